"""Machines that are not there, and the compilers for them.

The compilers of TPUs (libtpu) and GPUs (jax-cuda12-plugin) run on any Linux machine.
"""

import dataclasses
import importlib.util
import math
import re
from typing import Any

from t5x_lite import config as config_lib
from t5x_lite.hardware import CHIPS, Chip

# Platform -> (module, how to get it). CUDA itself is not needed to compile.
INSTALL = {
    "tpu": ("libtpu", "pip install -e '.[plan-tpu]', or 'jax[tpu]'"),
    "cuda": (
        "jax_cuda12_plugin",
        "pip install -e '.[plan-gpu]', or 'jax[cuda12-local]'",
    ),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Which devices, and how they are joined.

    Attributes:
        chip: their kind; None = virtual CPU devices.
        shape: of a TPU slice, in chips; (hosts, GPUs per host); (devices,) of a CPU.
        slices: how many TPU slices there are.
    """

    chip: Chip | None
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """'v5e:16x16', 'v5p:4x4x8*2' (two slices), 'h100:32x8', 'cpu:8'.

        Raises:
          ValueError: an unknown chip, or a shape it does not come in.
        """
        found = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)(?:\*(\d+))?", text)
        names = ["cpu", *CHIPS]
        if not found or found[1] not in names:
            hint = config_lib.nearest(text.partition(":")[0], names)
            raise ValueError(
                f"--topology={text!r} is none{hint} Write CHIP:SHAPE, CHIP:SHAPE*N or "
                "GPU:HOSTSxGPUS, such as v5e:16x16, v5p:4x4x8*2 or h100:32x8. "
                f"Known: {', '.join(names)}."
            )
        shape = tuple(int(n) for n in found[2].split("x"))
        chip, slices = CHIPS.get(found[1]), int(found[3] or 1)
        dims = 1 if chip is None else 2 if not chip.is_tpu else chip.links // 2
        if len(shape) != dims or 0 in shape or not slices:
            raise ValueError(
                f"--topology={text!r}: {found[1]} needs {dims} sizes of at least 1, as "
                f"in {found[1]}:{'x'.join(['8', '8', '8'][:dims])}."
            )
        if slices > 1 and not (chip and chip.is_tpu):
            raise ValueError(
                f"--topology={text!r}: only TPUs come in slices. Write HOSTSxGPUS."
            )
        return cls(chip, shape, slices)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        slices = f"*{self.slices}" if self.slices > 1 else ""
        return f"{self.chip.name if self.chip else 'cpu'}:{shape}{slices}"

    @property
    def platform(self) -> str:
        return "cpu" if self.chip is None else "tpu" if self.chip.is_tpu else "cuda"

    def environment(self) -> dict[str, str]:
        """Variables that must be set before jax is imported."""
        common = {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # cannot keep such programs
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        if self.platform == "cpu":
            return common | {"JAX_NUM_CPU_DEVICES": str(math.prod(self.shape))}
        if self.platform == "cuda":
            flags = {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}
            return common | flags | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        return common | {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }

    def check_installed(self):
        """Raises ValueError, naming what to install, if the compiler is missing."""
        if self.platform == "cpu":
            return
        module, how = INSTALL[self.platform]
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"--topology={self} needs the compiler in the package {module!r}, "
                f"which is not installed here: {how}."
            )

    def devices(self) -> list:
        """Descriptions of the devices; none of them exists (but for CPUs)."""
        import jax
        from jax.experimental import topologies

        if self.chip is None:
            return jax.devices("cpu")[: math.prod(self.shape)]
        if self.platform == "cuda":
            hosts, gpus = self.shape
            described = topologies.get_topology_desc(
                "", "cuda", target_config=GPU_TARGET[self.chip.name.split("-")[0]],
                topology=f"1x{hosts}x{gpus}",
            )  # fmt: skip
            return list(described.devices)
        more: dict[str, Any] = {}
        if self.slices > 1:
            more["num_slices"] = self.slices
        if self.chip.name == "v4":
            more["chip_config_name"] = "megacore"
        name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        try:
            return list(topologies.get_topology_desc(name, "tpu", **more).devices)
        except jax.errors.JaxRuntimeError as e:
            raise ValueError(
                f"--topology={self}: libtpu does not know such a slice ("
                f"{str(e).splitlines()[0][:200]}). Take one that is sold, such as "
                "v5e:16x16, v6e:2x4, v4:4x4x8 or v5p:8x8x4."
            ) from e


def _gpu_target(name, major, cores, fpus, shared, optin, l2, clock, memory, rate):
    """What XLA wants to know of a GPU (NVIDIA's tuning guides of the architecture)."""
    return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 memory_bandwidth: {rate} l2_cache_size: {l2} clock_rate_ghz: {clock}
 device_memory_size: {memory} shared_memory_per_block_optin: {optin}
 cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536
 registers_per_block_limit: 65536 }} platform_name: "CUDA"
 dnn_version_info {{ major: 9 minor: 8 }}
 runtime_version {{ major: 12 minor: 8 patch: 0 }} device_description_str: "{name}" """


_HOPPER = (9, 132, 128, 233_472, 232_448, 52_428_800, 1.98)
GPU_TARGET = {
    "a100": _gpu_target(
        *("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167_936, 166_912, 41_943_040, 1.41),
        *(85_899_345_920, 2_039_000_000_000),
    ),
    "h100": _gpu_target(
        "NVIDIA H100 80GB HBM3", *_HOPPER, 84_929_347_584, 3_352_320_000_000
    ),
    "h200": _gpu_target("NVIDIA H200", *_HOPPER, 141 * 10**9, 4_800_000_000_000),
    "b200": _gpu_target(
        *("NVIDIA B200", 10, 148, 128, 233_472, 232_448, 132_644_864, 1.965),
        *(180 * 10**9, 7_700_000_000_000),
    ),
}

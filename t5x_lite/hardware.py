"""What accelerators can do at most: the vendors' published figures, per device of JAX.

Where JAX counts a chip as two devices (TPU7x) a row is half a chip. Sources: [G] Google
Cloud TPU documentation, page of the version; [J] Jouppi et al. 2023, "TPU v4"; [N]
NVIDIA's data sheet of the product, dense rates (half of those "with sparsity"); [D]
NVIDIA's user guide of the DGX system with eight of them, one network card per GPU.
"""

import dataclasses
from typing import Any

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: as in `--topology=NAME:...`.
        kinds: `device_kind` strings of JAX.
        hbm_bytes: memory that a program can have. TPU: what the compiler reports as
            available, some 0.25 to 1.25 GiB less than the chip has.
        flops: bfloat16 matrix operations per second, dense.
        hbm_bandwidth: bytes per second.
        ici_bandwidth: bytes per second that one device can send over all its fast links
            (TPU: inter-chip links; GPU: NVLink), one direction.
        dcn_bandwidth: bytes per second, one direction, and device over the network
            between slices (TPU) or hosts (GPU).
        links: fast links per device, each way; 0 = a switch that connects all.
        per_host: devices of one host.
        torus: length from which a dimension of the slice wraps around (it must be a
            multiple of it too); 0 = no torus.
    """

    name: str
    kinds: tuple[str, ...]
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    links: int
    per_host: int
    torus: int = 0

    @property
    def is_tpu(self) -> bool:
        return self.links > 0


_TPU_2D: Any = dict(links=4, per_host=8, torus=16)
_TPU_3D: Any = dict(links=6, per_host=4, torus=4)
_GPU: Any = dict(links=0, per_host=8, torus=0)

_ROWS = (
    # [G] 275 TFLOPs, 32 GiB, 1200 GB/s. [J] six links of 50 GB/s each way. Between
    # slices: not published; taken as v5p's.
    Chip(
        name="v4",
        kinds=("TPU v4",),
        hbm_bytes=int(30.75 * _GIB),
        flops=275e12,
        hbm_bandwidth=1200e9,
        ici_bandwidth=300e9,
        dcn_bandwidth=6.25e9,
        **_TPU_3D,
    ),
    # [G] 197 TFLOPs, 16 GB, 819 GB/s, 400 GB/s both ways over four ports; between
    # pods of 256 chips 6.4 Tbit/s.
    Chip(
        name="v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        hbm_bytes=int(15.75 * _GIB),
        flops=197e12,
        hbm_bandwidth=819e9,
        ici_bandwidth=200e9,
        dcn_bandwidth=3.125e9,
        **_TPU_2D,
    ),
    # [G] 459 TFLOPs, 95 GiB, 2765 GB/s, 1200 GB/s both ways; 50 Gbit/s per chip
    # between slices.
    Chip(
        name="v5p",
        kinds=("TPU v5", "TPU v5p"),
        hbm_bytes=int(95.74 * _GIB),
        flops=459e12,
        hbm_bandwidth=2765e9,
        ici_bandwidth=600e9,
        dcn_bandwidth=6.25e9,
        **_TPU_3D,
    ),
    # [G] 918 TFLOPs, 32 GB, 1638 GB/s, 800 GB/s both ways over four ports; between
    # pods of 256 chips 25.6 Tbit/s.
    Chip(
        name="v6e",
        kinds=("TPU v6 lite", "TPU v6e"),
        hbm_bytes=int(31.25 * _GIB),
        flops=918e12,
        hbm_bandwidth=1638e9,
        ici_bandwidth=400e9,
        dcn_bandwidth=12.5e9,
        **_TPU_2D,
    ),
    # [G] a chip: 2307 TFLOPs, 192 GiB, 7380 GB/s, 1200 GB/s both ways; a device of
    # JAX is half of it. Between slices: not published; half of v6e's taken.
    Chip(
        name="tpu7x",
        kinds=("TPU7x", "TPU v7x"),
        hbm_bytes=int(94.75 * _GIB),
        flops=1153.5e12,
        hbm_bandwidth=3690e9,
        ici_bandwidth=300e9,
        dcn_bandwidth=6.25e9,
        **_TPU_3D | dict(per_host=8),
    ),
    # [N] SXM: 312 TFLOPS, 1555 and 2039 GB/s, NVLink 600 GB/s both ways. [D] 200
    # Gbit/s per GPU.
    Chip(
        name="a100-40",
        kinds=("NVIDIA A100-SXM4-40GB",),
        hbm_bytes=40 * _GIB,
        flops=312e12,
        hbm_bandwidth=1555e9,
        ici_bandwidth=300e9,
        dcn_bandwidth=25e9,
        **_GPU,
    ),
    Chip(
        name="a100",
        kinds=("NVIDIA A100-SXM4-80GB",),
        hbm_bytes=80 * _GIB,
        flops=312e12,
        hbm_bandwidth=2039e9,
        ici_bandwidth=300e9,
        dcn_bandwidth=25e9,
        **_GPU,
    ),
    # [N] SXM: 1979 TFLOPS with sparsity, 3.35 TB/s, NVLink 900 GB/s both ways. [D]
    # 400 Gbit/s per GPU. Memory: as the driver reports it.
    Chip(
        name="h100",
        kinds=("NVIDIA H100 80GB HBM3",),
        hbm_bytes=84_929_347_584,
        flops=989.5e12,
        hbm_bandwidth=3350e9,
        ici_bandwidth=450e9,
        dcn_bandwidth=50e9,
        **_GPU,
    ),
    # [N] 1979 TFLOPS with sparsity, 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways.
    Chip(
        name="h200",
        kinds=("NVIDIA H200",),
        hbm_bytes=141 * 10**9,
        flops=989.5e12,
        hbm_bandwidth=4800e9,
        ici_bandwidth=450e9,
        dcn_bandwidth=50e9,
        **_GPU,
    ),
    # [N] HGX: 4500 TFLOPS with sparsity, 180 GB, 7.7 TB/s, NVLink 1.8 TB/s both ways.
    Chip(
        name="b200",
        kinds=("NVIDIA B200",),
        hbm_bytes=180 * 10**9,
        flops=2250e12,
        hbm_bandwidth=7700e9,
        ici_bandwidth=900e9,
        dcn_bandwidth=50e9,
        **_GPU,
    ),
)
CHIPS = {chip.name: chip for chip in _ROWS}


def of_device(device: Any) -> Chip | None:
    """The row of a JAX device, by its `device_kind`; None for CPUs and unknown ones."""
    for chip in CHIPS.values():
        if device.device_kind in chip.kinds:
            return chip
    return None

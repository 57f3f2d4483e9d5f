"""What one step of a config costs on a machine, from the program compiled for it.

`python -m t5x_lite.estimate REQUEST RESULT` is how `plan` runs it: in a process of its
own, since the variables of a compiler must be set before jax starts, a compiler may
abort, and it talks.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from t5x_lite import config as config_lib
from t5x_lite.aot import Topology

UNITS = dict(B=1, K=2**10, M=2**20, G=2**30, T=2**40)


def estimate(cfg: config_lib.Config, topology: Topology) -> dict[str, Any]:
    """Compiles the train step of `cfg` for `topology`; needs none of its devices.

    Returns:
      JSON-able; bytes, FLOPs and seconds are of one step and, where the name does not
      say "model" or "parameters", of one device. `roofline` and `hbm` are missing for
      CPUs; `collectives` and all times where the program does not fit.

    Raises:
      ValueError, KeyError: the config cannot be used, on that machine or at all.
    """
    from t5x_lite import dry, metrics, state
    from t5x_lite import model as model_lib

    step = dry.Step.of(cfg, topology.devices())
    cfg, chip, devices = step.cfg, topology.chip, step.mesh.size
    model_flops = 3 * metrics.forward_flops(cfg.model, step.shapes)
    found: dict[str, Any] = dict(
        topology=str(topology),
        chip=chip.name if chip else "cpu",
        devices=devices,
        notes=step.notes,
        mesh=dict(step.mesh.shape),
        parameters=model_lib.parameter_count(step.model),
        vocab_size=cfg.model.vocab_size,
        examples=cfg.data.batch_size,
        microbatches=cfg.optim.microbatches,
        remat=cfg.model.remat,
        tokens=cfg.data.batch_size * sum(T for T, _, _ in step.shapes.values()),
        model_flops=model_flops * cfg.data.batch_size,
        state_bytes_all=state.size_bytes(step.state),
        memory=dict(
            state=dry.held(step.state) + dry.held(step.beside),
            batch=dry.held(step.batch),
        ),
    )
    memory = found["memory"]
    if chip:
        memory["hbm"] = chip.hbm_bytes
    began = time.perf_counter()
    lowered = step.lower(topology.platform)
    found["lower_seconds"] = time.perf_counter() - began
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except Exception as e:
        if "cuDNN not found" in str(e):
            raise ValueError(
                f"config.model.attention={cfg.model.attention!r} can be compiled only "
                "where cuDNN is. Plan with 'einsum'; its memory is more."
            ) from e
        needed = out_of_memory(str(e))
        if needed is None:
            raise
        memory |= dict(peak=needed[0], hbm=needed[1])
    else:
        _costs(found, compiled, step, topology)
    found["compile_seconds"] = time.perf_counter() - began
    if "hbm" in memory:
        memory["spare"] = memory["hbm"] - memory["peak"]
        memory["fits"] = memory["spare"] >= 0
    return found


def _costs(found: dict, compiled, step, topology: Topology):
    """Adds what the compiled program says."""
    from t5x_lite import collectives, hlo

    sizes = compiled.memory_analysis()
    found["memory"] |= dict(
        temporaries=sizes.temp_size_in_bytes,
        peak=peak(sizes),
        peak_in_use=sizes.peak_memory_in_bytes,
        host=sizes.host_argument_size_in_bytes + sizes.host_temp_size_in_bytes,
    )
    chip, devices = topology.chip, step.mesh.size
    module = hlo.Module(compiled.as_text())
    found["flops"], found["traffic"] = hlo.flops(module), hlo.traffic(module)
    rows, busy = collectives.summary(collectives.find(module, devices), step.mesh, chip)
    found["collectives"] = rows
    if chip is None:
        return
    compute = found["flops"] / chip.flops
    hbm, network = found["traffic"] / chip.hbm_bandwidth, max(busy.values(), default=0)
    at_peak = found["model_flops"] / (devices * chip.flops)
    best, serial = max(compute, hbm, network), max(compute, hbm) + network
    found["roofline"] = dict(
        compute=compute,
        hbm=hbm,
        network=network,
        links=busy,
        step=best,
        step_without_overlap=serial,
        mfu_ceiling=at_peak / best,
        mfu_without_overlap=at_peak / serial,
        bound=max((compute, "compute"), (hbm, "HBM"), (network, "network"))[1],
    )


def peak(sizes) -> int:
    """Bytes of a device that are reserved while a program runs.

    Args:
      sizes: its `memory_analysis()`. Temporaries are one block, code counts too.
    """
    return (
        sizes.generated_code_size_in_bytes
        + sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )


def out_of_memory(message: str) -> tuple[float, float] | None:
    """(bytes needed, bytes available) of a compiler's refusal."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    sizes = re.search(
        r"([\d.]+)([BKMGT])\) exceeds available HBM \(([\d.]+)([BKMGT])\)", message
    ) or re.search(
        r"Used ([\d.]+)([BKMGT]) of ([\d.]+)([BKMGT]) hbm", message, re.IGNORECASE
    )
    if not sizes:
        return None
    needed, n, available, a = sizes.groups()
    return float(needed) * UNITS[n], float(available) * UNITS[a]


class Job:
    """An estimate that runs in a process of its own."""

    def __init__(self, cfg: config_lib.Config, topology: Topology):
        topology.check_installed()
        self._folder = tempfile.TemporaryDirectory(prefix="t5x_lite_plan_")
        folder = pathlib.Path(self._folder.name)
        request, self._result = folder / "request.json", folder / "result.json"
        asked = dict(config=config_lib.to_json(cfg), topology=str(topology))
        request.write_text(json.dumps(asked | dict(parent=os.getpid())))
        self._log = (folder / "log").open("w+")
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "t5x_lite.estimate", request, self._result],
            env=environment | topology.environment(),
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def done(self) -> bool:
        return self._process.poll() is not None

    def stop(self):
        if not self.done():
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def result(self) -> dict[str, Any]:
        """What `estimate` returned.

        Raises:
          ValueError: it refused the config.
          RuntimeError: the compiler failed; with the end of what it said.
        """
        self._process.wait()
        if not self._result.exists():
            self._log.seek(0)
            said = self._log.read()[-4000:]
            raise RuntimeError(
                f"the compiler ended with code {self._process.returncode}:\n{said}"
            )
        found = json.loads(self._result.read_text())
        if "error" in found:
            raise ValueError(found["error"])
        return found


def _end_with(parent: int):
    """Ends this process when its parent is gone, in the midst of compiling too."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str] | None = None):
    from t5x_lite import cli

    request, result = sys.argv[1:] if argv is None else argv
    asked = json.loads(pathlib.Path(request).read_text())
    _end_with(asked["parent"])
    topology = Topology.parse(asked["topology"])
    try:
        found = estimate(config_lib.freeze(asked["config"]), topology)
    except (ValueError, KeyError, OSError) as e:
        found = dict(error=cli.message_of(e))
    pathlib.Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

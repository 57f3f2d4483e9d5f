"""Start-up of the demo, phase by phase, without and with the compilation cache.

python -m tests.bench.startup
"""

import re
import subprocess
import sys
import tempfile


def start(directory: str, name: str) -> dict[str, float]:
    """Seconds of each phase of one short run in a process of its own."""
    out = subprocess.run(
        [
            *(sys.executable, "-m", "t5x_lite.train", "--config=configs/demo.py"),
            f"--workdir={directory}/{name}",
            f"--config.data.cache_dir={directory}/stores",
            f"--config.compile_cache={directory}/compiled",
            *("--config.steps=2", "--config.optim.warmup_steps=1"),
            "--config.eval_batches=1",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    line = out[out.index("start-up:") :].splitlines()[0]
    found = re.findall(r"([a-z][a-z ]*) ([\d.]+) s", line)
    return {phase: float(seconds) for phase, seconds in found}


def main():
    with tempfile.TemporaryDirectory() as directory:
        first, second = start(directory, "first"), start(directory, "second")
    print(f"{'start-up of the demo':20} {'first':>8} {'second':>8}  seconds")
    for phase in first:
        print(f"{phase:20} {first[phase]:8.2f} {second[phase]:8.2f}")
    total, again = sum(first.values()), sum(second.values())
    print(f"{'total':20} {total:8.2f} {again:8.2f}  second / first {again / total:.2f}")


if __name__ == "__main__":
    main()

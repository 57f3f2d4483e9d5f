"""Start-up of the demo, phase by phase, without and with the compilation cache.

python -m tests.bench.startup --rounds=3

The total is the wall time from starting the process to the end of its first step, so it
holds what no phase of the log does (the interpreter, say).
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time


def start(directory: str, name: str) -> dict[str, float]:
    """Seconds of each phase of one short run in a process of its own, and in total."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "t5x_lite.train", "--config=configs/demo.py"),
            f"--workdir={directory}/{name}",
            f"--config.data.cache_dir={directory}/stores",
            f"--config.compile_cache={directory}/compiled",
            *("--config.steps=2", "--config.optim.warmup_steps=1"),
            "--config.eval_batches=1",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("start-up:"):
            total = time.perf_counter() - began
            break
    else:
        raise RuntimeError(process.communicate()[1])
    process.communicate()
    found = re.findall(r"([a-z][a-z ]*) ([\d.]+) s", line)
    phases = {phase: float(seconds) for phase, seconds in found}
    phases["anything else"] = total - sum(phases.values())
    return phases | {"total": total}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    rounds = []
    for _ in range(parser.parse_args().rounds):
        with tempfile.TemporaryDirectory() as directory:
            rounds.append((start(directory, "first"), start(directory, "second")))
        first, second = (each["total"] for each in rounds[-1])
        print(f"first {first:.2f} s, second {second:.2f} s", flush=True)
    print(f"{'start-up of the demo':20} {'first':>8} {'second':>8}  seconds, medians")
    for phase in rounds[0][0]:
        both = [statistics.median(each[i][phase] for each in rounds) for i in (0, 1)]
        print(f"{phase:20} {both[0]:8.2f} {both[1]:8.2f}")
    ratio = statistics.median(b["total"] / a["total"] for a, b in rounds)
    print(f"second / first {ratio:.2f}")


if __name__ == "__main__":
    main()

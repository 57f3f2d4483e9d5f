"""Compare the checkpoints of a run with what was saved: no byte may have changed.

    python -m t5x_lite.verify --workdir=runs/demo
    python -m t5x_lite.verify --workdir=runs/demo --step=200

Reads every array and compares it with its checksum, on the CPU, one piece of the files
after the other; names what is damaged, and exits with 1 then. Checkpoints that were
saved before there were checksums are read, and that is said.
"""

import pathlib

import tqdm

from t5x_lite import cli, integrity, retention


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of a training run")
    parser.add_argument("--step", type=int, default=-1, help="checkpoint; -1 = all")
    flags = parser.parse_args(argv)
    directory = pathlib.Path(flags.workdir).absolute() / "checkpoints"
    steps = retention.steps(directory)
    if flags.step != -1 and flags.step not in steps:
        raise ValueError(
            f"--step={flags.step} is not in {directory}: it has "
            f"{steps or 'no checkpoints'}. Use one of them, or -1 for all."
        )
    if not steps:
        raise FileNotFoundError(
            f"--workdir={flags.workdir} has no checkpoint. Give the --workdir of a "
            "training run."
        )
    if flags.step != -1:
        steps = [flags.step]
    found = {}
    total = sum(integrity.size_of(directory / str(step)) for step in steps)
    with tqdm.tqdm(
        total=total, unit="B", unit_scale=True, disable=None, leave=False
    ) as bar:
        for step in steps:
            bar.set_description(f"checkpoint {step}")
            found[step] = integrity.inspect(directory / str(step), bar.update)
    print(f"{'step':>10}  {'arrays':>6}  {'MiB':>10}  result")
    for step, each in found.items():
        result = (
            "good" if each.summed else "can be read; it was saved without checksums"
        )
        if each.problems:
            result = f"DAMAGED, {len(each.problems)} problems"
        print(f"{step:>10}  {each.arrays:>6}  {each.size / 2**20:>10,.1f}  {result}")
        for problem in each.problems[:20]:
            print(f"{'':>12}{problem}")
        if len(each.problems) > 20:
            print(f"{'':>12}and {len(each.problems) - 20} more")
    return int(any(each.problems for each in found.values()))


if __name__ == "__main__":
    cli.run(main)

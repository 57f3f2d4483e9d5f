"""Scaling studies: from a grid of configs to figures.

    python -m t5x_lite.study plan --config=configs/studies/depth_width/config.py
    python -m t5x_lite.study run  --config=configs/studies/depth_width/config.py
    python -m t5x_lite.study run  --config=... --launcher=slurm
    python -m t5x_lite.study fit | report | coordcheck --help

`plan` counts cells, parameters and FLOPs in seconds, without an accelerator. `run`
trains each cell of the grid, seed by seed, and goes on where it was stopped; its
results.jsonl has one line for each finished cell. Each command has its own --help.
"""

import importlib
import sys

from t5x_lite import cli

COMMANDS = {
    "plan": ("plan.main", "cells, parameters, FLOPs and hours of a study"),
    "run": ("run.main", "train the cells, here or on a cluster, or go on"),
    "fit": ("commands_fit.fit", "scaling laws of finished cells"),
    "report": ("commands_fit.report", "one HTML page and figures of finished cells"),
    "coordcheck": ("coordcheck.main", "do activations keep their size as width grows?"),
}


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\ncommands:")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:11} {what}")
        return None
    name, *rest = argv
    if name not in COMMANDS:
        raise ValueError(
            f"study has no command {name!r}. Commands: {', '.join(COMMANDS)}."
        )
    # What --help of the command calls itself.
    sys.argv[0] = f"t5x-lite study {name}"
    module, _, function = COMMANDS[name][0].partition(".")
    command = importlib.import_module(f"t5x_lite.studies.{module}")
    return getattr(command, function)(rest)


if __name__ == "__main__":
    cli.run(main)

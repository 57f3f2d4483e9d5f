"""Trains the cells of a study; run again, it goes on with what is not finished.

    python -m t5x_lite.study run --config=configs/studies/depth_width/config.py
    python -m t5x_lite.study run --config=... --only=decoder --seeds=0
    python -m t5x_lite.study run --config=... --launcher=slurm --sbatch='--time=1:00'
    python -m t5x_lite.study run --config=... --launcher=jobset --image=IMAGE

Here, the cells run one after the other, with one compilation cache; SIGTERM and Ctrl-C
save and end, the same command goes on. `--launcher=slurm` submits launch/study.sbatch
as an array, a task for each cell that is not finished; `--launcher=jobset` writes
ROOT/study.yaml for `kubectl apply`. `--launcher=watch` shows how far the cells are that
run elsewhere. All tasks need the same --root on a shared file system, which gets
results.jsonl, a line for each finished cell, and cells/.
"""

import pathlib
import shlex
import shutil
import subprocess
import time

from t5x_lite import cli
from t5x_lite.studies import grid, launchers, runner
from t5x_lite.studies.plan import default_root
from t5x_lite.studies.progress import Progress

LAUNCHERS = ("here", "slurm", "jobset", "watch")


def main(argv: list[str] | None = None) -> int | None:
    parser = cli.parser(__doc__)
    parser.add_argument("--config", required=True, help="Python file with get_study()")
    parser.add_argument("--root", help="of results and runs; default runs/studies/NAME")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--seeds", default="", help="of these seeds only: 0,1")
    parser.add_argument("--cell", type=int, help="only the i-th of all cells, from 0")
    parser.add_argument("--launcher", default="here", choices=LAUNCHERS)
    parser.add_argument("--sbatch", default="", help="further flags of sbatch")
    parser.add_argument("--dry_run", action="store_true", help="print, do not submit")
    parser.add_argument("--image", default="IMAGE", help="container image of a JobSet")
    flags = parser.parse_args(argv)
    study = grid.load(flags.config)
    cells = grid.cells(study)
    root = pathlib.Path(flags.root or default_root(study))
    wanted = choose(cells, flags)
    grid.check(wanted)
    todo = [cell for cell in wanted if runner.result(root, cell) is None]
    print(f"{study.name}: {len(wanted)} cells, {len(todo)} to do; {root}", flush=True)
    if flags.launcher == "watch":
        return watch(root, cells, wanted)
    if not todo:
        print(f"results  {runner.gather(root, cells)}")
        return None
    if flags.launcher == "here":
        left = runner.run_all(root, cells, wanted)
        print(f"results  {root / 'results.jsonl'}")
        if left:
            print("not finished:\n  " + "\n  ".join(left))
        return 1 if left else None
    indices = [i for i, cell in enumerate(cells) if cell in todo]
    if flags.launcher == "jobset":
        path = root / "study.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            launchers.jobset(study.name, flags.config, root, indices, flags.image)
        )
        print(f"kubectl apply -f {path}")
        return None
    command = launchers.sbatch(
        study.name, flags.config, root, indices, shlex.split(flags.sbatch)
    )
    print(shlex.join(command))
    if flags.dry_run:
        return None
    if shutil.which("sbatch") is None:
        raise ValueError(
            "--launcher=slurm: there is no sbatch here. Run this where jobs are "
            "submitted, or add --dry_run to see the command."
        )
    return subprocess.run(command, check=False).returncode


def choose(cells: list[grid.Cell], flags) -> list[grid.Cell]:
    """The cells that --cell, --only and --seeds leave."""
    if flags.cell is not None:
        if not 0 <= flags.cell < len(cells):
            raise ValueError(
                f"--cell={flags.cell}: the study has {len(cells)} cells. Give 0 to "
                f"{len(cells) - 1}."
            )
        return [cells[flags.cell]]
    seeds = {cell.seed for cell in cells}
    if flags.seeds:
        try:
            asked = {int(s) for s in flags.seeds.split(",")}
        except ValueError as error:
            raise ValueError(
                f"--seeds={flags.seeds}: numbers with commas are needed, as in 0,1."
            ) from error
        if not asked <= seeds:
            raise ValueError(
                f"--seeds={flags.seeds}: the study has {sorted(seeds)}. Give some of "
                "these."
            )
        seeds = asked
    found = [c for c in cells if c.seed in seeds and flags.only in c.name]
    if not found:
        names = ", ".join(dict.fromkeys(cell.name for cell in cells))
        raise ValueError(f"--only={flags.only} leaves no cell. Cells: {names}.")
    return found


def watch(root, cells: list[grid.Cell], wanted: list[grid.Cell]):
    """The progress bar until all wanted cells are finished, wherever they run."""
    with Progress(root, wanted) as progress:
        while len(progress.finished) < len(wanted):
            time.sleep(1.0)
    print(f"results  {runner.gather(root, cells)}")

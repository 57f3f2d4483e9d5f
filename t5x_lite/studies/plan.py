"""What a study will cost: cells, parameters, FLOPs, hours. Nothing is traced.

    python -m t5x_lite.study plan --config=configs/studies/depth_width/config.py
    python -m t5x_lite.study plan --config=... --flops_per_second=4e14 --json=plan.json

The hours are the FLOPs over --flops_per_second; without it, over what the study's
finished cells have reached, start-up included, else over 2e10 for each CPU core.
"""

import json
import pathlib

from t5x_lite import cli
from t5x_lite.studies import grid, runner
from t5x_lite.studies.ladders import short

PER_CORE = 2e10  # float32 FLOP/s that small models reach on a core


def main(argv: list[str] | None = None):
    parser = cli.parser(__doc__)
    parser.add_argument("--config", required=True, help="Python file with get_study()")
    parser.add_argument("--root", help="where the runs are; default runs/studies/NAME")
    parser.add_argument("--flops_per_second", type=float, help="speed for the estimate")
    parser.add_argument("--json", help="also write the plan to this file")
    parser.add_argument("--limit", type=int, default=40, help="rows shown; 0 = all")
    flags = parser.parse_args(argv)
    if flags.limit < 0:
        raise ValueError(f"--limit={flags.limit}: give 0 (all rows) or more.")
    study = grid.load(flags.config)
    cells = grid.cells(study)
    root = flags.root or default_root(study)
    if flags.flops_per_second is not None and flags.flops_per_second <= 0:
        raise ValueError(
            f"--flops_per_second={flags.flops_per_second} must be above 0: 4e14, say."
        )
    plan = make(study, cells, root, flags.flops_per_second)
    print("\n".join(table(plan, flags.limit)))
    if flags.json:
        pathlib.Path(flags.json).write_text(json.dumps(plan, indent=2) + "\n")


def default_root(study: grid.Study) -> pathlib.Path:
    return pathlib.Path("runs/studies") / study.name


def make(study: grid.Study, cells: list[grid.Cell], root, speed: float | None) -> dict:
    """The plan as plain numbers.

    Args:
      speed: FLOP/s; None = measured, else guessed.
    """
    rows = []
    for cell in cells:
        cost = grid.cost(cell)
        rows.append(
            dict(
                cell=cell.name,
                seed=cell.seed,
                **cost.parameters,
                steps=cost.steps,
                tokens=cost.tokens,
                training_flops=cost.training_flops,
                adaptation_flops=grid.adaptation_flops(cell),
            )
        )
    done = [runner.result(root, cell) for cell in cells]
    finished = [row for row in done if row is not None]
    source = "given"
    if speed is None:
        speed, source = PER_CORE * runner.cores(), "a guess for these CPU cores"
        seconds = sum(row["wall_seconds"] for row in finished)
        if seconds:
            spent = sum(all_flops(row) for row in finished)
            speed, source = spent / seconds, "reached by the finished cells"
    left = [row for row, is_done in zip(rows, done, strict=True) if is_done is None]
    return dict(
        study=study.name,
        cells=len(rows),
        finished=len(finished),
        training_flops=sum(all_flops(row) for row in rows),
        left_flops=sum(all_flops(row) for row in left),
        flops_per_second=speed,
        speed_is=source,
        left_hours=sum(all_flops(row) for row in left) / speed / 3600,
        rows=rows,
    )


def all_flops(row: dict) -> float:
    """Of a cell's run and its adaptations."""
    return row["training_flops"] + row["adaptation_flops"]


def table(plan: dict, limit: int) -> list[str]:
    """Lines of text: a row for each cell, seeds together, and the sums."""
    seeds: dict[str, list[dict]] = {}
    for row in plan["rows"]:
        seeds.setdefault(row["cell"], []).append(row)
    width = max(4, *map(len, seeds))
    lines = [
        f"{'cell':{width}}  seeds  parameters  non-embedding    steps   tokens"
        "     FLOPs"
    ]
    shown = list(seeds.items())[: limit or None]
    for name, rows in shown:
        one = rows[0]
        lines.append(
            f"{name:{width}}  {len(rows):5}  {short(one['total']):>10}  "
            f"{short(one['non_embedding']):>13}  {one['steps']:7,}  "
            f"{short(one['tokens']):>7}  {one['training_flops']:8.2e}"
        )
    if len(shown) < len(seeds):
        lines.append(f"... and {len(seeds) - len(shown)} more (--limit=0 shows all)")
    lines += [
        "",
        f"cells       {plan['cells']} in all, {plan['finished']} finished",
        f"FLOPs       {plan['training_flops']:.3e} in all, {plan['left_flops']:.3e} to "
        "do, adaptations included",
        f"time to go  {duration(plan['left_hours'])} at "
        f"{plan['flops_per_second']:.2e} FLOP/s, {plan['speed_is']}",
    ]
    return lines


def duration(hours: float) -> str:
    """'3.2 minutes', '5.1 hours'"""
    if hours < 2:
        return f"{60 * hours:,.1f} minutes"
    return f"{hours:,.1f} hours"

"""The study's figure and tables from results.jsonl and baseline.json beside it.

python -m configs.studies.real_tasks.figure
"""

import collections
import json
import pathlib

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from configs.studies.real_tasks import stages

HERE = pathlib.Path(__file__).parent


def scores() -> dict[tuple[str, str, str], list[float]]:
    """(task, structure, start) -> the score of each seed, in percent."""
    found = collections.defaultdict(list)
    for line in (HERE / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        share = stages.TASKS[row["task"]].score in ("accuracy", "tag_accuracy")
        key = (row["task"], row["structure"], row["start"])
        found[key].append(row["score"] * (100 if share else 1))
    return found


def interval(values: list[float]) -> float:
    """Half of the 95 % interval of the mean (Student's t); 0 of a single value."""
    n = len(values)
    if n < 2:
        return 0.0
    return float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))


def draw(found, baseline: dict[str, float]) -> Figure:
    tasks = [t for t in stages.TASKS if any(key[0] == t for key in found)]
    figure = Figure(figsize=(11, 2.8 * -(-len(tasks) // 3)), layout="constrained")
    grid = figure.subplots(-(-len(tasks) // 3), 3, squeeze=False)
    for cell, task in zip(grid.flat, tasks, strict=False):
        for shift, structure in enumerate(stages.STRUCTURES):
            at, means, widths = [], [], []
            for place, start in enumerate(stages.STARTS):
                if values := found.get((task, structure, start)):
                    at.append(place + 0.08 * (shift - 1.5))
                    means.append(np.mean(values))
                    widths.append(interval(values))
            if at:
                cell.errorbar(at, means, widths, fmt="o-", ms=4, capsize=2,
                              label=structure, color=f"C{shift}")  # fmt: skip
        if task in baseline:
            cell.axhline(100 * baseline[task], color="grey", linestyle="--")
        cell.set_xticks(range(len(stages.STARTS)), stages.STARTS)
        cell.set_title(f"{task}: {stages.TASKS[task].score}", fontsize=9)
        cell.grid(alpha=0.3)
    for cell in list(grid.flat)[len(tasks) :]:
        cell.set_axis_off()
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=4)  # fmt: skip
    return figure


def table(found, baseline: dict[str, float]) -> str:
    """Mean ± standard deviation over the seeds, in Markdown."""
    lines = ["| task | structure | " + " | ".join(stages.STARTS) + " |"]
    lines.append("| --- " * (2 + len(stages.STARTS)) + "|")
    for task in stages.TASKS:
        for structure in stages.STRUCTURES:
            cells = []
            for start in stages.STARTS:
                values = found.get((task, structure, start), [])
                spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.1f}{spread}" if values else "–")
            if any(cell != "–" for cell in cells):
                name = f"{task} ({stages.TASKS[task].score})"
                lines.append(f"| {name} | {structure} | {' | '.join(cells)} |")
        if task in baseline:
            score = f"{100 * baseline[task]:.1f}"
            lines.append(f"| {task} | TF-IDF, logistic regression | {score} | | | |")
    return "\n".join(lines) + "\n"


def forgetting() -> str:
    """Held-out loss of the stages before, before and after fine-tuning (seed 0)."""
    rows = collections.defaultdict(list)
    for line in (HERE / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        for each in row.get("forgetting", ()):
            if "after" in each:
                stage = each["workdir"].split("/")[0]
                key = (row["structure"], stage, row["start"])
                rows[key].append(each["after"] - each["before"])
    lines = ["| structure | loss of the stage | run started from | nats more | tasks |"]
    lines.append("| --- " * 5 + "|")
    for (structure, stage, start), values in rows.items():
        more = f"{np.mean(values):.3f}"
        lines.append(f"| {structure} | {stage} | {start} | {more} | {len(values)} |")
    return "\n".join(lines) + "\n"


def main():
    path = HERE / "baseline.json"
    baseline = json.loads(path.read_text()) if path.exists() else {}
    found = scores()
    draw(found, baseline).savefig(HERE / "figure.png", dpi=110)
    (HERE / "table.md").write_text(table(found, baseline) + "\n" + forgetting())
    print(table(found, baseline))


if __name__ == "__main__":
    main()

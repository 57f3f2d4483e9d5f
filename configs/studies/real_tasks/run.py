"""Runs the study, or goes on with it: every stage of every task, seed after seed.

    python -m configs.studies.real_tasks.prepare --data=DATA --output=ROOT/text
    python -m configs.studies.real_tasks.run --data=DATA --root=ROOT [--seeds=0]

Results go to ROOT/results.jsonl, a line for each fine-tuned run; what stands there is
not run again. Several of these commands may run at once with different --structures,
--tasks, --starts or --seeds.
"""

import argparse
import fcntl
import json
import pathlib
import shutil
import time

from tqdm import tqdm

from configs.studies.real_tasks import stages
from t5x_lite import config, evaluate, report
from t5x_lite.studies import runner

MOST = 100  # examples of the test split that are written out, of text tasks


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--root", type=pathlib.Path, required=True)
    parser.add_argument("--structures", default=",".join(stages.STRUCTURES))
    parser.add_argument("--tasks", default=",".join(stages.TASKS))
    parser.add_argument("--starts", default=",".join(stages.STARTS))
    parser.add_argument("--seeds", default="0,1,2")
    flags = parser.parse_args()
    root = flags.root.absolute()
    cells = [
        (seed, name, structure, start)
        for seed in map(int, flags.seeds.split(","))
        for name in flags.tasks.split(",")
        for structure in flags.structures.split(",")
        for start in flags.starts.split(",")
        if (stages.TASKS[name].head or structure != "encoder")
        and (start != "domain" or stages.TASKS[name].domain)
    ]
    for cell in tqdm(cells, unit="run"):
        if cell not in done(root):
            run(root, str(flags.data / "tasks"), *cell)


def done(root: pathlib.Path) -> set[tuple]:
    path = root / "results.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {(r["seed"], r["task"], r["structure"], r["start"]) for r in rows}


def run(root: pathlib.Path, data: str, seed: int, name: str, structure: str, start):
    """Fine-tunes one run, from the stage that it starts from, and notes its scores."""
    before = "" if start == "scratch" else str(stage(root, name, structure, start))
    cfg = config.freeze(stages.tuned(structure, name, seed, before, root, data))
    workdir = root / "runs" / f"{name}-{structure}-{start}-s{seed}"
    began = time.perf_counter()
    with runner.log_to(root / "logs" / f"{workdir.name}.txt"):
        heldout = runner.trained(cfg, workdir)
        scores = tested(workdir, name)
    row = dict(task=name, structure=structure, start=start, seed=seed)
    row |= {"score": scores[stages.TASKS[name].score], "test": scores}
    row |= {"heldout": heldout, "seconds": round(time.perf_counter() - began, 1)}
    row["revision"] = report.git_revision()
    path = workdir / "forgetting.json"
    if path.exists():
        row["forgetting"] = json.loads(path.read_text())["ancestors"]
        for each in row["forgetting"]:
            each["workdir"] = str(pathlib.Path(each["workdir"]).relative_to(root))
            each.pop("metrics", None)
    with (root / "results.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")
    shutil.rmtree(workdir / "checkpoints")


def tested(workdir: pathlib.Path, name: str) -> dict[str, float]:
    """Scores on the task's test split."""
    most = 0 if stages.TASKS[name].head else MOST
    asked = [f"--tasks={name}", "--split=test", f"--limit={most}"]
    (found,) = evaluate.evaluate([f"--workdir={workdir}", *asked])
    return {k: v for k, v in found.items() if isinstance(v, float | int)}


def stage(root: pathlib.Path, name: str, structure: str, start: str) -> pathlib.Path:
    """The finished workdir of a stage on text, trained first where it is not."""
    general = root / "general" / structure
    made(root, structure, "general", stages.GENERAL, "", general)
    if start == "general":
        return general
    before, domain = general, stages.TASKS[name].domain
    if domain:
        before = root / "domain" / f"{structure}-{domain}"
        made(root, structure, domain, stages.DOMAIN, str(general), before)
    if start == "domain":
        return before
    last = root / "task" / f"{structure}-{name}"
    made(root, structure, name, stages.TASK, str(before), last)
    return last


def made(root, structure: str, text: str, steps: int, before: str, workdir):
    """Trains a stage, unless it is finished; others that need it wait."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{workdir}.wait", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cfg = config.freeze(stages.pretrained(structure, text, steps, before, root))
        with runner.log_to(root / "logs" / f"{text}-{structure}.txt"):
            runner.trained(cfg, workdir)


if __name__ == "__main__":
    main()

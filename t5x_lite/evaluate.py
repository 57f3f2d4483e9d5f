"""Evaluate checkpoints: held-out loss, labelled tasks, prompts, minimal pairs.

    python -m t5x_lite.evaluate --workdir=runs/demo
    python -m t5x_lite.evaluate --workdir=runs/demo --step=200 --data=my/text.jsonl
    python -m t5x_lite.evaluate --workdir=runs/sst2 --checkpoints=all --split=test
    python -m t5x_lite.evaluate --workdir=runs/gpt --tasks=boolq,copa --shots=4 \\
        --task_dir=SuperGLUE
    python -m t5x_lite.evaluate --workdir=runs/bert --blimp=FOLDER

A run that was trained on labelled tasks answers these (or --tasks, if it reads and
writes text): by its head, or in writing. Any other run is asked --tasks by prompts: the
answer that it finds likeliest counts. --blimp compares the two sentences of each pair
of FOLDER/blimp.jsonl.xz. --as=WORKDIR gives the held-out loss of an earlier stage's
data and objective with this run's parameters.

The held-out loss stands beside that of the unigram baseline. Results go to
WORKDIR/evaluation-STEP*.json, what was answered to a .jsonl beside it; what is there
already is not computed again without --again. Several processes (see
t5x_lite/distributed.py) evaluate together a model that fits no single device.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from t5x_lite import (
    checkpoint,
    cli,
    compatible,
    distributed,
    evaluate_tasks,
    evaluations,
    heads,
    prompting,
    retention,
    run,
    sharding,
    step,
)
from t5x_lite.data import mixture
from t5x_lite.data.batches import AnyBatches
from t5x_lite.data.task_batches import HeadExamples, TaskBatches


def main(argv: list[str] | None = None):
    evaluate(argv)


def evaluate(argv: list[str] | None = None) -> list[dict]:
    """The command; returns the results, one for each checkpoint and what was asked."""
    parser = cli.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of a training run")
    parser.add_argument("--step", type=int, default=-1, help="checkpoint; -1 = latest")
    parser.add_argument(
        "--checkpoints", choices=("latest", "best", "all"), help="instead of --step"
    )
    parser.add_argument("--data", help="held-out text, instead of the run's own")
    parser.add_argument("--tasks", default="", help="a,b: tasks, instead of its own")
    parser.add_argument("--task_dir", help="folder of their files")
    parser.add_argument("--split", default="dev", choices=("dev", "test", "train"))
    parser.add_argument(
        "--limit", type=int, default=0, help="examples of a task; 0 = all"
    )
    parser.add_argument("--beams", type=int, default=1, help="of what is written")
    parser.add_argument(
        "--max_length", type=int, default=0, help="tokens written; 0 = the run's own"
    )
    parser.add_argument("--shots", type=int, default=0, help="examples in a prompt")
    parser.add_argument(
        "--norm", default="sum", choices=prompting.NORMS, help="of an answer's score"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the examples shown")
    parser.add_argument("--blimp", help="folder of blimp.jsonl.xz")
    parser.add_argument("--as", dest="ancestor", help="workdir of an earlier stage")
    parser.add_argument("--again", action="store_true", help="also what is done")
    flags = parser.parse_args(argv)
    if flags.checkpoints and flags.step >= 0:
        raise ValueError("--step and --checkpoints: give one of them.")
    for name, low in (("limit", 0), ("max_length", 0), ("beams", 1)):
        if getattr(flags, name) < low:
            raise ValueError(f"--{name}={getattr(flags, name)} must be at least {low}.")
    prompting.Shots(flags.shots, flags.seed, flags.norm)
    if flags.ancestor:
        from t5x_lite import stages  # which evaluates, too

        found = stages.evaluate_as(flags.workdir, flags.ancestor, flags.step)
        print(json.dumps(found))
        return [found]
    with distributed.join(lambda: distributed.identity(flags=vars(flags))) as peers:
        steps = checkpoint_steps(flags.workdir, flags.step, flags.checkpoints)
        peers.check_same({"checkpoints": steps})
        peers.show()
        cfg, _, meta = checkpoint.read_run(flags.workdir, steps[-1])
        # Alone one device is enough; several processes share the run's own layout.
        if peers.count > 1:
            mesh = dataclasses.replace(cfg.sharding, data=-1)
            cfg = dataclasses.replace(cfg, sharding=mesh)
        else:
            cfg = run.alone(cfg)
        if flags.data:
            data = mixture.with_heldout(cfg.data, flags.data)
            cfg = dataclasses.replace(cfg, data=data)
        if flags.task_dir:
            data = dataclasses.replace(cfg.data, task_dir=flags.task_dir)
            cfg = dataclasses.replace(cfg, data=data)
        setup = run.Setup.of(cfg, jax.devices()[:1] if peers.count == 1 else None)
        compatible.check_vocab(meta, setup.vocab)
        jobs = _jobs(setup, flags)
        results = []
        with sharding.use(setup.mesh, setup.cfg.sharding.rules):
            for at in steps:
                results += _evaluate(setup, jobs, flags, at, peers)
        if peers.lead and any("task" in found for found in results):
            print("\n".join(evaluations.table(results)))
        return results


def checkpoint_steps(workdir, step: int, which: str | None) -> list[int]:
    """The steps to evaluate: one, or those of "latest", "best" or "all"."""
    if not which or which == "latest":
        return [checkpoint.read_run(workdir, step)[1]]
    cfg, _, _ = checkpoint.read_run(workdir)
    directory = pathlib.Path(workdir).absolute() / "checkpoints"
    if which == "all":
        return retention.steps(directory)
    best = retention.Retention(cfg.checkpoint, directory).best()
    if best is None:
        raise ValueError(
            f"--checkpoints=best: no checkpoint of {workdir} has a held-out metric "
            "(config.eval_every). Use latest or all."
        )
    return [best]


def _jobs(setup: run.Setup, flags) -> list[evaluations.Job]:
    """What is asked for; the held-out loss unless it is something else."""
    cfg = setup.cfg
    asked = evaluations.Asked(
        tuple(name for name in flags.tasks.split(",") if name),
        *(flags.split, flags.limit, flags.beams, flags.max_length),
        *(flags.shots, flags.norm, flags.seed),
    )
    texts = [s.spec for s in mixture.sources_of(cfg, "heldout")]
    about = {"data": ", ".join([*texts, *map(str, cfg.data.tasks)])}
    if flags.blimp:
        return [evaluations.of_pairs(flags.blimp, flags.limit)]
    tasks = evaluations.of_tasks(setup, asked)
    if flags.tasks:
        return tasks
    return [evaluations.Job("", about, _heldout_job, together=True), *tasks]


def _heldout_job(setup: run.Setup, params: dict) -> evaluations.Result:
    eval_step = jax.jit(step.make_eval_step(setup.model, setup.cfg, setup.vocab.size))
    found = heldout(setup, eval_step, params)
    found |= evaluations.bits_per_byte(setup, found)
    return found | {"unigram_loss": setup.unigram_loss()}, []


def _evaluate(setup, jobs: list[evaluations.Job], flags, at: int, peers) -> list[dict]:
    """The results of one checkpoint, of which only what is new is computed."""
    done = [None if flags.again else job.done(flags.workdir, at) for job in jobs]
    done = peers.from_lead(f"done {at}", lambda: done)
    if all(done):
        setup.say(f"step {at}: done before (--again computes it again)")
    else:
        abstract = setup.abstract_state["params"]
        params = checkpoint.load_params(flags.workdir, at, abstract)
        for i, job in enumerate(jobs):
            if done[i]:
                continue
            result = None
            if job.together:
                result = job.compute(setup, params)
            else:
                with on_lead(setup, params) as whole:
                    if whole is not None:
                        result = job.compute(setup, whole)
            if peers.lead and result is not None:
                done[i] = job.write(flags.workdir, at, result)
    for found in filter(None, done):
        setup.say(json.dumps(found))
    return [*filter(None, done)]


def heldout(setup: run.Setup, eval_step, params) -> dict:
    """Loss, accuracy and perplexity of the held-out sets, per target token.

    Of several sets the means weighted by their shares of the run, the sums of what is
    counted, and all of each one under KEY/NAME.
    """
    each = {
        name: _heldout(setup, batches, eval_step, params)
        for name, batches in setup.heldouts.items()
    }
    if len(each) == 1:
        return next(iter(each.values()))
    shares, found = setup.heldout_shares, {}
    for key in next(iter(each.values())):
        values = {name: of.get(key, 0.0) for name, of in each.items()}
        if key.endswith(("_tokens", "_examples")):
            found[key] = sum(values.values())
        else:
            found[key] = sum(shares[name] * value for name, value in values.items())
    if "heldout_perplexity" in found:
        found["heldout_perplexity"] = math.exp(min(found[checkpoint.METRIC], 700.0))
    return found | {
        f"{key}/{name}": value for name, of in each.items() for key, value in of.items()
    }


def _heldout(setup: run.Setup, batches: AnyBatches, eval_step, params) -> dict:
    """Of one held-out set."""
    totals: dict[str, np.ndarray] = {}
    steps = setup.heldout_steps(batches)
    for i in tqdm.tqdm(
        steps, "held-out", leave=False, disable=not setup.lead, delay=1.0
    ):
        sums = eval_step(params, setup.to_device(batches[i]))
        for name, each in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0.0) + np.asarray(each, np.float64)
    main = heads.main(setup.cfg.model)
    _, nll, z, correct, weight = totals[main]
    loss = float(nll / weight)
    found: dict[str, float] = {checkpoint.METRIC: loss}
    if not heads.is_number(setup.cfg.model):
        found["heldout_accuracy"] = float(correct / weight)
    if main == "tokens":
        found["heldout_perplexity"] = math.exp(min(loss, 700.0))
        found["heldout_z_loss"] = float(z / weight)
    found["heldout_tokens" if main == "tokens" else "heldout_examples"] = int(weight)
    made = batches.made if isinstance(batches, TaskBatches) else None
    if isinstance(made, HeadExamples) and not setup.cfg.eval_batches:
        answers = evaluate_tasks.of_head(setup, made, batches, params)
        metrics = answers.metrics(made.task)
        found |= {f"heldout_{name}": value for name, value in metrics.items()}
    return found | {f"heldout_{k}": v for k, v in others(totals, main).items()}


def others(sums: dict, main: str = "tokens") -> dict[str, float]:
    """Loss and accuracy of the losses beside the main one; lessons have no accuracy."""
    found = {}
    for name, each in sums.items():
        if name != main:
            _, nll, _, correct, weight = map(float, each)
            found[f"{name}_loss"] = nll / max(weight, 1.0)
            if name not in ("taught", "hidden"):
                found[f"{name}_accuracy"] = correct / max(weight, 1.0)
    return found


@contextlib.contextmanager
def on_lead(setup: run.Setup, params: dict) -> Iterator[dict | None]:
    """Within: the whole parameters on one device of the lead, None on other processes.

    All processes call it. None on the lead too, with a word, if they do not fit there.
    """
    if jax.process_count() == 1:
        yield params
        return
    device = jax.local_devices()[0]
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    room = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    # Beside an optimizer with two moments; the same answer on every process.
    if 4 * size > room:
        setup.say(f"no samples: {size / 2**30:.1f} GiB of parameters on one device")
        yield None
        return
    # One at a time: for a moment each device holds the whole of it.
    whole = jax.tree.map(
        lambda x: multihost_utils.process_allgather(x, tiled=True), params
    )
    if not setup.lead:
        yield None
        return
    sizes = {axis: 1 for axis in setup.mesh.shape} | dict(dcn_data=-1, dcn_fsdp=1)
    one = dataclasses.replace(setup.cfg.sharding, **sizes)
    with sharding.use(sharding.make_mesh(one, [device]), one.rules):
        yield jax.device_put(whole, device)


if __name__ == "__main__":
    cli.run(main)

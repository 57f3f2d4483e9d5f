"""Stages of training: where a run comes from, and what it has forgotten on the way.

General -> domain-adaptive -> task-adaptive -> labelled (Gururangan et al. 2020): each
stage is a run of `t5x_lite.train` whose config names the workdir before it
(config.init_from; `configs/stages/`). config.json holds the line of ancestors, and the
end of a run writes forgetting.json: the held-out loss of each ancestor's data under its
objective, with the ancestor's parameters and with these.
"""

import dataclasses
import json
import pathlib
import time

import jax

from t5x_lite import (
    checkpoint,
    distill,
    evaluate,
    heads,
    lora,
    metrics,
    model,
    parameters,
    rows,
    run,
    sharding,
    step,
)
from t5x_lite.config import Config
from t5x_lite.workdir import replace

# What an ancestor has for its own objective, and a later stage need not have.
OWN = ("head/", "classes/", "mix/", "distill")


def pinned(setup: run.Setup, meta: dict) -> run.Setup:
    """The setup with config.init_step filled in, which its checkpoints then hold.

    Args:
        meta: of the checkpoint that the run goes on from; {} for a new run.

    Raises:
        FileNotFoundError, ValueError: a new run's config.init_from has no checkpoint.
    """
    cfg = setup.cfg
    if not cfg.init_from:
        return setup
    before = meta.get("config", {})
    if before.get("init_from") == cfg.init_from:
        at = before.get("init_step", -1)
    else:
        at = rows.Source.of(cfg.init_from, cfg.init_step).step
    return dataclasses.replace(setup, cfg=dataclasses.replace(cfg, init_step=at))


def lineage(cfg: Config) -> list[dict]:
    """The runs that a config's parameters come from, nearest first.

    Each is {"workdir", "step", "objective"}; the line ends at one that is gone.
    """
    found, seen = [], set()
    while cfg.init_from and cfg.init_from not in seen:
        seen.add(cfg.init_from)
        try:
            given, at, _ = checkpoint.read_run(cfg.init_from, cfg.init_step)
        except (FileNotFoundError, ValueError) as e:
            found.append(dict(workdir=cfg.init_from, step=cfg.init_step, gone=str(e)))
            break
        about = dict(workdir=cfg.init_from, step=at, objective=_objective(given))
        found.append(about)
        cfg = given
    return found


def _objective(cfg: Config) -> str:
    if cfg.data.tasks:
        return f"{', '.join(map(str, cfg.data.tasks))} ({cfg.model.head or 'text'})"
    return cfg.objective["name"]


class Misfit(ValueError):
    """The data of another run are not for these parameters."""


def heldout_as(setup: run.Setup, params: dict, workdir, at: int = -1) -> dict:
    """Held-out metrics of another run's data and objective, with these parameters.

    Args:
        params: of `setup`; of their names the other run's model takes them, its own
            heads it keeps.
        workdir, at: the other run, and its step; -1 = the latest.

    Returns:
        {"before": metrics with its own parameters, "after": with these, "kept": names
        of its own that were kept}.

    Raises:
        Misfit: its model or vocabulary is another one.
    """
    given, at, meta = checkpoint.read_run(workdir, at)
    if meta.get("params_only"):
        raise Misfit("it was converted, and has no data of its own")
    if meta["data"].get("vocab") != setup.vocab.fingerprint:
        raise Misfit("it has another vocabulary")
    if given.model.structure != setup.cfg.model.structure:
        raise Misfit(f"its structure is {given.model.structure!r}")
    given = dataclasses.replace(given, sharding=setup.cfg.sharding)
    other = run.Setup.of(given, list(setup.mesh.devices.flat))
    with sharding.use(other.mesh, other.cfg.sharding.rules):
        whole = checkpoint.load_params(workdir, at, other.abstract_state["params"])
        theirs, ours = _plain(other.model, whole), _plain(setup.model, params)
        mixed, kept = {}, []
        for name, array in theirs.items():
            same = name in ours and ours[name].shape == array.shape
            mixed[name] = ours[name] if same else array
            kept += [] if same else [name]
        if foreign := [name for name in kept if not name.startswith(OWN)]:
            raise Misfit(f"its parameters {foreign[:3]} are not those of this run")
        cfg = dataclasses.replace(other.cfg, model=lora.without(other.cfg.model))
        net = model.build(cfg.model)
        other = dataclasses.replace(other, cfg=cfg, model=net)
        eval_step = jax.jit(step.make_eval_step(net, cfg, other.vocab.size))
        before, after = (
            evaluate.heldout(other, eval_step, _nested(flat))
            for flat in (theirs, mixed)
        )
    return {"before": before, "after": after, "kept": kept}


def _plain(net, params: dict) -> dict:
    """Name -> array, adapters merged."""
    leaves = jax.tree_util.tree_leaves_with_path(lora.plain(params, net))
    return {parameters.name_of(path): leaf for path, leaf in leaves}


def _nested(flat: dict) -> dict:
    return parameters.nested({tuple(name.split("/")): x for name, x in flat.items()})


def evaluate_as(workdir, ancestor, at: int = -1, ancestor_step: int = -1) -> dict:
    """`heldout_as` of a run's checkpoint, on one device: `evaluate --as=ANCESTOR`.

    Raises:
        FileNotFoundError, ValueError: one of both is no run, or they do not fit.
    """
    cfg, at, _ = checkpoint.read_run(workdir, at)
    _, ancestor_step, _ = checkpoint.read_run(ancestor, ancestor_step, "--as")
    setup = run.Setup.of(run.alone(cfg), jax.devices()[:1])
    with sharding.use(setup.mesh, setup.cfg.sharding.rules):
        abstract = setup.abstract_state["params"]
        params = checkpoint.load_params(workdir, at, abstract)
        try:
            found = heldout_as(setup, params, ancestor, ancestor_step)
        except Misfit as e:
            raise ValueError(
                f"--as={ancestor} cannot be evaluated with the parameters of --workdir="
                f"{workdir}: {e}. Give a run of the same vocabulary and model."
            ) from e
        return {"step": at} | found


def finish(setup: run.Setup, params: dict, workdir: pathlib.Path, at: int):
    """Writes and prints what is reported once, at the end; all processes call it."""
    if setup.cfg.init_from and setup.cfg.init_forgetting:
        _once(setup, workdir / "forgetting.json", at, forgetting, params)
    if setup.cfg.distill:
        _once(setup, workdir / "distillation.json", at, distillation, params)


def _once(setup: run.Setup, path: pathlib.Path, at: int, make, params: dict):
    if path.exists() and json.loads(path.read_text())["step"] == at:
        return
    found = {"step": at} | make(setup, params)
    if setup.lead:
        replace(path, json.dumps(found, indent=2) + "\n")


def forgetting(setup: run.Setup, params: dict) -> dict:
    """Per ancestor: its held-out loss before and after what came since."""
    found = []
    for each in lineage(setup.cfg):
        row = dict(each)
        if "gone" not in each:
            try:
                scores = heldout_as(setup, params, each["workdir"], each["step"])
            except (OSError, ValueError, KeyError) as e:
                row["skipped"] = str(e).strip("'\"").splitlines()[0]
            else:
                row |= {k: scores[k][checkpoint.METRIC] for k in ("before", "after")}
                row |= {"metrics": scores, "forgotten": row["after"] - row["before"]}
        found.append(row)
    setup.say("held-out loss of the stages before, nats:  theirs    here   forgotten")
    for row in found:
        name = f"  {row['workdir']} ({row.get('objective', 'gone')})"
        if "after" in row:
            numbers = f"{row['before']:8.4f} {row['after']:7.4f}"
            setup.say(f"{name:42} {numbers} {row['forgotten']:+11.4f}")
        else:
            setup.say(f"{name:42} not evaluated: {row.get('skipped') or row['gone']}")
    return {"ancestors": found}


def distillation(setup: run.Setup, params: dict) -> dict:
    """Size, speed and held-out loss of student and teacher on the same batches.

    Speed is that of the evaluation's step, computed again after a first time.
    """
    teacher = setup.teacher
    assert teacher is not None
    known = teacher.params(setup.mesh, setup.cfg.sharding.rules)
    taught = dataclasses.replace(setup.cfg, model=teacher.cfg.model)
    found = {}
    for name, cfg, net, own in (
        ("teacher", taught, teacher.net, known),
        ("student", setup.cfg, setup.model, params),
    ):
        eval_step = jax.jit(step.make_eval_step(net, cfg, setup.vocab.size))
        scores = evaluate.heldout(setup, eval_step, own)
        batch = setup.to_device(setup.heldout_batches[0])
        began, times = time.perf_counter(), 5
        for _ in range(times):
            jax.block_until_ready(eval_step(own, batch))
        seconds = (time.perf_counter() - began) / times
        split = metrics.split_parameters(net)
        found[name] = {
            "parameters": model.parameter_count(net),
            "of which": split,
            "tokens_per_second": setup.tokens_per_step / seconds,
            **scores,
        }
    setup.say("             parameters   tokens/s   held-out loss")
    for name, each in found.items():
        setup.say(
            f"  {name}  {each['parameters']:12,}  {each['tokens_per_second']:9,.0f}  "
            f"{each[checkpoint.METRIC]:14.4f}"
        )
    return found | {"knobs": distill.knobs(setup.cfg), "loss": heads.main(taught.model)}

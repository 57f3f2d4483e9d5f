"""Stages: what a run takes over, what it has forgotten, when it stops; small runs."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import warnings
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from t5x_lite import (
    checkpoint,
    cli,
    config,
    export,
    metrics,
    model,
    progress,
    stages,
    train,
)
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
HELDOUT = str(ROOT / "data/heldout.jsonl")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Token stores and compiled programs, shared by the runs of this file."""
    return tmp_path_factory.mktemp("shared")


def config_of(shared, *, steps: int, **sections) -> config.Config:
    """A decoder of depth 2 on the held-out text, evaluated after every second step."""
    raw: Any = config.defaults()
    raw.update(config.to_json(tiny.tiny_config(), tuples=True))
    raw.update(dict(steps=steps, eval_every=2, eval_batches=1, platform="cpu"))
    raw.compile_cache = str(shared / "compiled")
    raw.checkpoint.every = 2
    raw.data.update(dict(train=HELDOUT, heldout=HELDOUT, inputs_length=24))
    raw.data.cache_dir = str(shared / "stores")
    raw.model.update(dict(structure="decoder", vocab_size=0))
    rate = dict(learning_rate=0.01, schedule="linear", warmup_steps=1)
    raw.optim.update(dict(name="adamw") | rate)
    with raw.unlocked():
        raw.objective = dict(name="causal_lm")
        raw.distill = {}
    for name, values in sections.items():
        if name == "distill":
            with raw.unlocked():
                raw.distill = values
        elif isinstance(values, dict):
            raw[name].update(values)
        else:
            raw[name] = values
    return config.freeze(raw)


def lines(workdir) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = metrics.read(pathlib.Path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in progress.CLOCKED} for row in rows]


def arrays(workdir, step: int = -1) -> dict[str, np.ndarray]:
    _, at, _ = checkpoint.read_run(workdir, step)
    where = pathlib.Path(workdir) / "checkpoints" / str(at) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the mesh, which is the same here
        tree = checkpointer.restore(where)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


@pytest.fixture(scope="module")
def general(shared, tmp_path_factory):
    """A finished run of four steps."""
    workdir = tmp_path_factory.mktemp("general") / "run"
    train.train(config_of(shared, steps=4), workdir)
    return workdir


@pytest.mark.slow
def test_a_stage_goes_on_and_says_what_it_forgot(general, shared, tmp_path, capsys):
    """On the same held-out text its own loss is what is left of the stage before's."""
    cfg = config_of(
        shared,
        steps=2,
        init_from=str(general),
        init_optimizer="restore",
        seed=1,
        optim=dict(l2_start=0.1),
    )
    last = train.train(cfg, tmp_path / "domain")
    found = json.loads((tmp_path / "domain" / "forgetting.json").read_text())
    (row,) = found["ancestors"]
    before = [r["heldout_loss"] for r in lines(general) if "heldout_loss" in r][-1]
    assert row["workdir"] == str(general) and row["step"] == 4
    np.testing.assert_allclose(row["before"], before, rtol=1e-6)
    np.testing.assert_allclose(row["after"], last["heldout_loss"], rtol=1e-6)
    assert row["forgotten"] == row["after"] - row["before"] != 0.0
    assert "forgotten" in capsys.readouterr().out
    about = json.loads((tmp_path / "domain" / "config.json").read_text())
    assert about["lineage"][0]["step"] == about["config"]["init_step"] == 4
    # Adam counts on, the schedule begins again.
    counts = {
        name: int(x)
        for name, x in arrays(tmp_path / "domain").items()
        if "count" in name and x.ndim == 0
    }
    assert sorted(counts.values()) == [2, 6], counts
    again = stages.evaluate_as(tmp_path / "domain", general)
    np.testing.assert_allclose(again["after"]["heldout_loss"], row["after"], rtol=1e-6)


@pytest.mark.slow
def test_a_restored_optimizer_must_fit(general, shared, tmp_path):
    other = config_of(
        shared,
        steps=2,
        init_from=str(general),
        init_optimizer="restore",
        optim=dict(lr_rules=((r"embedding", 0.0), (".*", 1.0))),
    )
    with pytest.raises(ValueError, match="init_optimizer='restore'.*Set it to 'reset'"):
        train.train(other, tmp_path / "run")


@pytest.mark.slow
def test_adapters_of_the_stage_before_are_merged(general, shared, tmp_path):
    """A run without LoRA starts from the function that one with it ended at."""
    adapted = config_of(
        shared,
        steps=2,
        init_from=str(general),
        model=dict(lora_rank=2, lora_targets=r".*/(query|up|out)"),
        optim=dict(learning_rate=0.3),
    )
    end = train.train(adapted, tmp_path / "lora")
    frozen, moved = arrays(general), arrays(tmp_path / "lora")
    for name, value in frozen.items():
        if name.startswith("['params']"):
            np.testing.assert_array_equal(moved[name], value, err_msg=name)
    cfg, _, params, _, _ = checkpoint.load_run(tmp_path / "lora")
    assert "lora" not in params and cfg.model.lora_rank == 0
    check_exports(tmp_path / "lora", tmp_path)
    still = config_of(
        shared,
        steps=2,
        init_from=str(tmp_path / "lora"),
        optim=dict(learning_rate=0.0),
    )
    same = train.train(still, tmp_path / "plain")
    np.testing.assert_allclose(same["heldout_loss"], end["heldout_loss"], rtol=1e-5)


def check_exports(workdir, tmp_path):
    """Merged as a whole model, verified; or what was trained alone, to be added."""
    run = [f"--workdir={workdir}", "--layers=stacked"]
    export.main([*run, f"--output={tmp_path / 'merged'}", "--verify"])
    export.main([*run, f"--output={tmp_path / 'adapter'}", "--lora=adapter"])
    whole, alone = (
        dict(np.load(tmp_path / name / "params.npz", allow_pickle=False))
        for name in ("merged", "adapter")
    )
    assert alone and all(name.startswith("lora/") for name in alone)
    base = arrays(workdir)
    for name, merged in whole.items():
        path = "".join(f"['{key}']" for key in ("params", *name.split("/")))
        wanted = base[path].astype(np.float64)
        if f"lora/{name}/a" in alone:
            pair = (alone[f"lora/{name}/{k}"].astype(np.float64) for k in "ab")
            wanted = wanted + 16.0 / 2 * np.matmul(*pair).reshape(wanted.shape)
        np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-6)
    about = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert about["config"]["model"]["lora_rank"] == 0


def interrupted(cfg: config.Config, workdir, at: int):
    """Forgets what came after a checkpoint, as after a kill, and goes on."""
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > at:
            shutil.rmtree(path)
    rows = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [row for row in rows if json.loads(row)["step"] <= at]
    (workdir / "metrics.jsonl").write_text("".join(kept))
    train.train(cfg, workdir)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["unfreeze", "l2_start", "distill", "patience"])
def test_resumed_is_uninterrupted(recipe, general, shared, tmp_path):
    """Bit for bit, with what no checkpoint holds made again."""
    more = dict(
        unfreeze=dict(optim=dict(unfreeze=((r"stack/.*", 3), ("embedding", 4)))),
        l2_start=dict(optim=dict(l2_start=1.0)),
        distill=dict(
            distill=dict(teacher=str(general), alpha=0.5, hidden=1.0),
            model=dict(d_model=16, distill_width=32),
        ),
        # A rate at which nothing gets better after the first evaluation.
        patience=dict(checkpoint=dict(patience=1), optim=dict(learning_rate=3.0)),
    )[recipe]
    start = {} if recipe == "distill" else dict(init_from=str(general))
    cfg = config_of(shared, steps=8, **start, **more)
    workdir = tmp_path / "run"
    last = train.train(cfg, workdir)
    ended, whole = arrays(workdir), lines(workdir)
    stop = max(row["step"] for row in whole)
    assert stop < 8 if recipe == "patience" else stop == 8
    again = train.train(cfg, workdir)  # says that it is finished
    assert again["heldout_loss"] == last["heldout_loss"] and lines(workdir) == whole
    interrupted(cfg, workdir, 2)
    assert lines(workdir) == whole
    for name, value in arrays(workdir).items():
        np.testing.assert_array_equal(value, ended[name], err_msg=name)
    if recipe == "distill":
        found = json.loads((workdir / "distillation.json").read_text())
        assert found["student"]["parameters"] < found["teacher"]["parameters"]
        assert found["student"]["heldout_loss"] == last["heldout_loss"]
        names = [name for name in ended if "params" in name]
        assert not any("teacher" in name for name in names)


@pytest.mark.parametrize("arg", ["", ":smoke", ":study"])
def test_each_stage_names_the_one_before(arg):
    order = ["general", "domain", "task", "labelled"]
    for before, stage in zip([None, *order], order, strict=False):
        cfg = config.freeze(cli.load_config(f"configs/stages/{stage}.py{arg}"))
        assert cfg.init_from.endswith(f"/{before}") if before else not cfg.init_from
        assert cfg.init_optimizer == ("restore" if stage == "domain" else "reset")
        model.build(dataclasses.replace(cfg.model, vocab_size=512))
    assert cfg.model.head == "class" and cfg.checkpoint.metric == "heldout_accuracy"


def test_checksums_of_the_stages_data():
    table = (ROOT / "data/stages/README.md").read_text()
    for path in sorted((ROOT / "data/stages").glob("*.jsonl")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert f"`{path.name}`" in table and digest in table

"""Ladders, grids, plans, and running, stopping and resuming a study. About 40 s."""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

from t5x_lite import config, metrics, model, parameters, run, study, train
from t5x_lite.studies import commands_fit, costs, grid, ladders, plan, records, runner
from t5x_lite.studies import run as run_command

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Overrides that make a cell of a second or so."""
    where = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(50)]
    for split, count in (("train", 4000), ("heldout", 400)):
        text = " ".join(rng.choice(words, count))
        (where / f"{split}.txt").write_text(text)
    return {
        "data.train": str(where / "train.txt"),
        "data.heldout": str(where / "heldout.txt"),
        "data.cache_dir": str(where / "stores"),
        "compile_cache": str(where / "programs"),
        "data.vocab": "bytes",
        "model.d_model": 16,
        "model.d_ff": 16,
        "model.heads": 2,
        "model.head_dim": 8,
        "model.dropout": 0.0,
        "optim.schedule": "constant",
        "steps": 4,
        "eval_every": 4,
        "checkpoint.every": 2,
    }


@pytest.fixture
def one_device(monkeypatch):
    """Runs take one of the devices that the tests pretend to have: it is faster."""
    whole = run.Setup.of
    monkeypatch.setattr(
        run.Setup, "of", lambda cfg, devices=None: whole(cfg, jax.devices()[:1])
    )


def small_study(base, **changes) -> grid.Study:
    made = grid.Study(
        name="small",
        config="configs/gpt2.py:smoke",
        base=base,
        axes={"depth": {f"l{d}": {"model.decoder_layers": d} for d in (1, 2)}},
        seeds=(0,),
    )
    return dataclasses.replace(made, **changes)


def test_a_grid_is_the_product_of_axes_and_seeds(base):
    axes = {
        "depth": {f"l{d}": {"model.decoder_layers": d} for d in (1, 2, 3)},
        "rate": {r: {"optim.learning_rate": float(r)} for r in ("1e-3", "2e-3")},
    }
    axes["rate"] = {k.replace("-", "m"): v for k, v in axes["rate"].items()}
    cells = grid.cells(small_study(base, axes=axes, seeds=(0, 7)))
    assert len(cells) == 12 and len({cell.key for cell in cells}) == 12
    assert [(c.name, c.seed) for c in cells[:3]] == [
        ("l1-1em3", 0),
        ("l1-1em3", 7),
        ("l1-2em3", 0),
    ]
    last = cells[-1]
    assert last.config.seed == 7 and last.config.model.decoder_layers == 3
    assert last.config.optim.learning_rate == 2e-3
    assert last.overrides == {"model.decoder_layers": 3, "optim.learning_rate": 2e-3}
    other = grid.cells(small_study(base | {"steps": 5}, axes=axes, seeds=(0, 7)))
    assert {c.key for c in other}.isdisjoint({c.key for c in cells})


def test_a_bad_cell_is_named(base):
    wrong = {"depth": {"l1": {"model.decoder_layer": 1}}}
    with pytest.raises(ValueError, match=r"cell 'l1'[\s\S]*did you mean"):
        grid.cells(small_study(base, axes=wrong))
    with pytest.raises(ValueError, match="part of a directory"):
        grid.cells(small_study(base, axes={"depth": {"a/b": {}}}))
    with pytest.raises(ValueError, match="cell 'far'"):
        far = {"far": {"objective": {"name": "span_corruption", "density": 7.0}}}
        [grid.cost(c) for c in grid.cells(small_study(base, axes={}, cells=far))]


def test_a_study_without_runs_or_with_a_typo_is_named(base, tmp_path):
    for changes, text in (
        (dict(seeds=()), r"study 'small' has seeds=\(\)"),
        (dict(axes={"depth": {}}), "study 'small': the axis 'depth' has no label"),
    ):
        with pytest.raises(ValueError, match=text):
            grid.cells(small_study(base, **changes))
    with pytest.raises(
        ValueError, match=r"study 'small', its config[\s\S]*did you mean"
    ):
        grid.cells(small_study(base | {"step": 5}))
    path = tmp_path / "config.py"
    path.write_text("def study(): pass\n")
    with pytest.raises(ValueError, match=r"does not define get_study\(\)"):
        grid.load(str(path))


def test_records_are_compared_with_the_study(base):
    made = small_study(base, seeds=(0, 1))
    rows = [
        records.Record(
            c.name, c.overrides, c.seed, {}, 1.0, 1.0,
            config=config.to_json(c.config) | {"sharding": {"data": 8}},
        )
        for c in grid.cells(made)
    ]  # fmt: skip
    count = len(rows)
    told = commands_fit.coverage(made, rows[:-1])
    assert told == f"{count - 1} of {count} runs of the study are here."
    rows[0].config["steps"] += 1
    told = commands_fit.coverage(made, [*rows, dataclasses.replace(rows[1], seed=9)])
    assert f"{count - 1} of {count} runs" in told and "2 records are not of it" in told


def test_what_comes_after_the_training_is_checked_before_it(base):
    typo = {"tuned": grid.Adaptation({"optim.learning_rates": 1e-3})}
    pairs = {"other": {"objective": {"name": "mass"}}}
    for changes, text in (
        (dict(adaptations=typo), r"l1, adaptation tuned[\s\S]*did you mean"),
        (dict(evaluations=pairs), "l1, evaluation other"),
        (dict(score="other_loss"), "score='other_loss'"),
        (dict(score="los"), "score='los'"),
    ):
        with pytest.raises(ValueError, match=text):
            grid.check(grid.cells(small_study(base, **changes)))
    fine = small_study(base, evaluations={"same": {}}, score="same_classes_loss")
    grid.check(grid.cells(fine))


def test_500_cells_are_planned_without_tracing_or_device(base, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a plan needs no device and traces nothing")

    for name in ("jit", "eval_shape", "devices", "make_jaxpr"):
        monkeypatch.setattr(jax, name, refuse)
    axes = {
        "structure": {s: {"model.structure": s} for s in ("decoder", "prefix_lm")},
        "depth": {f"l{d}": {"model.decoder_layers": d} for d in range(1, 11)},
        "width": {
            f"d{16 * k}": {"model.d_model": 16 * k, "model.d_ff": 64 * k}
            for k in (1, 2, 4, 8, 16)
        },
    }
    made = small_study(
        base | {"objective": {"name": "prefix_lm"}}, axes=axes, seeds=tuple(range(5))
    )
    cells = grid.cells(made)
    assert len(cells) == 500
    found = plan.make(made, cells, tmp_path, None)
    assert found["cells"] == 500 and found["finished"] == 0
    assert found["left_flops"] == sum(r["training_flops"] for r in found["rows"])
    lines = plan.table(found, 10)
    assert "and 90 more" in "\n".join(lines) and "time to go" in lines[-1]
    one = found["rows"][-1]
    net = model.build(dataclasses.replace(cells[-1].config.model, vocab_size=384))
    assert one["total"] == model.parameter_count(net)


def numbers(row: dict) -> list:
    return [row["curve"], row["heldout_loss"], row["heldout"]]


@pytest.mark.usefixtures("one_device")
def test_a_study_runs_resumes_and_skips(base, tmp_path, monkeypatch):
    """Losses are those of a run that nothing interrupted; what is finished stays."""
    cells = grid.cells(small_study(base))
    assert runner.run_all(tmp_path / "whole", cells, cells) == []
    whole = records.read(tmp_path / "whole/results.jsonl")
    assert [(r.cell, r.seed) for r in whole] == [("l1", 0), ("l2", 0)]
    for one, cell in zip(whole, cells, strict=True):
        assert one.training_flops == grid.cost(cell).training_flops
        assert [s for s, _ in one.curve] == [1, 2, 3, 4]
        assert one.heldout_loss == one.heldout["loss"] > 0
        assert one.config["model"]["vocab_size"] == 384 and one.wall_seconds > 0

    # A cell that was killed after two steps.
    half = dataclasses.replace(cells[1].config, steps=2, eval_every=4)
    train.train(half, runner.directory(tmp_path / "cut", cells[1]) / "train")
    assert runner.run_all(tmp_path / "cut", cells, cells[1:]) == []
    rows = records.read_rows(tmp_path / "cut/results.jsonl")
    assert [r["cell"] for r in rows] == ["l2"]
    want = records.read_rows(tmp_path / "whole/results.jsonl")[1]
    assert numbers(rows[0]) == numbers(want)

    def refuse(*_):
        raise AssertionError("finished cells are skipped")

    monkeypatch.setattr(train, "train", refuse)
    assert runner.run_all(tmp_path / "whole", cells, cells) == []
    assert records.read_rows(tmp_path / "whole/results.jsonl")[1] == want


@pytest.mark.usefixtures("one_device")
def test_a_failing_cell_is_told_of_and_the_others_go_on(base, tmp_path):
    axes = {"rate": {"bad": {"optim.learning_rate": 1e30}, "good": {}}}
    cells = grid.cells(small_study(base, axes=axes))
    left = runner.run_all(tmp_path, cells, cells)
    assert len(left) == 1 and left[0].startswith("bad, seed 0: step")
    assert [r.cell for r in records.read(tmp_path / "results.jsonl")] == ["good"]
    log = runner.directory(tmp_path, cells[0]) / "log.txt"
    assert "FloatingPointError" in log.read_text()


@pytest.mark.usefixtures("one_device")
def test_a_stopped_cell_ends_the_study_and_is_no_result(base, tmp_path, monkeypatch):
    cells = grid.cells(small_study(base))
    whole = train.train

    def stopped(cfg, workdir):  # as SIGTERM does it
        whole(dataclasses.replace(cfg, steps=2, eval_every=4), workdir)
        raise SystemExit(143)

    monkeypatch.setattr(train, "train", stopped)
    with pytest.raises(SystemExit, match="143"):
        runner.run_all(tmp_path, cells, cells)
    where = runner.directory(tmp_path, cells[0]) / "train"
    assert runner.saved_steps(cells[0].config, where) == [2]
    assert all(runner.result(tmp_path, cell) is None for cell in cells)


@pytest.mark.usefixtures("one_device")
def test_evaluations_and_adaptations_start_from_the_cells_parameters(base, tmp_path):
    tuned = {"steps": 2, "eval_every": 2, "optim.learning_rate": 1e-9}
    made = small_study(
        base,
        axes={},
        evaluations={"same": {}},
        adaptations={"frozen": grid.Adaptation(tuned)},
        score="frozen_loss",
    )
    cells = grid.cells(made)
    assert runner.run_all(tmp_path, cells, cells) == []
    (row,) = records.read_rows(tmp_path / "results.jsonl")
    scores = row["heldout"]
    assert scores["same_loss"] == pytest.approx(scores["loss"], rel=1e-6)
    # A rate of next to nothing leaves the loss where it was.
    assert scores["frozen_loss"] == pytest.approx(scores["loss"], rel=1e-4)
    assert row["heldout_loss"] == scores["frozen_loss"] and row["score"]
    assert row["adaptation_flops"] == row["training_flops"] / 2


def test_electras_discriminator_is_carried_into_an_encoder():
    rtd = ladders.base("configs/electra.py:smoke")
    shape = dataclasses.replace(rtd.model, vocab_size=128)
    nets = [
        model.build(dataclasses.replace(shape, generator_width=width))
        for width in (rtd.model.generator_width, 0.0)
    ]
    old, fresh = (
        parameters.init_params(net, jax.random.key(i)) for i, net in enumerate(nets)
    )
    found = runner.carried(old, fresh, "output/.*")
    same = jax.tree.map(np.array_equal, found["stack"], old["discriminator"]["stack"])
    assert all(jax.tree.leaves(same))
    np.testing.assert_array_equal(found["embedding"], old["embedding"])
    assert found["output"] is not old["output"]
    for a, b in zip(
        jax.tree.leaves(found["output"]), jax.tree.leaves(fresh["output"]), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def study_file(base, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "from t5x_lite.studies import grid\n"
        "def get_study():\n"
        "    axes = {'depth': {f'l{d}': {'model.decoder_layers': d} for d in (1, 2)}}\n"
        "    return grid.Study('small', 'configs/gpt2.py:smoke', seeds=(0, 1),\n"
        f"        base={base!r}, axes=axes)\n"
    )
    return path


def test_the_commands_choose_cells(study_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = [f"--config={study_file}", f"--root={tmp_path / 'runs'}"]
    assert study.main(["plan", *flags, f"--json={tmp_path / 'plan.json'}"]) is None
    assert "cells       4 in all, 0 finished" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["cells"] == 4
    chosen = []
    monkeypatch.setattr(
        runner, "run_all", lambda root, cells, wanted: chosen.extend(wanted) or []
    )
    for more, want in (
        ([], [("l1", 0), ("l1", 1), ("l2", 0), ("l2", 1)]),
        (["--only=l2", "--seeds=1"], [("l2", 1)]),
        (["--cell=2"], [("l2", 0)]),
    ):
        chosen.clear()
        assert study.main(["run", *flags, *more]) is None
        assert [(c.name, c.seed) for c in chosen] == want
    for more, text in (
        (["--cell=9"], "--cell=9"),
        (["--seeds=5"], "--seeds=5"),
        (["--only=x"], "leaves no cell"),
    ):
        with pytest.raises(ValueError, match=text):
            study.main(["run", *flags, *more])
    with pytest.raises(ValueError, match="--limit=-1"):
        study.main(["plan", *flags, "--limit=-1"])
    with pytest.raises(ValueError, match="no command 'runn'"):
        study.main(["runn"])
    with pytest.raises(FileNotFoundError, match="no such file"):
        study.main(["plan", "--config=nowhere.py"])


def test_a_slurm_array_runs_one_cell_a_task(study_file, tmp_path, monkeypatch, capsys):
    """With an sbatch that runs the script here and an srun that writes its command."""
    monkeypatch.chdir(ROOT)
    bin_dir, calls = tmp_path / "bin", tmp_path / "calls"
    bin_dir.mkdir()
    (bin_dir / "sbatch").write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do echo "$1" >> "$CALLS"; shift; done\n'
        'SLURM_ARRAY_TASK_ID=3 exec bash "$@"\n'
    )
    (bin_dir / "srun").write_text('#!/bin/bash\nprintf "%q " "$@" >> "$CALLS"\n')
    for script in bin_dir.iterdir():
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_dir}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("PYTHON", sys.executable)
    flags = [f"--config={study_file}", f"--root={tmp_path / 'runs'}"]
    done = run_command.main([*flags, "--launcher=slurm", "--sbatch=--time=1:00"])
    assert done == 0
    *asked, command = calls.read_text().splitlines()
    assert asked == ["--job-name=small", "--array=0-3", "--time=1:00"]
    python, dash_m, module, name, *rest = shlex.split(command)
    assert (python, dash_m, module) == (sys.executable, "-m", "t5x_lite.study")
    chosen = []
    monkeypatch.setattr(
        runner, "run_all", lambda root, cells, wanted: chosen.extend(wanted) or []
    )
    study.main([name, *rest])
    assert [(c.name, c.seed) for c in chosen] == [("l2", 1)]


def test_a_jobset_has_a_pod_for_each_cell(study_file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = [f"--config={study_file}", f"--root={tmp_path / 'runs'}"]
    run_command.main([*flags, "--launcher=jobset", "--image=here/it:1", "--seeds=1"])
    text = (tmp_path / "runs/study.yaml").read_text()
    assert "completions: 2" in text and "image: here/it:1" in text
    script = text.partition("- |\n")[2].partition("env:")[0]
    shown = subprocess.run(
        ["bash", "-c", script.replace("exec python", "echo")],
        env=os.environ | {"JOB_COMPLETION_INDEX": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split()[-1] == "--cell=3"


def test_long_curves_are_thinned_by_means():
    curve = [[s, float(s)] for s in range(1, 1001)]
    thin = runner.thinned(curve, 100)
    assert len(thin) == 100 and thin[-1][0] == 1000
    assert thin[0] == [10, 5.5]
    assert runner.thinned(curve[:50], 100) == curve[:50]


def test_overrides_of_no_section_are_refused():
    base = ladders.base("configs/gpt2.py:smoke")
    with pytest.raises(config.ConfigError, match="no section"):
        costs.resolved(base, {"steps.more": 1})
    assert metrics.read("nowhere.jsonl") == []

"""What models wrote, read as answers; the command that evaluates."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from t5x_lite import (
    checkpoint,
    evaluate,
    evaluate_tasks,
    generate,
    model,
    optim,
    run,
    sharding,
    state,
    step,
    stopping,
)
from t5x_lite.data import task_batches, tasks
from t5x_lite.settings import Settings
from tests.answering import WORDS, untrained
from tests.tiny import tiny_config
from tests.toy_task import custom, opened

# ---- writing ------------------------------------------------------------------------

READ = {
    "class": ("rte", {"label": "entailment"}, "entailment", (0, 0)),
    "no class": ("rte", {"label": "entailment"}, "entailments", (0, -1)),
    "number": ("stsb", {"value": 3.0}, "3.4", (3.0, 3.4)),
    "no number": ("stsb", {"value": 3.0}, "three", (3.0, -1.0)),
    "few tags": ("ud_ewt", {"tags": ["X", "NOUN"]}, "X", (["X", "NOUN"], ["X", ""])),
    "many tags": ("ud_ewt", {"tags": ["X"]}, "X X X", (["X"], ["X"])),
    "no answer": ("squad2", {"answers": []}, "unanswerable", (["right"], "")),
    "answer": ("squad2", {"answers": [("a", 0)]}, "some", (["right"], "some")),
    "text": ("e2e_nlg", {}, "some", (["right"], "some")),
}


@pytest.mark.parametrize("kind", sorted(READ))
def test_what_was_written_is_read(kind):
    name, record, text, expected = READ[kind]
    task = tasks.TASKS[name]
    assert evaluate_tasks._read(task, record, ["right"], text) == expected


# T5's tests of WSC: one names the other.
@pytest.mark.parametrize(
    ("text", "referent", "label", "expected"),
    [
        ("the stable", "stable", "True", (1, 1)),
        ("Stable", "the stable", "True", (1, 1)),
        ("the yard", "the stable", "False", (0, 0)),
        ("", "the stable", "False", (0, 0)),
    ],
)
def test_a_referent_is_right_if_one_names_the_other(text, referent, label, expected):
    found = evaluate_tasks._read(tasks.TASKS["wsc"], {"label": label}, [referent], text)
    assert found == expected


def test_texts_of_one_meaning_count_together(tmp_path):
    """Each meaning is asked once; all that people wrote for it is right."""
    cfg, net, params = untrained("encoder_decoder")
    cfg = dataclasses.replace(
        cfg, data=dataclasses.replace(cfg.data, inputs_length=32, targets_length=8)
    )
    rows = [("m1", "a"), ("m2", "b"), ("m1", "c"), ("m1", "a")]
    records = [dict(mr=mr, ref=ref) for mr, ref in rows]
    task = tasks.TASKS["e2e_nlg"]
    made = task_batches.TextExamples(cfg, WORDS, {"e2e": task}, {"e2e": records})
    settings = Settings(max_length=4)
    answers = evaluate_tasks.of_text(net, params, WORDS, made, task, settings)
    assert answers.targets == [["a", "c"], ["b"]]
    asked = np.append(WORDS.encode("describe: m2"), WORDS.eos_id)
    ((alone,),) = generate.continue_all(net, params, WORDS, [asked], settings)
    assert answers.predictions[1] == WORDS.decode(alone.ids).strip()


def test_a_limit_takes_examples_from_everywhere():
    assert evaluate_tasks.spread(range(10), 0) == [*range(10)]
    assert evaluate_tasks.spread(range(10), 4) == [0, 2, 5, 7]
    assert evaluate_tasks.spread(range(3), 4) == [0, 1, 2]


# ---- the command --------------------------------------------------------------------


def saved(folder, **sections):
    """A workdir with checkpoints of steps 3 and 5 for the toy task; -> config."""
    cfg = opened(folder, **sections)[0]
    cfg = dataclasses.replace(cfg, compile_cache="")
    net = model.build(cfg.model)
    tx = optim.make(cfg, net)
    mesh = sharding.make_mesh(cfg.sharding, jax.devices()[:1])
    abstract = state.abstract(net, tx, mesh, cfg.sharding.rules)
    checkpoints = checkpoint.Checkpoints(folder / "run", cfg.checkpoint)
    for at, loss in ((3, 0.5), (5, 0.7)):
        meta = checkpoint.make_meta(cfg, at, {"vocab": WORDS.fingerprint})
        fresh = state.create(net, tx, abstract, at)
        checkpoints.save(at, fresh, meta, {"heldout_loss": loss})
    checkpoints.wait()
    checkpoints.close()
    return cfg


def test_the_command_evaluates_all_checkpoints_once(tmp_path, monkeypatch, capsys):
    saved(
        tmp_path,
        structure="encoder",
        data=dict(task_format="head"),
        model=dict(head="class", classes=2, encoder_layers=1),
    )
    flags = [f"--workdir={tmp_path / 'run'}", "--tasks=toy"]
    first = evaluate.evaluate([*flags, "--checkpoints=all"])
    assert [found["step"] for found in first] == [3, 5]
    assert all(found["task"] == "toy" for found in first)
    out = capsys.readouterr().out
    assert out.count("accuracy") == 4 and "step  task  split  metric" in out
    path = tmp_path / "run/evaluation-3-toy-dev.json"
    assert json.loads(path.read_text()) == first[0]
    rows = [json.loads(x) for x in path.with_suffix(".jsonl").read_text().splitlines()]
    right = np.mean([row["target"] == row["prediction"] for row in rows])
    assert right == pytest.approx(first[0]["accuracy"])
    assert len(rows) == first[0]["examples"] > 2

    def fails(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(checkpoint, "load_params", fails)
    assert evaluate.evaluate([*flags, "--checkpoints=all"]) == first
    assert evaluate.evaluate([*flags, "--checkpoints=best"]) == first[:1]
    assert evaluate.evaluate(flags) == first[1:]
    with pytest.raises(ValueError, match="--shots=2, .* is not asked by prompts"):
        evaluate.evaluate([*flags, "--shots=2"])
    with pytest.raises(ValueError, match="--limit=-1 must be at least 0"):
        evaluate.evaluate([*flags, "--limit=-1"])
    for more in (["--again"], ["--split=train"], ["--task_dir=elsewhere"]):
        with pytest.raises(AssertionError, match="computed again"):
            evaluate.evaluate([*flags, *more])
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match="needs 'sklearn': pip install"):
        evaluate.evaluate([*flags, "--again"])  # before it is computed


def test_held_out_metrics_of_a_head_are_those_of_its_task(tmp_path):
    """As the loop writes them, in agreement with the sums of the loss."""
    cfg = tiny_config(
        data=custom(tmp_path, metrics=("f1",)) | dict(task_format="head"),
        model=dict(structure="encoder", head="class", classes=2, encoder_layers=1)
        | dict(vocab_size=384),
        compile_cache="",
    )
    setup = run.Setup.of(cfg, jax.devices()[:1])
    params = setup.create_state()["params"]
    eval_step = jax.jit(step.make_eval_step(setup.model, setup.cfg, WORDS.size))
    batches = setup.heldouts["toy"]
    assert isinstance(batches, task_batches.TaskBatches)
    assert isinstance(batches.made, task_batches.HeadExamples)
    with sharding.use(setup.mesh, cfg.sharding.rules):
        found = evaluate.heldout(setup, eval_step, params)
        answers = evaluate_tasks.of_head(setup, batches.made, batches, params)
    right = np.equal(answers.targets, answers.predictions)
    assert found["heldout_accuracy"] == pytest.approx(right.mean())
    assert found["heldout_examples"] == len(right) == len(batches.made.records)
    assert found["heldout_f1"] == answers.metrics(batches.made.task)["f1"]
    assert found.keys() - {"heldout_examples"} == set(stopping.names(cfg))
    few = evaluate_tasks.of_few(setup, params, batches.made, 2)
    half = len(right) // 2
    assert few.texts == [answers.texts[0], answers.texts[half]]

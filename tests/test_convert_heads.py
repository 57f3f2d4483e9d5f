"""Heads go out as the classes of transformers and come in again; needs no torch.

tests/test_parity_heads.py compares the logits, live.
"""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import pytest

from t5x_lite import checkpoint, model, parameters, vocab, warmstart
from t5x_lite.config import ModelConfig
from t5x_lite.interop import families, hf_config, huggingface, task_heads, workdirs
from tests import hf_dirs, parity
from tests.hf_dirs import run
from tests.tiny import stream, tiny_config

CLASSES = json.loads((parity.GOLDENS / "heads.json").read_text())
VOCAB = str(parity.GOLDENS / "vocab_cased.txt")
LENGTH = 7


def family_of(name: str) -> tuple[str, str]:
    """(family, head) of a class of theirs."""
    (found,) = (
        (family, head)
        for family, rows in task_heads.COUNTERPARTS.items()
        for head, row in rows.items()
        if row.name == name
    )
    return found


def config(name: str) -> ModelConfig:
    """Our model of the shape of a class in heads.json, with its head of 3 classes."""
    family, head = family_of(name)
    about = CLASSES[name]
    cfg = families.model_config(family, about["config"], tie_embeddings=True)
    cfg = dataclasses.replace(cfg, output_bias=False, head=head)
    cfg = dataclasses.replace(cfg, classes=3 if head in ("class", "tags") else 0)
    pooler = not name.startswith(("GPT2", "OpenAIGPT"))
    choices = 3 if head == "choice" else 0
    return dataclasses.replace(cfg, head_pooler=pooler, choices=choices)


def written(path: pathlib.Path, name: str, ids: int = 0, **how):
    """(config, parameters by our names) of a folder that is made at `path`."""
    cfg = config(name)
    cfg = dataclasses.replace(cfg, vocab_size=ids or cfg.vocab_size)
    flat = hf_dirs.drawn(cfg)
    path.mkdir()
    huggingface.write(path, cfg, flat, family=family_of(name)[0], **how)
    return cfg, flat


def test_every_class_is_known():
    names = [r.name for rows in task_heads.COUNTERPARTS.values() for r in rows.values()]
    assert sorted(names) == sorted(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_names_and_shapes_are_transformers_and_come_back(name, tmp_path):
    cfg, flat = written(tmp_path / "hf", name)
    slots = huggingface.open_weights(tmp_path / "hf").slots
    about = CLASSES[name]
    assert {n: list(slots[n].shape) for n in about["head"]} == about["head"]
    assert len(slots) == about["tensors"]
    assert sum(math.prod(s.shape) for s in slots.values()) == about["parameters"]
    theirs = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert theirs["architectures"] == [name]
    assert len(theirs["id2label"]) == about["config"]["num_labels"]
    # No GPT has a bias there: it went into the norm before it.
    moved = {"head/bias", "stack/norm/bias", "stack/blocks/mlp_norm/bias"}
    moved &= {"head/bias"} and moved if "GPT" in name else set()
    found = huggingface.read(tmp_path / "hf")
    again = found.cfg
    for key in ("head", "classes", "choices"):
        assert getattr(again, key) == getattr(cfg, key)
    if cfg.head in ("class", "choice"):
        assert again.head_pooler == cfg.head_pooler
    left = set(flat) - set(found.params)
    assert all(n.startswith("output/") for n in left | {*found.extras["fresh"]})
    for ours in set(flat) - left - moved - {*found.extras["fresh"]}:
        np.testing.assert_array_equal(found.params[ours], flat[ours], err_msg=ours)


@pytest.mark.parametrize(
    "name", ["GPT2ForSequenceClassification", "OpenAIGPTForSequenceClassification"]
)
def test_a_bias_that_theirs_has_not_is_in_the_norm(name, tmp_path):
    """The logits are the same, whatever the text."""
    cfg, flat = written(tmp_path / "hf", name)
    assert np.abs(flat["head/bias"]).max() > 0.05
    found = huggingface.read(tmp_path / "hf")
    assert not found.params["head/bias"].any() and found.extras["fresh"] == []
    batch = stream(np.random.default_rng(1), 4, LENGTH, causal=True, ids=60)
    batch |= dict(pooled=np.array([6, 3, 0, 5], np.int32))
    batch |= dict(targets=batch["tokens"], weights=np.ones((4, LENGTH), np.float32))

    def logits(cfg, params):
        nested = parameters.nested({tuple(n.split("/")): params[n] for n in params})
        return model.bind(model.build(cfg), nested).outputs({"main": batch}).head

    before, after = logits(cfg, flat), logits(found.cfg, dict(found.params))
    np.testing.assert_allclose(after, before, atol=2e-5, rtol=0)
    flat["head/kernel"][:, 1] = flat["head/kernel"][:, 0]
    with pytest.raises(ValueError, match="columns of head/kernel are dependent"):
        huggingface.write(tmp_path / "hf", cfg, flat)


def test_the_command_takes_a_head_in_and_out(tmp_path, capsys):
    """Its labels too; and a new run starts from its weights."""
    hf, workdir, back = (tmp_path / n for n in ("hf", "run", "back"))
    files = {"vocab.txt": pathlib.Path(VOCAB)}
    labels = ("no", "perhaps", "yes")
    words, name = vocab.load(VOCAB, 0), "BertForSequenceClassification"
    _, flat = written(hf, name, words.size, labels=labels, files=files)
    assert run(f"--from=hf:{hf}", f"--to={workdir}") == 0
    assert run(f"--from={workdir}", f"--to=hf:{back}") == 0
    capsys.readouterr()
    assert run("--diff", f"hf:{hf}", workdir) == 0
    assert run("--diff", f"hf:{hf}", f"hf:{back}") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("not compared") and out[1:] == ["no difference"] * 2
    theirs = json.loads((back / "config.json").read_text())
    assert theirs["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}
    assert theirs["label2id"] == {"no": 0, "perhaps": 1, "yes": 2}
    assert theirs["problem_type"] == "single_label_classification"
    assert theirs["pad_token_id"] == words.pad_id
    assert (back / "vocab.txt").read_text() == pathlib.Path(VOCAB).read_text()
    cfg, _, _, _, _ = checkpoint.load_run(workdir)
    assert cfg.data.task_format == "head"
    other = dataclasses.replace(cfg, init_from=str(workdir), seed=3)
    net = model.build(cfg.model)
    moves = warmstart.plan(other, net, warmstart.Source.of(str(workdir), -1))
    taken = {name for name, move in moves.items() if move.source == name}
    assert {n for n in flat if n.startswith("head/")} <= taken


def fine_tuned(folder: pathlib.Path, **shape):
    """A workdir as training leaves it, of a task that names its classes."""
    from t5x_lite import optim, sharding, state

    task = dict(train="a.tsv", inputs=("text",), classes=("dull", "warm"))
    cfg = tiny_config(
        model=dict(vocab_size=384) | shape,
        data=dict(tasks=("mine",), custom_tasks=dict(mine=task), task_format="head"),
    )
    words, net = vocab.load("bytes", 100), model.build(cfg.model)
    mesh = sharding.make_mesh(cfg.sharding, jax.devices()[:1])
    tx = optim.make(cfg, net)
    abstract = state.abstract(net, tx, mesh, cfg.sharding.rules)
    checkpoints = checkpoint.Checkpoints(folder, cfg.checkpoint)
    meta = checkpoint.make_meta(cfg, 3, {"vocab": words.fingerprint})
    checkpoints.save(3, state.create(net, tx, abstract, 3), meta)
    checkpoints.wait()
    checkpoints.close()
    return cfg


BERT_LIKE = dict(
    **dict(structure="encoder", gated=False, bias=True, norm="layer", types=2),
    **dict(norm_order="post", norm_eps=1e-12, embed_norm=True, scale_attention=True),
    **dict(positions="learned", head_dim=8, head="class", classes=2),
)


def test_a_fine_tuned_run_goes_out_with_the_names_of_its_classes(tmp_path, capsys):
    """LoRA's adapters are merged, whatever they are of; the output layer is left."""
    adapters = dict(lora_rank=2, lora_alpha=32.0, lora_targets=r".*/query")
    cfg = fine_tuned(tmp_path / "run", **BERT_LIKE, **adapters)
    assert run(f"--from={tmp_path / 'run'}", f"--to=hf:{tmp_path / 'out'}") == 0
    theirs = json.loads((tmp_path / "out" / "config.json").read_text())
    assert theirs["architectures"] == ["BertForSequenceClassification"]
    assert theirs["id2label"] == {"0": "dull", "1": "warm"}
    assert theirs["pad_token_id"] == 0 and not cfg.model.transform_output
    weights = huggingface.open_weights(tmp_path / "out")
    assert not [name for name in weights if name.startswith("cls.")]
    plain = tmp_path / "run"
    params = checkpoint.load_run(plain)[2]
    np.testing.assert_array_equal(
        weights["classifier.weight"], np.asarray(params["head"]["kernel"]).T
    )


@pytest.mark.parametrize(
    "shape, named",
    [
        (dict(head="similarity"), "head='similarity': no class of 'bert'"),
        (dict(mix_layers=True), "mix_layers=True, theirs has False"),
        (dict(head_pooler=False), "head_pooler=False, theirs has True"),
        (
            dict(activation="gelu_exact", d_embed=8, transform_output=True),
            "head='class': no class of 'electra'.*computes gelu, ours tanh.*span, tags",
        ),
        (dict(structure="prefix_lm"), "structure='prefix_lm'"),
    ],
)
def test_heads_without_a_counterpart_are_refused(shape, named, tmp_path):
    cfg = ModelConfig(**dict(d_model=32, heads=4, vocab_size=9) | BERT_LIKE | shape)
    with pytest.raises(ValueError, match=f"(?s){named}.*t5x_lite.export"):
        huggingface.write(tmp_path, cfg, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, changes, message",
    [
        (
            "ElectraForTokenClassification",
            dict(architectures=["ElectraForSequenceClassification"]),
            r"none of ours: its pooler computes gelu, ours tanh.*ElectraForTokenC.*hf:",
        ),
        (
            "T5ForQuestionAnswering",
            dict(architectures=["T5ForTokenClassification"]),
            "its tags are of the encoder.*T5ForSequenceClassification",
        ),
        (
            "BertForSequenceClassification",
            dict(problem_type="multi_label_classification"),
            "multi_label_classification' with 3 outputs",
        ),
        (
            "XLNetForSequenceClassification",
            dict(summary_type="mean"),
            "summary_type='mean'; our head has summary_type='last'",
        ),
        (
            "BertForQuestionAnswering",
            dict(architectures=["BertForTokenClassification"]),
            "but the files have no classifier.weight",
        ),
        (
            "BertForTokenClassification",
            dict(architectures=["BertForSequenceClassification"]),
            "not in the files at all: head/pooler, head/pooler_bias",
        ),
        (
            "BertForSequenceClassification",
            dict(id2label={str(i): str(i) for i in range(5)}),
            "5 names in id2label, but classifier.weight has 3 outputs",
        ),
        (
            "BertForTokenClassification",
            dict(id2label=["a", "b", "c"]),
            "id2label=.'a', 'b', 'c'.; an object with the keys",
        ),
        (
            "BertForTokenClassification",
            dict(id2label={"1": "a", "2": "b", "3": "c"}),
            "id2label=.*an object with the keys",
        ),
        ("BertForTokenClassification", dict(id2label=3), "id2label=3; an object"),
    ],
)
def test_classes_that_are_none_of_ours_are_refused(name, changes, message, tmp_path):
    written(tmp_path / "hf", name)
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        huggingface.read(tmp_path / "hf")


def test_names_of_classes_are_those_of_their_numbers():
    """transformers reads the keys as numbers, whatever their order in the file."""
    theirs = {key: f"n{key}" for key in sorted(map(str, range(12)))}
    assert list(theirs)[:3] == ["0", "1", "10"]
    found = workdirs.labels_of(tiny_config(), {"id2label": theirs})
    assert found == [f"n{i}" for i in range(12)]
    assert workdirs.labels_of(tiny_config(), {}) == []


def test_one_output_is_a_number(tmp_path):
    cfg = dataclasses.replace(
        config("BertForSequenceClassification"), head="regression", classes=0
    )
    huggingface.write(tmp_path, cfg, hf_dirs.drawn(cfg))
    theirs = json.loads((tmp_path / "config.json").read_text())
    assert theirs["problem_type"] == "regression" and len(theirs["id2label"]) == 1
    assert huggingface.read(tmp_path).cfg.head == "regression"
    path = tmp_path / "config.json"  # as older files have it
    del theirs["problem_type"]
    path.write_text(json.dumps(theirs))
    assert huggingface.read(tmp_path).cfg.head == "regression"


def test_cells_are_read_as_the_note_says():
    """Every class that needs to be called in a certain way says so."""
    noted = {
        (family, head)
        for family, rows in task_heads.COUNTERPARTS.items()
        for head in rows
        if hf_config.notes(family, config(rows[head].name))
    }
    seq2seq = ("bart", "mbart", "t5", "mt5", "umt5")
    assert noted == {
        *((family, head) for family in seq2seq for head in ("class", "span")),
        *(("xlnet", "class"), ("xlnet", "choice"), ("gpt", "class"), ("gpt2", "class")),
    }
    assert workdirs.labels_of(tiny_config(), {"id2label": {"0": "a"}}) == ["a"]

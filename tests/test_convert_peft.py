"""Adapters as peft keeps them, without it; live in tests/test_parity_peft.py."""

import dataclasses
import json

import numpy as np
import pytest

from t5x_lite import lora, model, parameters
from t5x_lite.arrays import open_arrays
from t5x_lite.interop import huggingface, peft
from tests.hf_dirs import run
from tests.test_convert_heads import BERT_LIKE, CLASSES, config, family_of, fine_tuned

EVERYWHERE = r".*/(attention|cross|mlp)/(query|key|value|out|gate|up|down)"
RANK, ALPHA = 2, 3.0


def adapted(name: str, targets: str, **more):
    """(config, random parameters with adapters) of a class in heads.json."""
    adapters = dict(lora_rank=RANK, lora_alpha=ALPHA, lora_targets=targets)
    cfg = dataclasses.replace(config(name), **adapters | more)
    rng = np.random.default_rng(0)
    return cfg, {
        n: rng.standard_normal(p.get_value().shape, np.float32)
        for n, p in parameters.declared(model.build(cfg)).items()
    }


@pytest.mark.parametrize(
    "name, targets",
    [
        ("BertForSequenceClassification", EVERYWHERE),
        ("AlbertForTokenClassification", r".*/(query|up)"),
        ("XLNetForTokenClassification", r".*/mlp/(up|down)"),
        ("GPT2ForSequenceClassification", EVERYWHERE),
        ("OpenAIGPTForSequenceClassification", r".*/(query|value)"),
        ("UMT5ForSequenceClassification", EVERYWHERE),
    ],
)
def test_base_and_adapters_are_the_merged_model(name, targets, tmp_path):
    """By peft's equation, W + alpha / r * B A, on what goes out to transformers."""
    cfg, flat = adapted(name, targets)
    plain, family = lora.without(cfg), family_of(name)[0]
    base, whole, folder = (tmp_path / n for n in ("base", "whole", "peft"))
    for path in (base, whole, folder):
        path.mkdir()
    nested = parameters.nested({tuple(n.split("/")): flat[n] for n in flat})
    merged = {
        "/".join(path): np.asarray(leaf)
        for path, leaf in _leaves(lora.plain(nested, model.build(cfg)))
    }
    before = {n: a for n, a in flat.items() if not n.startswith("lora/")}
    huggingface.write(base, plain, before, family=family)
    huggingface.write(whole, plain, merged, family=family)
    peft.write(folder, cfg, flat, family=family)
    about = json.loads((folder / "adapter_config.json").read_text())
    held = dict(open_arrays(folder / "adapter_model.safetensors"))
    assert (about["peft_type"], about["r"], about["lora_alpha"]) == ("LORA", 2, 3.0)
    want = dict(huggingface.open_weights(base))
    for module in about["target_modules"]:
        a, b = (held.pop(f"base_model.model.{module}.lora_{k}.weight") for k in "AB")
        rank = about["rank_pattern"].get(module, about["r"])
        assert a.shape[0] == b.shape[1] == rank
        delta = about["alpha_pattern"].get(module, about["lora_alpha"]) / rank * b @ a
        want[f"{module}.weight"] += delta.T if about["fan_in_fan_out"] else delta
    for key, array in held.items():  # the head, which was trained as a whole
        key = key.removeprefix("base_model.model.")
        assert key.rpartition(".")[0] in about["modules_to_save"]
        want[key] = array
    assert set(CLASSES[name]["head"]) <= {
        key.removeprefix("base_model.model.") for key in held
    }
    for key, array in huggingface.open_weights(whole).items():
        np.testing.assert_allclose(want[key], array, atol=2e-5, rtol=2e-5, err_msg=key)


def _leaves(tree, path=()):
    for key, below in tree.items():
        if isinstance(below, dict):
            yield from _leaves(below, (*path, key))
        else:
            yield (*path, key), below


@pytest.mark.parametrize(
    "name, targets, more, message",
    [
        ("BertForSequenceClassification", "embedding", {}, "embedding is no linear"),
        ("XLNetForTokenClassification", ".*/query", {}, "query is no linear.*'xlnet'"),
        ("BertForSequenceClassification", "head/pooler", {}, "trained as a whole"),
        (
            "BertForSequenceClassification",
            ".*/query",
            dict(lora_trained="(head|inputs/norm)/.*"),
            "trained .'inputs/norm/bias', 'inputs/norm/scale'. too",
        ),
        ("BertForSequenceClassification", ".*/query", dict(lora_rank=0), "no adapters"),
        (
            "GPT2ForSequenceClassification",
            "head/kernel",
            dict(lora_trained="nothing/.*"),
            "head/kernel, whose bias theirs has not",
        ),
    ],
)
def test_what_peft_has_not_is_refused(name, targets, more, message, tmp_path):
    cfg, flat = adapted(name, targets, **more)
    with pytest.raises(ValueError, match=message):
        peft.write(tmp_path, cfg, flat)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_adapters_and_reads_none(tmp_path, capsys):
    fine_tuned(tmp_path / "run", **BERT_LIKE, lora_rank=2)
    out = tmp_path / "out"
    assert run(f"--from={tmp_path / 'run'}", f"--to=peft:{out}") == 0
    said = capsys.readouterr().out
    assert "4 layers of BertForSequenceClassification" in said
    assert {p.name for p in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    with pytest.raises(ValueError, match="written, not read"):
        run(f"--from=peft:{out}", f"--to={tmp_path / 'back'}")
    with pytest.raises(ValueError, match="written, not read"):
        run("--diff", f"peft:{out}", tmp_path / "run")

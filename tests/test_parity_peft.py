"""LoRA's adapters as peft's, live: theirs on their model gives our logits."""

import dataclasses
import os
import secrets

import numpy as np
import pytest

from t5x_lite import lora, model, parameters
from t5x_lite.config import ModelConfig
from t5x_lite.interop import hf_config, huggingface, peft, task_heads
from tests import test_parity_heads as live
from tests import tiny
from tests.test_parity_convert import nested

pytestmark = [
    pytest.mark.parity,
    pytest.mark.usefixtures("strict_dtypes"),
    # peft 0.21 asks transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

SEED = int(os.environ.get("PARITY_SEED") or secrets.randbelow(2**31))
EVERYWHERE = r".*/(attention|cross|mlp)/(query|key|value|out|gate|up|down)"
# (family, head, weights with an adapter); head "" = the language model.
CASES = [
    ("bert", "class", r".*/(query|value)"),
    ("roberta", "span", EVERYWHERE),
    ("albert", "tags", EVERYWHERE),
    ("electra", "tags", r".*/key"),
    ("gpt", "class", r".*/attention/(query|value)"),
    ("gpt2", "class", EVERYWHERE),
    ("gpt2", "", r".*/attention/(key|out)"),
    ("bart", "class", r".*/attention/(query|value)"),
    ("t5", "class", EVERYWHERE),
    ("t5", "", EVERYWHERE),
]


def config(family: str, head: str, targets: str) -> ModelConfig:
    cfg = live.config(family, head or "class")
    if not head:
        cfg = dataclasses.replace(cfg, head="", classes=0, head_pooler=True)
    adapters = dict(lora_rank=3, lora_alpha=5.0, lora_targets=targets)
    return dataclasses.replace(cfg, **adapters)


def drawn(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Parameters and adapters that change much, by our names."""
    rng = np.random.default_rng(SEED)
    return {
        name: 0.2 * rng.standard_normal(p.get_value().shape, np.float32)
        for name, p in parameters.declared(model.build(cfg)).items()
    }


def batch_of(cfg: ModelConfig, rng) -> dict:
    """Random tokens of a language model."""
    if cfg.structure == "encoder_decoder":
        return {k: v for k, v in tiny.random_batch(SEED).items() if k != "fingerprint"}
    stream = tiny.stream(rng, 4, 9, causal=True)
    return {"main": stream | dict(targets=stream["tokens"], weights=np.ones((4, 9)))}


def language_model(net, batch: dict):
    import torch  # pyright: ignore[reportMissingImports]

    streams = [batch[k]["tokens"] for k in ("encoder", "decoder", "main") if k in batch]
    names = ("input_ids", "decoder_input_ids")
    with torch.no_grad():
        given = zip(names, streams, strict=False)
        return net(**{k: torch.tensor(v).long() for k, v in given}).logits.numpy()


@pytest.mark.parametrize("family, head, targets", CASES)
def test_their_adapters_give_our_logits(family, head, targets, tmp_path):
    why = "peft is not installed (extra `parity`)"
    theirs = pytest.importorskip("peft", reason=why)
    print(f"PARITY_SEED={SEED}")
    cfg = config(family, head, targets)
    plain, flat = lora.without(cfg), drawn(cfg)
    base, folder = live.fresh(tmp_path / "base"), live.fresh(tmp_path / "peft")
    # The base has another head, which the adapters' folder replaces.
    before = {k: a for k, a in flat.items() if not k.startswith("lora/")}
    before |= {k: a + 1 for k, a in before.items() if k.startswith("head/")}
    given = live.IDS | dict(pad_token_id=0)
    huggingface.write(base, plain, before, family=family, theirs=given)
    peft.write(folder, cfg, flat, family=family)
    row = task_heads.find(family, head)
    name = row.name if row else hf_config.THEIRS[family].architecture(plain)
    loaded = live.loaded(base, name)
    net = theirs.PeftModel.from_pretrained(loaded, folder).eval()

    written = huggingface.arrays.open_arrays(folder / "adapter_model.safetensors")
    held = theirs.get_peft_model_state_dict(net)
    assert {*held} == {*written}
    for key, tensor in held.items():
        np.testing.assert_array_equal(tensor.numpy(), written[key], err_msg=key)
    if head:
        batch = live.batch_of(plain)
        expected = live.theirs(net, family, plain, batch)
        live.same(plain, live.ours(cfg, nested(flat), batch), expected, batch)
        return
    batch = batch_of(plain, np.random.default_rng(SEED))
    bound = model.bind(model.build(cfg), nested(flat))
    found = np.asarray(bound.logits(bound.outputs(batch).cells_BKE))
    np.testing.assert_allclose(found, language_model(net, batch), atol=2e-4, rtol=0)
    assert np.abs(found).max() > 0.05

"""Directories of transformers in and out, live: `make parity`.

What they save is read and gives their logits; what we write they load without a missing
or unexpected name and give ours.
"""

import contextlib
import json
import os
import pathlib
import pickle
import secrets

import jax
import numpy as np
import pytest

from t5x_lite import parameters
from t5x_lite.interop import huggingface, torch_files
from tests import parity
from tests import parity_families as pf

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("strict_dtypes")]

SEED = int(os.environ.get("PARITY_SEED") or secrets.randbelow(2**31))
AUTO = {
    **dict.fromkeys(("albert", "bert", "ernie", "nezha"), "AutoModelForPreTraining"),
    "electra_discriminator": "AutoModelForPreTraining",
    **dict.fromkeys(("roberta", "electra_generator"), "AutoModelForMaskedLM"),
    **dict.fromkeys(("gpt", "gpt2"), "AutoModelForCausalLM"),
    **dict.fromkeys(("xlnet", "xlnet_permuted"), "AutoModelForCausalLM"),
    **dict.fromkeys(("bart", "mbart", "umt5"), "AutoModelForSeq2SeqLM"),
    "prophetnet": "AutoModelForSeq2SeqLM",
}
T5_AS = ("t5", "mt5")
WITHIN = 2e-4


@pytest.fixture
def goldens():
    from tests.goldens import make_families

    print(f"PARITY_SEED={SEED}")
    return make_families


def nested(found) -> dict:
    return parameters.nested({tuple(n.split("/")): np.float32(found[n]) for n in found})


def load(goldens, auto: str, path: pathlib.Path):
    """Their model, which must have used every tensor and drawn none."""
    model, info = getattr(goldens.transformers, auto).from_pretrained(
        path, output_loading_info=True, attn_implementation="eager"
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    return model


def write(tmp_path, found, **how) -> pathlib.Path:
    out = tmp_path / "out"
    out.mkdir()
    how = dict(family=found.extras["family"]) | how
    huggingface.write(out, found.cfg, found.params, **how)
    return out / "discriminator" if found.cfg.generator_width else out


@pytest.mark.parametrize("name", sorted(AUTO))
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_there_and_back(goldens, name, shards, tmp_path, monkeypatch):
    case = goldens.CASES[name]
    version = goldens.transformers.__version__
    if not version.startswith(case.version):
        pytest.skip(f"transformers {version} has no {name}")
    build, models = goldens.build, []

    def keep(case, rng):
        models.append(build(case, rng))
        return models[-1]

    monkeypatch.setattr(goldens, "build", keep)
    arrays = goldens.make(name, SEED)
    models[0].float().save_pretrained(tmp_path / "in", max_shard_size=shards)
    written = len(list((tmp_path / "in").glob("*.safetensors")))
    assert (written > 1) == (shards == "20KB")
    found = huggingface.read(tmp_path / "in", fresh=name == "electra_discriminator")
    as_read = "bert" if name == "electra_generator" else name
    pf.compare_outputs(as_read, found.cfg, nested(found.params), arrays)

    size = 20_000 if shards == "20KB" else huggingface.SHARD_BYTES
    theirs = json.loads((tmp_path / "in" / "config.json").read_text())
    out = write(tmp_path, found, theirs=theirs, shard_bytes=size)

    def again(case, rng):
        build(case, rng)  # the batch is drawn after it
        model = load(goldens, AUTO[name], out).double().eval()
        if name == "umt5":  # see `hf_config.notes`
            model.config.tie_word_embeddings = False
        return model

    monkeypatch.setattr(goldens, "build", again)
    back = goldens.make(name, SEED)
    for key in case.outputs:
        np.testing.assert_allclose(back[key], arrays[key], atol=WITHIN, rtol=0)


@pytest.mark.parametrize("name", ["t5", "t5_1_1"])
@pytest.mark.parametrize("as_type", T5_AS)
def test_t5_there_and_back(goldens, name, as_type, tmp_path):
    from tests.goldens import make_t5

    if (name, as_type) == ("t5", "mt5"):
        pytest.skip("mT5 is T5.1.1")
    rng = np.random.default_rng(SEED)
    cfg = {"t5": make_t5.V1_0, "t5_1_1": make_t5.V1_1}[name]
    model = make_t5.build(cfg, rng)
    batch = make_t5.draw_batch(cfg, rng, 24, 20)
    expected = make_t5.run(model, batch, z_loss=0.0)
    model.float().save_pretrained(tmp_path / "in")
    found = huggingface.read(tmp_path / "in")
    assert found.cfg.tie_embeddings == cfg.tie_embeddings
    parity.compare_logits(found.cfg, nested(found.params), batch, expected)
    out = write(tmp_path, found, family=as_type)
    again = load(goldens, "AutoModelForSeq2SeqLM", out).double().eval()
    assert type(again).__name__.lower().startswith(as_type + "for")
    logits = make_t5.run(again, batch, z_loss=0.0)["logits"]
    np.testing.assert_allclose(logits, expected["logits"], atol=WITHIN, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_files_of_theirs(goldens, dtype, tmp_path):
    torch = goldens.torch
    model = goldens.build(goldens.CASES["gpt2"], np.random.default_rng(SEED))
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "in")
    found = huggingface.read(tmp_path / "in")
    out = write(tmp_path, found, dtype=dtype)
    again = load(goldens, "AutoModelForCausalLM", out)
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == getattr(torch, dtype)
        assert torch.equal(again.state_dict()[name], tensor), name


def test_pytorch_files_of_theirs(goldens, tmp_path):
    torch = goldens.torch
    model = goldens.build(goldens.CASES["bert"], np.random.default_rng(SEED))
    model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    want = dict(huggingface.read(tmp_path / "in").params)
    (tmp_path / "in" / "model.safetensors").unlink()
    state = model.state_dict()
    torch.save(state, tmp_path / "in" / "pytorch_model.bin")
    found = dict(huggingface.read(tmp_path / "in").params)
    (tmp_path / "in" / "pytorch_model.bin").unlink()
    names = sorted(state)
    weight_map = {}
    for file, part in (("a.bin", names[::2]), ("b.bin", names[1::2])):
        torch.save({name: state[name] for name in part}, tmp_path / "in" / file)
        weight_map |= dict.fromkeys(part, file)
    index = json.dumps(dict(weight_map=weight_map))
    (tmp_path / "in" / "pytorch_model.bin.index.json").write_text(index)
    sharded = huggingface.read(tmp_path / "in").params
    for name in want:
        np.testing.assert_array_equal(found[name], want[name])
        np.testing.assert_array_equal(sharded[name], want[name])


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_is_not_run_by_torch_either(goldens, how, tmp_path):
    model = goldens.build(goldens.CASES["gpt2"], np.random.default_rng(SEED))
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    file, made = tmp_path / "in" / "pytorch_model.bin", tmp_path / "made"
    evil = model.state_dict() | {"transformer.x": Evil(made)}
    if how == "torch":
        goldens.torch.save(evil, file)
    else:
        file.write_bytes(pickle.dumps(Evil(made), protocol=2))
    with pytest.raises(ValueError, match="more than tensors.*throw-away") as e:
        huggingface.read(tmp_path / "in")
    assert not made.exists()
    assert torch_files.TENSORS_ALONE in str(e.value)
    way_out = torch_files.TENSORS_ALONE.replace("FILE", repr(str(file)))
    with contextlib.suppress(RuntimeError):  # a bare pickle is no file of torch's
        exec(way_out, {"torch": goldens.torch})
    assert made.exists()
    if how == "torch":
        found = huggingface.read(tmp_path / "in")
        np.testing.assert_array_equal(
            found.params["embedding"], model.state_dict()["transformer.wte.weight"]
        )


@pytest.mark.parametrize(
    "preset", ["bert_base", "roberta_base", "gpt2", "t5_1_1_small"]
)
def test_a_run_of_ours_loads_there(goldens, preset, tmp_path):
    """Without a config.json of theirs to start from."""
    from configs.models import PRESETS
    from t5x_lite import model as model_lib
    from t5x_lite.config import ModelConfig

    small = dict(d_model=24, d_ff=40, heads=3, head_dim=8, vocab_size=96)
    small |= dict(encoder_layers=2, decoder_layers=2, max_positions=40)
    cfg = ModelConfig(**PRESETS[preset] | small)
    drawn = parameters.init_params(model_lib.build(cfg), jax.random.key(SEED))
    out = tmp_path / "out"
    out.mkdir()
    flat = {
        "/".join(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(drawn)[0]
    }
    huggingface.write(out, cfg, flat)
    auto = dict(gpt2="AutoModelForCausalLM", t5_1_1_small="AutoModelForSeq2SeqLM")
    auto["roberta_base"] = "AutoModelForMaskedLM"
    theirs = load(goldens, auto.get(preset, "AutoModelForPreTraining"), out).eval()
    rng = np.random.default_rng(SEED)
    ids = rng.integers(3, 96, (2, 12)).astype(np.int32)
    torch, mask = goldens.torch, np.ones_like(ids)
    inputs: dict = dict(input_ids=ids, attention_mask=mask)
    stream = dict(labels=ids, next_sentence_label=np.zeros(2, np.int32))
    if cfg.types:
        inputs["token_type_ids"] = np.zeros_like(ids)
    if cfg.structure == "encoder_decoder":
        inputs |= dict(decoder_input_ids=ids[:, ::-1].copy())
        stream |= dict(decoder_attention_mask=mask)
    with torch.no_grad():
        out = theirs(**{k: torch.tensor(v).long() for k, v in inputs.items()})
    name = {"encoder_decoder": "t5"}.get(cfg.structure, "")
    found = pf.forward(name, cfg, drawn, inputs | stream)["logits"]
    logits = out.prediction_logits if "prediction_logits" in out else out.logits
    np.testing.assert_allclose(found, logits.numpy(), atol=WITHIN, rtol=0)

"""An export computed with NumPy alone gives Hugging Face's logits (the goldens)."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from t5x_lite import checkpoint, config, export, parameters
from t5x_lite import model as model_lib
from t5x_lite.arrays import open_arrays
from t5x_lite.interop import families, numpy_forward, t5
from t5x_lite.model_config import ModelConfig
from tests import parity
from tests import parity_families as pf
from tests.tiny import tiny_config

T5 = ["t5", "t5_1_1"]
OTHERS = ["albert", "bart", "bert", "ernie", "gpt", "gpt2", "mbart", "roberta", "umt5"]


def golden(name: str):
    """-> (our config, our parameters, batch, its arrays, bool [B, T] of its logits)."""
    arrays = pf.load(name)
    if name not in T5:
        cfg = pf.config(name, arrays)
        params = families.from_hf(pf.family(name), pf.weights(arrays), cfg)
        mask = "decoder_attention_mask"
        seen = arrays[mask if mask in arrays else "attention_mask"]
        return cfg, params, pf.streams(name, cfg, arrays), arrays, seen > 0
    cfg = ModelConfig(**json.loads(str(arrays["config"])))
    prefix = "weights/"
    kept = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
    copies = {*t5.COPIES, "lm_head.weight"} - set(kept)
    weights = kept | {k: kept["shared.weight"] for k in copies}
    batch, seen = parity.streams(arrays), arrays["decoder_mask"] > 0
    return cfg, t5.from_hf(weights, cfg), batch, arrays, seen


@pytest.mark.parametrize("layout", export.LAYOUTS)
@pytest.mark.parametrize("name", T5 + OTHERS)
def test_logits_are_the_reference(name, layout):
    cfg, params, batch, arrays, seen = golden(name)
    flat = export.flatten(params)
    if layout == "unrolled" and not cfg.share_layers:
        flat = dict(export.unroll(flat))
    found = numpy_forward.forward(flat, vars(cfg), batch)
    assert all(x.dtype == np.float32 for x in found.values())
    parity.close("logits", found["logits"][seen], arrays["logits"][seen])
    assert ("classes" in found) == ("sentence_logits" in arrays)
    if "classes" in found:
        parity.close("classes", found["classes"], arrays["sentence_logits"])


# Without jax and its like, as on a machine that has NumPy and the file only.
ALONE = """
import importlib.abc, json, sys
import numpy as np

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "orbax", "tensorstore"):
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Blocked())
from t5x_lite.arrays import open_arrays
from t5x_lite.interop.numpy_forward import forward

out = sys.argv[1]
about = json.load(open(f"{out}/config.json"))
batch = {}
for name, array in np.load(f"{out}/../batch.npz").items():
    stream, field = name.split("/")
    batch.setdefault(stream, {})[field] = array
found = forward(open_arrays(out), about["config"]["model"], batch)
np.save(f"{out}/../logits.npy", found["logits"])
"""


@pytest.mark.parametrize(
    "name, kind", [("t5_1_1", "npz"), ("t5", "npy-dir"), ("bert", "safetensors")]
)
def test_neither_jax_nor_flax_is_needed(name, kind, tmp_path):
    cfg, params, batch, arrays, seen = golden(name)
    about = {"config": config.to_json(tiny_config(model=vars(cfg)))}
    export.write(tmp_path / "out", export.unroll(export.flatten(params)), about, kind)
    streams = {f"{s}/{k}": v for s, of in batch.items() for k, v in of.items()}
    np.savez(tmp_path / "batch.npz", **streams)  # pyright: ignore[reportArgumentType]
    root = str(pathlib.Path(__file__).parent.parent)
    subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "out"],
        check=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": root},
    )
    logits = np.load(tmp_path / "logits.npy")
    parity.close("logits", logits[seen], arrays["logits"][seen])


@pytest.mark.parametrize("name", ["t5_1_1", "bert"])
def test_the_command_verifies_with_numpy(name, tmp_path, capsys):
    cfg, params, batch, arrays, seen = golden(name)
    whole = tiny_config(model=vars(cfg))
    checkpoints = checkpoint.Checkpoints(tmp_path / "run", whole.checkpoint)
    meta = checkpoint.make_meta(whole, 0, {"vocab": ""})
    checkpoints.save(0, {"params": params}, meta)
    checkpoints.close()
    out = tmp_path / "out"
    export.main([f"--workdir={tmp_path / 'run'}", f"--output={out}", "--verify"])
    found = re.search(r"NumPy alone .* within (\S+) of", capsys.readouterr().out)
    assert found is not None and float(found[1]) < 1e-5
    logits = numpy_forward.forward(open_arrays(out), vars(cfg), batch)["logits"]
    parity.close("logits", logits[seen], arrays["logits"][seen])


# Of training, of the device, or of what is refused.
NOT_READ = {"attention", "dropout", "dtype", "init_residual", "init_std", "remat"}
NOT_READ |= {"entities", "entity_heads", "entity_layers", "scan", "unpadded"}
NOT_READ |= {"max_positions", "vocab_size", "d_ff", "heads", "window_every"}
# Of a head, which is refused; merged or left out by `export`.
NOT_READ |= {"head_pooler", "choices", "distill_width", "lora_rank", "lora_alpha"}
NOT_READ |= {"lora_targets", "lora_trained"}
NOT_READ |= {f.name for f in dataclasses.fields(ModelConfig) if f.name[:5] == "base_"}


def test_a_new_key_of_the_model_is_read_or_refused():
    source = pathlib.Path(numpy_forward.__file__).read_text()
    read = {f.name for f in dataclasses.fields(ModelConfig)} - NOT_READ
    assert not [key for key in read if not re.search(rf"\b{key}\b", source)]


def test_what_it_has_not_is_refused():
    for changes in (
        dict(positions="functional"),
        dict(structure="decoder", window=4),
        dict(parametrisation="mup", base_d_model=16),
        dict(structure="encoder", generator_width=0.5, transform_output=True),
    ):
        model = vars(tiny_config(model=changes).model)
        key = next(key for key in changes if key != "structure")
        with pytest.raises(ValueError, match=f"config.model.{key}="):
            numpy_forward.forward({}, model, {})


@pytest.mark.parametrize(
    "changes",
    [
        dict(structure="prefix_lm"),
        dict(share_stacks=True),
        dict(structure="decoder", positions="sinusoidal", norm="layer", bias=True),
        dict(structure="encoder", positions="none", activation="relu", gated=False),
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_what_no_golden_has_is_as_the_model_has_it(changes):
    cfg = tiny_config(model=changes).model
    net = model_lib.build(cfg)
    params = parameters.init_params(net, jax.random.key(0))
    batch = export.fixed_batch(cfg)
    for stream in batch.values():  # padding, two rows of one
        stream["segments"][:, -2:] = 0
    found = numpy_forward.forward(export.flatten(params), vars(cfg), batch)
    want = np.asarray(export.logits(cfg, params, batch)).reshape(found["logits"].shape)
    seen = batch[model_lib.trained_stream(cfg)]["segments"] > 0
    if cfg.structure == "encoder":
        seen = seen[:, ::2]
    parity.close("logits", found["logits"][seen], want[seen])

"""Directories of Hugging Face made of the goldens, without torch, and the command."""

import json
import pathlib

import jax
import numpy as np
from safetensors import numpy as safetensors_numpy

from t5x_lite import convert, model, parameters
from t5x_lite.config import ModelConfig
from t5x_lite.interop import hf_config, t5
from tests import parity_families as pf

VOCAB = str(pathlib.Path(__file__).parents[1] / "data" / "vocab_4k.model")
SMALL = dict(d_model=24, d_ff=40, heads=3, head_dim=8, vocab_size=96)
# File of tests/goldens -> family of its directory.
FAMILIES = dict(
    albert="albert",
    bart="bart",
    bert="bert",
    electra_discriminator="electra_discriminator",
    electra_generator="electra",
    ernie="ernie",
    gpt="gpt",
    gpt2="gpt2",
    mbart="mbart",
    nezha="nezha",
    prophetnet="prophetnet",
    roberta="roberta",
    t5="t5",
    t5_1_1="t5",
    umt5="umt5",
    xlnet="xlnet",
)


def load(name: str) -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(config.json, weights without copies, all arrays) of a golden."""
    arrays = pf.load(name)
    kept = {
        key.removeprefix("weights/"): array
        for key, array in arrays.items()
        if key.startswith("weights/")
    }
    family = hf_config.THEIRS[FAMILIES[name]]
    theirs = json.loads(str(arrays["config"]))
    if name in ("t5", "t5_1_1"):
        theirs = t5.hf_config(ModelConfig(**theirs))
    named = dict(model_type=family.type, architectures=[family.classes[-1]])
    return theirs | named, kept, arrays


def write(
    path: pathlib.Path,
    theirs: dict,
    weights: dict[str, np.ndarray],
    files: int = 1,
    dtype: str = "float32",
) -> pathlib.Path:
    """As save_pretrained does, in one file or in several with their index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(theirs))
    narrow = {k: a.astype(dtype) for k, a in weights.items()}
    meta = {"format": "pt"}
    if files == 1:
        safetensors_numpy.save_file(narrow, path / "model.safetensors", meta)
        return path
    names = sorted(narrow)
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = {name: narrow[name] for name in names[i::files]}
        safetensors_numpy.save_file(part, path / file, meta)
        weight_map |= dict.fromkeys(part, file)
    index = dict(metadata={}, weight_map=weight_map)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def run(*flags: object) -> int:
    return convert.main([str(flag) for flag in flags])


def drawn(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Random parameters by our flat names, small as after a fresh start."""
    rng = np.random.default_rng(0)
    return {
        name: 0.1 * rng.standard_normal(p.get_value().shape, np.float32)
        for name, p in parameters.declared(model.build(cfg)).items()
    }


def flattened(params) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(key.key for key in path): np.asarray(x) for path, x in leaves}

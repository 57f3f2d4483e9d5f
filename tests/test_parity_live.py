"""Our models against Hugging Face's on fresh random models: `make parity`.

The seed differs in each run and is printed with a failure; PARITY_SEED=n repeats it.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import secrets

import jax
import numpy as np
import pytest

from t5x_lite import model as model_lib
from t5x_lite import parameters
from t5x_lite.interop import families, t5
from tests import parity
from tests import parity_families as pf

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("strict_dtypes")]

SEED = int(os.environ.get("PARITY_SEED") or secrets.randbelow(2**31))


@pytest.fixture
def reference():
    # Imported here: without torch this is a failure of these tests alone.
    from tests.goldens import make_t5

    print(f"PARITY_SEED={SEED}")
    return make_t5


def draw_config(reference, name: str, rng: np.random.Generator):
    """Random small sizes, depths of one included."""
    base = {"t5": reference.V1_0, "t5_1_1": reference.V1_1}[name]
    small = dict(encoder_layers=4, decoder_layers=4, heads=5, head_dim=12, d_ff=60)
    sizes = {k: int(rng.integers(1, most + 1)) for k, most in small.items()}
    sizes |= dict(d_model=int(rng.integers(8, 40)), vocab_size=int(rng.integers(9, 99)))
    return dataclasses.replace(base, **sizes)


@pytest.mark.parametrize("name", ["t5", "t5_1_1"])
@pytest.mark.parametrize("case", range(3))
def test_their_weights_in_our_model(reference, name, case):
    rng = np.random.default_rng((SEED, case))
    cfg = draw_config(reference, name, rng)
    theirs = reference.build(cfg, rng)
    lengths = (int(n) for n in rng.integers(30, 180, 2))
    batch = reference.draw_batch(cfg, rng, *lengths)
    expected = reference.run(theirs, batch, z_loss=0.01)
    params = t5.from_hf(reference.weights_of(theirs), cfg)
    parity.compare_logits(cfg, params, batch, expected)
    parity.compare_grads(cfg, params, batch, expected, z_loss=0.01)


@pytest.mark.parametrize("name", ["t5", "t5_1_1"])
def test_our_weights_in_their_model(reference, name):
    rng = np.random.default_rng(SEED)
    cfg = draw_config(reference, name, rng)
    drawn = parameters.init_params(model_lib.build(cfg), jax.random.key(SEED))
    params = jax.tree.map(np.asarray, drawn)
    theirs = reference.build(cfg, rng)
    state = {
        k: reference.torch.tensor(v, dtype=reference.torch.float64)
        for k, v in t5.to_hf(params, cfg).items()
    }
    theirs.load_state_dict(state, strict=True)
    batch = reference.draw_batch(cfg, rng, 150, 140)
    expected = reference.run(theirs, batch, z_loss=0.0)
    parity.compare_logits(cfg, params, batch, expected)
    parity.compare_grads(cfg, params, batch, expected, z_loss=0.0)


FAMILIES = (
    *("albert", "bart", "bert", "electra_discriminator", "electra_generator", "ernie"),
    *("gpt", "gpt2", "mbart", "nezha", "prophetnet", "roberta", "umt5"),
    *("xlnet", "xlnet_mems", "xlnet_permuted"),
)


@pytest.fixture
def other_families():
    from tests.goldens import make_families

    print(f"PARITY_SEED={SEED}")
    return make_families


def skip_absent(other_families, name: str):
    version = other_families.transformers.__version__
    if not version.startswith(other_families.CASES[name].version):
        pytest.skip(f"transformers {version} has no {name}")


@pytest.mark.parametrize("name", FAMILIES)
def test_their_weights_in_our_model_of_the_family(other_families, name):
    skip_absent(other_families, name)
    arrays = other_families.make(name, SEED)
    cfg = pf.config(name, arrays)
    params = pf.our_params(name, cfg, arrays)
    pf.compare_outputs(name, cfg, params, arrays)
    if other_families.CASES[name].grads:
        pf.compare_grads(name, cfg, params, arrays)


@pytest.mark.parametrize("name", FAMILIES)
def test_our_weights_in_their_model_of_the_family(other_families, name, monkeypatch):
    skip_absent(other_families, name)
    arrays = other_families.make(name, SEED)
    cfg = pf.config(name, arrays)
    drawn = parameters.init_params(model_lib.build(cfg), jax.random.key(SEED))
    params = jax.tree.map(np.asarray, drawn)
    weights = families.to_hf(pf.family(name), params, cfg)
    build, torch = other_families.build, other_families.torch

    def loaded(case, rng):
        theirs = build(case, rng)
        state = {k: torch.tensor(v, dtype=torch.float64) for k, v in weights.items()}
        theirs.load_state_dict(state, strict=True)
        return theirs

    monkeypatch.setattr(other_families, "build", loaded)
    pf.compare_outputs(name, cfg, params, other_families.make(name, SEED))


RXNMAPPER = pathlib.Path(__file__).parents[2] / "shared/data/weights/albert_rxnmapper"
SMILES = (
    "CC(=O)Oc1ccccc1C(=O)O",
    "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
    "BrCCBr.OCC>>OCCBr",
)


@pytest.mark.skipif(not RXNMAPPER.exists(), reason=f"no {RXNMAPPER.name} in ../shared")
def test_a_trained_albert_computes_what_theirs_does(other_families):
    """rxnmapper's (MIT): 12 shared layers that were trained on chemical reactions."""
    torch, transformers = other_families.torch, other_families.transformers
    raw = json.loads((RXNMAPPER / "config.json").read_text())
    path = RXNMAPPER / "pytorch_model.bin"
    state = torch.load(path, weights_only=True, map_location="cpu")
    theirs = transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(**raw, attn_implementation="eager")
    )
    refused = theirs.load_state_dict(state, strict=False)
    assert not refused.missing_keys
    cfg = families.model_config("albert", raw, classes=0)
    weights = {name: tensor.numpy() for name, tensor in state.items()}
    params = families.from_hf("albert", weights, cfg)
    ids = {
        word: i for i, word in enumerate((RXNMAPPER / "vocab.txt").read_text().split())
    }
    rows = [
        [ids["[CLS]"], *(ids[c] for c in text), ids["[SEP]"]]
        for text in (spaced(text, ids) for text in SMILES)
    ]
    longest = max(map(len, rows))
    tokens = np.array([row + [0] * (longest - len(row)) for row in rows], np.int32)
    hidden = tokens.copy()
    hidden[:, 5] = ids["[MASK]"]
    mask = (tokens > 0).astype(np.int32)
    batch = dict(input_ids=hidden, attention_mask=mask, token_type_ids=mask * 0)
    with torch.no_grad():
        inputs = {k: torch.tensor(v).long() for k, v in batch.items()}
        expected = theirs.double().eval()(**inputs).logits.numpy()
    labels = np.where(hidden != tokens, tokens, -100)
    found = pf.forward("albert", cfg, params, batch | dict(labels=labels))["logits"]
    parity.close("logits", found[mask > 0], expected[mask > 0])
    assert (found[:, 5].argmax(axis=-1) == tokens[:, 5]).mean() > 0.5


def spaced(text: str, ids: dict) -> list[str]:
    """SMILES as the longest known tokens, from the left."""
    words = []
    while text:
        word = next(text[:n] for n in range(6, 0, -1) if text[:n] in ids)
        words.append(word)
        text = text[len(word) :]
    return words


@pytest.mark.parametrize("script", ["make_t5", "make_optim", "make_families"])
def test_the_committed_goldens_are_the_scripts(
    script, reference, tmp_path, monkeypatch
):
    module = importlib.import_module(f"tests.goldens.{script}")
    for writer in (module, reference):
        monkeypatch.setattr(writer, "HERE", tmp_path, raising=False)
    module.main()
    assert list(tmp_path.iterdir())
    for path in tmp_path.iterdir():
        new, old = np.load(path), np.load(parity.GOLDENS / path.name)
        assert set(new) == set(old)
        for key in set(new) - {"made_with"}:
            if new[key].dtype.kind == "f":
                np.testing.assert_allclose(new[key], old[key], rtol=1e-5, atol=1e-7)
            else:
                np.testing.assert_array_equal(new[key], old[key])

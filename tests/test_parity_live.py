"""Our T5 against Hugging Face's on fresh random models: `make parity`.

The seed differs in each run and is printed with a failure; PARITY_SEED=n repeats it.
"""

import dataclasses
import importlib
import os
import secrets

import jax
import numpy as np
import pytest

from t5x_lite import model as model_lib
from t5x_lite import parameters
from t5x_lite.interop import t5
from tests import parity

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


@pytest.mark.parametrize("script", ["make_t5", "make_optim"])
def test_the_committed_goldens_are_the_scripts(
    script, reference, tmp_path, monkeypatch
):
    monkeypatch.setattr(reference, "HERE", tmp_path)
    importlib.import_module(f"tests.goldens.{script}").main()
    assert list(tmp_path.iterdir())
    for path in tmp_path.iterdir():
        new, old = np.load(path), np.load(parity.GOLDENS / path.name)
        assert set(new) == set(old)
        for key in set(new) - {"made_with"}:
            if new[key].dtype.kind == "f":
                np.testing.assert_allclose(new[key], old[key], rtol=1e-5, atol=1e-7)
            else:
                np.testing.assert_array_equal(new[key], old[key])

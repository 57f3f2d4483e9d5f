"""AdamW and Adafactor against PyTorch's and transformers', from a committed golden."""

from typing import Any

import numpy as np
import optax
import pytest
from flax import nnx

from t5x_lite import layers, optim, parameters
from t5x_lite.config import Config, ModelConfig, OptimConfig
from tests import parity

GRID = 128.0  # stored integers / GRID are the values
KEPT = (..., slice(None, None, 4))  # every fourth column of a result is stored
# The gradient's size changes from step to step, so that moving averages lag, updates
# are clipped, and epsilon counts.
SCALES = (1.0, 8.0, 0.25, 3.0, 0.01, 1.0)
AXES = {
    "wide": ("embed", "mlp"),
    "tall": ("mlp", "embed"),
    "query": ("embed", "heads", "kv"),
    "out": ("heads", "kv", "embed"),
}
OPTIMIZERS = dict(
    adamw=OptimConfig(
        name="adamw",
        learning_rate=0.02,
        beta1=0.8,
        beta2=0.95,
        eps=1e-3,
        weight_decay=0.1,
        schedule="constant",
        warmup_steps=0,
    ),
    adafactor=OptimConfig(
        name="adafactor", learning_rate=0.3, schedule="constant", warmup_steps=0
    ),
)


def step_gradient(stored: np.ndarray, step: int) -> np.ndarray:
    """The gradient of a step: the stored one, turned over and scaled. float64."""
    turned = np.roll(stored, 7 * step, axis=tuple(range(stored.ndim)))
    return turned / GRID * SCALES[step]


class Block(nnx.Module):
    def __init__(self, shapes: dict):
        for name in ("query", "out"):
            shape = shapes[f"blocks/{name}"][1:]
            setattr(self, name, parameters.param(shape, AXES[name], layers.ones))
        norm = shapes["blocks/norm/scale"][1]
        self.norm = layers.Norm(ModelConfig(d_model=norm))


class Matrices(nnx.Module):
    """Parameters of the kinds that a Transformer has, stacked ones among them."""

    def __init__(self, shapes: dict):
        for name in ("wide", "tall"):
            setattr(self, name, parameters.param(shapes[name], AXES[name], layers.ones))
        self.norm = layers.Norm(ModelConfig(d_model=shapes["norm/scale"][0]))
        self.blocks = parameters.stacked(Block(shapes), shapes["blocks/query"][0])


def nested(flat: dict) -> dict:
    return nnx.traversals.unflatten_mapping(
        {tuple(name.split("/")): value for name, value in flat.items()}
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_the_reference(name):
    golden: dict[str, dict] = {}
    with np.load(parity.GOLDENS / "optim.npz", allow_pickle=False) as file:
        for key in set(file.files) - {"made_with"}:
            section, _, parameter = key.partition("/")
            golden.setdefault(section, {})[parameter] = file[key]
    start = {k: (v / GRID).astype(np.float32) for k, v in golden["start"].items()}
    model = Matrices({k: v.shape for k, v in start.items()})
    assert set(parameters.declared(model)) == set(start)

    tx = optim.make(Config(optim=OPTIMIZERS[name]), model)
    params = nested(start)
    state = tx.init(params)
    for step in range(len(SCALES)):
        grads = {
            k: step_gradient(v, step).astype(np.float32)
            for k, v in golden["gradient"].items()
        }
        updates, state = tx.update(nested(grads), state, params)
        params: Any = optax.apply_updates(params, updates)

    flat = nnx.traversals.flatten_mapping(params)
    for path, p in flat.items():
        parameter = "/".join(path)
        change = np.asarray(p, np.float64) - start[parameter]
        parity.close(parameter, change[KEPT], golden[name][parameter])

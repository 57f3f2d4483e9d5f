"""Runs our T5 on a reference's weights and batch, and compares; needs no torch."""

import functools
import pathlib

import jax
import numpy as np

from t5x_lite import model as model_lib
from t5x_lite import step
from t5x_lite.config import Config, LossConfig, ModelConfig
from t5x_lite.interop import t5

GOLDENS = pathlib.Path(__file__).parent / "goldens"
# Measured: below 2e-6 everywhere; 2e-4 of the largest value is what issue 2 asks for.
NORMWISE, ELEMENTWISE = 2e-5, 2e-4


def streams(batch: dict) -> dict:
    """Ids, attention masks and labels (-100 = ignored) as our batch."""

    def stream(tokens, mask, ranks):
        places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), mask.shape)
        ranks = places if ranks else np.zeros_like(places)
        return dict(tokens=tokens, segments=mask, positions=places, ranks=ranks)

    labels = batch["labels"]
    decoder = stream(batch["decoder_inputs"], batch["decoder_mask"], ranks=True)
    decoder["targets"] = np.maximum(labels, 0)
    decoder["weights"] = (labels >= 0).astype(np.float32)
    encoder = stream(batch["inputs"], batch["inputs_mask"], ranks=False)
    return dict(encoder=encoder, decoder=decoder)


def logits(cfg: ModelConfig, params: dict, batch: dict) -> np.ndarray:
    """float32 [B, T, V]; those of padded queries mean nothing."""
    model, ours = model_lib.build(cfg), streams(batch)

    @jax.jit
    def forward(params):
        bound = model_lib.bind(model, params)
        return bound.logits(bound.outputs(ours).cells_BKE)

    return np.asarray(forward(params))


def grads(cfg: ModelConfig, params: dict, batch: dict, z_loss: float, chunk: int = 0):
    """-> loss without z-loss, gradients under their names; through our train loss."""
    config = Config(model=cfg, loss=LossConfig(z_loss=z_loss, chunk=chunk))
    model, ours = model_lib.build(cfg), streams(batch)

    # Compiled in half the time; it runs for milliseconds.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    @functools.partial(jax.grad, has_aux=True)
    def of_mean(params):
        mean, sums = step.batch_sums(model, params, ours, config, cfg.vocab_size)
        return mean, sums["tokens"].nll / sums["tokens"].weight

    grads, loss = of_mean(params)
    return float(loss), t5.to_hf(jax.tree.map(np.asarray, grads), cfg)


def compare_logits(cfg: ModelConfig, params: dict, batch: dict, reference: dict):
    """Logits wherever there is a query."""
    seen = batch["decoder_mask"] > 0
    close("logits", logits(cfg, params, batch)[seen], reference["logits"][seen])


def compare_grads(cfg: ModelConfig, params: dict, batch: dict, reference: dict, **kw):
    """Loss and the gradient of every parameter that the reference has."""
    loss, ours = grads(cfg, params, batch, **kw)
    np.testing.assert_allclose(loss, reference["loss"], rtol=1e-5)
    theirs = {
        k.removeprefix("grads/"): v
        for k, v in reference.items()
        if k.startswith("grads/")
    }
    copies = {*t5.COPIES} | ({"lm_head.weight"} if cfg.tie_embeddings else set())
    assert set(ours) - copies == set(theirs)
    for name, grad in theirs.items():
        close(f"gradient of {name}", ours[name], grad)


def close(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Largest difference over largest value, and every element for itself."""
    top = np.abs(theirs).max()
    assert top > 1e-4, f"{name} is almost zero in the reference: it tests nothing"
    worst = np.abs(ours - theirs).max() / top
    assert worst < NORMWISE, f"{name}: off by {worst:.1e} of the largest value"
    np.testing.assert_allclose(
        ours, theirs, rtol=ELEMENTWISE, atol=NORMWISE * top, err_msg=name
    )

"""The pure train and evaluation steps."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from t5x_lite import losses
from t5x_lite.config import Config
from t5x_lite.model import TRAINED_STREAM, bind
from t5x_lite.sharding import constrain


def batch_sums(
    model: nnx.Module, params, batch, cfg: Config, used_ids: int, key=None
) -> losses.Sums:
    """Loss sums of one batch; parameters are cast once to the compute dtype.

    Args:
      used_ids: vocabulary size; the model may have more (padded) rows.
      key: of dropout; None = no dropout.
    """
    cast = jax.tree.map(lambda p: p.astype(cfg.model.dtype), params)
    bound = bind(model, cast)
    y_BTD = bound.hidden(batch, key)
    stream = batch[TRAINED_STREAM[cfg.model.structure]]
    B, T, _ = y_BTD.shape
    ways = max(1, cfg.sharding.data) * max(1, cfg.sharding.fsdp)
    V = cfg.model.vocab_size
    return losses.cross_entropy(
        y_BTD,
        bound.output_kernel,
        stream["targets"],
        stream["weights"],
        cfg.loss.z_loss,
        used_ids,
        losses.chunk_length(cfg.loss.chunk, -(-B // ways), T, V),
    )


def make_train_step(
    model: nnx.Module, tx: optax.GradientTransformation, cfg: Config, used_ids: int
):
    """-> train_step(state, batch) -> (state, metrics); jit it with donated state.

    Gradients are of the summed objective, divided once by the summed weight, so that
    microbatches and hosts cannot change the mean. Dropout depends on (seed, step).
    """

    def sums_and_grads(params, batch, key):
        def objective(params):
            sums = batch_sums(model, params, batch, cfg, used_ids, key)
            return sums.objective, sums

        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return sums, grads

    def train_step(state, batch):
        batch = dict(batch)
        fingerprint = jnp.sum(batch.pop("fingerprint"), dtype=jnp.uint32)
        key = None
        if cfg.model.dropout:
            key = jax.random.fold_in(jax.random.key(cfg.seed), state["step"])
        sums, grads = accumulate(
            sums_and_grads, state["params"], batch, key, cfg.optim.microbatches
        )
        weight = jnp.maximum(sums.weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {
            "sums": sums,
            "grad_norm": optax.tree.norm(grads),
            "fingerprint": fingerprint,
        }
        return {"params": params, "opt": opt, "step": state["step"] + 1}, metrics

    return train_step


def accumulate(sums_and_grads, params, batch, key, microbatches: int):
    """Sums and gradients over `microbatches` slices of the batch, one at a time."""
    if microbatches == 1:
        return sums_and_grads(params, batch, key)

    def split(x):
        # Every k-th row: each device keeps its own rows, nothing moves between them.
        rows = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:])
        return constrain(
            jnp.moveaxis(rows, 1, 0), None, "batch", *[None] * (x.ndim - 1)
        )

    def body(total, of_slice):
        part, i = of_slice
        own = None if key is None else jax.random.fold_in(key, i)
        return jax.tree.map(jnp.add, total, sums_and_grads(params, part, own)), None

    slices = (jax.tree.map(split, batch), jnp.arange(microbatches))
    shapes = jax.eval_shape(
        sums_and_grads, params, jax.tree.map(lambda x: x[0], slices[0]), key
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, slices)[0]


def make_eval_step(model: nnx.Module, cfg: Config, used_ids: int):
    """-> eval_step(params, batch) -> Sums, without dropout."""

    def eval_step(params, batch):
        batch = {k: v for k, v in batch.items() if k != "fingerprint"}
        return batch_sums(model, params, batch, cfg, used_ids)

    return eval_step

"""The pure train and evaluation steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from t5x_lite import losses, optim
from t5x_lite import state as state_lib
from t5x_lite.config import Config
from t5x_lite.model import Outputs, bind, build, trained_stream
from t5x_lite.sharding import constrain


def totals(batch: dict, cfg: Config) -> dict[str, jax.Array]:
    """What each loss is divided by: its weight in the whole batch, known beforehand.

    So microbatches and hosts cannot change a mean, and losses of different weights
    (tokens and sentence pairs, say) add up in one backward pass.
    """
    stream = batch[trained_stream(cfg.model)]
    found = {"tokens": jnp.sum(stream["weights"])}
    if "labels" in stream:
        found["classes"] = jnp.sum(row_weights(stream))
    if "entity_targets" in stream:
        there_BM = (stream["entity_targets"] > 0).astype(jnp.float32)
        found["entities"] = jnp.sum(there_BM * row_weights(stream)[:, None])
    if cfg.model.generator_width:
        found["replaced"] = jnp.sum(text_weights(stream))
    return {name: jnp.maximum(total, 1.0) for name, total in found.items()}


def row_weights(stream: dict) -> jax.Array:
    """float32 [B]: 0 for rows that only fill up a batch."""
    return (jnp.sum(stream["weights"], axis=1) > 0).astype(jnp.float32)


def text_weights(stream: dict) -> jax.Array:
    """float32 [B, T]: 1 for every token of a row that counts."""
    text_BT = (stream["segments"] > 0).astype(jnp.float32)
    return text_BT * row_weights(stream)[:, None]


def batch_sums(
    model: nnx.Module, params, batch, cfg: Config, used_ids: int, whole=None, key=None
) -> tuple[jax.Array, dict[str, losses.Sums]]:
    """-> (what is minimised, loss sums by name); parameters are cast once.

    Args:
      used_ids: vocabulary size; the model may have more (padded) rows.
      whole: `totals` of the batch that this is a part of; None = of this one.
      key: of dropout; None = no dropout.
    """
    cast = jax.tree.map(lambda p: p.astype(cfg.model.dtype), params)
    bound = bind(model, cast)
    stream = batch[trained_stream(cfg.model)]
    whole = totals(batch, cfg) if whole is None else whole

    def over_vocabulary(assembly, out: Outputs) -> losses.Sums:
        B, K, _ = out.cells_BKE.shape
        ways = max(1, cfg.sharding.data) * max(1, cfg.sharding.fsdp)
        V = cfg.model.vocab_size
        return losses.cross_entropy(
            out.cells_BKE,
            assembly.output_kernel,
            stream["targets"],
            stream["weights"],
            cfg.loss.z_loss,
            used_ids,
            losses.chunk_length(cfg.loss.chunk, -(-B // ways), K, V),
            assembly.output_bias,
        )

    if cfg.model.generator_width:
        sums = bound.sums(batch, over_vocabulary, text_weights(stream), used_ids, key)
    else:
        out = bound.outputs(batch, key)
        sums = {"tokens": over_vocabulary(bound, out)}
        if out.classes_BC is not None:
            rows_B = row_weights(stream)
            logits_BC, labels_B = out.classes_BC, stream["labels"]
            sums["classes"] = losses.classification(logits_BC, labels_B, rows_B)
        if out.mentions_BMC is not None:
            sums["entities"] = bound.entity_sums(out, stream, row_weights(stream))
    objective = jnp.zeros((), jnp.float32)
    for name, each in sums.items():
        factor = cfg.loss.replaced_weight if name == "replaced" else 1.0
        objective += factor * each.objective / whole[name]
    return objective, sums


def make_train_step(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    cfg: Config,
    used_ids: int,
    abstract_state: dict | None = None,
):
    """-> train_step(state, batch) -> (state, metrics); jit it with donated state.

    Dropout depends on (seed, step).

    Args:
      abstract_state: says what lies in the host's memory (config.optim.offload).
    """

    def sums_and_grads(params, batch, key, whole):
        def objective(params):
            return batch_sums(model, params, batch, cfg, used_ids, whole, key)

        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return sums, grads

    rate = optim.schedule(cfg)

    def train_step(state, batch):
        batch = dict(batch)
        fingerprint = jnp.sum(batch.pop("fingerprint"), dtype=jnp.uint32)
        key, whole = None, totals(batch, cfg)
        if cfg.model.dropout or cfg.model.generator_width:
            key = jax.random.fold_in(jax.random.key(cfg.seed), state["step"])
        sums, grads = accumulate(
            functools.partial(sums_and_grads, whole=whole),
            state["params"],
            batch,
            key,
            cfg.optim.microbatches,
            cfg.optim.accumulate_dtype,
        )
        opt = state["opt"]
        if cfg.optim.offload:
            assert abstract_state is not None
            opt = state_lib.on_device(opt, abstract_state["opt"])
        updates, opt = tx.update(grads, opt, state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {
            "sums": sums,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(rate(state["step"]), jnp.float32),
            "fingerprint": fingerprint,
        }
        return {"params": params, "opt": opt, "step": state["step"] + 1}, metrics

    return train_step


def accumulate(
    sums_and_grads, params, batch, key, microbatches: int, dtype: str = "float32"
):
    """Sums and gradients over `microbatches` slices of the batch, one at a time.

    Args:
      dtype: of the running sum of the gradients; loss sums are float32.
    """
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
        sums, grads = sums_and_grads(params, part, own)
        grads = jax.tree.map(lambda g: g.astype(dtype), grads)
        return jax.tree.map(jnp.add, total, (sums, grads)), None

    slices = (jax.tree.map(split, batch), jnp.arange(microbatches))
    shapes = jax.eval_shape(
        sums_and_grads, params, jax.tree.map(lambda x: x[0], slices[0]), key
    )
    sums, grads = shapes
    zeros = (
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums),
        jax.tree.map(lambda s: jnp.zeros(s.shape, dtype), grads),
    )
    sums, grads = jax.lax.scan(body, zeros, slices)[0]
    return sums, jax.tree.map(lambda g, s: g.astype(s.dtype), grads, shapes[1])


def make_eval_step(model: nnx.Module, cfg: Config, used_ids: int):
    """-> eval_step(params, batch) -> sums by name, without dropout."""

    still = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dropout=0.0))
    model = build(still.model)

    def eval_step(params, batch):
        batch = {k: v for k, v in batch.items() if k != "fingerprint"}
        # ELECTRA's generator samples, the same way in every evaluation.
        key = jax.random.key(cfg.seed) if cfg.model.generator_width else None
        return batch_sums(model, params, batch, still, used_ids, None, key)[1]

    return eval_step

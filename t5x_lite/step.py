"""The pure train and evaluation steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from t5x_lite import distill, heads, losses, optim
from t5x_lite import state as state_lib
from t5x_lite.config import Config
from t5x_lite.model import Outputs, bind, build, trained_stream
from t5x_lite.parameters import name_of
from t5x_lite.sharding import constrain


def totals(batch: dict, cfg: Config) -> dict[str, jax.Array]:
    """What each loss is divided by: its weight in the whole batch, known beforehand.

    So microbatches and hosts cannot change a mean, and losses of different weights
    (tokens and sentence pairs, say) add up in one backward pass.
    """
    stream = batch[trained_stream(cfg.model)]
    found = {"tokens": jnp.sum(stream["weights"])}
    if cfg.model.head:
        found["head"] = jnp.sum(heads.answers(cfg.model, stream)[1])
    elif "labels" in stream:
        found["classes"] = jnp.sum(row_weights(stream))
    if "entity_targets" in stream:
        there_BM = (stream["entity_targets"] > 0).astype(jnp.float32)
        found["entities"] = jnp.sum(there_BM * row_weights(stream)[:, None])
    if cfg.model.generator_width:
        found["replaced"] = jnp.sum(text_weights(stream))
    if cfg.distill:
        found["taught"] = found[heads.main(cfg.model)]
        found["hidden"] = jnp.sum(stream["segments"] > 0).astype(jnp.float32)
    return {name: jnp.maximum(total, 1.0) for name, total in found.items()}


def row_weights(stream: dict) -> jax.Array:
    """float32 [B]: 0 for rows that only fill up a batch."""
    return (jnp.sum(stream["weights"], axis=1) > 0).astype(jnp.float32)


def text_weights(stream: dict) -> jax.Array:
    """float32 [B, T]: 1 for every token of a row that counts."""
    text_BT = (stream["segments"] > 0).astype(jnp.float32)
    return text_BT * row_weights(stream)[:, None]


def batch_sums(
    model: nnx.Module,
    params,
    batch,
    cfg: Config,
    used_ids: int,
    whole=None,
    key=None,
    lessons=None,
) -> tuple[jax.Array, dict[str, losses.Sums]]:
    """-> (what is minimised, loss sums by name); parameters are cast once.

    Args:
      used_ids: vocabulary size; the model may have more (padded) rows.
      whole: `totals` of the batch that this is a part of; None = of this one.
      key: of dropout; None = no dropout.
      lessons: (bound model, its outputs) -> loss sums of `distill`, or None.
    """
    bound = bind(model, params, cfg.model.dtype)
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
            cfg.loss.label_smoothing,
        )

    if cfg.model.generator_width:
        sums = bound.sums(batch, over_vocabulary, text_weights(stream), used_ids, key)
    else:
        hidden = lessons is not None and distill.knobs(cfg)["hidden"] > 0
        out = bound.outputs(batch, key, hidden) if hidden else bound.outputs(batch, key)
        sums = {} if lessons is None else lessons(bound, out)
        if out.head is not None:
            smoothing = cfg.loss.label_smoothing
            sums["head"] = heads.sums(cfg.model, out.head, stream, smoothing)
        if not cfg.model.head or cfg.loss.lm_weight:
            sums["tokens"] = over_vocabulary(bound, out)
        if out.classes_BC is not None:
            rows_B = row_weights(stream)
            logits_BC, labels_B = out.classes_BC, stream["labels"]
            sums["classes"] = losses.classification(logits_BC, labels_B, rows_B)
        if out.mentions_BMC is not None:
            sums["entities"] = bound.entity_sums(out, stream, row_weights(stream))
    factors = {"replaced": cfg.loss.replaced_weight}
    if cfg.model.head:
        factors["tokens"] = cfg.loss.lm_weight
    if lessons is not None:
        knobs = distill.knobs(cfg)
        factors |= {"taught": knobs["alpha"], "hidden": knobs["hidden"]}
        factors[heads.main(cfg.model)] = 1.0 - knobs["alpha"]
    objective = jnp.zeros((), jnp.float32)
    for name, each in sums.items():
        factor = factors.get(name, 1.0)
        objective += factor * each.objective / whole[name]
    return objective, sums


def make_train_step(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    cfg: Config,
    used_ids: int,
    abstract_state: dict | None = None,
    teacher: distill.Teacher | None = None,
):
    """-> train_step(state, batch) -> (state, metrics); jit it with donated state.

    With config.optim.l2_start or config.distill it takes a third argument, what
    `run.Setup.beside` gives.

    Dropout depends on (seed, step). A step whose loss or gradient is not finite leaves
    parameters and optimizer as they are, bit for bit (metrics["finite"] is False then);
    only state["step"], the place in the data, goes on. The learning rate follows the
    updates that were made.

    Args:
      abstract_state: says what lies in the host's memory (config.optim.offload).
      teacher: of config.distill, or None.
    """

    trained = optim.trainable(cfg, model)

    def sums_and_grads(params, batch, key, whole, taught):
        """Gradients are None where a parameter is frozen."""

        def objective(moving):
            every = filled(moving, params, lambda p: p)
            lessons = None
            if teacher is not None:
                lessons = functools.partial(teacher.lessons, taught, batch, used_ids)
            return batch_sums(model, every, batch, cfg, used_ids, whole, key, lessons)

        moving = jax.tree.map_with_path(
            lambda path, p: p if name_of(path) in trained else None, params
        )
        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(moving)
        return sums, grads

    rate = optim.schedule(cfg)

    def train_step(state, batch, beside=None):
        batch, beside = dict(batch), beside or {}
        fingerprint = jnp.sum(batch.pop("fingerprint"), dtype=jnp.uint32)
        key, whole = None, totals(batch, cfg)
        if cfg.model.dropout or cfg.model.generator_width:
            key = jax.random.fold_in(jax.random.key(cfg.seed), state["step"])
        sums, grads = accumulate(
            functools.partial(
                sums_and_grads, whole=whole, taught=beside.get("teacher")
            ),
            state["params"],
            batch,
            key,
            cfg.optim.microbatches,
            cfg.optim.accumulate_dtype,
            heads.rows(cfg.model),
        )
        given, grads = grads, filled(grads, state["params"], jnp.zeros_like)
        old = state["opt"]
        if cfg.optim.offload:
            assert abstract_state is not None
            old = state_lib.on_device(old, abstract_state["opt"])
        extra = {"start": beside["start"]} if "start" in beside else {}
        updates, opt = tx.update(grads, old, state["params"], **extra)
        params = optax.apply_updates(state["params"], updates)
        moved = jax.tree.map(
            lambda g, p: None if g is None else p,
            *(given, params),
            is_leaf=lambda x: x is None,
        )
        params = filled(moved, state["params"], lambda p: p)
        norm = optax.tree.norm(grads)
        finite = all_finite(sums) & jnp.isfinite(norm)
        metrics = {
            "sums": sums,
            "finite": finite,
            "grad_norm": norm,
            "grad_norms": jnp.stack(
                [optax.tree.norm([g]) for g in jax.tree.leaves(grads)]
            ),
            "learning_rate": jnp.asarray(rate(updates_done(old, state)), jnp.float32),
            "fingerprint": fingerprint,
            "nonpadding": nonpadding(batch),
        }
        # One pass over what the update reads anyway; no copy of the state.
        params, opt = jax.tree.map(
            lambda new, kept: jnp.where(finite, new, kept),
            (params, opt),
            (state["params"], old),
        )
        return {"params": params, "opt": opt, "step": state["step"] + 1}, metrics

    return train_step


def nonpadding(batch) -> jax.Array:
    """Part of the cells of all streams that is no padding: float32 []."""
    cells = [stream["segments"] > 0 for stream in batch.values()]
    filled_cells = sum(jnp.sum(cell, dtype=jnp.int32) for cell in cells)
    return jnp.float32(filled_cells) / sum(cell.size for cell in cells)


def filled(tree, params, make):
    """`tree`, its None leaves made of those of `params`."""
    return jax.tree.map(
        lambda x, p: make(p) if x is None else x,
        tree,
        params,
        is_leaf=lambda x: x is None,
    )


def all_finite(tree) -> jax.Array:
    """bool []: is no number in it NaN or infinite?"""
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, leaves)


def updates_done(opt, state) -> jax.Array:
    """int32 []: what the schedule counts; steps that were skipped are not in it."""

    def counts(x):
        return isinstance(x, optax.ScaleByScheduleState)

    found = [s.count for s in jax.tree.leaves(opt, is_leaf=counts) if counts(s)]
    return found[0] if found else state["step"]


def accumulate(
    sums_and_grads,
    params,
    batch,
    key,
    microbatches: int,
    dtype: str = "float32",
    together: int = 1,
):
    """Sums and gradients over `microbatches` slices of the batch, one at a time.

    Args:
      dtype: of the running sum of the gradients; loss sums are float32.
      together: rows that follow each other and are one example.
    """
    if microbatches == 1:
        return sums_and_grads(params, batch, key)

    def split(x):
        # Every k-th row: each device keeps its own rows, nothing moves between them.
        B, rest = x.shape[0] // microbatches, x.shape[1:]
        rows = x.reshape(B // together, microbatches, together, *rest)
        rows = jnp.moveaxis(rows, 1, 0).reshape(microbatches, B, *rest)
        return constrain(rows, None, "batch", *[None] * (x.ndim - 1))

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


def make_predict_step(model: nnx.Module, cfg: Config):
    """-> predict(params, batch) -> what the head says, see `heads.predictions`."""
    still = dataclasses.replace(cfg.model, dropout=0.0)
    model = build(still)

    def predict(params, batch):
        batch = {k: v for k, v in batch.items() if k != "fingerprint"}
        bound = bind(model, params, still.dtype)
        return heads.predictions(still, bound.outputs(batch).head)

    return predict

"""Heads: what is read off a stack's output for a task, and its loss.

| head       | reads                | says                   | is trained by        |
| ---------- | -------------------- | ---------------------- | -------------------- |
| class      | the `pooled` cell    | [B, K] logits          | `labels`             |
| regression | the `pooled` cell    | [B] numbers            | `values`             |
| choice     | it, of n rows        | [B/n, n] logits        | `labels`             |
| similarity | it, of 2 rows, added | [B/2, K] (K=1: [B/2])  | `labels` (`values`)  |
| tags       | every cell           | [B, T, K] logits       | `tags`               |
| span       | every cell           | [B, T] logits, twice   | `span`, `allowed`    |

The structure decides which cell is pooled (`t5x_lite/example.py`): BERT and T5's
encoder the first one (Devlin et al. 2019, section 3), GPT-1 the last token of the text
(Radford et al. 2018, section 3.3), BART the last one of a decoder that reads the text
again (Lewis et al. 2020, section 3.1). A text pair is one row; the examples of `choice`
and `similarity` are several rows that follow each other, with labels in the first one.

Axis letters: B batch, T length, D model, K classes or outputs, n rows of an example.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_lite import layers, losses
from t5x_lite.model_config import ModelConfig
from t5x_lite.parameters import ones, param, weight_init, zeros

POOLED = ("class", "regression", "choice", "similarity")
FIELDS = {
    **dict.fromkeys(("class", "choice", "similarity"), "labels"),
    **dict(regression="values", tags="tags", span="span"),
}
NEVER = -1e9  # logit of a cell that is not allowed; finite, so that no row is NaN


class Mix(nnx.Module):
    """gamma * sum of softmax(weights)_l h_l over layers (Peters et al. 2018, eq. 1)."""

    def __init__(self, count: int):
        self.weights = param((count,), (None,), zeros)
        self.gamma = param((1,), (None,), ones)

    def __call__(self, h_LBTD):
        shares_L = jax.nn.softmax(self.weights[...].astype(jnp.float32))
        shares_L *= self.gamma[...].astype(jnp.float32)
        return jnp.einsum("L,LBTD->BTD", shares_L.astype(h_LBTD.dtype), h_LBTD)


class Head(nnx.Module):
    """A linear layer over cells, for `POOLED` heads after BERT's pooler or none."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        D, K = cfg.d_model, outputs(cfg)
        if cfg.head in POOLED and cfg.head_pooler:
            self.pooler = param((D, D), ("embed", None), weight_init(cfg, D**-0.5))
            self.pooler_bias = param((D,), ("norm",), zeros)
        self.kernel = param((D, K), ("embed", None), weight_init(cfg, D**-0.5))
        self.bias = param((K,), (None,), zeros)

    def __call__(self, y_BTD, stream: dict, key=None) -> jax.Array:
        """float32 logits in the shape of the module's table, K or 2 last.

        Args:
          y_BTD: the stack's own cells.
          key: of dropout; None = none.
        """
        rate, n = self.cfg.dropout, rows(self.cfg)
        if self.cfg.head in POOLED:
            at_B11 = stream["pooled"][:, None, None]
            y_BTD = jnp.take_along_axis(y_BTD, at_B11, axis=1)
            if hasattr(self, "pooler"):
                y_BTD = layers.dropout(y_BTD, rate, layers.fold(key, 0), along=1)
                y_BTD = layers.product("BTD,DE->BTE", y_BTD, self.pooler[...])
                y_BTD = jnp.tanh(y_BTD + self.pooler_bias[...][None, None])
        y_BTD = layers.dropout(y_BTD, rate, layers.fold(key, 1), along=1)
        if self.cfg.head == "similarity":  # in both orders, added
            y_BTD = y_BTD.reshape(-1, n, y_BTD.shape[-1]).sum(1, keepdims=True)
        logits_BTK = layers.product("BTD,DK->BTK", y_BTD, self.kernel[...])
        logits_BTK = (logits_BTK + self.bias[...][None, None]).astype(jnp.float32)
        if self.cfg.head == "choice":
            return logits_BTK.reshape(-1, n)
        if self.cfg.head in POOLED:
            return logits_BTK[:, 0]
        if self.cfg.head == "span" and "allowed" in stream:
            allowed_BT1 = stream["allowed"][..., None] > 0
            return jnp.where(allowed_BT1, logits_BTK, NEVER)
        return logits_BTK


def outputs(cfg: ModelConfig) -> int:
    """Numbers that the head makes of a cell."""
    fixed = dict(regression=1, choice=1, span=2)
    return fixed.get(cfg.head, cfg.classes)


def rows(cfg: ModelConfig) -> int:
    """Rows of a batch that are one example."""
    return dict(choice=cfg.choices, similarity=2).get(cfg.head, 1)


def is_number(cfg: ModelConfig) -> bool:
    """Does the head predict numbers, by squared error?"""
    return cfg.head == "regression" or (cfg.head == "similarity" and cfg.classes == 1)


def main(cfg: ModelConfig) -> str:
    """The loss that a run is judged by: its name in the loss sums."""
    return "head" if cfg.head else "tokens"


def check_batch(cfg: ModelConfig, stream: dict):
    """Refuses host batches that a head cannot be trained on.

    Raises:
      ValueError: a field is missing, or an answer the head cannot give.
    """
    needed = [FIELDS[cfg.head]] if not is_number(cfg) else ["values"]
    needed += ["pooled"] if cfg.head in POOLED else []
    if missing := [name for name in needed if name not in stream]:
        raise ValueError(
            f"config.model.head={cfg.head!r} needs the field(s) {missing}; the data "
            f"gives {sorted(stream)}. Choose the head of the task (config.data.tasks), "
            "or config.model.head='' for text."
        )
    kinds = cfg.choices if cfg.head == "choice" else cfg.classes
    field = needed[0]
    if field in ("labels", "tags") and (high := int(stream[field].max())) >= kinds:
        name = "choices" if cfg.head == "choice" else "classes"
        raise ValueError(
            f"config.model.{name}={kinds}, but the data's {field} go up to {high}. "
            f"Set it to {high + 1} or more."
        )


def answers(cfg: ModelConfig, stream: dict) -> tuple[Any, Any]:
    """(what is to be predicted, its float32 weights), of NumPy or JAX arrays alike."""
    n = rows(cfg)
    if is_number(cfg):
        values = stream["values"].reshape(-1, n)[:, 0]
        there = values == values  # NaN fills up
        return values, there.astype("float32")
    if cfg.head == "tags":
        found = stream["tags"]
    elif cfg.head == "span":
        return stream["span"], (stream["span"][:, 0] >= 0).astype("float32")
    else:
        found = stream["labels"].reshape(-1, n)[:, 0]
    return found, (found >= 0).astype("float32")


def sums(cfg: ModelConfig, logits, stream: dict, smoothing: float) -> losses.Sums:
    """The head's loss: cross-entropy in nats, or squared errors.

    `weight` counts examples, for tags cells. A span's loss is the mean of its ends'
    (Devlin et al. 2019's code), and it is correct if both ends are.
    """
    given, weights = answers(cfg, stream)
    if is_number(cfg):
        error = jnp.where(weights > 0, logits[:, 0] - given, 0.0)
        nll, zero = jnp.sum(error**2), jnp.zeros((), jnp.float32)
        return losses.Sums(nll, nll, zero, zero, jnp.sum(weights))
    given = jnp.maximum(given, 0)
    if cfg.head != "span":
        return losses.classification(logits, given, weights, smoothing)
    ends = [
        losses.classification(logits[..., end], given[:, end], weights)
        for end in (0, 1)  # not smoothed: most cells are not allowed
    ]
    both_B = jnp.all(jnp.argmax(logits, axis=1) == given, axis=-1)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *ends)
    return mean._replace(correct=jnp.sum(both_B * weights))


def predictions(cfg: ModelConfig, logits) -> dict[str, jax.Array]:
    """What `step.make_predict_step` gives of the head's logits."""
    if is_number(cfg):
        return {"values": logits[:, 0]}
    if cfg.head == "tags":
        share_BTK = jax.nn.softmax(logits, axis=-1)
        tags_BT = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return {"tags": tags_BT, "probability": jnp.max(share_BTK, axis=-1)}
    if cfg.head == "span":
        return {"start_logits": logits[..., 0], "end_logits": logits[..., 1]}
    return {"logits": logits}


def baseline(cfg: ModelConfig, train, heldout) -> float:
    """Held-out loss of a guess that knows the training answers only; on NumPy.

    Each class as often as in training, each seen once more; the mean; for spans, any
    allowed cell.

    Args:
      train, heldout: iterables of host streams.
    """
    if cfg.head == "span":
        logs = [
            np.log(np.maximum(s["allowed"].sum(axis=1), 1))[answers(cfg, s)[1] > 0]
            for s in heldout
        ]
        return float(np.mean(np.concatenate(logs)))
    seen, asked = (
        np.concatenate([x[w > 0] for x, w in (answers(cfg, s) for s in of)])
        for of in (train, heldout)
    )
    if is_number(cfg):
        return float(np.mean((asked - np.mean(seen)) ** 2))
    kinds = cfg.choices if cfg.head == "choice" else cfg.classes
    counts_K = np.bincount(seen, minlength=kinds) + 1
    return float(-np.mean(np.log(counts_K / counts_K.sum())[asked]))

"""Token-weighted sums. A mean is taken once, at the end, from (sum, weight) pairs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite.sharding import constrain


class Sums(NamedTuple):
    """float32 scalars summed over tokens; `objective` is what is differentiated."""

    objective: jax.Array  # nll, smoothed if asked, + z
    nll: jax.Array  # negative log likelihood, nats
    z: jax.Array  # z_loss * log(Z)^2
    correct: jax.Array  # tokens whose most likely id is the target
    weight: jax.Array  # token weights


LOGITS_PER_CHUNK = 2**24  # float32 numbers: 64 MiB


def chunk_length(asked: int, batch: int, length: int, vocab: int) -> int:
    """Target positions per chunk, so that [batch, chunk, vocab] stays small.

    Args:
      asked: config.loss.chunk; 0 = as many as fit into 64 MiB of logits.
      batch: rows of one device.
    """
    most = asked or max(1, LOGITS_PER_CHUNK // (batch * vocab))
    chunks = -(-length // min(most, length))
    return -(-length // chunks)


def cross_entropy(
    x_BTD,
    kernel_VD,
    targets_BT,
    weights_BT,
    z_loss,
    used_ids,
    chunk,
    bias_V=None,
    smoothing=0.0,
) -> Sums:
    """Softmax cross-entropy of x @ kernel.T without holding [B, T, V] logits.

    The gradient is made in the same pass over chunks of positions as the value, so no
    logits are computed twice and none are kept (the head is the largest activation by
    far: 8 x 114 x 32128 float32 are 112 MiB).

    Args:
      z_loss: weight of log(Z)^2 (Raffel et al.'s code; Chowdhery et al. 2022, sec. 5).
      used_ids: vocabulary size; logits of the padded ids beyond it are left out.
      chunk: positions per chunk.
      bias_V: of the logits, or None.
      smoothing: share of each target that is spread over all used ids (Szegedy et al.
        2016, section 7); `nll` is that of the target alone.

    Returns:
      Sums over all tokens; only `objective` has a gradient.
    """
    arrays = (x_BTD, kernel_VD, bias_V, targets_BT, weights_BT)
    sums: Any = _cross_entropy(*arrays, z_loss, used_ids, chunk, smoothing)
    return sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _cross_entropy(x_BTD, kernel_VD, bias_V, targets_BT, weights_BT, *static):
    inputs = (x_BTD, kernel_VD, bias_V, targets_BT, weights_BT)
    return _chunked(*inputs, *static, grad=False)[0]


def _forward(x_BTD, kernel_VD, bias_V, targets_BT, weights_BT, *static):
    inputs = (x_BTD, kernel_VD, bias_V, targets_BT, weights_BT)
    return _chunked(*inputs, *static, grad=True)


def _backward(z_loss, used_ids, chunk, smoothing, grads, cotangent: Sums):
    scale = cotangent.objective
    scaled = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
    return (*scaled, None, None)


_cross_entropy.defvjp(_forward, _backward)


def _chunked(
    x_BTD,
    kernel_VD,
    bias_V,
    targets_BT,
    weights_BT,
    z_loss,
    used_ids,
    chunk,
    smoothing,
    grad,
):
    """-> (Sums, gradients of x, kernel and bias; None without `grad`)."""
    B, T, D = x_BTD.shape
    V = kernel_VD.shape[0]
    chunks = -(-T // chunk)
    fill = chunks * chunk - T

    def split(a):
        a = jnp.pad(a, ((0, 0), (0, fill)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, chunks, chunk, *a.shape[2:]), 1, 0)

    def body(carry, of_chunk):
        sums, dkernel_VD, dbias_V = carry
        x_BCD, targets_BC, weights_BC = of_chunk
        x_BCD = constrain(x_BCD, "batch", "predicted", "residual")
        logits_BCV = jnp.einsum(
            "BCD,VD->BCV", x_BCD, kernel_VD, preferred_element_type=jnp.float32
        )
        if bias_V is not None:
            logits_BCV += bias_V.astype(jnp.float32)[None, None]
        logits_BCV = constrain(logits_BCV, "batch", "predicted", "vocab")
        ids_11V = jnp.arange(V)[None, None]
        if used_ids < V:
            logits_BCV = jnp.where(ids_11V < used_ids, logits_BCV, -jnp.inf)
        top_BC = jnp.max(logits_BCV, axis=-1)
        exp_BCV = jnp.exp(logits_BCV - top_BC[..., None])
        total_BC = jnp.sum(exp_BCV, axis=-1)
        log_z_BC = jnp.log(total_BC) + top_BC
        is_target_BCV = ids_11V == targets_BC[..., None]
        hit_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0), axis=-1)
        nll = jnp.sum((log_z_BC - hit_BC) * weights_BC)
        z = jnp.sum(z_loss * log_z_BC**2 * weights_BC)
        correct = jnp.sum(jnp.where(hit_BC >= top_BC, weights_BC, 0.0))
        objective = nll + z
        if smoothing:
            used_BCV = jnp.where(ids_11V < used_ids, logits_BCV, 0.0)
            mean_BC = jnp.sum(used_BCV, axis=-1) / used_ids
            objective += smoothing * jnp.sum((hit_BC - mean_BC) * weights_BC)
        new = Sums(objective, nll, z, correct, jnp.sum(weights_BC))
        sums = jax.tree.map(jnp.add, sums, new)
        if not grad:
            return (sums, dkernel_VD, dbias_V), None
        slope_BC = weights_BC * (1.0 + 2.0 * z_loss * log_z_BC) / total_BC
        wanted_BC = weights_BC if not smoothing else weights_BC * (1.0 - smoothing)
        dlogits_BCV = exp_BCV * slope_BC[..., None] - jnp.where(
            is_target_BCV, wanted_BC[..., None], 0.0
        )
        if smoothing:
            spread_BC1 = weights_BC[..., None] * (smoothing / used_ids)
            dlogits_BCV -= jnp.where(ids_11V < used_ids, spread_BC1, 0.0)
        if bias_V is not None:
            dbias_V += jnp.sum(dlogits_BCV, axis=(0, 1))
        dlogits_BCV = dlogits_BCV.astype(kernel_VD.dtype)
        dx_BCD = jnp.einsum("BCV,VD->BCD", dlogits_BCV, kernel_VD)
        dkernel_VD += jnp.einsum(
            "BCV,BCD->VD", dlogits_BCV, x_BCD, preferred_element_type=jnp.float32
        )
        return (sums, dkernel_VD, dbias_V), dx_BCD

    zero = jnp.zeros((), jnp.float32)
    dkernel_VD = jnp.zeros((V, D), jnp.float32) if grad else zero
    dbias_V = jnp.zeros((V,), jnp.float32) if grad and bias_V is not None else zero
    carry = (Sums(zero, zero, zero, zero, zero), dkernel_VD, dbias_V)
    xs = (split(x_BTD), split(targets_BT), split(weights_BT))
    (sums, dkernel_VD, dbias_V), dx = jax.lax.scan(body, carry, xs)
    if dx is None:
        return sums, None
    dx_BTD = jnp.moveaxis(dx, 0, 1).reshape(B, chunks * chunk, D)[:, :T]
    dbias_V = None if bias_V is None else dbias_V.astype(bias_V.dtype)
    return sums, (dx_BTD, dkernel_VD.astype(kernel_VD.dtype), dbias_V)


def classification(logits_BK, labels_B, weights_B, smoothing: float = 0.0) -> Sums:
    """Softmax cross-entropy of small logits [..., K] that exist already."""
    logits_BK = logits_BK.astype(jnp.float32)
    nll_B = optax.softmax_cross_entropy_with_integer_labels(logits_BK, labels_B)
    nll = jnp.sum(nll_B * weights_B)
    hit_B = jnp.argmax(logits_BK, axis=-1) == labels_B
    sums = _sums(nll, hit_B, weights_B)
    if not smoothing:
        return sums
    hot_BK = jax.nn.one_hot(labels_B, logits_BK.shape[-1])
    smooth_BK = optax.smooth_labels(hot_BK, smoothing)
    smoothed_B = optax.softmax_cross_entropy(logits_BK, smooth_BK)
    return sums._replace(objective=jnp.sum(smoothed_B * weights_B))


def binary(logits_BT, labels_BT, weights_BT) -> Sums:
    """Sigmoid cross-entropy; `labels_BT` bool."""
    logits_BT = logits_BT.astype(jnp.float32)
    labels = labels_BT.astype(jnp.float32)
    nll = jnp.sum(optax.sigmoid_binary_cross_entropy(logits_BT, labels) * weights_BT)
    return _sums(nll, (logits_BT > 0) == labels_BT, weights_BT)


def _sums(nll, hit, weights) -> Sums:
    correct = jnp.sum(jnp.where(hit, weights, 0.0))
    return Sums(nll, nll, jnp.zeros((), jnp.float32), correct, jnp.sum(weights))

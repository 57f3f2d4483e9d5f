"""Attention of queries over keys and values: the reference, one row at a time, cuDNN's.

Shapes: q_BTNH, k_BSNH, v_BSNH; visible_BTS bool; bias float32 [1 or B, N, T, S] or None
(`rows`: 1 only); keep_BN1S is the dropout mask of the weights, already divided by the
rate that is kept, or None.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from t5x_lite.model_config import ModelConfig


def einsum(q_BTNH, k_BSNH, v_BSNH, visible_BTS, bias, keep_BN1S, of_weights=None):
    """Softmax attention without scaling, softmax in float32 -> o_BTNH.

    `of_weights`: weights_BNTS -> what positions add to the output, or None.
    """
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH).astype(jnp.float32)
    if bias is not None:
        add = _add if len(bias) == 1 else jnp.add
        scores_BNTS = jnp.asarray(add(scores_BNTS, bias))
    scores_BNTS = jnp.where(visible_BTS[:, None], scores_BNTS, -1e10)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BTNH.dtype)
    if keep_BN1S is not None:
        weights_BNTS *= keep_BN1S
    o_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)
    return o_BTNH if of_weights is None else o_BTNH + of_weights(weights_BNTS)


@jax.custom_vjp
def _add(scores_BNTS, bias_1NTS):
    """A sum whose gradient is summed over B by a product with ones.

    XLA's CPU would fuse a reduction with the softmax's gradient and compute that anew
    for every element: T5.1.1-small's step took 6.5 s instead of 7.0 (README).
    """
    return scores_BNTS + bias_1NTS


def _add_backward(_, d_BNTS):
    ones_B = jnp.ones(d_BNTS.shape[0], d_BNTS.dtype)
    d_BNTS, ones_B = jax.lax.optimization_barrier((d_BNTS, ones_B))
    return d_BNTS, jnp.einsum("B,BNTS->NTS", ones_B, d_BNTS)[None]


_add.defvjp(lambda scores, bias: (scores + bias, None), _add_backward)


@jax.custom_vjp
def rows(q_BTNH, k_BSNH, v_BSNH, visible_BTS, bias_1NTS, keep_BN1S):
    """`einsum`, one example at a time, and again in the backward pass.

    The [N, T, S] arrays of one example stay in a CPU's cache and [B, N, T, S] is never
    held. For one device: a loop over a sharded batch would gather it.
    """

    def row(of_row):
        q, k, v, visible, keep = jax.tree.map(lambda x: x[None], of_row)
        return einsum(q, k, v, visible, bias_1NTS, keep)[0]

    return jax.lax.map(row, (q_BTNH, k_BSNH, v_BSNH, visible_BTS, keep_BN1S))


def _forward(q_BTNH, k_BSNH, v_BSNH, visible_BTS, bias_1NTS, keep_BN1S):
    inputs = (q_BTNH, k_BSNH, v_BSNH, visible_BTS, bias_1NTS, keep_BN1S)
    return rows(*inputs), inputs


def _backward(inputs, do_BTNH):
    *per_row, bias_1NTS, keep_BN1S = inputs

    def row(dbias_1NTS, of_row):
        q, k, v, visible, keep, do = jax.tree.map(lambda x: x[None], of_row)
        _, pull = jax.vjp(
            lambda q, k, v, bias: einsum(q, k, v, visible, bias, keep),
            q,
            k,
            v,
            bias_1NTS,
        )
        dq, dk, dv, dbias = pull(do)
        dbias_1NTS = jax.tree.map(jnp.add, dbias_1NTS, dbias)
        return dbias_1NTS, (dq[0], dk[0], dv[0])

    zero = jax.tree.map(jnp.zeros_like, bias_1NTS)
    dbias_1NTS, (dq, dk, dv) = jax.lax.scan(row, zero, (*per_row, keep_BN1S, do_BTNH))
    return dq, dk, dv, None, dbias_1NTS, jax.tree.map(jnp.zeros_like, keep_BN1S)


rows.defvjp(_forward, _backward)


def cudnn(
    q_BTNH,
    k_BSNH,
    v_BSNH,
    visible_BTS,
    bias,
    keep_BN1S,
    *,
    pattern: str = "mask",
    implementation: Literal["xla", "cudnn"] = "cudnn",
):
    """`einsum` through cuDNN's flash attention: [B, N, T, S] stays on the chip.

    Weights that are dropped for all queries at once are values that are dropped. The
    bias is rounded to q's dtype, and a mask enters as one: each costs an array of its
    own shape, so [B, 1, T, S] for the mask alone and [B, N, T, S] with a bias.

    Args:
      pattern: "mask" reads `visible_BTS`. "all" and "causal" are promises that every
        query sees every key, or those up to its own index: no mask is read, and the
        part that nobody sees is not computed.
      implementation: "xla" computes the same on anything, for tests.
    """
    if keep_BN1S is not None:
        v_BSNH = v_BSNH * jnp.moveaxis(keep_BN1S, 3, 1)[..., 0][..., None]
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSNH,
        v_BSNH,
        None if bias is None else bias.astype(q_BTNH.dtype),
        visible_BTS[:, None] if pattern == "mask" else None,
        scale=1.0,
        is_causal=pattern == "causal",
        implementation=implementation,
    )


KERNELS = {"einsum": einsum, "rows": rows, "cudnn": cudnn}


def check(cfg: ModelConfig, mesh: Mesh, lengths=()):
    """Refuses a kernel that cannot compute this model here, before any compile.

    Args:
      lengths: of all streams, in cells; cuDNN is tried out on them.

    Raises:
      ValueError: naming config.model.attention, the reasons and the way out.
    """
    reasons = []
    device = mesh.devices.flat[0]
    if cfg.attention == "rows" and mesh.size > 1:
        reasons.append(f"it runs on one device, here are {mesh.size}")
    if cfg.attention == "cudnn":
        if device.platform not in ("gpu", "cuda"):
            reasons.append(f"it needs NVIDIA GPUs, here is {device.device_kind!r}")
        if cfg.dtype != "bfloat16":
            reasons.append(f"config.model.dtype={cfg.dtype!r} must be 'bfloat16'")
        if mesh.shape.get("sequence", 1) > 1:
            reasons.append(
                "no stream can be split: config.sharding.sequence must be 1, here "
                f"{mesh.shape['sequence']}"
            )
        if not reasons and (refused := _tried(cfg, lengths or (128,))):
            reasons.append(refused)
    if reasons:
        raise ValueError(
            f"config.model.attention={cfg.attention!r} cannot be had: "
            f"{'; '.join(reasons)}. Change that, or set config.model.attention="
            "'einsum', which computes everything everywhere."
        )


def _tried(cfg: ModelConfig, lengths) -> str | None:
    """What cuDNN has against a forward and backward pass over these lengths."""

    def total(q, k, v, visible, bias):
        return jnp.sum(cudnn(q, k, v, visible, bias, None).astype(jnp.float32))

    dtype, (N, H) = jnp.dtype(cfg.dtype), (cfg.heads, cfg.head_dim)
    for T in lengths:
        cells = jax.ShapeDtypeStruct((1, T, N, H), dtype)
        visible = jax.ShapeDtypeStruct((1, T, T), jnp.bool_)
        bias = jax.ShapeDtypeStruct((1, N, T, T), jnp.float32)
        both = jax.jit(jax.grad(total, (0, 1, 2, 4)))
        try:
            both.lower(cells, cells, cells, visible, bias).compile()
        except (RuntimeError, NotImplementedError, ValueError) as e:
            return f"with {T} cells, {N} heads of {H}: {str(e).strip().splitlines()[0]}"
    return None

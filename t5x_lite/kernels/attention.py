"""Attention of queries over keys and values: the reference, and one row at a time.

Shapes: q_BTNH, k_BSNH, v_BSNH; visible_BTS bool; bias float32 [1 or B, N, T, S] or None
(`rows`: 1 only); keep_BN1S is the dropout mask of the weights, already divided by the
rate that is kept, or None.
"""

import jax
import jax.numpy as jnp


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

KERNELS = {"einsum": einsum, "rows": rows}

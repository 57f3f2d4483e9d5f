"""The parts of a block: parameters, stacking, norm, feed-forward, attention, positions.

Modules only declare parameters (shape, logical axes, init) and say how to use them;
building one allocates nothing. Axis letters: B batch, T query length, S key length,
D model, F feed-forward, N heads, H head dim, V vocabulary, L layers.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from t5x_lite.config import ModelConfig
from t5x_lite.kernels.attention import KERNELS
from t5x_lite.sharding import on_cpu

ones = nnx.initializers.ones
normal = nnx.initializers.normal


def param(shape, axes, init) -> nnx.Param:
    """Declares a float32 parameter: its shape, logical axis names and initializer."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, init=init)


def stacked(block: nnx.Module, layers: int) -> nnx.Module:
    """The same module with a leading `layers` axis on every parameter."""

    def stack(p: nnx.Param) -> nnx.Param:
        declared = p.get_metadata()
        return param(
            (layers, *p.get_value().shape),
            ("layers", *declared["axes"]),
            declared["init"],
        )

    graph, state = nnx.split(block)
    state = jax.tree.map(stack, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.merge(graph, state)


def declared(model: nnx.Module) -> dict[str, nnx.Param]:
    """Name ('decoder/blocks/attention/query') -> declaration, in a fixed order."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): p for path, p in sorted(flat)}


def init_params(model: nnx.Module, key: jax.Array) -> dict:
    """Draws all parameters; a parameter's key is folded from its name alone."""

    def draw(path, p):
        own = jax.random.fold_in(key, zlib.crc32("/".join(map(str, path)).encode()))
        return p.get_metadata()["init"](own, p.get_value().shape, jnp.float32)

    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return nested({path: draw(path, p) for path, p in flat})


def nested(flat: dict) -> dict:
    """{('a', 'b'): x} -> {'a': {'b': x}}"""
    return nnx.traversals.unflatten_mapping(flat)


def dropout(x: jax.Array, rate: float, key, *, along: int) -> jax.Array:
    """Dropout whose mask is shared along axis `along` (length), as in T5's own code.

    Sharing it also makes random bits a negligible cost. `key` None: no dropout.
    """
    if key is None or rate == 0.0:
        return x
    shape = list(x.shape)
    shape[along] = 1
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return x * (keep.astype(x.dtype) / jnp.asarray(1.0 - rate, x.dtype))


def fold(key, n: int):
    """`jax.random.fold_in` that lets None (no dropout) through."""
    return None if key is None else jax.random.fold_in(key, n)


class RMSNorm(nnx.Module):
    """Scale-only norm without mean (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, cfg: ModelConfig):
        self.eps = cfg.norm_eps
        self.scale = param((cfg.d_model,), ("norm",), ones)

    def __call__(self, x_BTD):
        x32_BTD = x_BTD.astype(jnp.float32)
        mean_BT1 = jnp.mean(x32_BTD * x32_BTD, axis=-1, keepdims=True)
        y_BTD = x32_BTD * jax.lax.rsqrt(mean_BT1 + self.eps)
        scale_11D = self.scale[...].astype(jnp.float32)[None, None]
        return (y_BTD * scale_11D).astype(x_BTD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: str, x, weight):
    """einsum(x, weight) in x's dtype, fast on a CPU too.

    XLA's CPU multiplies bfloat16 about twice as fast into float32, also in the backward
    pass, where jnp.einsum's own gradient would not. Elsewhere the partial sums of a
    sharded product are exchanged in the result's dtype, so it stays x's.
    """
    return _product(spec, x, weight)


def _product(spec, x, y):
    wide = jnp.float32 if on_cpu() else None
    return jnp.einsum(spec, x, y, preferred_element_type=wide).astype(x.dtype)


def _product_backward(spec, kept, d):
    x, weight = kept
    ins, out = spec.split("->")
    of_x, of_weight = ins.split(",")
    dx = _product(f"{out},{of_weight}->{of_x}", d, weight)
    return dx, _product(f"{of_x},{out}->{of_weight}", x, d)


# Forward calls no custom_vjp itself: remat would not see the product to save it.
product.defvjp(lambda spec, x, w: (_product(spec, x, w), (x, w)), _product_backward)

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(activation: str, gate_BTF, up_BTF):
    """act(gate) * up, whose gradients are computed once.

    Left to itself, XLA on a CPU computes them again inside the transposes of each
    product that follows.
    """
    return ACTIVATIONS[activation](gate_BTF) * up_BTF


def _gated_forward(activation, gate_BTF, up_BTF):
    return ACTIVATIONS[activation](gate_BTF) * up_BTF, (gate_BTF, up_BTF)


def _gated_backward(activation, kept, d_BTF):
    gate_BTF, up_BTF = kept
    open_BTF, pull = jax.vjp(ACTIVATIONS[activation], gate_BTF)
    return jax.lax.optimization_barrier((*pull(d_BTF * up_BTF), d_BTF * open_BTF))


gated.defvjp(_gated_forward, _gated_backward)


class FeedForward(nnx.Module):
    """act(x W) W' without biases, or act(x W_gate) * (x W_up) W' (Shazeer 2020)."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        D, F = cfg.d_model, cfg.d_ff
        into, out = normal(D**-0.5), normal(F**-0.5)
        if cfg.gated:
            self.gate = param((D, F), ("embed", "mlp"), into)
        self.up = param((D, F), ("embed", "mlp"), into)
        self.down = param((F, D), ("mlp", "embed"), out)

    def __call__(self, x_BTD, key=None):
        act = ACTIVATIONS[self.cfg.activation]
        h_BTF = product("BTD,DF->BTF", x_BTD, self.up[...])
        if self.cfg.gated:
            gate_BTF = product("BTD,DF->BTF", x_BTD, self.gate[...])
            h_BTF = jnp.asarray(gated(self.cfg.activation, gate_BTF, h_BTF))
        else:
            h_BTF = act(h_BTF)
        h_BTF = dropout(h_BTF, self.cfg.dropout, key, along=1)
        return product("BTF,FD->BTD", h_BTF, self.down[...])


class Attention(nnx.Module):
    """Attention of queries over the keys and values of any stream: self, cross, cache.

    T5 does not scale by 1/sqrt(H); the query's initialisation carries it.
    """

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        D, N, H = cfg.d_model, cfg.heads, cfg.head_dim
        axes = ("embed", "heads", "kv")
        self.query = param((D, N, H), axes, normal((D * H) ** -0.5))
        self.key = param((D, N, H), axes, normal(D**-0.5))
        self.value = param((D, N, H), axes, normal(D**-0.5))
        self.out = param((N, H, D), ("heads", "kv", "embed"), normal((N * H) ** -0.5))

    def keys_values(self, y_BSD):
        k_BSNH = product("BSD,DNH->BSNH", y_BSD, self.key[...])
        v_BSNH = product("BSD,DNH->BSNH", y_BSD, self.value[...])
        return k_BSNH, v_BSNH

    def __call__(self, x_BTD, keys_values, visible_BTS, bias_1NTS=None, key=None):
        k_BSNH, v_BSNH = keys_values
        q_BTNH = product("BTD,DNH->BTNH", x_BTD, self.query[...])
        keep_BN1S = None
        if key is not None and self.cfg.dropout:
            B, S, N, _ = k_BSNH.shape
            ones_BN1S = jnp.ones((B, N, 1, S), x_BTD.dtype)
            keep_BN1S = dropout(ones_BN1S, self.cfg.dropout, key, along=2)
        attend = KERNELS[self.cfg.attention]
        o_BTNH = attend(q_BTNH, k_BSNH, v_BSNH, visible_BTS, bias_1NTS, keep_BN1S)
        o_BTNH = checkpoint_name(o_BTNH, "attention")
        return product("BTNH,NHD->BTD", o_BTNH, self.out[...])


def relative_bucket(distance: np.ndarray, cfg: ModelConfig, bidirectional: bool):
    """T5's log-spaced bucket of key position - query position (same shape, int32)."""
    buckets, max_distance = cfg.relative_buckets, cfg.relative_max_distance
    offset = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = np.where(distance > 0, buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    # float32 as in the reference: float64 puts some distances into other buckets.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    scale = np.float32(np.log(max_distance / exact))
    log = exact + (ratio / scale * np.float32(buckets - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(log, buckets - 1))
    return (offset + bucket).astype(np.int32)


class RelativeBias(nnx.Module):
    """T5's relative-position bias, one table for all layers of a stack.

    It depends on the distance of indices alone, which inside a segment is the distance
    of positions for every layout whose positions are consecutive.
    """

    def __init__(self, cfg: ModelConfig, bidirectional: bool):
        self.cfg, self.bidirectional = cfg, bidirectional
        self.embedding = param(
            (cfg.relative_buckets, cfg.heads),
            ("buckets", "heads"),
            normal(cfg.d_model**-0.5),
        )

    def __call__(self, T: int, S: int) -> jax.Array:
        """float32 [1, N, T, S] for queries 0..T-1 and keys 0..S-1."""
        distances = np.arange(-(T - 1), S)
        buckets = relative_bucket(distances, self.cfg, self.bidirectional)
        diagonals_NR = self.embedding[...].astype(jnp.float32)[buckets].T
        return _from_diagonals(diagonals_NR, T, S)[None]

    def row(self, index: jax.Array, S: int) -> jax.Array:
        """float32 [1, N, 1, S] for the query at traced `index` and keys 0..S-1."""
        buckets = relative_bucket(np.arange(-(S - 1), S), self.cfg, self.bidirectional)
        diagonals_NR = self.embedding[...].astype(jnp.float32)[buckets].T
        row_NS = jax.lax.dynamic_slice_in_dim(diagonals_NR, S - 1 - index, S, axis=1)
        return row_NS[None, :, None, :]


def _from_diagonals(diagonals_NR, T: int, S: int) -> jax.Array:
    """[N, T+S-1] values by distance -> [N, T, S], without a gather.

    Entry (t, s) is diagonal s - t + T - 1. Written as a skewed reshape, so that the
    gradient is a plain sum instead of a scatter of T*S*N updates.
    """
    N, R = diagonals_NR.shape
    padded = jnp.pad(diagonals_NR, ((0, 0), (0, 1)))
    tiled = jnp.broadcast_to(padded[:, None, :], (N, T, R + 1)).reshape(N, T * (R + 1))
    # Cut with stride R instead of R + 1: row t is shifted right by t.
    return tiled[:, : T * R].reshape(N, T, R)[:, :, T - 1 :]

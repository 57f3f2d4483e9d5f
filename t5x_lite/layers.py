"""The parts of a block: norm, feed-forward, attention.

Axis letters: B batch, T query length, S key length, D model, F feed-forward, N heads,
H head dim, V vocabulary, L layers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from t5x_lite import mup
from t5x_lite.config import ModelConfig
from t5x_lite.kernels.attention import KERNELS
from t5x_lite.parameters import ones, param, weight_init, zeros
from t5x_lite.positions import RELATIVE
from t5x_lite.sharding import on_cpu


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


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016), in float32."""

    def __init__(self, cfg: ModelConfig, width: int = 0):
        self.eps, self.centred = cfg.norm_eps, cfg.norm == "layer"
        self.scale = param((width or cfg.d_model,), ("norm",), ones)
        if self.centred and cfg.bias:
            self.bias = param((width or cfg.d_model,), ("norm",), zeros)

    def __call__(self, x_BTD):
        y_BTD = x_BTD.astype(jnp.float32)
        if self.centred:
            y_BTD -= jnp.mean(y_BTD, axis=-1, keepdims=True)
        mean_BT1 = jnp.mean(y_BTD * y_BTD, axis=-1, keepdims=True)
        y_BTD *= jax.lax.rsqrt(mean_BT1 + self.eps)
        y_BTD *= self.scale[...].astype(jnp.float32)[None, None]
        if hasattr(self, "bias"):
            y_BTD += self.bias[...].astype(jnp.float32)[None, None]
        return y_BTD.astype(x_BTD.dtype)


def product(spec: str, x, weight) -> jax.Array:
    """einsum(x, weight) in x's dtype, fast on a CPU too.

    XLA's CPU multiplies bfloat16 about twice as fast into float32, also in the backward
    pass, where jnp.einsum's own gradient would not. Elsewhere the partial sums of a
    sharded product are exchanged in the result's dtype, so it stays x's.
    """
    result: Any = _differentiable_product(spec, x, weight)
    return result


def _product(spec, x, y):
    wide = jnp.float32 if on_cpu() else None
    return jnp.einsum(spec, x, y, preferred_element_type=wide).astype(x.dtype)


def _product_backward(spec, kept, d):
    x, weight = kept
    ins, out = spec.split("->")
    of_x, of_weight = ins.split(",")
    dx = _product(f"{out},{of_weight}->{of_x}", d, weight)
    return dx, _product(f"{of_x},{out}->{of_weight}", x, d)


_differentiable_product = jax.custom_vjp(_product, nondiff_argnums=(0,))
# Forward calls no custom_vjp itself: remat would not see the product to save it.
_differentiable_product.defvjp(
    lambda spec, x, w: (_product(spec, x, w), (x, w)), _product_backward
)

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
}


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
    """act(x W) W', or act(x W_gate) * (x W_up) W' (Shazeer 2020)."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        D, F = cfg.d_model, cfg.d_ff
        into = weight_init(cfg, D**-0.5)
        if cfg.gated:
            self.gate = param((D, F), ("embed", "mlp"), into)
        self.up = param((D, F), ("embed", "mlp"), into)
        out = weight_init(cfg, F**-0.5, residual=True)
        self.down = param((F, D), ("mlp", "embed"), out)
        if cfg.bias:
            self.up_bias = param((F,), ("mlp",), zeros)
            self.down_bias = param((D,), ("norm",), zeros)

    def __call__(self, x_BTD, key=None):
        act = ACTIVATIONS[self.cfg.activation]
        h_BTF = product("BTD,DF->BTF", x_BTD, self.up[...])
        if self.cfg.bias:
            h_BTF += self.up_bias[...][None, None]
        if self.cfg.gated:
            gate_BTF = product("BTD,DF->BTF", x_BTD, self.gate[...])
            h_BTF = jnp.asarray(gated(self.cfg.activation, gate_BTF, h_BTF))
        else:
            h_BTF = act(h_BTF)
        h_BTF = dropout(h_BTF, self.cfg.dropout, key, along=1)
        y_BTD = product("BTF,FD->BTD", h_BTF, self.down[...])
        return y_BTD + self.down_bias[...][None, None] if self.cfg.bias else y_BTD


class Attention(nnx.Module):
    """Attention of queries over the keys and values of any stream: self, cross, cache.

    T5 does not scale by 1/sqrt(H); the query's initialisation carries it.
    """

    def __init__(self, cfg: ModelConfig, positions: str = "none"):
        self.cfg = cfg
        D, N, H = cfg.d_model, cfg.heads, cfg.head_dim
        axes = ("embed", "heads", "kv")
        unscaled = 1 if cfg.scale_attention else H**-0.5
        self.query = param((D, N, H), axes, weight_init(cfg, D**-0.5 * unscaled))
        self.key = param((D, N, H), axes, weight_init(cfg, D**-0.5))
        self.value = param((D, N, H), axes, weight_init(cfg, D**-0.5))
        out = weight_init(cfg, (N * H) ** -0.5, residual=True)
        self.out = param((N, H, D), ("heads", "kv", "embed"), out)
        if cfg.bias and positions != "transformer_xl":  # XLNet's attention has none
            self.query_bias = param((N, H), ("heads", "kv"), zeros)
            self.key_bias = param((N, H), ("heads", "kv"), zeros)
            self.value_bias = param((N, H), ("heads", "kv"), zeros)
            self.out_bias = param((D,), ("norm",), zeros)
        if positions in RELATIVE:
            if cfg.attention != "einsum":
                raise ValueError(
                    f"config.model.attention={cfg.attention!r} with positions="
                    f"{positions!r}: it takes one bias for all rows, here each has its "
                    "own. Set attention='einsum'."
                )
            self.relative = RELATIVE[positions](cfg)

    def _projected(self, x_BTD, name: str):
        y_BTNH = product("BTD,DNH->BTNH", x_BTD, getattr(self, name)[...])
        if hasattr(self, "out_bias"):
            y_BTNH += getattr(self, f"{name}_bias")[...][None, None]
        return y_BTNH

    def keys_values(self, y_BSD):
        return self._projected(y_BSD, "key"), self._projected(y_BSD, "value")

    def __call__(
        self, x_BTD, keys_values, visible_BTS, bias=None, key=None, at=None, seen="mask"
    ):
        """-> [B, T, D].

        Args:
          keys_values: k_BSNH, v_BSNH.
          bias: float32, added to the scores, [1 or B, N, T, S].
          at: `positions.Cells` of queries and keys, for positions that enter here.
          seen: "mask" is what `visible_BTS` says; "all" and "causal" promise it.
        """
        k_BSNH, v_BSNH = keys_values
        q_BTNH = self._projected(x_BTD, "query")
        scale = mup.attention_scale(self.cfg)
        of_values = None
        if hasattr(self, "relative"):
            q_BTNH, bias, of_values = self.relative(x_BTD, q_BTNH, scale, at)
        elif scale != 1.0:
            q_BTNH *= jnp.asarray(scale, q_BTNH.dtype)
        keep_BN1S = None
        if key is not None and self.cfg.dropout:
            B, S, N, _ = k_BSNH.shape
            ones_BN1S = jnp.ones((B, N, 1, S), x_BTD.dtype)
            keep_BN1S = dropout(ones_BN1S, self.cfg.dropout, key, along=2)
        attend = KERNELS[self.cfg.attention]
        extra = {} if of_values is None else {"of_weights": of_values}
        if self.cfg.attention == "cudnn":
            extra["pattern"] = seen
        o_BTNH = attend(q_BTNH, k_BSNH, v_BSNH, visible_BTS, bias, keep_BN1S, **extra)
        return self._out(checkpoint_name(o_BTNH, "attention"))

    def of_cache(self, x_BTD, k_BNSH, v_BNSH, visible_BTS, bias=None):
        """As `__call__`, of keys and values kept by `arranged`; nothing is dropped."""
        q_BTNH = self._projected(x_BTD, "query")
        q_BTNH *= jnp.asarray(mup.attention_scale(self.cfg), q_BTNH.dtype)
        scores_BNTS = jnp.einsum("BTNH,BNSH->BNTS", q_BTNH, k_BNSH).astype(jnp.float32)
        scores_BNTS = scores_BNTS if bias is None else scores_BNTS + bias
        scores_BNTS = jnp.where(visible_BTS[:, None], scores_BNTS, -1e10)
        weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BTNH.dtype)
        return self._out(jnp.einsum("BNTS,BNSH->BTNH", weights_BNTS, v_BNSH))

    def arranged(self, y_BSD):
        """Keys and values [B, N, S, H]: each head's in one piece of memory.

        XLA's CPU multiplies them 6 to 8 times faster so at batch 32 than [B, S, N, H],
        which it would transpose at every step.
        """
        return tuple(jnp.swapaxes(each, 1, 2) for each in self.keys_values(y_BSD))

    def _out(self, o_BTNH):
        y_BTD = product("BTNH,NHD->BTD", o_BTNH, self.out[...])
        if hasattr(self, "out_bias"):
            y_BTD += self.out_bias[...][None, None]
        return y_BTD

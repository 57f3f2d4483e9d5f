"""One block, and one scanned stack of them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite import layers, mup, positions
from t5x_lite.model_config import ModelConfig
from t5x_lite.parameters import stacked
from t5x_lite.sharding import constrain


class Cache(NamedTuple):
    """Keys and values of one layer, kept while decoding.

    keys, values: [B, N, S, H] of the decoder's own tokens, filled up to `index`.
    cross_keys, cross_values: [B / K, N, S', H] of the encoder's output, or None; K
      beams, neighbours in the batch, share them.
    """

    keys: jax.Array
    values: jax.Array
    cross_keys: Any = None
    cross_values: Any = None

    def written(self, keys_values, index: jax.Array) -> "Cache":
        """With keys and values of further tokens, the first at `index`."""
        at = (0, 0, index, 0)
        keys, values = (
            jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
            for old, new in zip((self.keys, self.values), keys_values, strict=True)
        )
        return self._replace(keys=keys, values=values)


class Context(NamedTuple):
    """What all layers of a stack share: computed once, closed over by the scan.

    T cells of the stack's own, then G*T of its query streams; see `positions.Grid`.
    """

    visible_BTS: jax.Array
    bias_1NTS: jax.Array | None = None
    grid: positions.Grid | None = None
    banded_BTS: jax.Array | None = None  # of every cfg.window_every-th layer
    memory_BSD: jax.Array | None = None
    memory_visible_BTS: jax.Array | None = None
    causal: bool = False  # which of T5's buckets
    seen: str = "mask"  # "all", "causal": what visible_BTS is promised to be
    memory_seen: str = "mask"
    index: jax.Array | None = None  # where a cached decoder writes; None = no cache
    keep: bool = False  # give each layer's input


def relative_bias(table: positions.RelativeBias, ctx: Context) -> jax.Array:
    """float32 [1, N, queries, keys]"""
    if ctx.index is not None:
        _, T, S = ctx.visible_BTS.shape
        return table.row(ctx.index, S, ctx.causal, T)
    assert ctx.grid is not None
    T, S = ctx.grid.length, ctx.grid.memory + ctx.grid.length
    return ctx.grid.over_streams(table(T, S, ctx.causal))


class Block(nnx.Module):
    """Attention, cross-attention (decoders), feed-forward; norms before or after."""

    def __init__(self, cfg: ModelConfig, cross: bool, relative: str, depth: int):
        self.cfg, self.has_cross = cfg, cross
        self.branch_scale = mup.branch_scale(cfg, depth)
        self.attention_norm = layers.Norm(cfg)
        self.attention = layers.Attention(cfg, relative)
        if relative == "bias_per_layer":
            self.relative = positions.RelativeBias(cfg)
        if cross:
            self.cross_norm = layers.Norm(cfg)
            self.cross = layers.Attention(cfg)
        self.mlp_norm = layers.Norm(cfg)
        self.mlp = layers.FeedForward(cfg)

    def __call__(self, x_BTD, ctx: Context, key=None, cache=None, before_BMD=None):
        """-> (x_BTD, this layer's cache).

        Args:
          before_BMD: inputs of this layer at the M tokens before (XLNet's memory).
        """
        keys = [None] * 6 if key is None else jax.random.split(key, 6)
        pre, rate = self.cfg.norm_order == "pre", self.cfg.dropout

        def sublayer(x_BTD, norm, f, key):
            y_BTD = layers.dropout(f(norm(x_BTD) if pre else x_BTD), rate, key, along=1)
            if self.branch_scale != 1.0:
                y_BTD *= jnp.asarray(self.branch_scale, y_BTD.dtype)
            return x_BTD + y_BTD if pre else norm(x_BTD + y_BTD)

        def attend(h_BTD):
            nonlocal cache
            y_BSD = h_BTD
            if ctx.grid is not None and ctx.grid.streams and not ctx.grid.own:
                y_BSD = h_BTD[:, : ctx.grid.length]
            if before_BMD is not None:
                before = self.attention_norm(before_BMD) if pre else before_BMD
                y_BSD = jnp.concatenate([before, y_BSD], axis=1)
            bias = ctx.bias_1NTS
            if hasattr(self, "relative"):
                bias = relative_bias(self.relative, ctx)
            if cache is not None:
                assert ctx.index is not None
                cache = cache.written(self.attention.arranged(y_BSD), ctx.index)
                return self.attention.of_cache(
                    h_BTD, cache.keys, cache.values, ctx.visible_BTS, bias
                )
            kv = self.attention.keys_values(y_BSD)
            return self.attention(
                h_BTD, kv, ctx.visible_BTS, bias, keys[0], ctx.grid, ctx.seen
            )

        def cross(h_BTD):
            seen_BTS, how = ctx.memory_visible_BTS, ctx.memory_seen
            if cache is None:
                kv = self.cross.keys_values(ctx.memory_BSD)
                return self.cross(h_BTD, kv, seen_BTS, None, keys[2], seen=how)
            # Beams are queries of one row, so that its keys are read once for them all.
            of_row = h_BTD
            if len(cache.cross_keys) < len(h_BTD):
                of_row = h_BTD.reshape(len(cache.cross_keys), -1, h_BTD.shape[-1])
            kv = (cache.cross_keys, cache.cross_values)
            return self.cross.of_cache(of_row, *kv, seen_BTS).reshape(h_BTD.shape)

        x_BTD = sublayer(x_BTD, self.attention_norm, attend, keys[1])
        if self.has_cross and ctx.memory_visible_BTS is not None:
            x_BTD = sublayer(x_BTD, self.cross_norm, cross, keys[3])
        mlp = functools.partial(self.mlp, key=keys[4])
        x_BTD = sublayer(x_BTD, self.mlp_norm, mlp, keys[5])
        return constrain(x_BTD, "batch", "length", "residual"), cache


def _dots_and_flash(primitive, *avals, **parameters):
    """Products, and cuDNN's output and softmax statistics for its backward pass."""
    if primitive.name == "dot_product_attention_fwd_wrapper":
        return True
    return jax.checkpoint_policies.dots_saveable(primitive, *avals, **parameters)


POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _dots_and_flash, jax.checkpoint_policies.save_only_these_names("attention")
    ),
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(nnx.Module):
    """Blocks over one stream; T5's relative bias is shared by them all.

    Args:
      cross: attends to an encoder's output too, where there is one.
    """

    def __init__(self, cfg: ModelConfig, depth: int, *, cross: bool):
        self.cfg, self.depth = cfg, depth
        # ProphetNet's encoder has learned positions only.
        kind = cfg.positions
        if kind == "prophetnet" and not cross:
            kind = "learned"
        block = Block(cfg, cross, kind, depth)
        self.blocks = block if cfg.share_layers else stacked(block, depth)
        if kind == "bias":
            self.relative = positions.RelativeBias(cfg)
        if cfg.norm_order == "pre":
            self.norm = layers.Norm(cfg)

    def layers(self) -> list[Any]:
        """Every layer with parameters of its own, for decoding."""
        if self.cfg.share_layers:
            return [self.blocks] * self.depth
        graph, params = nnx.split(self.blocks)
        each = [jax.tree.map(lambda p, i=i: p[i], params) for i in range(self.depth)]
        return [nnx.merge(graph, of_layer) for of_layer in each]

    def __call__(self, x_BTD, ctx: Context, key=None, before_LBMD=None):
        """-> (x_BTD after the final norm, each layer's input [L, B, T, D]).

        The inputs are of the stack's own cells, and only kept if `ctx.keep`; else None.
        """
        graph, params = nnx.split(self.blocks)
        params, cfg = nnx.to_pure_dict(params), self.cfg
        keys = None if key is None else jax.random.split(key, self.depth)
        if hasattr(self, "relative"):
            ctx = ctx._replace(bias_1NTS=relative_bias(self.relative, ctx))
        banded_L = None
        if ctx.banded_BTS is not None:
            banded_L = (jnp.arange(self.depth) + 1) % cfg.window_every == 0

        def layer(x_BTD, of_layer):
            params, key, before_BMD, banded = of_layer
            if cfg.share_layers:
                params = shared
            own = ctx
            if ctx.banded_BTS is not None:
                seen = jnp.where(banded, ctx.banded_BTS, ctx.visible_BTS)
                own = ctx._replace(visible_BTS=seen)
            read_BTD = None
            if ctx.keep and ctx.grid is not None:
                read_BTD = x_BTD[:, : ctx.grid.length]
            block = nnx.merge(graph, params)
            x_BTD, _ = block(x_BTD, own, key, None, before_BMD)
            return x_BTD, read_BTD

        if cfg.remat != "none":
            layer = jax.checkpoint(
                layer, policy=POLICIES[cfg.remat], prevent_cse=not cfg.scan
            )
        shared = params if cfg.share_layers else None
        each = None if cfg.share_layers else params
        per_layer = (each, keys, before_LBMD, banded_L)
        if cfg.scan:
            x_BTD, read_LBTD = jax.lax.scan(layer, x_BTD, per_layer, length=self.depth)
        else:
            outs = []
            for i in range(self.depth):
                one = jax.tree.map(lambda leaf, i=i: leaf[i], per_layer)
                x_BTD, new = layer(x_BTD, one)
                outs.append(new)
            read_LBTD = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)
        return self.norm(x_BTD) if hasattr(self, "norm") else x_BTD, read_LBTD

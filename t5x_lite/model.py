"""One block, one scanned stack, and the assemblies built of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite import layers
from t5x_lite.config import ModelConfig
from t5x_lite.sharding import constrain
from t5x_lite.visibility import Cells, visible


class Cache(NamedTuple):
    """Keys and values kept while decoding; every array carries a layers axis.

    keys, values: [L, B, S, N, H] of the decoder's own tokens, filled up to `index`.
    cross_keys, cross_values: [L, B, S', N, H] of the encoder's output.
    """

    keys: jax.Array
    values: jax.Array
    cross_keys: jax.Array
    cross_values: jax.Array


class Context(NamedTuple):
    """What all layers of a stack share: computed once, closed over by the scan."""

    visible_BTS: jax.Array
    bias_1NTS: jax.Array | None
    memory_BSD: jax.Array | None = None
    memory_visible_BTS: jax.Array | None = None
    index: jax.Array | None = None  # where a cached decoder writes; None = no cache


class Block(nnx.Module):
    """Pre-norm attention, cross-attention (decoders), feed-forward."""

    def __init__(self, cfg: ModelConfig, cross: bool):
        self.cfg, self.has_cross = cfg, cross
        self.attention_norm = layers.RMSNorm(cfg)
        self.attention = layers.Attention(cfg)
        if cross:
            self.cross_norm = layers.RMSNorm(cfg)
            self.cross = layers.Attention(cfg)
        self.mlp_norm = layers.RMSNorm(cfg)
        self.mlp = layers.FeedForward(cfg)

    def __call__(self, x_BTD, ctx: Context, key=None, cache: Cache | None = None):
        """-> (x_BTD, this layer's cache). `cache` has no layers axis here."""
        keys = [None] * 6 if key is None else jax.random.split(key, 6)
        rate = self.cfg.dropout

        h_BTD = self.attention_norm(x_BTD)
        kv = self.attention.keys_values(h_BTD)
        if cache is not None:
            assert ctx.index is not None
            at = (0, ctx.index, 0, 0)
            kv = tuple(
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
                for old, new in zip((cache.keys, cache.values), kv, strict=True)
            )
            cache = cache._replace(keys=kv[0], values=kv[1])
        h_BTD = self.attention(h_BTD, kv, ctx.visible_BTS, ctx.bias_1NTS, keys[0])
        x_BTD += layers.dropout(h_BTD, rate, keys[1], along=1)

        if self.has_cross:
            h_BTD = self.cross_norm(x_BTD)
            if cache is None:
                kv = self.cross.keys_values(ctx.memory_BSD)
            else:
                kv = (cache.cross_keys, cache.cross_values)
            h_BTD = self.cross(h_BTD, kv, ctx.memory_visible_BTS, None, keys[2])
            x_BTD += layers.dropout(h_BTD, rate, keys[3], along=1)

        h_BTD = self.mlp(self.mlp_norm(x_BTD), keys[4])
        x_BTD += layers.dropout(h_BTD, rate, keys[5], along=1)
        return constrain(x_BTD, "batch", "length", "residual"), cache


POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable,
        jax.checkpoint_policies.save_only_these_names("attention"),
    ),
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(nnx.Module):
    """Blocks over one stream with T5's shared relative bias and a final norm."""

    def __init__(self, cfg: ModelConfig, depth: int, *, decoder: bool):
        self.cfg, self.depth = cfg, depth
        self.blocks = layers.stacked(Block(cfg, cross=decoder), depth)
        self.relative = layers.RelativeBias(cfg, bidirectional=not decoder)
        self.norm = layers.RMSNorm(cfg)

    def __call__(self, x_BTD, ctx: Context, key=None, cache: Cache | None = None):
        """-> (final-normed x_BTD, new cache)."""
        graph, params = nnx.split(self.blocks)
        keys = None if key is None else jax.random.split(key, self.depth)

        def layer(x_BTD, of_layer):
            params, key, cache = of_layer
            return nnx.merge(graph, params)(x_BTD, ctx, key, cache)

        if self.cfg.remat != "none":
            layer = jax.checkpoint(
                layer, policy=POLICIES[self.cfg.remat], prevent_cse=not self.cfg.scan
            )
        per_layer = (nnx.to_pure_dict(params), keys, cache)
        if self.cfg.scan:
            x_BTD, cache = jax.lax.scan(layer, x_BTD, per_layer)
        else:
            caches = []
            for i in range(self.depth):
                one = jax.tree.map(lambda leaf, i=i: leaf[i], per_layer)
                x_BTD, new = layer(x_BTD, one)
                caches.append(new)
            cache = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
        return self.norm(x_BTD), cache


class EncoderDecoder(nnx.Module):
    """T5 (Raffel et al. 2020): bidirectional encoder, causal decoder.

    A batch is {"encoder": stream, "decoder": stream} as in `t5x_lite/example.py`.
    """

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        V, D = cfg.vocab_size, cfg.d_model
        self.embedding = layers.param((V, D), ("vocab", "embed"), layers.normal(1.0))
        self.encoder = Stack(cfg, cfg.encoder_layers, decoder=False)
        self.decoder = Stack(cfg, cfg.decoder_layers, decoder=True)
        if not cfg.tie_embeddings:
            self.head = layers.param((V, D), ("vocab", "embed"), layers.normal(D**-0.5))

    def embed(self, tokens_BT, key=None):
        # Gather the table's D first, as FSDP does with any weight: looked up with D
        # sharded, GSPMD replicates the whole batch of activations instead.
        table_VD = constrain(self.embedding[...], "vocab", "residual")
        x_BTD = table_VD.astype(self.cfg.dtype)[tokens_BT]
        x_BTD = constrain(x_BTD, "batch", "length", "residual")
        return layers.dropout(x_BTD, self.cfg.dropout, key, along=1)

    def encode(self, stream: dict, key=None) -> jax.Array:
        """Encoder output [B, S, D]."""
        cells, S = Cells.of(stream), stream["tokens"].shape[1]
        ctx = Context(visible(cells, cells), self.encoder.relative(S, S))
        x_BSD = self.embed(stream["tokens"], layers.fold(key, 0))
        x_BSD, _ = self.encoder(x_BSD, ctx, layers.fold(key, 1))
        return layers.dropout(x_BSD, self.cfg.dropout, layers.fold(key, 2), along=1)

    def decode(self, stream: dict, memory_BSD, memory_cells: Cells, key=None):
        """Decoder output [B, T, D], scaled so that `y @ output_kernel.T` are logits."""
        cells, T = Cells.of(stream), stream["tokens"].shape[1]
        ctx = Context(
            visible(cells, cells),
            self.decoder.relative(T, T),
            memory_BSD,
            visible(cells, memory_cells),
        )
        x_BTD = self.embed(stream["tokens"], layers.fold(key, 0))
        y_BTD, _ = self.decoder(x_BTD, ctx, layers.fold(key, 1))
        y_BTD = layers.dropout(y_BTD, self.cfg.dropout, layers.fold(key, 2), along=1)
        return self.rescale(y_BTD)

    def rescale(self, y_BTD):
        """Tied embeddings have unit variance: T5 v1.0 scales before the logits."""
        return y_BTD * self.cfg.d_model**-0.5 if self.cfg.tie_embeddings else y_BTD

    @property
    def output_kernel(self) -> jax.Array:
        """[V, D]"""
        return self.embedding[...] if self.cfg.tie_embeddings else self.head[...]

    def hidden(self, batch: dict, key=None) -> jax.Array:
        """Output [B, T, D] of the trained stream; `key` None: no dropout."""
        memory_BSD = self.encode(batch["encoder"], layers.fold(key, 0))
        memory_cells = Cells.of(batch["encoder"])
        return self.decode(
            batch["decoder"], memory_BSD, memory_cells, layers.fold(key, 1)
        )

    def logits(self, y_BTD) -> jax.Array:
        """float32 [B, T, V]; only for small V or T (training uses `losses`)."""
        kernel_VD = self.output_kernel.astype(y_BTD.dtype)
        return jnp.einsum(
            "BTD,VD->BTV", y_BTD, kernel_VD, preferred_element_type=jnp.float32
        )


ASSEMBLIES = {"encoder_decoder": EncoderDecoder}
TRAINED_STREAM = {"encoder_decoder": "decoder"}


def build(cfg: ModelConfig) -> EncoderDecoder:
    """The model of a config; allocates nothing."""
    return ASSEMBLIES[cfg.structure](cfg)


def bind(model: nnx.Module, params: dict) -> Any:
    """The model with `params` (nested dict of arrays, see `layers.declared`)."""
    graph, _ = nnx.split(model)
    return nnx.merge(graph, params)


def parameter_count(model: nnx.Module) -> int:
    """Number of parameters, from shapes alone."""
    return sum(p.get_value().size for p in layers.declared(model).values())

"""The assemblies: what is built of stacks, and what its batches mean."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite import heads, layers, lora, mup, positions
from t5x_lite.config import ModelConfig
from t5x_lite.embeddings import Classes, Inputs, Output
from t5x_lite.model_config import base_config
from t5x_lite.parameters import declared, param, weight_init
from t5x_lite.sharding import constrain
from t5x_lite.stack import Context, Stack
from t5x_lite.visibility import Cells, visible, visible_to_streams


class Outputs(NamedTuple):
    """What the losses read.

    cells_BKE: of the predicted cells; times `output_kernel` they are logits.
    classes_BC: float32 logits of the whole example, or None.
    mentions_BMC: what the entities' embeddings are multiplied with, or None.
    head: float32 logits of config.model.head, see `heads`; or None.
    layers_LBTD: embeddings, then each layer's output, the last one after the final
        norm: of the trained stream's own cells; None if not asked for.
    """

    cells_BKE: jax.Array
    classes_BC: jax.Array | None = None
    mentions_BMC: jax.Array | None = None
    head: jax.Array | None = None
    layers_LBTD: jax.Array | None = None


class Assembly(nnx.Module):
    """Embedding table and output layer, which all structures have."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        V, E = cfg.vocab_size, cfg.d_embed or cfg.d_model
        self.embedding = param((V, E), ("vocab", "embed"), weight_init(cfg, 1.0))
        self.output = Output(cfg)
        if cfg.head:
            self.head = heads.Head(cfg)
        elif cfg.classes:
            self.classes = Classes(cfg)
        if cfg.mix_layers:
            depth = cfg.depth
            if cfg.structure == "encoder_decoder":
                depth = cfg.decoder_layers
            self.mix = heads.Mix(depth + 1)
        if cfg.distill_width:
            shape = (cfg.d_model, cfg.distill_width)
            init = weight_init(cfg, cfg.d_model**-0.5)
            self.distill = param(shape, ("embed", None), init)

    def embed(self, tokens_BT):
        # Gather the table's D first, as FSDP does with any weight: looked up with D
        # sharded, GSPMD replicates the whole batch of activations instead.
        table_VE = constrain(self.embedding[...], "vocab", "residual")
        x_BTE = table_VE.astype(self.cfg.dtype)[tokens_BT]
        if self.cfg.scale_embedding:
            x_BTE *= jnp.asarray(x_BTE.shape[-1] ** 0.5, x_BTE.dtype)
        return constrain(x_BTE, "batch", "length", "residual")

    @property
    def output_kernel(self) -> jax.Array:
        """[V, E]"""
        tied = self.cfg.tie_embeddings
        return self.embedding[...] if tied else self.output.kernel[...]

    @property
    def output_bias(self) -> jax.Array | None:
        """[V]"""
        return self.output.bias[...] if self.cfg.output_bias else None

    def logits(self, cells_BTE) -> jax.Array:
        """float32 [B, T, V]; only for small V or T (training uses `losses`)."""
        kernel_VE = self.output_kernel.astype(cells_BTE.dtype)
        logits_BTV = jnp.einsum(
            "BTE,VE->BTV", cells_BTE, kernel_VE, preferred_element_type=jnp.float32
        )
        bias_V = self.output_bias
        if bias_V is None:
            return logits_BTV
        return logits_BTV + bias_V.astype(jnp.float32)[None, None]

    def read(self, y_BTD, stream: dict, kept=None, key=None) -> Outputs:
        """Picks the predicted cells of a stack's output, and applies the heads.

        Args:
          kept: [L, B, T, D], each layer's input, or None.
          key: of the head's dropout.
        """
        T = stream["tokens"].shape[1]
        classes = self.classes(y_BTD) if hasattr(self, "classes") else None
        own_BTD = y_BTD[:, :T]
        states = None
        if kept is not None:
            states = jnp.concatenate([kept, own_BTD[None]])
        found = None
        if self.cfg.head and (self.cfg.head not in heads.POOLED or "pooled" in stream):
            read_BTD = self.mix(states) if self.cfg.mix_layers else own_BTD
            found = self.head(read_BTD, stream, key)
        y_BTD = y_BTD[:, T:] if "query_ranks" in stream else y_BTD
        if "places" in stream:
            y_BTD = jnp.take_along_axis(y_BTD, stream["places"][..., None], axis=1)
            y_BTD = constrain(y_BTD, "batch", "predicted", "residual")
        return Outputs(self.output(y_BTD), classes, head=found, layers_LBTD=states)


def context(cfg: ModelConfig, stream: dict, before: dict | None = None) -> Context:
    """Visibility and grid of a stream, which may follow the memory stream `before`."""
    cells = keys = Cells.of(stream)
    memory, different = 0, None
    if before is not None:
        # What came before is visible to all, whatever the order inside the stream.
        first = jnp.full_like(before["ranks"], -(2**30))
        both = zip(Cells.of(before)._replace(ranks_BT=first), cells, strict=True)
        keys = Cells(*(jnp.concatenate(pair, axis=1) for pair in both))
        memory = before["tokens"].shape[1]
    if cfg.types and "types" in stream:
        types = before["types"] if before is not None else stream["types"][:, :0]
        types = jnp.concatenate([types, stream["types"]], axis=1)
        different = stream["types"][:, :, None] != types[:, None]
    queries = stream.get("query_ranks")
    streams = 0 if queries is None else queries.shape[1]
    own = "query_groups" in stream

    def seen(window: int) -> jax.Array:
        if queries is None:
            return visible(cells, keys, window=window)
        return visible_to_streams(
            cells, keys, queries, stream.get("query_groups"), window=window
        )

    implied = {"encoder": "all", "decoder": "causal"}.get(cfg.structure, "mask")
    return Context(
        visible_BTS=seen(0),
        seen=implied if cfg.unpadded else "mask",
        grid=positions.Grid(stream["tokens"].shape[1], streams, memory, own, different),
        banded_BTS=seen(cfg.window) if cfg.window else None,
        causal=cfg.structure == "decoder",
    )


class SingleStack(Assembly):
    """Encoder, decoder, prefix-LM and permuted-LM: they differ in the batch's ranks.

    A batch is {"main": stream} as in `t5x_lite/example.py`, with {"memory": stream}
    before it for XLNet.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.inputs = Inputs(cfg)
        self.stack = Stack(cfg, cfg.depth, cross=False)

    def states(self, batch: dict, key=None, keep: bool = False):
        """([B, (1+G)*T, D], each layer's input [L, B, T, D] if asked to keep it).

        The first is the stack's output for its own cells and query streams.
        """
        stream, before, kept_LBMD = batch["main"], batch.get("memory"), None
        if before is not None:
            kept_LBMD = self.remember(before, layers.fold(key, 2))
        ctx = context(self.cfg, stream, before)._replace(keep=keep)
        x_BTE = self.embed(stream["tokens"])
        x_BTD = self.inputs.with_streams(x_BTE, stream, layers.fold(key, 0))
        y_BTD, kept = self.stack(x_BTD, ctx, layers.fold(key, 1), kept_LBMD)
        dropped = layers.dropout(y_BTD, self.cfg.dropout, layers.fold(key, 3), along=1)
        return dropped, kept

    def remember(self, before: dict, key=None) -> Any:
        """Each layer's input at the tokens before, without gradient: [L, B, M, D]."""
        x_BMD = self.inputs(self.embed(before["tokens"]), before, layers.fold(key, 0))
        ctx = context(self.cfg, before)._replace(keep=True)
        _, kept_LBMD = self.stack(x_BMD, ctx, layers.fold(key, 1))
        return jax.lax.stop_gradient(kept_LBMD)

    def outputs(self, batch: dict, key=None, keep: bool = False) -> Outputs:
        """Args: keep: give each layer's states, too."""
        keep = keep or self.cfg.mix_layers
        y_BTD, kept = self.states(batch, key, keep)
        return self.read(y_BTD, batch["main"], kept, layers.fold(key, 4))


class EncoderDecoder(Assembly):
    """T5 (Raffel et al. 2020) and its like: bidirectional encoder, causal decoder.

    A batch is {"encoder": stream, "decoder": stream} as in `t5x_lite/example.py`.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.encoder_inputs = Inputs(cfg, streams=0)
        self.decoder_inputs = Inputs(cfg)
        self.decoder = Stack(cfg, cfg.decoder_layers, cross=True)
        if not cfg.share_stacks:
            self.encoder = Stack(cfg, cfg.encoder_layers, cross=False)

    def encode(self, stream: dict, key=None) -> jax.Array:
        """Encoder output [B, S, D]."""
        stack = self.decoder if self.cfg.share_stacks else self.encoder
        x_BSE = self.embed(stream["tokens"])
        x_BSD = self.encoder_inputs(x_BSE, stream, layers.fold(key, 0))
        ctx = context(self.cfg, stream)
        ctx = ctx._replace(seen="all" if self.cfg.unpadded else "mask")
        x_BSD, _ = stack(x_BSD, ctx, layers.fold(key, 1))
        return layers.dropout(x_BSD, self.cfg.dropout, layers.fold(key, 2), along=1)

    def decode(
        self, stream: dict, memory_BSD, memory_cells: Cells, key=None, keep=False
    ):
        """(decoder output [B, (1+G)*T, D], each layer's input if asked to keep it)."""
        cells, G = Cells.of(stream), self.cfg.query_streams
        queries = Cells(*(jnp.concatenate([c] * (1 + G), axis=1) for c in cells))
        # Cross-attention asks for the segment only: every token of it has rank 0.
        queries = queries._replace(ranks_BT=jnp.maximum(queries.ranks_BT, 0))
        ctx = context(self.cfg, stream)._replace(
            memory_BSD=memory_BSD,
            memory_visible_BTS=visible(queries, memory_cells),
            causal=True,
            seen="causal" if self.cfg.unpadded else "mask",
            memory_seen="all" if self.cfg.unpadded else "mask",
            keep=keep,
        )
        x_BTE = self.embed(stream["tokens"])
        x_BTD = self.decoder_inputs.with_streams(x_BTE, stream, layers.fold(key, 0))
        y_BTD, kept = self.decoder(x_BTD, ctx, layers.fold(key, 1))
        dropped = layers.dropout(y_BTD, self.cfg.dropout, layers.fold(key, 2), along=1)
        return dropped, kept

    def outputs(self, batch: dict, key=None, keep: bool = False) -> Outputs:
        """Args: keep: give each of the decoder's layers' states, too."""
        memory_BSD = self.encode(batch["encoder"], layers.fold(key, 0))
        cells, keep = Cells.of(batch["encoder"]), keep or self.cfg.mix_layers
        y_BTD, kept = self.decode(
            batch["decoder"], memory_BSD, cells, layers.fold(key, 1), keep
        )
        return self.read(y_BTD, batch["decoder"], kept, layers.fold(key, 2))


ASSEMBLIES = {
    "encoder": SingleStack,
    "decoder": SingleStack,
    "encoder_decoder": EncoderDecoder,
    "prefix_lm": SingleStack,
    "permuted": SingleStack,
}


def trained_stream(cfg: ModelConfig) -> str:
    """The stream of a batch that holds the targets."""
    return "decoder" if cfg.structure == "encoder_decoder" else "main"


def build(cfg: ModelConfig) -> Any:
    """The model of a config; allocates nothing."""
    net = _standard(cfg)
    if cfg.parametrisation == "mup":
        net = mup.parametrised(net, _standard(base_config(cfg)), cfg)
    return lora.adapted(net, cfg) if cfg.lora_rank else net


def _standard(cfg: ModelConfig) -> Any:
    if cfg.generator_width:
        from t5x_lite import electra  # it is built of this module's parts

        return electra.Electra(cfg)
    if cfg.d_entity:
        from t5x_lite import entities

        return entities.EntityEncoder(cfg)
    return ASSEMBLIES[cfg.structure](cfg)


def bind(model: nnx.Module, params: dict, dtype=None) -> Any:
    """The model with `params` (nested dict of arrays, see `parameters.declared`).

    Adapters are added to the weights that they are of, before these are cast to `dtype`
    (None = as they are).
    """
    params = lora.merged(params, model)
    if dtype is not None:
        params = jax.tree.map(lambda p: p.astype(dtype), params)
    graph, _ = nnx.split(model)
    return nnx.merge(graph, params)


def parameter_count(model: nnx.Module) -> int:
    """Number of parameters, from shapes alone."""
    return sum(p.get_value().size for p in declared(model).values())

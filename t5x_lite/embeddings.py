"""What stands before and behind a stack: embeddings, output layer, class of a text."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_lite import layers, mup, positions
from t5x_lite.config import ModelConfig
from t5x_lite.parameters import param, weight_init, zeros
from t5x_lite.sharding import constrain


class Inputs(nnx.Module):
    """Token embeddings -> the stream that a stack reads: positions, types, norm."""

    def __init__(self, cfg: ModelConfig, streams: int | None = None):
        self.cfg = cfg
        E = cfg.d_embed or cfg.d_model
        init = weight_init(cfg, 1.0)
        streams = cfg.query_streams if streams is None else streams
        if cfg.positions in ("learned", "prophetnet"):
            rows = cfg.max_positions + cfg.position_offset
            self.positions = param((rows, E), (None, "embed"), init)
        if cfg.types and cfg.positions != "transformer_xl":
            self.types = param((cfg.types, E), (None, "embed"), init)
        if cfg.embed_norm:
            self.norm = layers.Norm(cfg, E)
        if cfg.d_embed:
            shape = (cfg.d_embed, cfg.d_model)
            project = weight_init(cfg, cfg.d_embed**-0.5)
            self.project = param(shape, (None, "embed"), project)
            self.project_bias = param((cfg.d_model,), ("norm",), zeros)
        if streams:
            self.queries = param((streams, E), (None, "embed"), init)

    def __call__(self, x_BTE, stream: dict, key=None):
        """Embedded tokens [B, T, E], or query streams [B, G, T, E] one by one."""
        places_BT = stream["positions"]
        if hasattr(self, "positions"):
            rows = constrain(self.positions[...], None, "residual").astype(x_BTE.dtype)
            x_BTE += rows[places_BT + self.cfg.position_offset]
        elif self.cfg.positions == "sinusoidal":
            table = positions.sinusoids(
                np.arange(self.cfg.max_positions), x_BTE.shape[-1]
            )
            x_BTE += jnp.asarray(table, x_BTE.dtype)[places_BT]
        if hasattr(self, "types") and "types" in stream:
            rows = constrain(self.types[...], None, "residual").astype(x_BTE.dtype)
            x_BTE += rows[stream["types"]]
        if hasattr(self, "norm"):
            x_BTE = self.norm(x_BTE)
        x_BTE = layers.dropout(x_BTE, self.cfg.dropout, key, along=1)
        if hasattr(self, "project"):
            x_BTE = layers.product("BTE,ED->BTD", x_BTE, self.project[...])
            x_BTE += self.project_bias[...][None, None]
        return constrain(x_BTE, "batch", "length", "residual")

    def with_streams(self, x_BTE, stream: dict, key=None):
        """[B, (1+G)*T, D]: the stack's own cells, then its query streams."""
        own = self(x_BTE, stream, layers.fold(key, 0))
        if "query_ranks" not in stream:
            return own
        queries_GE = self.queries[...].astype(x_BTE.dtype)
        ahead = 1 if self.cfg.positions == "prophetnet" else 0
        at = stream | {"positions": stream["positions"] + ahead}
        each = [
            self(jnp.broadcast_to(query_E, x_BTE.shape), at, layers.fold(key, 1 + g))
            for g, query_E in enumerate(queries_GE)
        ]
        return jnp.concatenate([own, *each], axis=1)


class Output(nnx.Module):
    """Hidden vectors -> logits over the vocabulary, given the embedding table."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        V, D, E = cfg.vocab_size, cfg.d_model, cfg.d_embed or cfg.d_model
        if cfg.transform_output:
            self.transform = param((D, E), ("embed", None), weight_init(cfg, D**-0.5))
            self.transform_bias = param((E,), ("norm",), zeros)
            self.norm = layers.Norm(cfg, E)
        if cfg.output_bias:
            self.bias = param((V,), ("vocab",), zeros)
        if not cfg.tie_embeddings:
            init = weight_init(cfg, E**-0.5)
            self.kernel = param((V, E), ("vocab", "embed"), init)

    def __call__(self, y_BTD):
        """What the table is multiplied with: [B, T, E]."""
        cfg = self.cfg
        if cfg.transform_output:
            y_BTD = layers.product("BTD,DE->BTE", y_BTD, self.transform[...])
            y_BTD += self.transform_bias[...][None, None]
            y_BTD = self.norm(layers.ACTIVATIONS[cfg.activation](y_BTD))
        if (scale := mup.logits_scale(cfg)) != 1.0:
            y_BTD *= jnp.asarray(scale, y_BTD.dtype)
        return y_BTD


class Classes(nnx.Module):
    """BERT's pooler and a class of the whole example, from its first token."""

    def __init__(self, cfg: ModelConfig):
        D, K = cfg.d_model, cfg.classes
        self.pooler = param((D, D), ("embed", None), weight_init(cfg, D**-0.5))
        self.pooler_bias = param((D,), ("norm",), zeros)
        self.kernel = param((D, K), ("embed", None), weight_init(cfg, D**-0.5))
        self.bias = param((K,), (None,), zeros)

    def __call__(self, y_BTD):
        """float32 logits [B, K]."""
        pooled_BD = jnp.einsum("BD,DE->BE", y_BTD[:, 0], self.pooler[...])
        pooled_BD = jnp.tanh(pooled_BD + self.pooler_bias[...][None])
        logits_BK = jnp.einsum("BD,DK->BK", pooled_BD, self.kernel[...])
        return (logits_BK + self.bias[...][None]).astype(jnp.float32)

"""ERNIE of Tsinghua: a text encoder whose upper layers also read aligned entities."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_lite import layers, losses, model, stack
from t5x_lite.config import ModelConfig
from t5x_lite.model_config import with_base
from t5x_lite.parameters import param, stacked, weight_init, zeros
from t5x_lite.sharding import constrain


class Alignment(NamedTuple):
    """The mentions of a batch: a token each, and whether its entity is given."""

    places_BM: jax.Array
    known_BM: jax.Array

    @property
    def visible_BMM(self) -> jax.Array:
        """Entities see those that are given; the others only serve to fill a row."""
        return self.known_BM[:, :, None] == self.known_BM[:, None]

    def to_tokens(self, e_BMC, length: int) -> jax.Array:
        """Each entity at the token that it is aligned with, 0 elsewhere: [B, T, C]."""
        B, _, C = e_BMC.shape
        e_BTC = jnp.zeros((B, length, C), e_BMC.dtype)
        return e_BTC.at[jnp.arange(B)[:, None], self.places_BM].add(self.given(e_BMC))

    def of_tokens(self, x_BTD) -> jax.Array:
        """The tokens that are aligned: [B, M, D]."""
        return jnp.take_along_axis(x_BTD, self.places_BM[..., None], axis=1)

    def given(self, e_BMC) -> jax.Array:
        return jnp.where(self.known_BM[..., None], e_BMC, 0)


class Aggregator(nnx.Module):
    """Tokens and entities attend to their own kind, then fuse (section 3.3).

    For a token w_j aligned with the entity e_k, after attention:
      h_j  = act(w_j W_t + e_k W_e + b)
      w_j' = norm(w_j + h_j U_t + b_t)
      e_k' = norm(e_k + h_j U_e + b_e)
    Other tokens go without the terms in e_k. The paper prints w_j' = act(h_j U_t + b_t)
    and so on; residual and norm are those of BERT's layer and of the released code.
    """

    def __init__(self, cfg: ModelConfig):
        self.cfg, small = cfg, entity_config(cfg)
        D, C, F = cfg.d_model, cfg.d_entity, cfg.d_ff
        self.attention, self.attention_norm = layers.Attention(cfg), layers.Norm(cfg)
        self.entity_attention = layers.Attention(small)
        self.entity_attention_norm = layers.Norm(small)
        self.up = param((D, F), ("embed", "mlp"), weight_init(cfg, D**-0.5))
        self.entity_up = param((C, F), (None, "mlp"), weight_init(cfg, C**-0.5))
        self.up_bias = param((F,), ("mlp",), zeros)
        self.down = param((F, D), ("mlp", "embed"), weight_init(cfg, F**-0.5))
        self.down_bias = param((D,), ("norm",), zeros)
        self.entity_down = param((F, C), ("mlp", None), weight_init(cfg, F**-0.5))
        self.entity_down_bias = param((C,), ("norm",), zeros)
        self.mlp_norm, self.entity_mlp_norm = layers.Norm(cfg), layers.Norm(small)

    def __call__(self, x_BTD, e_BMC, ctx: stack.Context, at: Alignment, key=None):
        """-> (x_BTD, e_BMC)"""
        rate = self.cfg.dropout

        def added(x, y, norm, n: int):
            return norm(x + layers.dropout(y, rate, layers.fold(key, n), along=1))

        def attended(x, attention, norm, visible, n: int):
            kv = attention.keys_values(x)
            y = attention(x, kv, visible, None, layers.fold(key, n))
            return added(x, y, norm, n + 1)

        x_BTD = attended(x_BTD, self.attention, self.attention_norm, ctx.visible_BTS, 0)
        e_BMC = attended(
            e_BMC, self.entity_attention, self.entity_attention_norm, at.visible_BMM, 2
        )
        h_BTF = layers.product("BTD,DF->BTF", x_BTD, self.up[...])
        e_BTC = at.to_tokens(e_BMC, x_BTD.shape[1])
        h_BTF += layers.product("BTC,CF->BTF", e_BTC, self.entity_up[...])
        h_BTF += self.up_bias[...][None, None]
        h_BTF = layers.ACTIVATIONS[self.cfg.activation](h_BTF)
        y_BTD = layers.product("BTF,FD->BTD", h_BTF, self.down[...])
        y_BTD += self.down_bias[...][None, None]
        h_BMF = at.of_tokens(h_BTF)
        z_BMC = layers.product("BMF,FC->BMC", h_BMF, self.entity_down[...])
        z_BMC += self.entity_down_bias[...][None, None]
        x_BTD = added(x_BTD, y_BTD, self.mlp_norm, 4)
        e_BMC = added(e_BMC, z_BMC, self.entity_mlp_norm, 5)
        return constrain(x_BTD, "batch", "length", "residual"), e_BMC


def entity_config(cfg: ModelConfig) -> ModelConfig:
    """The shape of the entities' attention and norms."""
    heads = cfg.entity_heads
    small = dataclasses.replace(
        cfg, d_model=cfg.d_entity, heads=heads, head_dim=cfg.d_entity // heads
    )
    # Entities stay as wide as they are when the text grows: their base is themselves.
    return with_base(small, small) if cfg.parametrisation == "mup" else small


class EntityEncoder(model.SingleStack):
    """ERNIE (Zhang et al. 2019): `encoder_layers` of text, then `entity_layers`.

    A batch is that of an encoder; without the entities' fields no token is aligned.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        D, E, C = cfg.d_model, cfg.entities, cfg.d_entity
        init = weight_init(cfg, 1.0)
        self.entity_embedding = param((E, C), ("vocab", None), init)
        self.aggregators = stacked(Aggregator(cfg), cfg.entity_layers)
        self.entity_output = param((D, C), ("embed", None), weight_init(cfg, D**-0.5))
        self.entity_output_bias = param((C,), ("norm",), zeros)
        self.entity_output_norm = layers.Norm(cfg, C)

    def embed_entities(self, entities_BM) -> jax.Array:
        """[B, M, C] of entities counted from 1; any will do for 0."""
        table_EC = constrain(self.entity_embedding[...], "vocab", None)
        return table_EC.astype(self.cfg.dtype)[jnp.maximum(entities_BM - 1, 0)]

    def states(self, batch: dict, key=None) -> jax.Array:
        """Tokens after the last aggregator: [B, T, D]."""
        stream = batch["main"]
        ctx = model.context(self.cfg, stream)
        x_BTE = self.embed(stream["tokens"])
        x_BTD = self.inputs(x_BTE, stream, layers.fold(key, 0))
        x_BTD, _ = self.stack(x_BTD, ctx, layers.fold(key, 1))
        if "entities" in stream:
            at = Alignment(stream["entity_places"], stream["entities"] > 0)
            e_BMC = self.embed_entities(stream["entities"])
        else:
            none_B1 = jnp.zeros_like(stream["tokens"][:, :1])
            at = Alignment(none_B1, none_B1 > 0)
            e_BMC = jnp.zeros((*none_B1.shape, self.cfg.d_entity), x_BTD.dtype)
        return self.aggregate(x_BTD, e_BMC, ctx, at, layers.fold(key, 2))

    def aggregate(self, x_BTD, e_BMC, ctx: stack.Context, at: Alignment, key=None):
        """The aggregators, in a scan as in `stack.Stack`: [B, T, D]."""
        cfg, L = self.cfg, self.cfg.entity_layers
        graph, params = nnx.split(self.aggregators)
        each = (
            nnx.to_pure_dict(params),
            None if key is None else jax.random.split(key, L),
        )

        def layer(carry, of_layer):
            params, key = of_layer
            return nnx.merge(graph, params)(*carry, ctx, at, key), None

        if cfg.remat != "none":
            policy = stack.POLICIES[cfg.remat]
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=not cfg.scan)
        carry = (x_BTD, e_BMC)
        if cfg.scan:
            carry, _ = jax.lax.scan(layer, carry, each, length=L)
        else:
            for i in range(L):
                carry, _ = layer(carry, jax.tree.map(lambda leaf, i=i: leaf[i], each))
        return carry[0]

    def outputs(self, batch: dict, key=None) -> model.Outputs:
        stream = batch["main"]
        y_BTD = self.states(batch, key)
        out = self.read(y_BTD, stream)
        if "entity_places" not in stream:
            return out
        x_BMD = jnp.take_along_axis(y_BTD, stream["entity_places"][..., None], axis=1)
        m_BMC = layers.product("BMD,DC->BMC", x_BMD, self.entity_output[...])
        m_BMC += self.entity_output_bias[...][None, None]
        m_BMC = self.entity_output_norm(layers.ACTIVATIONS[self.cfg.activation](m_BMC))
        return out._replace(mentions_BMC=m_BMC)

    def entity_sums(self, out: model.Outputs, stream: dict, rows_B) -> losses.Sums:
        """The entity of each mention among those of its row, as in
        section 3.4; the released code takes those of the whole batch.

        Args:
          rows_B: weights of the rows.
        """
        truth_BM = stream["entity_targets"]
        table_BMC = self.embed_entities(truth_BM)
        logits_BMM = jnp.einsum(
            "BMC,BNC->BMN",
            out.mentions_BMC,
            table_BMC,
            preferred_element_type=jnp.float32,
        )
        # An entity mentioned twice is one candidate, at its first mention.
        same_BMM = truth_BM[:, :, None] == truth_BM[:, None]
        first_BM = jnp.argmax(same_BMM, axis=2)
        there_BM = truth_BM > 0
        chosen_BM = there_BM & (first_BM == jnp.arange(truth_BM.shape[1])[None])
        logits_BMM = jnp.where(chosen_BM[:, None], logits_BMM, -1e10)
        weights_BM = there_BM.astype(jnp.float32) * rows_B[:, None]
        return losses.classification(logits_BMM, first_BM, weights_BM)


def with_embeddings(params: dict, embeddings_EC: np.ndarray) -> dict:
    """The parameters with these embeddings of the first entities, others as drawn.

    Raises:
      ValueError: they have another width.
    """
    drawn: Any = params["entity_embedding"]
    E, C = embeddings_EC.shape
    if C != drawn.shape[1]:
        raise ValueError(
            f"config.model.d_entity={drawn.shape[1]}, but the embeddings in the file "
            f"config.objective.entities have {C} columns. Set it to {C}."
        )
    place = jax.jit(lambda old, new: old.at[:E].set(new), out_shardings=drawn.sharding)
    return params | {"entity_embedding": place(drawn, embeddings_EC)}

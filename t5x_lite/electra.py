"""ELECTRA: a small generator proposes tokens, a discriminator finds them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite import layers, losses, model, stack
from t5x_lite.embeddings import Inputs, Output
from t5x_lite.model_config import ModelConfig, generator_config
from t5x_lite.parameters import param, weight_init, zeros


class Electra(nnx.Module):
    """Replaced-token detection (Clark et al. 2020); embeddings are shared.

    The batch is that of a masked LM. `tokens` is the generator's loss at the masked
    places, `replaced` the discriminator's over every token. Only the discriminator is
    meant to be used afterwards.
    """

    def __init__(self, cfg: ModelConfig):
        self.cfg, self.small = cfg, generator_config(cfg)
        V, E = cfg.vocab_size, cfg.d_embed or cfg.d_model
        self.embedding = param((V, E), ("vocab", "embed"), weight_init(cfg, 1.0))
        whole = dataclasses.replace(cfg, d_embed=0, d_model=E)
        self.inputs = Inputs(whole)
        self.generator = Tower(self.small, E)
        self.output = Output(self.small)
        self.discriminator = Tower(cfg, E)
        D = cfg.d_model
        self.dense = param((D, D), ("embed", None), weight_init(cfg, D**-0.5))
        self.dense_bias = param((D,), ("norm",), zeros)
        self.score = param((D, 1), ("embed", None), weight_init(cfg, D**-0.5))
        self.score_bias = param((1,), (None,), zeros)

    embed = model.Assembly.embed
    logits = model.Assembly.logits
    output_kernel = model.Assembly.output_kernel
    output_bias = model.Assembly.output_bias

    def outputs(self, batch: dict, key=None) -> model.Outputs:
        """The generator's predictions at the masked places."""
        stream = batch["main"]
        x_BTE = self.inputs(self.embed(stream["tokens"]), stream, layers.fold(key, 0))
        y_BTD = self.generator(x_BTE, stream, layers.fold(key, 1))
        cells = jnp.take_along_axis(y_BTD, stream["places"][..., None], axis=1)
        return model.Outputs(self.output(cells))

    def scores(self, stream: dict, tokens_BT, key=None) -> jax.Array:
        """float32 [B, T]: > 0 where the discriminator takes a token for replaced."""
        x_BTE = self.inputs(self.embed(tokens_BT), stream, layers.fold(key, 0))
        y_BTD = self.discriminator(x_BTE, stream, layers.fold(key, 1))
        h_BTD = layers.product("BTD,DE->BTE", y_BTD, self.dense[...])
        h_BTD += self.dense_bias[...][None, None]
        h_BTD = layers.ACTIVATIONS[self.cfg.activation](h_BTD)
        score_BT1 = layers.product("BTE,EO->BTO", h_BTD, self.score[...])
        return (score_BT1 + self.score_bias[...][None, None])[..., 0]

    def sampled(self, out: model.Outputs, used_ids: int, key) -> jax.Array:
        """Tokens [B, K] drawn from the generator with Gumbel noise, without gradient.

        A few places at a time, so that [B, K, V] is never held.
        """
        B, K, E = out.cells_BKE.shape
        chunk = losses.chunk_length(0, B, K, self.cfg.vocab_size)
        chunks = -(-K // chunk)
        fill = ((0, 0), (0, chunks * chunk - K), (0, 0))
        cells = jnp.pad(jax.lax.stop_gradient(out.cells_BKE), fill)
        cells = jnp.moveaxis(cells.reshape(B, chunks, chunk, E), 1, 0)

        def draw(of_chunk):
            cells_BCE, i = of_chunk
            logits_BCV = jax.lax.stop_gradient(self.logits(cells_BCE))
            unused_11V = jnp.arange(self.cfg.vocab_size)[None, None] >= used_ids
            logits_BCV = jnp.where(unused_11V, -jnp.inf, logits_BCV)
            return jax.random.categorical(jax.random.fold_in(key, i), logits_BCV)

        tokens = jax.lax.map(draw, (cells, jnp.arange(chunks)))
        return jnp.moveaxis(tokens, 0, 1).reshape(B, -1)[:, :K].astype(jnp.int32)

    def sums(self, batch: dict, over_vocabulary, text_BT, used_ids: int, key) -> dict:
        """Loss sums by name; `key` also draws the samples, dropout only if it is on."""
        stream = batch["main"]
        dropped = key if self.cfg.dropout else None
        out = self.outputs(batch, layers.fold(dropped, 0))
        drawn_BK = self.sampled(out, used_ids, jax.random.fold_in(key, 1))
        original_BT = placed(stream, stream["targets"])
        corrupted_BT = placed(stream, drawn_BK)
        score_BT = self.scores(stream, corrupted_BT, layers.fold(dropped, 2))
        replaced_BT = corrupted_BT != original_BT
        return {
            "tokens": over_vocabulary(self, out),
            "replaced": losses.binary(score_BT, replaced_BT, text_BT),
        }


class Tower(nnx.Module):
    """A projection from the shared embeddings, and a stack."""

    def __init__(self, cfg: ModelConfig, width: int):
        self.cfg = cfg
        if width != cfg.d_model:
            init = weight_init(cfg, width**-0.5)
            self.project = param((width, cfg.d_model), (None, "embed"), init)
            self.project_bias = param((cfg.d_model,), ("norm",), zeros)
        self.stack = stack.Stack(cfg, cfg.depth, cross=False)

    def __call__(self, x_BTE, stream: dict, key=None):
        if hasattr(self, "project"):
            x_BTE = layers.product("BTE,ED->BTD", x_BTE, self.project[...])
            x_BTE += self.project_bias[...][None, None]
        y_BTD, _ = self.stack(x_BTE, model.context(self.cfg, stream), key)
        return y_BTD


def placed(stream: dict, values_BK) -> jax.Array:
    """The stream's tokens with `values_BK` at its predicted places."""
    tokens_BT = stream["tokens"]
    B, T = tokens_BT.shape
    # Places of weight 0 fill up a row: they point behind its end and are dropped.
    places_BK = jnp.where(stream["weights"] > 0, stream["places"], T)
    return tokens_BT.at[jnp.arange(B)[:, None], places_BK].set(values_BK, mode="drop")

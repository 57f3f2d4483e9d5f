"""Decoding with a key-value cache: greedy and sampling.

`generate` compiles once per shape and setting and stops when every row has ended. A
cached step gives the logits of the uncached forward pass (`tests/test_decoding.py`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite import model as model_lib
from t5x_lite.model import Cache, Context
from t5x_lite.visibility import Cells, visible

START_ID = 0  # the decoder reads padding first, as T5's does


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits.

    Attributes:
      temperature: divides the logits; 0 = greedy, the most likely token.
      top_k: only the k most likely tokens; 0 = all (Fan et al. 2018).
      top_p: only the most likely tokens that together reach this probability; 0 = all
        (Holtzman et al. 2020). The token that crosses it is kept.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature} must be 0 (greedy) or positive."
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0 (0 = all).")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be in [0, 1] (0 = all).")
        if self.temperature == 0.0 and (self.top_k or self.top_p):
            raise ValueError(
                f"top_k={self.top_k}, top_p={self.top_p} do nothing with temperature=0 "
                "(greedy). Set a temperature, 1.0 say."
            )


def init_cache(bound: Any, memory_BSD: jax.Array, max_length: int) -> Cache:
    """An empty cache for `max_length` tokens; cross keys and values are made here.

    Args:
      bound: an `EncoderDecoder` with parameters.
      memory_BSD: the encoder's output.
    """
    graph, params = nnx.split(bound.decoder.blocks.cross)
    keys_LBSNH, values_LBSNH = jax.vmap(
        lambda layer: nnx.merge(graph, layer).keys_values(memory_BSD)
    )(params)
    L, B, _, N, H = keys_LBSNH.shape
    empty = jnp.zeros((L, B, max_length, N, H), keys_LBSNH.dtype)
    return Cache(empty, empty, keys_LBSNH, values_LBSNH)


def decode_step(
    bound: Any,
    tokens_B1: jax.Array,
    index: jax.Array,
    cache: Cache,
    memory_cells: Cells,
) -> tuple[jax.Array, Cache]:
    """One token further: -> (logits of the next token [B, V] float32, new cache).

    Args:
      tokens_B1: the tokens at `index`; the start token at 0.
      index: int32 scalar, below the cache's length.
      memory_cells: cells of the encoder's stream.
    """
    B, S = tokens_B1.shape[0], cache.keys.shape[2]
    positions_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], (B, S))
    now_B1 = jnp.full((B, 1), index, jnp.int32)
    query = Cells(jnp.ones_like(now_B1), now_B1, now_B1)
    # Keys behind `index` are not written yet; their rank hides them.
    own = Cells(jnp.ones_like(positions_BS), positions_BS, positions_BS)
    ctx = Context(
        visible(query, own),
        memory_visible_BTS=visible(query, memory_cells),
        causal=True,
        index=index,
    )
    stream = {"positions": now_B1}
    x_B1D = bound.decoder_inputs(bound.embed(tokens_B1), stream)
    y_B1D, cache, _ = bound.decoder(x_B1D, ctx, None, cache)
    return bound.logits(bound.output(y_B1D))[:, 0], cache


def restrict(logits_BV: jax.Array, top_k: int = 0, top_p: float = 0.0) -> jax.Array:
    """Logits with -inf for tokens outside the top k and the top p; see `Sampling`.

    Of equally likely tokens the lower ids count as more likely.
    """
    order_BV = jnp.argsort(logits_BV, axis=-1, stable=True, descending=True)
    rank_BV = jnp.argsort(order_BV, axis=-1)
    if top_k:
        logits_BV = jnp.where(rank_BV < top_k, logits_BV, -jnp.inf)
    if top_p:
        sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        before_BV = jnp.take_along_axis(before_BV, rank_BV, axis=-1)
        # The first one stays even if top_p is below any float32 probability.
        inside_BV = (before_BV < top_p) | (rank_BV == 0)
        logits_BV = jnp.where(inside_BV, logits_BV, -jnp.inf)
    return logits_BV


def draw(logits_BV: jax.Array, key: jax.Array, how: Sampling) -> jax.Array:
    """Token ids [B] int32."""
    if how.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = restrict(logits_BV / how.temperature, how.top_k, how.top_p)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def generate(
    model: model_lib.EncoderDecoder,
    params: dict,
    encoder_stream: dict,
    *,
    max_length: int,
    eos_id: int,
    used_ids: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 0.0,
    key: jax.Array | None = None,
    pad_id: int = START_ID,
) -> tuple[jax.Array, jax.Array]:
    """Decodes every row of an encoder stream until EOS or `max_length`.

    Args:
      encoder_stream: arrays [B, S]; rows without any token are not decoded.
      max_length: tokens to write at most, EOS included.
      used_ids: vocabulary size; the padded ids from there on are never written.
      temperature, top_k, top_p: see `Sampling`.
      key: of the samples; needed unless greedy.
      pad_id: the decoder's first input, and what follows EOS.

    Returns:
      (tokens int32 [B, max_length], score float32 [B]: the sum of the log-probabilities
      that the model itself, at temperature 1, gives the tokens up to EOS).

    Raises:
      ValueError: for settings out of range.
    """
    how = Sampling(temperature, top_k, top_p)
    if max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1.")
    if key is None:
        if temperature:
            raise ValueError(f"temperature={temperature} samples: give a key.")
        key = jax.random.key(0)
    settings = (max_length, eos_id, used_ids, how, pad_id)
    return _generate(params, encoder_stream, key, model.cfg, *settings)


@functools.partial(jax.jit, static_argnums=range(3, 9))
def _generate(params, stream, key, cfg, max_length, eos_id, used_ids, how, pad_id):
    cast = jax.tree.map(lambda p: p.astype(cfg.dtype), params)
    bound: Any = model_lib.bind(model_lib.build(cfg), cast)
    cells, B = Cells.of(stream), stream["tokens"].shape[0]
    unused_1V = jnp.arange(cfg.vocab_size)[None] >= used_ids

    def unfinished(carry):
        index, _, _, ended_B, _, _ = carry
        return (index < max_length) & ~jnp.all(ended_B)

    def body(carry):
        index, tokens_BT, last_B, ended_B, score_B, cache = carry
        logits_BV, cache = decode_step(bound, last_B[:, None], index, cache, cells)
        logits_BV = jnp.where(unused_1V, -jnp.inf, logits_BV)
        next_B = draw(logits_BV, jax.random.fold_in(key, index), how)
        logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        gain_B = jnp.take_along_axis(logp_BV, next_B[:, None], axis=-1)[:, 0]
        score_B += jnp.where(ended_B, 0.0, gain_B)
        next_B = jnp.where(ended_B, pad_id, next_B)
        tokens_BT = jax.lax.dynamic_update_slice(
            tokens_BT, next_B[:, None], (jnp.zeros_like(index), index)
        )
        ended_B |= next_B == eos_id
        return index + 1, tokens_BT, next_B, ended_B, score_B, cache

    carry = (
        jnp.zeros((), jnp.int32),
        jnp.full((B, max_length), pad_id, jnp.int32),
        jnp.full((B,), pad_id, jnp.int32),
        jnp.all(stream["segments"] == 0, axis=1),
        jnp.zeros((B,), jnp.float32),
        init_cache(bound, bound.encode(stream), max_length),
    )
    _, tokens_BT, _, _, score_B, _ = jax.lax.while_loop(unfinished, body, carry)
    return tokens_BT, score_B

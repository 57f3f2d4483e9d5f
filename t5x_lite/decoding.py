"""Decoding with a key-value cache, greedy and sampling, and prediction in place.

`generate` compiles once per shape and setting and stops when every row has ended. A
cached step gives the logits of the uncached forward pass (`tests/test_decoding.py`).

A stack decodes in cells: first those of its prompt, which are read in one pass, then
one for each token it writes. The prompt of an encoder-decoder is the start token; that
of a single stack is the text it goes on from.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_lite import model as model_lib
from t5x_lite import positions
from t5x_lite.config import ModelConfig
from t5x_lite.sampling import Sampling, draw
from t5x_lite.stack import Cache, Context
from t5x_lite.visibility import Cells, visible

START_ID = 0  # the decoder reads padding first, as T5's does


def check_decodes(cfg: ModelConfig):
    """Refuses a model that cannot write one token after the other here."""
    wrong = None
    if cfg.structure in ("encoder", "permuted"):
        wrong = f"structure={cfg.structure!r}"
    elif cfg.query_streams:
        wrong = f"query_streams={cfg.query_streams}"
    elif cfg.positions in positions.RELATIVE:
        wrong = f"positions={cfg.positions!r}"
    if wrong:
        raise ValueError(
            f"config.model.{wrong} does not decode with a cache. Allowed: structure "
            "encoder_decoder, decoder or prefix_lm, without query streams, positions "
            "none, learned, sinusoidal, bias or bias_per_layer. Train such a model."
        )


def check_room(cfg: ModelConfig, cells: int, what: str):
    """Refuses more cells than the model has positions for."""
    if cfg.positions in ("learned", "sinusoidal") and cells > cfg.max_positions:
        raise ValueError(
            f"{what} needs {cells} positions; config.model.max_positions="
            f"{cfg.max_positions}. Shorten the text or lower max_length."
        )


def layout(
    cfg: ModelConfig, tokens_BP: jax.Array, segments_BP: jax.Array, length: int
) -> tuple[jax.Array, Cells]:
    """Prompts that all end at cell P-1, and the cells [B, length] of prompt and answer.

    Padding goes before a prompt: T5's relative bias is by the distance of cells.
    """
    P = tokens_BP.shape[1]
    count_B1 = jnp.sum(segments_BP > 0, axis=1, keepdims=True)
    places_BS = jnp.arange(length, dtype=jnp.int32)[None] - (P - count_B1)
    tokens_BP = jnp.take_along_axis(tokens_BP, places_BS[:, :P] % P, axis=1)
    positions_BS = jnp.maximum(places_BS, 0)
    ranks_BS = positions_BS
    if cfg.structure == "prefix_lm":
        ranks_BS = jnp.where(places_BS < count_B1, 0, positions_BS)
    return tokens_BP, Cells((places_BS >= 0).astype(jnp.int32), ranks_BS, positions_BS)


def init_cache(bound: Any, B: int, length: int, memory_BSD=None) -> Cache:
    """An empty cache for `length` cells; cross keys and values are made here.

    Args:
      bound: a model with parameters that decodes, see `check_decodes`.
      memory_BSD: the encoder's output, of an encoder-decoder.
    """
    cfg, stack = bound.cfg, _stack(bound)
    shape = (stack.depth, B, length, cfg.heads, cfg.head_dim)
    empty = jnp.zeros(shape, cfg.dtype)
    if memory_BSD is None:
        return Cache(empty, empty)
    graph, params = nnx.split(stack.blocks.cross)

    def of_layer(params):
        return nnx.merge(graph, params).keys_values(memory_BSD)

    if cfg.share_layers:
        cross = jax.tree.map(lambda x: jnp.stack([x] * stack.depth), of_layer(params))
    else:
        cross = jax.vmap(of_layer)(params)
    return Cache(empty, empty, *cross)


def _stack(bound: Any) -> Any:
    return bound.decoder if hasattr(bound, "decoder") else bound.stack


def decode_step(
    bound: Any,
    tokens_BT: jax.Array,
    index: jax.Array,
    cache: Cache,
    cells: Cells,
    memory_cells: Cells | None = None,
) -> tuple[jax.Array, Cache]:
    """T tokens further: -> (logits after the last one [B, V] float32, new cache).

    Args:
      tokens_BT: the tokens of cells `index` to `index` + T - 1.
      index: int32 scalar.
      cells: [B, S], all cells of the cache. Those behind the tokens are not written
        yet; their rank hides them.
      memory_cells: cells of the encoder's stream.
    """
    cfg, T = bound.cfg, tokens_BT.shape[1]
    query = Cells(*(jax.lax.dynamic_slice_in_dim(c, index, T, axis=1) for c in cells))
    ctx = Context(
        visible(query, cells),
        banded_BTS=visible(query, cells, window=cfg.window) if cfg.window else None,
        causal=cfg.structure != "prefix_lm",
        index=index,
    )
    inputs = bound.inputs if memory_cells is None else bound.decoder_inputs
    if memory_cells is not None:
        ctx = ctx._replace(memory_visible_BTS=visible(query, memory_cells))
    x_BTD = inputs(bound.embed(tokens_BT), {"positions": query.positions_BT})
    y_BTD, cache, _ = _stack(bound)(x_BTD, ctx, None, cache)
    return bound.logits(bound.output(y_BTD[:, -1:]))[:, 0], cache


def generate(
    model: Any,
    params: dict,
    stream: dict,
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
    """Writes behind every row of a stream until EOS or `max_length`.

    Args:
      stream: arrays [B, S] of what is read: the encoder's stream, or the prompt of a
        decoder or prefix-LM, whose ranks and positions are made here. Rows end with
        padding (segment 0); rows without any token are not decoded.
      max_length: tokens to write at most, EOS included.
      used_ids: vocabulary size; the padded ids from there on are never written.
      temperature, top_k, top_p: see `Sampling`.
      key: of the samples; needed unless greedy.
      pad_id: the first input of an encoder-decoder's decoder, and what follows EOS.

    Returns:
      (tokens int32 [B, max_length], score float32 [B]: the sum of the log-probabilities
      that the model itself, at temperature 1, gives the tokens up to EOS).

    Raises:
      ValueError: for settings out of range, a model that does not decode, a text that
        is too long for it.
    """
    how = Sampling(temperature, top_k, top_p)
    check_decodes(model.cfg)
    if max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1.")
    read = int(np.sum(np.asarray(stream["segments"]) > 0, axis=1).max())
    if model.cfg.structure == "encoder_decoder":
        check_room(model.cfg, max(read, max_length), "the text, or max_length,")
    else:
        whole = f"a prompt of {read} tokens with max_length={max_length}"
        check_room(model.cfg, read + max_length - 1, whole)
    settings = (max_length, eos_id, used_ids, how, pad_id)
    return _generate(params, stream, how.key(key), model.cfg, *settings)


class Start(NamedTuple):
    """What decoding starts from: the prompt has been read.

    The first step reads the prompt's last token `last_B` in cell `index` (again, if the
    prompt has others), so that all steps are the same.
    """

    last_B: jax.Array
    index: int
    cache: Cache
    cells: Cells
    memory: Cells | None


def begin(bound: Any, stream: dict, max_length: int, pad_id: int) -> Start:
    """Reads what a stream holds, with room for `max_length` tokens behind it."""
    prompt_BP, segments_BP = stream["tokens"], stream["segments"]
    memory_BSD = memory = None
    if bound.cfg.structure == "encoder_decoder":
        memory_BSD, memory = bound.encode(stream), Cells.of(stream)
        prompt_BP = jnp.full((len(prompt_BP), 1), pad_id, jnp.int32)
        segments_BP = jnp.ones_like(prompt_BP)
    B, P = prompt_BP.shape
    S = P + max_length - 1  # the last token that is written is not read
    prompt_BP, cells = layout(bound.cfg, prompt_BP, segments_BP, S)
    cache = init_cache(bound, B, S, memory_BSD)
    if P > 1:
        zero = jnp.zeros((), jnp.int32)
        _, cache = decode_step(bound, prompt_BP, zero, cache, cells, memory)
    return Start(prompt_BP[:, -1], P - 1, cache, cells, memory)


@functools.partial(jax.jit, static_argnums=range(3, 9))
def _generate(params, stream, key, cfg, max_length, eos_id, used_ids, how, pad_id):
    cast = jax.tree.map(lambda p: p.astype(cfg.dtype), params)
    bound: Any = model_lib.bind(model_lib.build(cfg), cast)
    unused_1V = jnp.arange(cfg.vocab_size)[None] >= used_ids
    start = begin(bound, stream, max_length, pad_id)

    def unfinished(carry):
        index, _, _, ended_B, _, _ = carry
        return (index < max_length) & ~jnp.all(ended_B)

    def body(carry):
        index, tokens_BT, last_B, ended_B, score_B, cache = carry
        logits_BV, cache = decode_step(
            bound,
            last_B[:, None],
            start.index + index,
            cache,
            start.cells,
            start.memory,
        )
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
        jnp.full((*start.last_B.shape, max_length), pad_id, jnp.int32),
        start.last_B,
        jnp.all(stream["segments"] == 0, axis=1),
        jnp.zeros(start.last_B.shape, jnp.float32),
        start.cache,
    )
    _, tokens_BT, _, _, score_B, _ = jax.lax.while_loop(unfinished, body, carry)
    return tokens_BT, score_B

"""Decoding with a key-value cache: greedy and sampling; `beam` searches with its steps.

`generate` compiles once per shape and setting and stops when every row has ended. A
cached step gives the logits of the uncached forward pass (`tests/test_decoding.py`).

A stack decodes in cells: first those of its prompt, which are read in one pass, then
one for each token it writes. The prompt of an encoder-decoder is the start token; that
of a single stack is the text it goes on from. What the answer must begin with (its
prefix) is the end of the prompt.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import model as model_lib
from t5x_lite import positions
from t5x_lite.config import ModelConfig
from t5x_lite.sampling import draw, folded, row_keys
from t5x_lite.settings import Settings
from t5x_lite.sharding import constrain
from t5x_lite.stack import Cache, Context, relative_bias
from t5x_lite.visibility import Cells, visible

START_ID = 0  # the decoder reads padding first, as T5's does
NO_TOKEN = -1  # in a history: a cell without a token


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


def check_fits(
    cfg: ModelConfig, read: int, forced: int, max_length: int, where: str = "the text"
):
    """Refuses a model that does not decode, and what is too long for it.

    Args:
      read, forced: tokens of the text and of its prefix.
    """
    check_decodes(cfg)
    if cfg.structure == "encoder_decoder":
        cells = max(read, forced + max_length)
        check_room(cfg, cells, f"{where}, or max_length,")
    else:
        read += forced
        whole = f"{where}, a prompt of {read} tokens, with max_length={max_length}"
        check_room(cfg, read + max_length - 1, whole)


class Given(NamedTuple):
    """What is read before anything is written.

    Attributes:
      encoder: stream of the encoder, or None.
      prompt_BP: tokens of the decoder's prompt, each row's first, then padding.
      counts_B: how many tokens of it are a row's own.
      forced_B: how many of these begin the answer.
      live_B: rows that hold a text.
    """

    encoder: dict | None
    prompt_BP: np.ndarray
    counts_B: np.ndarray
    forced_B: np.ndarray
    live_B: np.ndarray


def given(
    cfg: ModelConfig,
    stream: dict,
    prefixes: Sequence[Sequence[int] | np.ndarray] | None,
    pad_id: int,
    max_length: int,
) -> Given:
    """The prompts of a stream, prefixes behind them.

    Raises:
      ValueError: for a model that does not decode, or a text too long for it.
    """
    segments_BS = np.asarray(stream["segments"])
    B, read_B = len(segments_BS), (segments_BS > 0).sum(axis=1).astype(np.int32)
    forced = [np.asarray(p, np.int32) for p in prefixes or [()] * B]
    forced_B = np.array([len(p) for p in forced], np.int32)
    longest = int(np.argmax(read_B + forced_B))
    if cfg.structure == "encoder_decoder":
        check_fits(cfg, int(read_B.max()), int(forced_B.max()), max_length)
    check_fits(cfg, int(read_B[longest]), int(forced_B[longest]), max_length)
    if cfg.structure == "encoder_decoder":
        tokens_BS = np.full((B, 1), pad_id, np.int32)
        counts_B, encoder = np.ones(B, np.int32), stream
    else:
        tokens_BS, encoder, counts_B = np.asarray(stream["tokens"]), None, read_B
    # Few lengths, so that there are few shapes to compile.
    room = 1 << (int(forced_B.max()) - 1).bit_length() if forced_B.any() else 0
    prompt_BP = np.pad(tokens_BS, ((0, 0), (0, room)), constant_values=pad_id)
    for row, (count, ids) in enumerate(zip(counts_B, forced, strict=True)):
        prompt_BP[row, count : count + len(ids)] = ids
    return Given(encoder, prompt_BP, counts_B + forced_B, forced_B, read_B > 0)


def layout(cfg: ModelConfig, read: Given, length: int) -> tuple[jax.Array, Cells]:
    """Prompts that all end at cell P-1, and the cells [B, length] of prompt and answer.

    Padding (`NO_TOKEN`) goes before a prompt: T5's relative bias is by the distance of
    cells.
    """
    P = read.prompt_BP.shape[1]
    count_B1 = jnp.asarray(read.counts_B)[:, None]
    places_BS = jnp.arange(length, dtype=jnp.int32)[None] - (P - count_B1)
    places_BP = places_BS[:, :P]
    tokens_BP = jnp.take_along_axis(jnp.asarray(read.prompt_BP), places_BP % P, axis=1)
    tokens_BP = jnp.where(places_BP >= 0, tokens_BP, NO_TOKEN)
    positions_BS = jnp.maximum(places_BS, 0)
    ranks_BS = positions_BS
    if cfg.structure == "prefix_lm":
        read_B1 = count_B1 - jnp.asarray(read.forced_B)[:, None]
        ranks_BS = jnp.where(places_BS < read_B1, 0, positions_BS)
    return tokens_BP, Cells((places_BS >= 0).astype(jnp.int32), ranks_BS, positions_BS)


class Decoder:
    """A model with parameters, its layers apart: one array a layer is read in place.

    A loop over stacked layers would copy each layer's weights and cache at every step.
    """

    def __init__(self, bound: Any):
        self.bound, self.cfg = bound, bound.cfg
        self.stack = bound.decoder if hasattr(bound, "decoder") else bound.stack
        self.blocks: list[Any] = self.stack.layers()

    def caches(self, B: int, length: int, memory_BSD=None) -> tuple[Cache, ...]:
        """Empty ones for `length` cells; cross keys and values are made here.

        Args:
          memory_BSD: the encoder's output, of an encoder-decoder.
        """
        cfg = self.cfg
        empty = jnp.zeros((B, cfg.heads, length, cfg.head_dim), cfg.dtype)
        empty = constrain(empty, "batch", "heads", None, "kv")
        made = []
        for block in self.blocks:
            cross = (None, None)
            if memory_BSD is not None:
                cross = block.cross.arranged(memory_BSD)
            made.append(Cache(empty, empty, *cross))
        return tuple(made)

    def step(
        self,
        tokens_BT: jax.Array,
        index: jax.Array,
        caches: tuple[Cache, ...],
        cells: Cells,
        memory_cells: Cells | None = None,
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """T tokens further: -> (logits after the last [B, V] float32, new caches).

        Args:
          tokens_BT: the tokens of cells `index` to `index` + T - 1.
          index: int32 scalar.
          cells: [B, S], all cells of the cache. Those behind the tokens are not written
            yet; their rank hides them.
          memory_cells: of the encoder's stream, for B / K rows: beams share them.
        """
        cfg, T = self.cfg, tokens_BT.shape[1]
        query = Cells(
            *(jax.lax.dynamic_slice_in_dim(c, index, T, axis=1) for c in cells)
        )
        ctx = Context(
            visible(query, cells), causal=cfg.structure != "prefix_lm", index=index
        )
        inputs = (
            self.bound.inputs if memory_cells is None else self.bound.decoder_inputs
        )
        if memory_cells is not None:
            beams = len(tokens_BT) // len(memory_cells.segments_BT)
            first = Cells(*(c[::beams] for c in query))
            ctx = ctx._replace(memory_visible_BTS=visible(first, memory_cells))
        if hasattr(self.stack, "relative"):
            ctx = ctx._replace(bias_1NTS=relative_bias(self.stack.relative, ctx))
        banded = ctx
        if cfg.window:
            banded = ctx._replace(visible_BTS=visible(query, cells, window=cfg.window))
        x_BTD = self.bound.embed(jnp.maximum(tokens_BT, 0))
        x_BTD = inputs(x_BTD, {"positions": query.positions_BT})
        new = []
        for number, (block, cache) in enumerate(
            zip(self.blocks, caches, strict=True), 1
        ):
            own = banded if number % cfg.window_every == 0 else ctx
            x_BTD, cache = block(x_BTD, own, None, cache)
            new.append(cache)
        last_B1D = x_BTD[:, -1:]
        if hasattr(self.stack, "norm"):
            last_B1D = self.stack.norm(last_B1D)
        logits_B1V = self.bound.logits(self.bound.output(last_B1D))
        return logits_B1V[:, 0], tuple(new)


class Start(NamedTuple):
    """What decoding starts from: the prompt has been read.

    The first step reads the prompt's last token in cell `index` (again, if the prompt
    has others), so that all steps are the same.

    Attributes:
      history_BS: tokens of the prompt, and room for `max_length` behind it.
    """

    history_BS: jax.Array
    index: int
    caches: tuple[Cache, ...]
    cells: Cells
    memory: Cells | None


def begin(decoder: Decoder, read: Given, max_length: int, pad_id: int) -> Start:
    """Reads what is given, with room for `max_length` tokens behind it."""
    memory_BSD = memory = None
    if read.encoder is not None:
        memory_BSD = decoder.bound.encode(read.encoder)
        memory = Cells.of(read.encoder)
    B, P = read.prompt_BP.shape
    S = P + max_length - 1  # the last token that is written is not read
    prompt_BP, cells = layout(decoder.cfg, read, S)
    caches = decoder.caches(B, S, memory_BSD)
    if P > 1:
        zero = jnp.zeros((), jnp.int32)
        _, caches = decoder.step(prompt_BP, zero, caches, cells, memory)
    room = ((0, 0), (0, max_length))
    history_BS = jnp.pad(prompt_BP, room, constant_values=pad_id)
    return Start(history_BS, P - 1, caches, cells, memory)


def model_for(params: dict, cfg: ModelConfig) -> Decoder:
    """The decoder of a model, with parameters in the dtype it computes in."""
    cast = jax.tree.map(lambda p: p.astype(cfg.dtype), params)
    return Decoder(model_lib.bind(model_lib.build(cfg), cast))


def forbidden(
    settings: Settings, history_BS: jax.Array, end: jax.Array, written, V: int, eos: int
) -> jax.Array | None:
    """bool [B or 1, V]: the ids that may not come next, or None.

    An n-gram may not come again among the first `end` tokens of a history, which are
    the prompt's and those written, as in transformers: a decoder's text counts, and the
    start token of an encoder-decoder.
    """
    banned_BV = None
    if settings.min_length and eos >= 0:
        banned_BV = ((jnp.arange(V) == eos) & (written < settings.min_length))[None]
    n = settings.no_repeat_ngram
    if not n or history_BS.shape[1] < n:
        return banned_BV
    B, S = history_BS.shape
    before_BS = jnp.pad(history_BS, ((0, 0), (n - 1, 0)), constant_values=NO_TOKEN)
    last_BN = jax.lax.dynamic_slice_in_dim(before_BS, end, n - 1, axis=1)
    ends_W = jnp.arange(n - 1, S)
    again_BW = jnp.broadcast_to(ends_W[None] < end, (B, S - n + 1))
    for i in range(n - 1):
        last_B1 = last_BN[:, i : i + 1]
        again_BW &= (history_BS[:, i : S - n + 1 + i] == last_B1) & (last_B1 >= 0)
    next_BW = history_BS[:, n - 1 :]
    next_BW = jnp.where(again_BW & (next_BW >= 0), next_BW, V)
    repeats_BV = jnp.zeros((B, V), bool)
    rows_B1 = jnp.arange(B)[:, None]
    repeats_BV = repeats_BV.at[rows_B1, next_BW].set(True, mode="drop")
    return repeats_BV if banned_BV is None else repeats_BV | banned_BV


def generate(
    model: Any,
    params: dict,
    stream: dict,
    *,
    eos_id: int,
    used_ids: int,
    key: jax.Array | None = None,
    pad_id: int = START_ID,
    prefixes: Sequence[Sequence[int] | np.ndarray] | None = None,
    **settings: Any,
) -> tuple[jax.Array, jax.Array]:
    """Writes behind every row of a stream until EOS or `max_length`.

    Args:
      stream: arrays [B, S] of what is read: the encoder's stream, or the prompt of a
        decoder or prefix-LM, whose ranks and positions are made here. Rows end with
        padding (segment 0); rows without any token are not decoded.
      eos_id: ends a row; -1 = nothing does.
      used_ids: vocabulary size; the padded ids from there on are never written.
      key: of the samples, one or [B]; needed unless greedy.
      pad_id: the first input of an encoder-decoder's decoder, and what follows EOS.
      prefixes: B sequences of ids that the answers begin with; they are not returned.
      settings: fields of `Settings`, of which beams and num_return are not read.

    Returns:
      (tokens int32 [B, max_length], score float32 [B]: the sum of the log-probabilities
      that the model itself, at temperature 1 and with nothing forbidden, gives the
      tokens up to EOS).

    Raises:
      ValueError: for settings out of range, a model that does not decode, a text that
        is too long for it.
    """
    how = Settings(**settings)
    read = given(model.cfg, stream, prefixes, pad_id, how.max_length)
    keys_B = row_keys(key, len(read.live_B), how.sampling)
    return _generate(params, read, keys_B, model.cfg, how, eos_id, used_ids, pad_id)


@functools.partial(jax.jit, static_argnums=range(3, 8))
def _generate(params, read, keys_B, cfg, how, eos_id, used_ids, pad_id):
    decoder = model_for(params, cfg)
    start = begin(decoder, read, how.max_length, pad_id)
    P, V, sampling = start.index + 1, cfg.vocab_size, how.sampling
    unused_1V = jnp.arange(V)[None] >= used_ids

    def unfinished(carry):
        written, _, ended_B, _, _ = carry
        return (written < how.max_length) & ~jnp.all(ended_B)

    def body(carry):
        written, history_BS, ended_B, score_B, caches = carry
        at = P + written
        last_B1 = jax.lax.dynamic_slice_in_dim(history_BS, at - 1, 1, axis=1)
        logits_BV, caches = decoder.step(
            last_B1, at - 1, caches, start.cells, start.memory
        )
        logits_BV = jnp.where(unused_1V, -jnp.inf, logits_BV)
        allowed_BV = logits_BV
        banned_BV = forbidden(how, history_BS, at, written, V, eos_id)
        if banned_BV is not None:
            allowed_BV = jnp.where(banned_BV, -jnp.inf, logits_BV)
        keys = folded(keys_B, written) if sampling.temperature else keys_B
        next_B = draw(allowed_BV, keys, sampling)
        if banned_BV is not None:  # nothing is left to write
            ended_B |= jnp.max(allowed_BV, axis=1) == -jnp.inf
        chosen_B = jnp.take_along_axis(logits_BV, next_B[:, None], axis=-1)[:, 0]
        gain_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
        score_B += jnp.where(ended_B, 0.0, gain_B)
        next_B = jnp.where(ended_B, pad_id, next_B)
        history_BS = jax.lax.dynamic_update_slice_in_dim(
            history_BS, next_B[:, None], at, axis=1
        )
        ended_B |= next_B == eos_id
        return written + 1, history_BS, ended_B, score_B, caches

    carry = (
        jnp.zeros((), jnp.int32),
        start.history_BS,
        ~jnp.asarray(read.live_B),
        jnp.zeros(len(read.live_B), jnp.float32),
        start.caches,
    )
    _, history_BS, _, score_B, _ = jax.lax.while_loop(unfinished, body, carry)
    return history_BS[:, P:], score_B

"""Beam search: the most likely texts, with the cache and the steps of `decoding`.

Each row keeps its `beams` most likely unfinished texts and as many finished ones. The
order of candidates, and when a row stops, are those of transformers' `generate`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import decoding
from t5x_lite.decoding import START_ID
from t5x_lite.settings import LENGTH_NORMS, Settings
from t5x_lite.stack import Cache


class Beams(NamedTuple):
    """K unfinished and K finished texts of each row, best first.

    Attributes:
      written: tokens so far.
      history_BKS, logp_BK: unfinished, prompts included, with the sum of the
        log-probabilities of what was written.
      ended_BKS, score_BK: finished, with their scores; -inf: there is none yet.
      open_B: may an unfinished text still become better than a finished one?
    """

    written: jax.Array
    history_BKS: jax.Array
    logp_BK: jax.Array
    ended_BKS: jax.Array
    score_BK: jax.Array
    open_B: jax.Array
    caches: tuple[Cache, ...]


def search(
    model: Any,
    params: dict,
    stream: dict,
    *,
    eos_id: int,
    used_ids: int,
    pad_id: int = START_ID,
    prefixes: Sequence[Sequence[int] | np.ndarray] | None = None,
    beams: int = 4,
    **settings: Any,
) -> tuple[jax.Array, jax.Array]:
    """The best `beams` texts behind every row of a stream, best first.

    Args:
      stream, eos_id, used_ids, pad_id, prefixes: as in `decoding.generate`.
      beams, settings: fields of `Settings`, of which num_return is not read.

    Returns:
      (tokens int32 [B, beams, max_length], score float32 [B, beams]). A text without
      EOS was cut at `max_length`. Where there are fewer texts than beams the score is
      -inf; rows without any token to read have none.

    Raises:
      ValueError: for settings out of range, a model that does not decode, a text that
        is too long for it.
    """
    how = Settings(beams=beams, **settings)
    read = decoding.given(model.cfg, stream, prefixes, pad_id, how.max_length)
    return _search(params, read, model.cfg, how, eos_id, used_ids, pad_id)


def _pick(x_BK, at_BJ):
    """[B, K, ...] -> [B, J, ...]: of each row those at J places."""
    return jax.vmap(lambda x_K, at_J: x_K[at_J])(x_BK, at_BJ)


def _best(k: int, score_BJ, *others):
    """The k best of each row, with what belongs to them."""
    score_BK, at_BK = jax.lax.top_k(score_BJ, k)
    return score_BK, *(_pick(x, at_BK) for x in others)


@functools.partial(jax.jit, static_argnums=range(2, 7))
def _search(params, read, cfg, how, eos_id, used_ids, pad_id):
    decoder = decoding.model_for(params, cfg)
    start = decoding.begin(decoder, read, how.max_length, pad_id)
    B, K, V, P = len(read.live_B), how.beams, cfg.vocab_size, start.index + 1

    def norm(length) -> jax.Array:
        length = jnp.asarray(length, jnp.float32)
        return LENGTH_NORMS[how.length_norm](length, how.length_penalty)

    cells = jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), start.cells)
    unused_1V = jnp.arange(V)[None] >= used_ids

    def own(cache: Cache, change) -> Cache:
        """What the encoder gave is the same to all beams of a row."""
        return cache._replace(keys=change(cache.keys), values=change(cache.values))

    def step(at: Beams) -> Beams:
        end = P + at.written
        history_XS = at.history_BKS.reshape(B * K, -1)
        last_X1 = jax.lax.dynamic_slice_in_dim(history_XS, end - 1, 1, axis=1)
        logits_XV, caches = decoder.step(
            last_X1, end - 1, at.caches, cells, start.memory
        )
        logp_XV = jax.nn.log_softmax(jnp.where(unused_1V, -jnp.inf, logits_XV), axis=-1)
        banned = decoding.forbidden(how, history_XS, end, at.written, V, eos_id)
        if banned is not None:
            logp_XV = jnp.where(banned, -jnp.inf, logp_XV)
        logp_BKV = at.logp_BK[..., None] + logp_XV.reshape(B, K, V)

        # Of 2K continuations at most K end: K go on whatever happens.
        logp_BJ, at_BJ = jax.lax.top_k(logp_BKV.reshape(B, K * V), 2 * K)
        from_BJ, next_BJ = at_BJ // V, (at_BJ % V).astype(jnp.int32)
        history_BJS = _pick(at.history_BKS, from_BJ)
        history_BJS = jax.lax.dynamic_update_index_in_dim(
            history_BJS, next_BJ, end, axis=2
        )
        written = at.written + 1
        over_BJ = (next_BJ == eos_id) | (written == how.max_length)

        # Only the first K may end: the others are there to go on.
        counts_BJ = over_BJ & (jnp.arange(2 * K) < K)[None] & at.open_B[:, None]
        if how.early_stopping == "true":
            counts_BJ &= ~_full(at.score_BK)[:, None]
        score_BJ = jnp.where(counts_BJ, logp_BJ / norm(written), -jnp.inf)
        score_BK, ended_BKS = _best(
            K,
            jnp.concatenate([at.score_BK, score_BJ], axis=1),
            jnp.concatenate([at.ended_BKS, history_BJS], axis=1),
        )
        logp_BK, history_BKS, from_BK = _best(
            K, jnp.where(over_BJ, -jnp.inf, logp_BJ), history_BJS, from_BJ
        )
        # Log-probabilities only fall; the longest text is divided by the most.
        longest = how.max_length if how.early_stopping == "never" else written
        hope_B = logp_BK[:, 0] / norm(longest)
        open_B = at.open_B & (~_full(score_BK) | (hope_B > score_BK[:, -1]))
        # Rows of the caches follow their beam.
        rows_X = (from_BK + K * jnp.arange(B)[:, None]).reshape(-1)
        caches = tuple(own(cache, lambda x: x[rows_X]) for cache in caches)
        return Beams(written, history_BKS, logp_BK, ended_BKS, score_BK, open_B, caches)

    def unfinished(at: Beams) -> jax.Array:
        waiting_B = at.open_B
        if how.early_stopping == "true":
            waiting_B &= ~_full(at.score_BK)
        return (at.written < how.max_length) & jnp.any(waiting_B)

    history_BKS = jnp.repeat(start.history_BS[:, None], K, axis=1)
    none_BKS = jnp.full_like(history_BKS, pad_id)
    none_BK = jnp.full((B, K), -jnp.inf, jnp.float32)
    first_BK = none_BK.at[:, 0].set(jnp.where(read.live_B, 0.0, -jnp.inf))
    caches = tuple(
        own(cache, lambda x: jnp.repeat(x, K, axis=0)) for cache in start.caches
    )
    zero, live_B = jnp.zeros((), jnp.int32), jnp.asarray(read.live_B)
    begun = Beams(zero, history_BKS, first_BK, none_BKS, none_BK, live_B, caches)
    done: Beams = jax.lax.while_loop(unfinished, step, begun)
    return done.ended_BKS[..., P:], done.score_BK


def _full(score_BK: jax.Array) -> jax.Array:
    """bool [B]: has the row as many finished texts as beams?"""
    return jnp.all(score_BK > -jnp.inf, axis=1)


def best(tokens_BKT: np.ndarray, eos_id: int) -> list[list[int]]:
    """The best text of each row up to its EOS, which is left out."""
    rows = [row.tolist() for row in np.asarray(tokens_BKT)[:, 0]]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]

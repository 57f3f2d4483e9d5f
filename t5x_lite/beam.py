"""Beam search: the most likely texts, with the cache and the steps of `decoding`.

Each row keeps its `beams` most likely unfinished texts and as many finished ones. It
stops when no unfinished text can still become better than a finished one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import decoding
from t5x_lite import model as model_lib
from t5x_lite.config import ModelConfig
from t5x_lite.decoding import START_ID
from t5x_lite.stack import Cache


class Beams(NamedTuple):
    """K unfinished and K finished texts of each row, best first.

    Attributes:
      index: tokens written so far.
      tokens_BKT, logp_BK: unfinished, with the sum of their log-probabilities.
      ended_BKT, score_BK: finished, with their scores; -inf: there is none yet.
    """

    index: jax.Array
    tokens_BKT: jax.Array
    logp_BK: jax.Array
    ended_BKT: jax.Array
    score_BK: jax.Array
    cache: Cache


def search(
    model: Any,
    params: dict,
    stream: dict,
    *,
    max_length: int,
    eos_id: int,
    used_ids: int,
    beams: int = 4,
    length_penalty: float = 0.6,
    min_length: int = 0,
    pad_id: int = START_ID,
) -> tuple[jax.Array, jax.Array]:
    """The best `beams` texts behind every row of a stream, best first.

    Args:
      stream, max_length, eos_id, used_ids, pad_id: as in `decoding.generate`.
      length_penalty: alpha of Wu et al. 2016, section 7: a text's score is its
        log-probability over ((5 + length) / 6) ** alpha, EOS counted. T5 took 0.6 with
        4 beams (Raffel et al. 2020, section 3.1.2); 0 = none.
      min_length: no EOS before so many tokens.

    Returns:
      (tokens int32 [B, beams, max_length], score float32 [B, beams]). A text without
      EOS was cut at `max_length`. Where there are fewer texts than beams the score is
      -inf; rows without any token to read have none.

    Raises:
      ValueError: for settings out of range, a model that does not decode, a text that
        is too long for it.
    """
    _check_fits(model.cfg, stream, max_length)
    if beams < 1:
        raise ValueError(f"beams={beams} must be at least 1 (1 = greedy).")
    if not 0.0 <= length_penalty < float("inf"):
        raise ValueError(f"length_penalty={length_penalty} must be at least 0 (none).")
    if not 0 <= min_length <= max_length:
        raise ValueError(
            f"min_length={min_length} must be in [0, max_length={max_length}]."
        )
    return _search(
        params,
        stream,
        model.cfg,
        max_length,
        eos_id,
        used_ids,
        beams,
        length_penalty,
        min_length,
        pad_id,
    )


def _check_fits(cfg: ModelConfig, stream: dict, max_length: int):
    """Refuses a model that does not decode, and what is too long for it."""
    decoding.check_decodes(cfg)
    if max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1.")
    read = int(np.sum(np.asarray(stream["segments"]) > 0, axis=1).max())
    if cfg.structure == "encoder_decoder":
        decoding.check_room(cfg, max(read, max_length), "the text, or max_length,")
    else:
        whole = f"a prompt of {read} tokens with max_length={max_length}"
        decoding.check_room(cfg, read + max_length - 1, whole)


def _pick(x_BK, at_BJ):
    """[B, K, ...] -> [B, J, ...]: of each row those at J places."""
    return jax.vmap(lambda x_K, at_J: x_K[at_J])(x_BK, at_BJ)


def _best(k: int, score_BJ, *others):
    """The k best of each row, with what belongs to them."""
    score_BK, at_BK = jax.lax.top_k(score_BJ, k)
    return score_BK, *(_pick(x, at_BK) for x in others)


@functools.partial(jax.jit, static_argnums=range(2, 10))
def _search(
    params,
    stream,
    cfg,
    max_length,
    eos_id,
    used_ids,
    beams,
    length_penalty,
    min_length,
    pad_id,
):
    cast = jax.tree.map(lambda p: p.astype(cfg.dtype), params)
    bound: Any = model_lib.bind(model_lib.build(cfg), cast)
    one = decoding.begin(bound, stream, max_length, pad_id)
    B, K, V = len(one.last_B), beams, cfg.vocab_size
    start = one._replace(
        last_B=jnp.repeat(one.last_B, K, axis=0),
        cache=jax.tree.map(lambda x: jnp.repeat(x, K, axis=1), one.cache),
        cells=jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), one.cells),
        memory=jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), one.memory),
    )
    ids_V = jnp.arange(V)

    def penalty(length):
        return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** length_penalty

    def step(at: Beams) -> Beams:
        before = jnp.maximum(at.index - 1, 0)
        last_BK = jax.lax.dynamic_index_in_dim(at.tokens_BKT, before, 2, False)
        last_X = jnp.where(at.index == 0, start.last_B, last_BK.reshape(-1))
        logits_XV, cache = decoding.decode_step(
            bound,
            last_X[:, None],
            start.index + at.index,
            at.cache,
            start.cells,
            start.memory,
        )
        never_V = (ids_V >= used_ids) | ((ids_V == eos_id) & (at.index < min_length))
        logits_XV = jnp.where(never_V[None], -jnp.inf, logits_XV)
        logp_XV = jax.nn.log_softmax(logits_XV, axis=-1)
        logp_BKV = at.logp_BK[..., None] + logp_XV.reshape(B, K, V)

        # Of 2K continuations at most K end: K go on whatever happens.
        logp_BJ, at_BJ = jax.lax.top_k(logp_BKV.reshape(B, K * V), 2 * K)
        from_BJ, next_BJ = at_BJ // V, (at_BJ % V).astype(jnp.int32)
        tokens_BJT = _pick(at.tokens_BKT, from_BJ)
        tokens_BJT = jax.lax.dynamic_update_index_in_dim(
            tokens_BJT, next_BJ, at.index, axis=2
        )
        length = at.index + 1
        over_BJ = (next_BJ == eos_id) | (length == max_length)
        score_BJ = jnp.where(over_BJ, logp_BJ / penalty(length), -jnp.inf)
        score_BK, ended_BKT = _best(
            K,
            jnp.concatenate([at.score_BK, score_BJ], axis=1),
            jnp.concatenate([at.ended_BKT, tokens_BJT], axis=1),
        )
        logp_BK, tokens_BKT, from_BK = _best(
            K, jnp.where(over_BJ, -jnp.inf, logp_BJ), tokens_BJT, from_BJ
        )
        # Rows of the cache follow their beam; what the encoder gave is the same to all.
        rows_X = (from_BK + K * jnp.arange(B)[:, None]).reshape(-1)
        cache = cache._replace(
            keys=cache.keys[:, rows_X], values=cache.values[:, rows_X]
        )
        return Beams(length, tokens_BKT, logp_BK, ended_BKT, score_BK, cache)

    def unfinished(at: Beams) -> jax.Array:
        # Log-probabilities only fall, and the longest text is divided by the most.
        hope_B = at.logp_BK[:, 0] / penalty(max_length)
        return (at.index < max_length) & jnp.any(hope_B > at.score_BK[:, -1])

    none_BKT = jnp.full((B, K, max_length), pad_id, jnp.int32)
    none_BK = jnp.full((B, K), -jnp.inf, jnp.float32)
    empty_B = jnp.all(stream["segments"] == 0, axis=1)
    first_BK = none_BK.at[:, 0].set(jnp.where(empty_B, -jnp.inf, 0.0))
    zero = jnp.zeros((), jnp.int32)
    begun = Beams(zero, none_BKT, first_BK, none_BKT, none_BK, start.cache)
    done: Beams = jax.lax.while_loop(unfinished, step, begun)
    return done.ended_BKT, done.score_BK


def best(tokens_BKT: np.ndarray, eos_id: int) -> list[list[int]]:
    """The best text of each row up to its EOS, which is left out."""
    rows = [row.tolist() for row in np.asarray(tokens_BKT)[:, 0]]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]

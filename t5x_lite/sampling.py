"""How a token is drawn from logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


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


def row_keys(given: jax.Array | None, rows: int, how: Sampling) -> jax.Array:
    """A key for each row [B]: those given, or folded from one by the row's number.

    Raises:
      ValueError: if there is none and the tokens are sampled; greedy needs none.
    """
    if given is None and how.temperature:
        raise ValueError(f"temperature={how.temperature} samples: give a key.")
    one = jax.random.key(0) if given is None else given
    return one if one.ndim else folded(one, jnp.arange(rows))


def folded(key: jax.Array, numbers_B) -> jax.Array:
    """Keys [B] of one key and a number each, or of B keys and one number."""
    many = (0, None) if key.ndim else (None, 0)
    return jax.vmap(jax.random.fold_in, many)(key, numbers_B)


def sample_keys(seed: int, numbers_B: np.ndarray, copies: int = 1) -> jax.Array:
    """A key for each of `copies` samples of each text, by the text's number alone."""
    keys_B = folded(jax.random.key(seed), jnp.asarray(numbers_B))
    return jax.vmap(lambda key: folded(key, jnp.arange(copies)))(keys_B).reshape(-1)


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


def draw(logits_BV: jax.Array, keys_B: jax.Array, how: Sampling) -> jax.Array:
    """Token ids [B] int32; each row with its own key, whatever stands beside it."""
    if how.temperature == 0.0:
        return most_likely(logits_BV)
    logits_BV = restrict(logits_BV / how.temperature, how.top_k, how.top_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def most_likely(logits_BV: jax.Array) -> jax.Array:
    """The lowest of the most likely ids: argmax, which XLA's CPU does not vectorise."""
    V = logits_BV.shape[-1]
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    ids_1V = jnp.arange(V, dtype=jnp.int32)[None]
    found_B = jnp.min(jnp.where(logits_BV == best_B1, ids_1V, V), axis=-1)
    return jnp.minimum(found_B, V - 1)  # not a number: no id is the best

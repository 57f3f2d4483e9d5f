"""Who may see whom: the rank rule, and the only place a mask is made.

Every token carries a segment (0 = padding), a rank and a position. A query sees a key
iff they share a segment and `rank_k <= rank_q - gap`; a window also asks
`position_q - position_k < window`. See the table in the README for the ranks of each
structure.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.model_config import ModelConfig


class Cells(NamedTuple):
    """What visibility needs to know of a stream; each int32 [B, T]."""

    segments_BT: jax.Array
    ranks_BT: jax.Array
    positions_BT: jax.Array

    @classmethod
    def of(cls, stream: dict) -> "Cells":
        return cls(stream["segments"], stream["ranks"], stream["positions"])


def visible(query: Cells, key: Cells, *, gap: int = 0, window: int = 0) -> jax.Array:
    """bool [B, T, S]: may query t see key s?

    Args:
      query: cells of the T queries.
      key: cells of the S keys; the same stream for self-attention.
      gap: how much lower a key's rank must be (0 content, 1 query stream, k ...).
      window: positions a query looks back, itself included; 0 = no limit.
    """
    segment_q, segment_k = query.segments_BT[:, :, None], key.segments_BT[:, None, :]
    rank_q, rank_k = query.ranks_BT[:, :, None], key.ranks_BT[:, None, :]
    seen = (segment_q == segment_k) & (segment_k > 0) & (rank_k <= rank_q - gap)
    if window:
        distance = query.positions_BT[:, :, None] - key.positions_BT[:, None, :]
        seen &= distance < window
    return jnp.asarray(seen)


def visible_to_streams(
    cells: Cells, keys: Cells, ranks_BGT, groups_BGT=None, *, window: int = 0
) -> jax.Array:
    """bool [B, (1+G)*T, S]: the stack's own T cells, then G query streams.

    A query cell sees `keys` (the stack's cells, or memory and these) by its own rank.
    With `groups_BGT` the G*T query cells are keys too, behind the others: a query cell
    sees those of its group (> 0).
    """
    B, G, T = ranks_BGT.shape
    again = [jnp.concatenate([c] * (1 + G), axis=1) for c in cells]
    segments, ranks, positions = again
    ranks = jnp.concatenate([cells.ranks_BT, ranks_BGT.reshape(B, G * T)], axis=1)
    query = Cells(segments, ranks, positions)
    seen = visible(query, keys, window=window)
    if groups_BGT is None:
        return seen
    groups = jnp.concatenate(
        [jnp.zeros((B, T), jnp.int32), groups_BGT.reshape(B, G * T)], axis=1
    )
    own = groups[:, :, None] == groups[:, None, T:]
    own &= (groups[:, :, None] > 0) & (segments[:, None, T:] > 0)
    own &= segments[:, :, None] == segments[:, None, T:]
    return jnp.concatenate([seen, own], axis=2)


def check_unpadded(cfg: ModelConfig, batch: dict) -> None:
    """Refuses a host batch whose masks are not all or causal, as was promised.

    Raises:
      ValueError: naming config.model.unpadded and the stream.
    """
    for name, stream in batch.items():
        if not isinstance(stream, dict):
            continue
        causal = name == "decoder" or cfg.structure == "decoder"
        ranks_T = np.arange(stream["ranks"].shape[1]) if causal else 0
        if (stream["segments"] != 1).any() or (stream["ranks"] != ranks_T).any():
            raise ValueError(
                f"config.model.unpadded=True, but the stream {name!r} of a batch has "
                f"padding, several segments, or ranks that are not "
                f"{'0, 1, 2, ...' if causal else '0'}. Set it to False."
            )

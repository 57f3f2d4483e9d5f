"""How positions enter attention: four ways, and sinusoids.

A stack reads T cells, then G query streams of T cells each (G may be 0), after M cells
of memory. Keys are the memory and the T cells, and the query streams' own cells if
these see each other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_lite.config import ModelConfig
from t5x_lite.parameters import param, weight_init, zeros


class Grid(NamedTuple):
    """The cells of queries and keys.

    length T, streams G, memory M, and do keys include the query streams?
    different_BTS: bool, are query and key of different types (sentences)?
    """

    length: int
    streams: int = 0
    memory: int = 0
    own: bool = False
    different_BTS: jax.Array | None = None

    def over_streams(self, scores_XNTS):
        """[X, N, T, M + T] of one stream -> of all queries and keys."""
        M = self.memory
        if self.own:
            again = [scores_XNTS[..., M:]] * self.streams
            scores_XNTS = jnp.concatenate([scores_XNTS, *again], axis=-1)
        return jnp.concatenate([scores_XNTS] * (1 + self.streams), axis=-2)


def sinusoids(positions: np.ndarray, width: int, *, interleaved: bool = False):
    """float32 [len(positions), width] (Vaswani et al. 2017, section 3.5).

    All sines, then all cosines, unless `interleaved`.
    """
    rates = np.exp(np.arange(0, width, 2) * (-np.log(10_000.0) / width))
    angles = positions[:, None] * rates[None]
    if interleaved:
        both = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(len(angles), -1)
    else:
        both = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    return both[:, :width].astype(np.float32)


def relative_bucket(distance: np.ndarray, cfg: ModelConfig, bidirectional: bool):
    """T5's log-spaced bucket of key position - query position (same shape, int32)."""
    buckets, max_distance = cfg.relative_buckets, cfg.relative_max_distance
    offset = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = np.where(distance > 0, buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    # float32 as in the reference: float64 puts some distances into other buckets.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    scale = np.float32(np.log(max_distance / exact))
    log = exact + (ratio / scale * np.float32(buckets - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(log, buckets - 1))
    return (offset + bucket).astype(np.int32)


class RelativeBias(nnx.Module):
    """T5's relative-position bias, one table for all layers of a stack.

    It depends on the distance of indices alone, which inside a segment is the distance
    of positions for every layout whose positions are consecutive.
    """

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        self.embedding = param(
            (cfg.relative_buckets, cfg.heads),
            ("buckets", "heads"),
            weight_init(cfg, cfg.d_model**-0.5),
        )

    def __call__(self, T: int, S: int, causal: bool) -> jax.Array:
        """float32 [1, N, T, S] for keys 0..S-1 and queries S-T..S-1."""
        distances = np.arange(-(S - 1), T)
        buckets = relative_bucket(distances, self.cfg, not causal)
        diagonals_NR = self.embedding[...].astype(jnp.float32)[buckets].T
        N, R = diagonals_NR.shape
        rows_NTR = jnp.broadcast_to(diagonals_NR[:, None], (N, T, R))
        return skewed(rows_NTR, T, S)[None]

    def row(self, index: jax.Array, S: int, causal: bool, T: int = 1) -> jax.Array:
        """float32 [1, N, T, S] for T queries from traced `index` on, keys 0..S-1."""
        buckets = relative_bucket(np.arange(-(S - 1), S), self.cfg, not causal)
        diagonals_NR = self.embedding[...].astype(jnp.float32)[buckets].T
        R = T + S - 1
        rows_NR = jax.lax.dynamic_slice_in_dim(diagonals_NR, S - T - index, R, axis=1)
        rows_NTR = jnp.broadcast_to(rows_NR[:, None], (len(rows_NR), T, R))
        return skewed(rows_NTR, T, S)[None]


def skewed(by_distance_XTR, T: int, S: int) -> jax.Array:
    """[..., T, T+S-1] values by distance, -(T-1) first -> [..., T, S], no gather.

    Entry (t, s) is distance s - t. A skewed reshape: the gradient is a plain sum
    instead of a scatter.
    """
    *lead, _, R = by_distance_XTR.shape
    none = [(0, 0)] * (len(lead) + 1)
    padded = jnp.pad(by_distance_XTR, (*none, (0, 1))).reshape(*lead, T * (R + 1))
    # Cut with stride R instead of R + 1: row t is shifted right by t.
    return padded[..., : T * R].reshape(*lead, T, R)[..., T - 1 :]


def unskewed(values_XTS) -> jax.Array:
    """The transpose of `skewed`: [..., T, S] -> [..., T, T+S-1] by distance."""
    *lead, T, S = values_XTS.shape
    R, none = T + S - 1, [(0, 0)] * len(lead)
    padded = jnp.pad(values_XTS, (*none, (0, 0), (T - 1, 0))).reshape(*lead, T * R)
    padded = jnp.pad(padded, (*none, (0, T)))
    return padded.reshape(*lead, T, R + 1)[..., :R]


class Functional(nnx.Module):
    """NEZHA (Wei et al. 2019, section 3.2): fixed sinusoids in keys and values.

    Distances are clipped to +-relative_max_distance. No parameters.
    """

    def __init__(self, cfg: ModelConfig):
        self.far, self.width = cfg.relative_max_distance, cfg.head_dim

    def __call__(self, x_BTD, q_BTNH, scale: float, grid: Grid):
        distances = np.arange(-(grid.length - 1), grid.length)
        clipped = np.clip(distances, -self.far, self.far)
        table_RH = jnp.asarray(
            sinusoids(clipped + self.far, self.width, interleaved=True), q_BTNH.dtype
        )
        q_BTNH *= jnp.asarray(scale, q_BTNH.dtype)
        scores_BNTR = jnp.einsum("BTNH,RH->BNTR", q_BTNH, table_RH)
        bias_BNTS = skewed(scores_BNTR.astype(jnp.float32), grid.length, grid.length)
        return (
            q_BTNH,
            bias_BNTS,
            lambda w: jnp.einsum("BNTR,RH->BTNH", unskewed(w), table_RH),
        )


class TransformerXL(nnx.Module):
    """XLNet's relative positions and segments (Dai et al. 2019; Yang et al. 2019).

    Scores are (q + content_bias) k + (q + position_bias) r + (q + segment_bias) s.
    """

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        D, N, H = cfg.d_model, cfg.heads, cfg.head_dim
        init = weight_init(cfg, D**-0.5)
        self.position = param((D, N, H), ("embed", "heads", "kv"), init)
        self.content_bias = param((N, H), ("heads", "kv"), init)
        self.position_bias = param((N, H), ("heads", "kv"), init)
        if cfg.types:
            self.segment_bias = param((N, H), ("heads", "kv"), init)
            self.segment = param((cfg.types, N, H), (None, "heads", "kv"), init)

    def __call__(self, x_BTD, q_BTNH, scale: float, grid: Grid):
        B, _, N, H = q_BTNH.shape
        T, S, streams = grid.length, grid.memory + grid.length, 1 + grid.streams
        factor = jnp.asarray(scale, q_BTNH.dtype)
        # Query t stands at index M + t of the keys.
        distances = np.arange(-(grid.memory + T - 1), T)
        r_RD = jnp.asarray(sinusoids(-distances, self.cfg.d_model), q_BTNH.dtype)
        r_RNH = jnp.einsum("RD,DNH->RNH", r_RD, self.position[...])
        q_r = (q_BTNH + self.position_bias[...][None, None]) * factor
        scores = jnp.einsum("BTNH,RNH->BNTR", q_r, r_RNH).astype(jnp.float32)
        bias = skewed(scores.reshape(B, N, streams, T, -1), T, S)
        bias = bias.reshape(B, N, streams * T, S)
        if self.cfg.types and grid.different_BTS is not None:
            q_s = (q_BTNH + self.segment_bias[...][None, None]) * factor
            both = jnp.einsum("BTNH,KNH->KBNT", q_s, self.segment[...])
            both = both.astype(jnp.float32)[..., None]
            different = jnp.concatenate([grid.different_BTS] * streams, axis=1)
            bias += jnp.where(different[:, None], both[1], both[0])
        return (q_BTNH + self.content_bias[...][None, None]) * factor, bias, None


class ProphetNet(nnx.Module):
    """A relative bias that each query computes from its own input (its released code).

    In the query streams the context counts as one position farther away.
    """

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        D, N, K = cfg.d_model, cfg.heads, cfg.relative_buckets
        init = weight_init(cfg, D**-0.5)
        self.kernel = param((D, K, N), ("embed", "buckets", "heads"), init)
        self.bias = param((K, N), ("buckets", "heads"), zeros)

    def __call__(self, x_BTD, q_BTNH, scale: float, grid: Grid):
        T, streams = grid.length, 1 + grid.streams
        of_BTKN = jnp.einsum("BTD,DKN->BTKN", x_BTD, self.kernel[...])
        of_BNTK = jnp.moveaxis(of_BTKN + self.bias[...][None, None], -1, 1)
        distances = np.arange(T)[None] - np.arange(T)[:, None]
        main, behind = (relative_bucket(d, self.cfg, False) for d in
                        (distances, distances - 1))  # fmt: skip
        rows = [np.concatenate([main] * (1 + grid.streams * grid.own), axis=1)]
        far = np.concatenate([behind] + [main] * (grid.streams * grid.own), axis=1)
        buckets_TS = jnp.asarray(np.concatenate(rows + [far] * (streams - 1)))
        K = self.cfg.relative_buckets
        onehot = jax.nn.one_hot(buckets_TS, K, dtype=x_BTD.dtype)
        bias = jnp.einsum("BNTK,TSK->BNTS", of_BNTK, onehot).astype(jnp.float32)
        return q_BTNH * jnp.asarray(scale, q_BTNH.dtype), bias, None


# What the blocks themselves hold, by config.model.positions.
RELATIVE = {
    "functional": Functional,
    "transformer_xl": TransformerXL,
    "prophetnet": ProphetNet,
}

"""Which rows of a table another model's rows become: ids, positions, distances."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from t5x_lite import checkpoint, model, parameters
from t5x_lite import vocab as vocab_lib
from t5x_lite.config import Config, ModelConfig
from t5x_lite.positions import relative_bucket
from t5x_lite.vocab import Vocab


class Rows(NamedTuple):
    """For each row of a table of ours, the rows of another that it is made of.

    Row t is low * (1 - weight) + high * weight of rows `low_T[t]`, `high_T[t]`.

    Attributes:
        low_T, high_T: int32 [T]; -1: no such row there.
        weight_T: float32 [T].
        blank_T: bool [T], rows that nothing reads, such as padding of a vocabulary.
    """

    low_T: np.ndarray
    high_T: np.ndarray
    weight_T: np.ndarray
    blank_T: np.ndarray

    @property
    def new_T(self) -> np.ndarray:
        """bool [T]: rows that are read and have no counterpart."""
        return (self.low_T < 0) & ~self.blank_T


def copies(rows_T, blank_T=None) -> Rows:
    """Each row is one row of the other table, or new (-1)."""
    rows_T = np.asarray(rows_T, np.int32)
    blank_T = np.zeros(len(rows_T), bool) if blank_T is None else blank_T
    return Rows(rows_T, rows_T, np.zeros(len(rows_T), np.float32), blank_T)


def of_ids(ours: Vocab, size: int, theirs: Vocab | None) -> Rows:
    """Rows of ids, by what `Vocab.names` calls them: roles, sentinels, pieces.

    Args:
        size: rows of our table, at least ours.size.
        theirs: None = the same vocabulary.
    """
    blank_T = np.arange(size) >= ours.size
    if theirs is None:
        return copies(np.where(blank_T, -1, np.arange(size)), blank_T)
    there = {name: i for i in range(theirs.size) for name in theirs.names(i)}
    found_T = np.full(size, -1, np.int32)
    for i in range(ours.size):
        found_T[i] = next((there[n] for n in ours.names(i) if n in there), -1)
    return copies(found_T, blank_T)


def of_positions(ours: ModelConfig, theirs: ModelConfig, how: str) -> Rows:
    """Rows of learned positions; a shorter table takes the first.

    Args:
        how: for a longer one, "repeat": the table begins again behind its end (Beltagy
            et al. 2020, section 5); "interpolate": it is stretched, the first and last
            position staying these.
    """
    have, want = theirs.max_positions, ours.max_positions
    at_T = np.arange(want + ours.position_offset) - ours.position_offset
    where_T = np.maximum(at_T, 0).astype(np.float64)
    if want > have and how == "interpolate":
        where_T *= (have - 1) / (want - 1)
    else:
        where_T %= have
    low_T = np.floor(where_T).astype(np.int32)
    high_T = np.minimum(low_T + 1, have - 1)
    # The rows before the first position belong to padding.
    before_T, offset = at_T < 0, theirs.position_offset
    first_T = np.where(ours.position_offset == offset, np.arange(len(at_T)), -1)
    return Rows(
        np.where(before_T, first_T, low_T + offset).astype(np.int32),
        np.where(before_T, first_T, high_T + offset).astype(np.int32),
        np.where(before_T, 0, where_T - low_T).astype(np.float32),
        before_T,
    )


def of_buckets(
    ours: ModelConfig, theirs: ModelConfig, one_way: bool, theirs_one_way: bool
) -> Rows:
    """Rows of T5's relative distances, by the distances that fall into a bucket.

    Of several their middle one counts. A one-way table (a decoder's) knows no keys
    behind the query: these get the row of the distance before it. So a decoder's 32
    buckets become the 64 of a prefix-LM, and again the 32, without loss.
    """
    far = 2 * max(ours.relative_max_distance, theirs.relative_max_distance)
    distances = np.arange(-far, 1 if one_way else far + 1)
    of_ours = relative_bucket(distances, ours, not one_way)
    behind = -np.abs(distances) if theirs_one_way else distances
    of_theirs = relative_bucket(behind, theirs, not theirs_one_way)
    rows_T = np.zeros(ours.relative_buckets, np.int32)
    reached_T = np.isin(np.arange(len(rows_T)), of_ours)
    for bucket in np.flatnonzero(reached_T):
        held = of_theirs[of_ours == bucket]
        rows_T[bucket] = held[len(held) // 2]
    return copies(np.where(reached_T, rows_T, -1), ~reached_T)


@dataclasses.dataclass(frozen=True)
class Source:
    """The run that parameters are taken from."""

    path: str
    cfg: Config
    step: int
    fingerprint: str
    declared: dict

    @classmethod
    def of(cls, path: str, step: int = -1) -> "Source":
        try:
            cfg, chosen, meta = checkpoint.read_run(path, step)
        except FileNotFoundError as e:
            raise FileNotFoundError(
                f"config.init_from={path!r} is no workdir with a checkpoint. Give the "
                "--workdir of a run, or of t5x_lite.convert."
            ) from e
        declared = parameters.declared(model.build(cfg.model))
        return cls(path, cfg, chosen, meta["data"].get("vocab", ""), declared)

    @functools.cached_property
    def vocab(self) -> Vocab:
        """Raises ValueError: its file is not there, or another one."""
        data = self.cfg.data
        try:
            words = vocab_lib.load(data.vocab, data.sentinels)
        except (OSError, ValueError) as e:
            raise ValueError(
                f"config.init_from={self.path!r}: its vocabulary {data.vocab!r}, whose "
                f"pieces config.init_vocab compares, cannot be read: {e}"
            ) from e
        if words.fingerprint != self.fingerprint:
            raise ValueError(
                f"config.init_from={self.path!r}: {data.vocab!r} is no longer the "
                f"vocabulary of that run (fingerprint {words.fingerprint}, then "
                f"{self.fingerprint}). Put the original file back."
            )
        return words


class Differences:
    """Between the tables of a config and of a source.

    Args:
        cfg: with its config.model.vocab_size filled in.
    """

    def __init__(self, cfg: Config, source: Source):
        self.cfg, self.source = cfg, source

    def rows(self, name: str, axes: tuple, there: str) -> tuple[int, Rows | None]:
        """-> (axis, rows along it, or None if they are the same).

        Args:
            name, axes: of our parameter.
            there: its name in the source.

        Raises:
            ValueError: they differ and no config key says how to go on.
        """
        if "vocab" in axes:
            return axes.index("vocab"), self._ids
        if name.endswith("inputs/positions"):
            return 0, self._positions()
        if "buckets" in axes:
            return axes.index("buckets"), self._buckets(name, there)
        return 0, None

    @functools.cached_property
    def _ids(self) -> Rows | None:
        cfg, source = self.cfg, self.source
        words = vocab_lib.load(cfg.data.vocab, cfg.data.sentinels)
        size = cfg.model.vocab_size
        if words.fingerprint == source.fingerprint:
            if size == source.cfg.model.vocab_size:
                return None
            return of_ids(words, size, None)
        if not source.fingerprint:
            raise ValueError(
                "it was converted without its vocabulary, so that nobody knows its "
                "ids. Convert it again with --vocab=FILE."
            )
        if not cfg.init_vocab:
            raise ValueError(
                f"rows are ids of another vocabulary, {source.cfg.data.vocab!r} with "
                f"{source.cfg.data.sentinels} sentinels there, {words.spec!r} with "
                f"{words.sentinels} here. config.init_vocab='mean' or 'fresh' takes "
                "over the pieces that both have."
            )
        return of_ids(words, size, source.vocab)

    def _positions(self) -> Rows | None:
        ours, theirs = self.cfg.model, self.source.cfg.model
        table = (ours.max_positions, ours.position_offset)
        if table == (theirs.max_positions, theirs.position_offset):
            return None
        if ours.max_positions > theirs.max_positions and not self.cfg.init_positions:
            raise ValueError(
                f"{ours.max_positions} positions here, {theirs.max_positions} there. "
                "config.init_positions='repeat' or 'interpolate' makes more of them."
            )
        return of_positions(ours, theirs, self.cfg.init_positions)

    def _buckets(self, name: str, there: str) -> Rows | None:
        ours, theirs = self.cfg.model, self.source.cfg.model
        ways = _one_way(name, ours), _one_way(there, theirs)
        here = (ours.relative_buckets, ours.relative_max_distance, ways[0])
        if here == (theirs.relative_buckets, theirs.relative_max_distance, ways[1]):
            return None
        if not self.cfg.init_positions:
            raise ValueError(
                f"{_distances(ours, ways[0])} here, {_distances(theirs, ways[1])} "
                "there. config.init_positions='repeat' maps them by distance (nothing "
                "is lost from n buckets of a decoder to 2n both ways, and back)."
            )
        return of_buckets(ours, theirs, *ways)


def _one_way(name: str, cfg: ModelConfig) -> bool:
    """Does a table of relative distances know keys before the query only?"""
    return name.startswith("decoder/") or cfg.structure == "decoder"


def _distances(cfg: ModelConfig, one_way: bool) -> str:
    ways = "one way" if one_way else "both ways"
    far = cfg.relative_max_distance
    return f"{cfg.relative_buckets} buckets of distances {ways} up to {far}"

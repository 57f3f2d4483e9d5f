"""Which source an example of a mixture comes from: closed forms, no state.

Of the first t examples of a phase, source k has `counts(t)[k]`: within a few of its
share of t, at every t, so its long-run share is exact. Blocks of `BLOCK` examples are
shuffled inside, so the sources do not alternate in a pattern.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from t5x_lite.data import texts

BLOCK = 1024
_BITS = np.uint64(32)
_ONE = 1 << 32


def proportional(
    sizes: Mapping[str, int], temperature: float = 1.0, cap: int = 0
) -> dict[str, float]:
    """Rates in proportion to size (Raffel et al. 2020, section 3.5.2).

    Args:
        sizes: examples of each source.
        temperature: T of min(size, cap) ** (1 / T); 1 = in proportion, large = equal.
        cap: artificial limit K of a size; 0 = none.
    """
    limited = {k: min(n, cap) if cap else n for k, n in sizes.items()}
    rates = {k: float(n) ** (1 / temperature) for k, n in limited.items()}
    # The last bit of a power is not the same on all machines; the order of a run is.
    return {k: float(f"{rate:.12g}") for k, rate in rates.items()}


@dataclasses.dataclass(frozen=True)
class Phase:
    """Examples [first, next phase's first) with fixed rates.

    Attributes:
        first: example of the run.
        rates: of each source, not negative, not all 0; need not sum to 1.
        before: examples of each source in the phases before.
    """

    first: int
    rates: tuple[float, ...]
    before: tuple[int, ...]

    def counts(self, t_X: np.ndarray) -> np.ndarray:
        """Examples of each source among the first t of the phase: int64 [K, X].

        Source 0 gets floor(t * its share), source 1 its share of what is left, and so
        on: each grows by 0 or 1 from t to t + 1, and together by 1.
        """
        left_X, counts = np.asarray(t_X).astype(np.uint64), []
        for ways in self._ways:
            # floor(left * ways / 2**32) without overflow: any machine gets the same.
            high_X, low_X = left_X >> _BITS, left_X & np.uint64(_ONE - 1)
            taken_X = high_X * np.uint64(ways) + (low_X * np.uint64(ways) >> _BITS)
            counts.append(taken_X)
            left_X = left_X - taken_X
        return np.stack([*counts, left_X]).astype(np.int64)

    @functools.cached_property
    def _ways(self) -> tuple[int, ...]:
        """Share of each source but the last in what those before it leave, * 2**32."""
        left = [sum(self.rates[k:]) for k in range(len(self.rates))]
        # Behind the last rate above 0 nothing is left.
        return tuple(
            round(r / all_left * _ONE) if all_left else 0
            for r, all_left in zip(self.rates[:-1], left, strict=False)
        )


class Mix:
    """The sources of all examples: `of(indices_B)`.

    Args:
        rates: name -> rate, not negative; they need not sum to 1.
        changes: (first example, name, rate) from which on a rate is another.
        seed: of the order inside the blocks.
    """

    def __init__(
        self,
        rates: Mapping[str, float],
        changes: Sequence[tuple[int, str, float]] = (),
        seed: int = 0,
    ):
        self.names, self.seed = tuple(rates), seed
        now = dict(rates)
        self.phases = [Phase(0, tuple(now.values()), (0,) * len(now))]
        for first in sorted({first for first, _, _ in changes}):
            now |= {name: rate for at, name, rate in changes if at == first}
            last = self.phases[-1]
            inside = last.counts(np.array([first - last.first]))[:, 0]
            before = tuple((inside + np.array(last.before)).tolist())
            same = self.phases[-1].first == first
            self.phases = self.phases[: -1 if same else None]
            self.phases.append(Phase(first, tuple(now.values()), before))

    def counts(self, examples: int) -> tuple[int, ...]:
        """Examples of each source among the first ones of the run."""
        index = max(i for i, p in enumerate(self.phases) if p.first <= examples)
        phase, length = self._at(index)
        block, inside = divmod(examples - phase.first, BLOCK)
        found_K = phase.counts(np.array([block * BLOCK]))[:, 0] + phase.before
        if inside:
            sources_X, _ = _block(phase, length, block, (self.seed, index))
            found_K += np.bincount(sources_X[:inside], minlength=len(self.names))
        return tuple(found_K.tolist())

    def phase_rates(self) -> list[list]:
        """[first example, {name: share}] of each phase, for JSON."""
        return [
            [
                p.first,
                {n: r / sum(p.rates) for n, r in zip(self.names, p.rates, strict=True)},
            ]
            for p in self.phases
        ]

    def of(self, indices_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source_B, index_B): of each example, and its number in that source."""
        sources_B = np.empty(len(indices_B), np.int64)
        numbers_B = np.empty(len(indices_B), np.int64)
        firsts = np.array([phase.first for phase in self.phases])
        phases_B = np.searchsorted(firsts, indices_B, side="right") - 1
        places_B = indices_B - firsts[phases_B]
        keys_B2 = np.stack([phases_B, places_B // BLOCK], axis=1)
        for phase, block in np.unique(keys_B2, axis=0).tolist():
            here_B = (keys_B2 == (phase, block)).all(axis=1)
            sources, numbers = _block(*self._at(phase), block, (self.seed, phase))
            inside = places_B[here_B] % BLOCK
            sources_B[here_B], numbers_B[here_B] = sources[inside], numbers[inside]
        return sources_B, numbers_B

    def _at(self, phase: int) -> tuple[Phase, int]:
        """(the phase, how many examples it has; 2**62 for the last)."""
        ends = [after.first for after in self.phases[phase + 1 :]] or [2**62]
        return self.phases[phase], ends[0] - self.phases[phase].first


@functools.lru_cache(maxsize=8)
def _block(phase: Phase, length: int, block: int, seeds: tuple[int, int]):
    """(source, number in it) of all examples of a block of a phase, in their order."""
    begin = block * BLOCK
    counts_KX = phase.counts(np.arange(begin, min(begin + BLOCK, length) + 1))
    slots_X = np.argmax(np.diff(counts_KX, axis=1), axis=0)
    entropy = np.random.SeedSequence((seeds[0] % 2**64, seeds[1], block))
    shuffle = np.random.Generator(np.random.Philox(entropy))
    sources_X = shuffle.permutation(slots_X)
    numbers_X = np.empty(len(sources_X), np.int64)
    for k, before in enumerate(counts_KX[:, 0] + np.array(phase.before)):
        mine_X = sources_X == k
        numbers_X[mine_X] = before + np.arange(mine_X.sum())
    return sources_X, numbers_X


KEYS = ("train", "heldout", "rate", "field", "documents", "bad_utf8")
_AMONG = dict(documents=texts.DOCUMENTS, bad_utf8=texts.BAD_UTF8)


def problems(data) -> Iterator[str]:
    """What in the mixture of a `config.DataConfig` does not fit together."""
    at = "config.data.mixture"
    mixed, by_size = data.mixture, data.mixing == "proportional"
    unused = dict(mixing="rates", temperature=1.0, cap=0, rate_changes=())
    if not mixed:
        for name in ("train", "heldout"):
            if not getattr(data, name) and not data.tasks:
                yield f"config.data.{name}='' names no text. Give a path or a URL."
        for name, default in unused.items():
            if (value := getattr(data, name)) != default:
                yield f"config.data.{name}={value!r} is of a mixture: {at} is empty."
        return
    for name, entry in mixed.items():
        yield from _entry_problems(f"{at}.{name}", name, entry, data, by_size)
    if not any(_get(entry, "heldout") for entry in mixed.values()) and not data.tasks:
        yield f"{at}: no source has a held-out text. Give one heldout=PATH."
    if data.tasks and data.task_format == "head":
        yield f"{at}: a task with a head cannot be mixed. Set task_format='text'."
    names = sorted({*mixed, *data.tasks})
    if by_size and data.rate_changes:
        yield (
            f"config.data.rate_changes={data.rate_changes!r} needs config.data.mixing="
            "'rates'; here rates follow from sizes."
        )
    if not by_size:
        for name in ("temperature", "cap"):
            if (value := getattr(data, name)) != unused[name]:
                yield (
                    f"config.data.{name}={value!r} needs config.data.mixing="
                    "'proportional'."
                )
        yield from _change_problems(data.rate_changes, names)
        yield from _zero_problems(data, names)


def _entry_problems(at: str, name: str, entry, data, by_size: bool) -> Iterator[str]:
    if not re.fullmatch(r"[\w.-]+", str(name)) or type(name) is not str:
        yield f"{at}: a source's name is letters, digits, '_', '-' and '.', in quotes."
    if not isinstance(entry, Mapping):
        yield f"{at}={entry!r} must be a dict with keys {', '.join(KEYS)}."
        return
    for key, value in entry.items():
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            yield f"{at}.{key} is no key{hint} Keys here: {', '.join(KEYS)}."
        elif key == "rate":
            if by_size:
                yield f"{at}.rate={value!r} needs config.data.mixing='rates'."
            elif not _is_rate(value):
                yield f"{at}.rate={value!r} must be a number of at least 0."
        elif not isinstance(value, str):
            yield f"{at}.{key}={value!r} must be of type str."
        elif value not in (allowed := _AMONG.get(key, (value,))):
            yield f"{at}.{key}={value!r} is not one of {', '.join(allowed)}."
    if name in data.tasks and {"train", "heldout"} & entry.keys():
        yield f"{at} is a task of config.data.tasks: it has its own texts. Leave them."
    if name not in data.tasks and not _get(entry, "train"):
        yield f"{at}.train is missing: a path, or a task's name in config.data.tasks."


def _change_problems(changes, names: list[str]) -> Iterator[str]:
    for change in changes:
        at = f"config.data.rate_changes: {change!r}"
        if not _is_change(change):
            yield f"{at} must be (step, name, rate)."
            continue
        step, name, rate = change
        if type(step) is not int or step < 1:
            yield f"{at}: the step must be an integer of at least 1."
        if name not in names:
            yield f"{at}: no such source. There are {', '.join(names)}."
        if not _is_rate(rate):
            yield f"{at}: the rate must be a number of at least 0."
        if sum(other[:2] == change[:2] for other in changes if _is_change(other)) > 1:
            yield f"{at}: a source has one rate at a step. Leave the others out."


def _zero_problems(data, names: list[str]) -> Iterator[str]:
    now = {name: _get(data.mixture.get(name), "rate", 1.0) for name in names}
    rows = [c for c in data.rate_changes if _is_change(c)]
    if not all(map(_is_rate, [*now.values(), *[rate for *_, rate in rows]])):
        return  # has been said
    for step in [0, *sorted({c[0] for c in rows if type(c[0]) is int})]:
        now |= {name: rate for at, name, rate in rows if at == step}
        if not any(now.values()):
            yield f"config.data.mixture: from step {step} on all rates are 0."


def _is_change(value) -> bool:
    return isinstance(value, tuple) and len(value) == 3


def _is_rate(value) -> bool:
    number = type(value) in (int, float)
    return number and value >= 0 and math.isfinite(value)


def _get(entry, key: str, default=None):
    return entry.get(key, default) if isinstance(entry, Mapping) else default

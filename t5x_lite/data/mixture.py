"""Mixtures: the examples of several sources in one run, batch = f(seed, step).

    config.data.mixture = {
        "books": dict(train="books/*.txt", heldout="books_heldout.txt", rate=0.7),
        "code": dict(train="code.jsonl", heldout="code_heldout.jsonl", field="content",
                     rate=0.3),
    }
    config.data.rate_changes = ((10_000, "code", 0.6),)   # from step 10,000 on

Example i of the run is example j of source k, both closed forms of i (`rates.Mix`);
each source goes through its own epochs. A source may also be a labelled task.
"""

import contextlib
import dataclasses
import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_lite.config import Config, DataConfig
from t5x_lite.data import pipeline, rates, sources, store
from t5x_lite.data.batches import AnyBatches, Streams, check_rows
from t5x_lite.vocab import Vocab

_OPTIONS = ("field", "documents", "bad_utf8")


class MixedBatches(AnyBatches):
    """The batches of several sources.

    Args:
        members: name -> batches for training, of the same shapes and vocabulary.
        mix: of the same names.
        batch_size, rows: see `batches.AnyBatches`; not those of the members.

    Attributes:
        examples_per_epoch: of all sources together.

    Raises:
        ValueError: naming the members that do not go together.
    """

    evaluation = False

    def __init__(
        self,
        members: Mapping[str, AnyBatches],
        mix: rates.Mix,
        *,
        batch_size: int,
        rows: np.ndarray | None = None,
    ):
        assert tuple(members) == mix.names
        self.members, self.mix = dict(members), mix
        self.batch_size, self.rows = batch_size, check_rows(rows, batch_size)
        self.examples_per_epoch = sum(m.examples_per_epoch for m in members.values())
        first_name, first = next(iter(members.items()))
        self.vocab, self.shapes = first.vocab, first.shapes
        for name, member in members.items():
            if member.vocab.fingerprint != first.vocab.fingerprint:
                raise ValueError(
                    f"config.data.mixture: {name} has another vocabulary than "
                    f"{first_name}; one run has one."
                )
            for form in (_shapes, _fields):
                if (found := form(member)) != (wanted := form(first)):
                    raise ValueError(
                        f"config.data.mixture: an example of {first_name} has "
                        f"{wanted}, of {name} {found}. They must agree: set config."
                        "data.inputs_length, config.data.targets_length and the knobs "
                        "of the objective so."
                    )
        told = [(name, member.fingerprint) for name, member in members.items()]
        self.fingerprint = hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def examples(self, indices_B: np.ndarray) -> Streams:
        sources_B, numbers_B = self.mix.of(indices_B)
        streams: Streams = {}
        for k, member in enumerate(self.members.values()):
            mine_B = sources_B == k
            if not mine_B.any():
                continue
            for name, stream in member.examples(numbers_B[mine_B]).items():
                for field, values in stream.items():
                    whole = streams.setdefault(name, {})
                    if field not in whole:
                        shape = (len(indices_B), *values.shape[1:])
                        whole[field] = np.empty(shape, values.dtype)
                    whole[field][mine_B] = values
        return streams

    def describe(self) -> str:
        told = [f"{name}: {m.describe()}" for name, m in self.members.items()]
        return "; ".join(told)

    def epochs(self, examples: int) -> dict[str, float]:
        return {
            name: count / member.examples_per_epoch
            for (name, member), count in zip(
                self.members.items(), self.mix.counts(examples), strict=True
            )
        }

    def shares(self, examples: int) -> dict[str, float]:
        """What part of the first examples of the run is of each source."""
        counts = self.mix.counts(examples)
        return {n: c / examples for n, c in zip(self.members, counts, strict=True)}


def _shapes(batches: AnyBatches) -> dict[str, str]:
    return {
        name: f"{T} cells"
        + f", {K} predicted" * bool(K)
        + f", {G} query streams" * bool(G)
        for name, (T, K, G) in batches.shapes.items()
    }


def _fields(batches: AnyBatches) -> dict[str, str]:
    """'stream/field' -> type and axes of one example."""
    return {
        f"{name}/{field}": f"{values.dtype} {values.shape[1:]}"
        for name, stream in batches.examples(np.arange(1)).items()
        for field, values in stream.items()
    }


@dataclasses.dataclass(frozen=True)
class Source:
    """A text that a config names.

    Attributes:
        key: where, such as "config.data.mixture.books.train".
        name: of the source in the mixture; "" without one.
        spec: see `sources.documents`.
        options: how it is read.
    """

    key: str
    name: str
    spec: str
    options: sources.Options


def sources_of(cfg: Config, part: str) -> list[Source]:
    """The texts of a config whose tokens are stored; part: "train" or "heldout".

    Their order is that of the names, not of the config file.
    """
    data = cfg.data
    common = sources.Options.of(data)
    if not data.mixture:
        if data.tasks:
            return []
        return [Source(f"config.data.{part}", "", getattr(data, part), common)]
    found = []
    for name, entry in sorted(data.mixture.items()):
        if entry.get(part):
            options = {k: entry[k] for k in _OPTIONS if k in entry}
            key = f"config.data.mixture.{name}.{part}"
            options = dataclasses.replace(common, **options)
            found.append(Source(key, name, entry[part], options))
    return found


def train(cfg: Config, words: Vocab, rows: np.ndarray | None = None) -> AnyBatches:
    """What a run trains on: one text, a mixture, or labelled tasks.

    Args:
        rows: of a batch that this host makes; None = all.

    Raises:
        ValueError: the data and the config do not go together.
    """
    from t5x_lite.data import task_batches

    texts = sources_of(cfg, "train")
    if not cfg.data.mixture and cfg.data.tasks:
        return task_batches.train(cfg, words, rows)
    if not cfg.data.mixture:
        return _text(cfg, words, texts[0], rows, evaluation=False, seed=cfg.seed)
    members: dict[str, AnyBatches] = {
        name: task_batches.batches(cfg, words, (name,), "train", rows, evaluation=False)
        for name in cfg.data.tasks
    }
    for text in texts:
        # Other noise and another order for each source.
        seed = cfg.seed + (zlib.crc32(text.name.encode()) << 32)
        members[text.name] = _text(cfg, words, text, rows, evaluation=False, seed=seed)
    members = dict(sorted(members.items()))
    mix = rates.Mix(
        _rates(cfg, members),
        [(s * cfg.data.batch_size, n, float(r)) for s, n, r in cfg.data.rate_changes],
        cfg.seed,
    )
    return MixedBatches(members, mix, batch_size=cfg.data.batch_size, rows=rows)


def heldouts(
    cfg: Config, words: Vocab, rows: np.ndarray | None = None
) -> dict[str, AnyBatches]:
    """The held-out sets by name; that of a single text is named ""."""
    from t5x_lite.data import task_batches

    found: dict[str, AnyBatches] = {
        text.name: _text(cfg, words, text, rows, evaluation=True, seed=cfg.seed)
        for text in sources_of(cfg, "heldout")
    }
    if cfg.data.tasks:
        found |= task_batches.heldouts(cfg, words, rows)
    return dict(sorted(found.items()))


def with_heldout(data: DataConfig, spec: str) -> DataConfig:
    """The same data with another text, alone, as what is held out.

    A mixture reads it as its first source is read.
    """
    if not data.mixture:
        return dataclasses.replace(data, heldout=spec)
    first, *others = sorted(name for name, entry in data.mixture.items() if entry)
    changed = {name: dict(data.mixture[name], heldout="") for name in others}
    changed[first] = dict(data.mixture[first], heldout=spec)
    return dataclasses.replace(data, mixture=changed)


def _rates(cfg: Config, members: Mapping[str, AnyBatches]) -> dict[str, float]:
    data = cfg.data
    if data.mixing == "proportional":
        sizes = {name: member.examples_per_epoch for name, member in members.items()}
        return rates.proportional(sizes, data.temperature, data.cap)
    return {
        name: float(data.mixture.get(name, {}).get("rate", 1.0)) for name in members
    }


def look(texts: Sequence[Source]):
    """Reads the first document of each text: what is wrong with a path, a package or a
    field is known before any of them is tokenised.

    Raises:
        FileNotFoundError, ValueError, OSError: naming the key.
    """
    for text in texts:
        with _named(text):
            first = sources.files(text.spec, text.options)[:1]
            for file in first:
                next(sources.read(file, text.options), None)


@contextlib.contextmanager
def _named(text: Source) -> Iterator[None]:
    """Errors about a source name the key that it comes from."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not str(error).startswith("source "):
            raise
        raise type(error)(f"{text.key}: {error}") from error


def open_text(cfg: Config, words: Vocab, text: Source, **more) -> store.TokenStore:
    """The tokens of a text; `more` and errors: see `store.open_store`."""
    with _named(text):
        return store.open_store(
            text.spec,
            words,
            cfg.data.cache_dir,
            options=text.options,
            deduplicate=cfg.data.deduplicate,
            processes=cfg.data.build_processes,
            **more,
        )


def _text(
    cfg: Config, words: Vocab, text: Source, rows, *, evaluation: bool, seed: int
) -> pipeline.Batches:
    knobs: dict[str, Any] = dict(cfg.objective)
    tokens = open_text(cfg, words, text)
    try:
        return pipeline.Batches(
            tokens,
            words,
            objective=knobs.pop("name"),
            knobs=knobs,
            structure=cfg.model.structure,
            inputs_length=cfg.data.inputs_length,
            memory_length=cfg.model.memory_length,
            train_inputs=cfg.data.train_inputs,
            static_noise=cfg.data.static_noise,
            batch_size=cfg.data.batch_size,
            seed=seed,
            rows=rows,
            evaluation=evaluation,
        )
    except ValueError as e:
        if str(e).startswith("config."):  # not the corpus's fault
            raise
        raise ValueError(f"{text.key}={text.spec!r}: {e}") from e

"""What all vocabularies share: special ids, sentinels and marks."""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

TRAIN_HINT = (
    "`python -m t5x_lite.vocab train --input='data/train.jsonl' --output=FILE.model`"
)
SENTINEL = re.compile(r"<extra_id_(\d+)>")

# What in-place objectives put into the text; UL2's three modes (Tay et al. 2022).
MARKS = ("mask", "cls", "sep", "bos", "regular", "sequential", "extreme")

# The pieces by which published files name them.
_ROLES = {
    "pad": ("<pad>", "[PAD]"),
    "eos": ("</s>", "<|endoftext|>", "<eos>", "[EOS]"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
    "cls": ("<cls>", "[CLS]"),
    "sep": ("<sep>", "[SEP]"),
    "bos": ("<s>", "<bos>", "[BOS]"),
}


def roles(pieces: Mapping[str, int]) -> dict[str, int]:
    """Ids of a file's own special pieces: pad, eos, unk and marks, those there are.

    RoBERTa and BART use <s> and </s> where BERT has [CLS] and [SEP]; a document of
    BERT or ALBERT ends with [SEP].
    """
    found = {
        role: pieces[next(n for n in names if n in pieces)]
        for role, names in _ROLES.items()
        if any(n in pieces for n in names)
    }
    if "bos" in found and "eos" in found:
        found = dict(cls=found["bos"], sep=found["eos"]) | found
    if "sep" in found:
        found = dict(eos=found["sep"]) | found
    return found


class Vocab:
    """Base of all vocabularies.

    Ids are the file's own pieces, then one for padding and one for EOS if the file has
    none, then the sentinels.

    Attributes:
        spec: what `load` was given.
        size: number of all ids, sentinels included.
        pieces: how many of them the file itself holds.
        pad_id, eos_id, unk_id: 0, 1, 2 unless the file says otherwise; unk_id is -1 if
            every text has ids.
        sentinels: how many sentinels there are.
        own: marks of `MARKS` for which the file has a piece -> its id.
        fingerprint: short hash of the content; equal ids <=> equal fingerprints.
        threads: of `encode_batch`, where the library takes a number; -1 = its own.
    """

    spec: str
    size: int
    sentinels: int
    fingerprint: str
    pieces: int
    pad_id: int = 0
    eos_id: int = 1
    unk_id: int = 2
    own: Mapping[str, int] = {}
    threads: int = -1

    def _settle(self, pieces: int, held: Mapping[str, int], sentinels: int, content):
        """Sets sizes, special ids and fingerprint.

        Args:
            pieces: how many ids the file holds, without sentinels of its own.
            held: `roles` of the file.
            content: bytes of the file or files.
        """
        self.pieces, self.sentinels = pieces, sentinels
        self.unk_id = held.get("unk", -1)
        missing = [role for role in ("pad", "eos") if role not in held]
        added = {role: pieces + i for i, role in enumerate(missing)}
        self.pad_id, self.eos_id = ({**held, **added}[r] for r in ("pad", "eos"))
        self.own = {mark: held[mark] for mark in MARKS if mark in held}
        self.size = pieces + len(added) + sentinels
        # Files that could be read before there were marks of their own keep their hash.
        marks = b"".join(b"\0%s=%d" % (m.encode(), i) for m, i in self.own.items())
        self.fingerprint = fingerprint(content + marks, sentinels)

    def _settle_file(self, names: list[str], held, sentinels: int, content: bytes):
        """As `_settle`, for a file of pieces `names` that may end with sentinels.

        Raises:
            ValueError: `sentinels` is not the number that the file has.
        """
        own = own_sentinels(names, self.spec, sentinels)
        missing = [role for role in ("pad", "eos") if role not in held]
        if own and missing:
            raise ValueError(
                f"vocabulary {self.spec!r} ends with {own} sentinel pieces and has no "
                f"piece for {' and '.join(missing)}, which would take their ids. Give "
                f"it pieces {' and '.join(_ROLES[role][0] for role in missing)}."
            )
        self._settle(len(names) - own, held, sentinels, content)

    def sentinel(self, i: Any) -> Any:
        """The id of <extra_id_i>; i is an int or an integer array.

        Raises:
            ValueError: i is not in [0, sentinels).
        """
        index = np.asarray(i)
        if index.size and not 0 <= index.min() <= index.max() < self.sentinels:
            raise ValueError(
                f"sentinel {index.min()} to {index.max()} asked for, but vocabulary "
                f"{self.spec!r} has {self.sentinels} of them (0 to "
                f"{self.sentinels - 1}). Load it with more sentinels."
            )
        return self.size - 1 - i

    @property
    def _lent(self) -> list[str]:
        """Marks that take the place of the last sentinels."""
        return [mark for mark in MARKS if mark not in self.own]

    def special(self, name: str) -> int:
        """Id of a mark of `MARKS`: the file's own, or one of the last sentinels.

        So any vocabulary with sentinels serves all structures without another file.

        Raises:
            ValueError: too few sentinels to lend one.
        """
        if name in self.own:
            return self.own[name]
        needed = self._lent.index(name) + 1
        if self.sentinels < needed:
            raise ValueError(
                f"the mark [{name}] needs at least {needed} sentinels; "
                f"vocabulary {self.spec!r} has {self.sentinels}. Set "
                "config.data.sentinels=100."
            )
        return int(self.sentinel(self.sentinels - needed))

    @property
    def mask_id(self) -> int:
        return self.special("mask")

    @functools.cached_property
    def ordinary(self) -> np.ndarray:
        """int32 ids of pieces of text: no pad, EOS, unknown, mark, sentinel."""
        ids = np.arange(self.size - self.sentinels, dtype=np.int32)
        return ids[~np.isin(ids, list(self._no_text()))]

    def _no_text(self) -> Iterable[int]:
        return {self.pad_id, self.eos_id, self.unk_id, *self.own.values()}

    def starts_word(self, tokens_BT: np.ndarray) -> np.ndarray:
        """bool [B, T]: where a word begins; a mark or EOS is a word of its own."""
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 [T]; no EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Texts -> one int32 [T] each (may be read-only); no EOS."""
        raise NotImplementedError

    def decode(self, ids: Any, *, inside: bool = False) -> str:
        """Ids [T] -> text; sentinels as <extra_id_i>, padding and EOS dropped.

        A sentinel stands exactly where its span was cut out, so putting the span's
        text in its place gives the text back ("you<extra_id_0> me": the space before
        the missing word is part of the span).

        Args:
            inside: the ids are from inside a text: the space they begin with is kept.

        Raises:
            ValueError: an id is not in [0, size).
        """
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.size:
            raise ValueError(
                f"ids from {ids.min()} to {ids.max()} cannot be decoded by "
                f"{self.spec!r}: its ids are [0, {self.size})."
            )
        ids = ids[(ids != self.pad_id) & (ids != self.eos_id)]
        first, own = self.size - self.sentinels, {*self.own.values()}
        text = []
        for is_mark, run in itertools.groupby(
            ids.tolist(), lambda i: i >= first or i in own
        ):
            if is_mark:
                text += [self._piece(i) if i < first else self._extra(i) for i in run]
            else:
                at_start = not text and not inside
                text.append(self._decode_run(list(run), at_start=at_start))
        return "".join(text)

    def _extra(self, i: int) -> str:
        return f"<extra_id_{self.size - 1 - i}>"

    def label(self, i: int) -> str:
        """One id for people: a piece, [MASK], <extra_id_0>, </s>, [PAD]."""
        mark = next(iter(self._marks_of(i)), None)
        if i == self.pad_id or mark:
            return f"[{(mark or 'pad').upper()}]"
        if i in (self.eos_id, self.unk_id):
            return "</s>" if i == self.eos_id else "<unk>"
        return self._piece(i) if i < self.size - self.sentinels else self._extra(i)

    def _marks_of(self, i: int) -> list[str]:
        """The marks that an id stands for."""
        place = i - (self.size - self.sentinels)
        if place >= 0:
            return self._lent[place : place + 1]
        return [mark for mark, at in self.own.items() if at == i]

    def names(self, i: int) -> list[str]:
        """What an id is known by, in any vocabulary; no two ids share a name.

        Its roles ("role pad", "role mask"), then its number as a sentinel ("sentinel
        0"), or else its piece ("piece \u2581the").
        """
        roles = {"pad": self.pad_id, "eos": self.eos_id, "unk": self.unk_id}
        found = [f"role {role}" for role, at in roles.items() if at == i]
        found += [f"role {mark}" for mark in self._marks_of(i)]
        if i >= self.size - self.sentinels:
            return [*found, f"sentinel {self.size - 1 - i}"]
        return [*found, f"piece {self._piece(i)}"] if i < self.pieces else found

    def _piece(self, i: int) -> str:
        raise NotImplementedError

    def _decode_run(self, ids: list[int], at_start: bool) -> str:
        raise NotImplementedError


def own_sentinels(names: list[str], spec: str, sentinels: int) -> int:
    """How many of a file's pieces are sentinels: none, or the last `sentinels`.

    Args:
        names: all pieces, by id.

    Raises:
        ValueError: there are others, or elsewhere.
    """
    held = [i for i, name in enumerate(names) if SENTINEL.fullmatch(name)]
    if not held:
        return 0
    ours = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    if held[-1] != len(names) - 1 or [names[i] for i in held] != ours:
        raise ValueError(
            f"vocabulary {spec!r} of {len(names)} pieces already holds {len(held)} "
            f"sentinel pieces, ids {held[0]} to {held[-1]}, but sentinels={sentinels} "
            "was asked for. Allowed: a model without <extra_id_*> pieces, or one whose "
            f"last {sentinels} pieces are <extra_id_{sentinels - 1}> to <extra_id_0>."
        )
    return len(held)


def fingerprint(content: bytes, sentinels: int) -> str:
    """16 hexadecimal digits."""
    digest = hashlib.sha256(content + b"\0sentinels=%d" % sentinels)
    return digest.hexdigest()[:16]

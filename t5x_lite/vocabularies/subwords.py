"""WordPiece and BPE files as vocabularies, through the `tokenizers` library."""

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from t5x_lite.vocabularies import base, files
from t5x_lite.vocabularies.base import Vocab

_UNUSED = re.compile(r"\[unused\d+\]|madeupword\d+")
_BYTES = {*pre_tokenizers.ByteLevel.alphabet()}
_END = "</w>"


class SubwordVocab(Vocab):
    """A `tokenizers.Tokenizer` with sentinels on top; `wordpiece`, `bpe`, `whole` load.

    Args:
        word: how pieces show words: "##" (inside one), "</w>" (ends one), "\u0120",
            "\u2581" (a space begins one), "" (each is one).
        content: bytes of the files.
        ids: of all pieces, if not those of the tokenizer.
        special: ids of pieces that are no text, beside the marks.
    """

    def __init__(
        self,
        spec: str,
        tokenizer: tokenizers.Tokenizer,
        word: str,
        content: bytes,
        sentinels: int,
        ids: dict[str, int] | None = None,
        special: Iterable[int] = (),
    ):
        self.spec, self._tokenizer, self._word = spec, tokenizer, word
        ids = ids or tokenizer.get_vocab(with_added_tokens=True)
        if {*ids.values()} != {*range(len(ids))}:
            raise ValueError(
                f"vocabulary {spec!r} has {len(ids)} pieces with ids from "
                f"{min(ids.values(), default=0)} to {max(ids.values(), default=0)}; "
                "every id from 0 on must have one piece."
            )
        self._names = sorted(ids, key=ids.__getitem__)
        # Text that says "[MASK]" is not the mark.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._settle_file(self._names, base.roles(ids), sentinels, content)
        unused = {i for i, name in enumerate(self._names) if _UNUSED.fullmatch(name)}
        self._special = {*special, *unused}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def _no_text(self) -> Iterable[int]:
        return {*super()._no_text(), *self._special}

    def starts_word(self, tokens_BT: np.ndarray) -> np.ndarray:
        if self._word != _END:
            return self._marked_V[tokens_BT]
        ends_BT = self._marked_V[tokens_BT]
        starts_BT = np.ones(tokens_BT.shape, bool)
        starts_BT[:, 1:] = ends_BT[:, :-1] | self._no_text_V[tokens_BT[:, 1:]]
        return starts_BT

    @functools.cached_property
    def _no_text_V(self) -> np.ndarray:
        return ~np.isin(np.arange(self.size), self.ordinary)

    @functools.cached_property
    def _marked_V(self) -> np.ndarray:
        """bool by id: pieces that begin a word (</w>: end one), and all no text."""
        begins = {
            "##": lambda name: not name.startswith("##"),
            _END: lambda name: name.endswith(_END),
            # A space, a line feed, a tab, a carriage return.
            "\u0120": lambda name: name[0] in "\u0120\u010a\u0109\u010d",
            "\u2581": lambda name: name.startswith("\u2581"),
            "": lambda name: True,
        }[self._word]
        marked = np.ones(self.size, bool)
        for i in self.ordinary:
            marked[i] = begins(self._names[i])
        return marked

    def _piece(self, i: int) -> str:
        return self._names[i]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    @functools.cached_property
    def _anchor(self) -> tuple[int, str]:
        """A piece that is a word by itself, and its text."""
        for letter in "aeo.,1":
            ids = self.encode(letter)
            if len(ids) == 1 and ids[0] in self.ordinary:
                return int(ids[0]), self._text([int(ids[0])])
        whole = (i for i in self.ordinary if self._marked_V[i])
        i = int(next(whole, self.ordinary[0]))
        return i, self._text([i])

    def _decode_run(self, ids: list[int], at_start: bool) -> str:
        # Decoders drop a space at either end; beside another piece they keep it.
        i, text = self._anchor
        if self._word == _END:
            return self._text([*ids, i]).removesuffix(text)
        if at_start or self._word == "\u0120":
            return self._text(ids)
        return self._text([i, *ids]).removeprefix(text)

    def decode(self, ids, *, inside: bool = False) -> str:
        text = super().decode(ids, inside=inside)
        # The space belongs to the word before it: it is no part of a text that ends.
        gaps = (np.asarray(ids) >= self.size - self.sentinels).any()
        return text.removesuffix(" ") if self._word == _END and not gaps else text


def wordpiece(path: str, sentinels: int = 100) -> SubwordVocab:
    """BERT's vocab.txt, one piece a line (Devlin et al. 2019).

    Text is put in small letters without accents if no piece has a capital letter.

    Raises:
        ValueError: the file is not such a list.
    """
    content = files.read(path)
    names = content.removesuffix("\n").split("\n")  # not at U+2028, which is a piece
    names = [name.removesuffix("\r") for name in names]
    ids = {name: i for i, name in enumerate(names)}
    if "[UNK]" not in ids:
        raise ValueError(
            f"vocabulary {path!r} of {len(names)} lines has no line [UNK]: a WordPiece "
            "vocabulary has one piece a line, [UNK] among them. Train one with "
            "`python -m t5x_lite.vocab train --kind=wordpiece --output=vocab.txt`."
        )
    if len(ids) < len(names) or "" in ids:
        wrong = next(i for i, name in enumerate(names) if ids[name] != i or not name)
        raise ValueError(
            f"vocabulary {path!r}, line {wrong + 1}: {names[wrong]!r} stands in line "
            f"{ids[names[wrong]] + 1} too, or is empty. Each line is another piece."
        )
    marks = {*base.roles(ids).values()}
    lower = all(n == n.lower() for i, n in enumerate(names) if i not in marks)
    tokenizer = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return SubwordVocab(path, tokenizer, "##", content.encode(), sentinels)


def bpe(spec: str, path: Path, merges: Path, sentinels: int = 100) -> SubwordVocab:
    """Pieces and merges of GPT-2 (bytes) or GPT (pieces that end a word have </w>).

    Args:
        spec: what to call it.
        path: JSON file, piece -> id.
        merges: a pair of pieces a line, in order.

    Raises:
        ValueError: the files are not such, or do not belong together.
    """
    content, rules = files.read(path), files.read(merges)
    ids = files.parse(path, content)
    if not ids or not all(type(i) is int and i >= 0 for i in ids.values()):
        raise ValueError(
            f"vocabulary {str(path)!r} is not a JSON object of pieces and their ids."
        )
    pairs = []
    for number, line in enumerate(rules.split("\n"), 1):
        pair = line.removesuffix("\r").split(" ")
        if (number == 1 and line.startswith("#version")) or pair == [""]:
            continue
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise ValueError(
                f"merges {str(merges)!r}, line {number}: {line!r} is not two pieces of "
                f"{str(path)!r} that make a third of it. The two files must belong "
                "together."
            )
        pairs.append(tuple(pair))
    words = any(name.endswith(_END) for name in ids)
    if not words and (missing := _BYTES - ids.keys()):
        raise ValueError(
            f"vocabulary {str(path)!r} is neither GPT's (no piece ends with </w>) nor "
            f"GPT-2's: {len(missing)} of the 256 bytes have no piece."
        )
    unknown = "<unk>" if words and "<unk>" in ids else None
    suffix = _END if words else ""
    model = models.BPE(ids, pairs, unk_token=unknown, end_of_word_suffix=suffix)
    tokenizer = tokenizers.Tokenizer(model)
    if words:
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.BPEDecoder(suffix=_END)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    both = f"{content}\0{rules}".encode()
    return SubwordVocab(spec, tokenizer, _END if words else "\u0120", both, sentinels)


def whole(path: str, sentinels: int = 100) -> SubwordVocab:
    """Hugging Face's tokenizer.json, of any kind.

    Raises:
        ValueError: the file is not such a tokenizer.
    """
    content = files.read(path)
    described = files.parse(path, content)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content)
        ids = tokenizer.get_vocab(with_added_tokens=True)
        if described["model"]["type"] == "Unigram":
            tokenizer = _unspelled(described)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"vocabulary {path!r} is not a tokenizer.json that tokenizers "
            f"{tokenizers.__version__} can read: {error}"
        ) from error
    kinds = {*_types(described.get("pre_tokenizer")), *_types(described.get("decoder"))}
    model = described["model"]
    word = ""
    if model.get("type") == "WordPiece":
        word = "##"
    elif model.get("end_of_word_suffix") == _END:
        word = _END
    elif "ByteLevel" in kinds:
        word = "\u0120"
    elif model.get("type") == "Unigram" or "Metaspace" in kinds:
        word = "\u2581"
    if word == "##":
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
    added = described.get("added_tokens", [])
    special = [token["id"] for token in added if token["special"]]
    return SubwordVocab(
        path, tokenizer, word, content.encode(), sentinels, ids, special
    )


def _unspelled(described: dict) -> tokenizers.Tokenizer:
    """A Unigram tokenizer.json whose special pieces no text can spell.

    They are pieces of the model like others: typed, </s> would end a document.
    """
    added = described.get("added_tokens", [])
    special = {token["content"] for token in added if token["special"]}
    vocab = [
        [f"\0{name}\0" if name in special else name, score]
        for name, score in described["model"]["vocab"]
    ]
    changed = described | dict(
        model=described["model"] | dict(vocab=vocab),
        added_tokens=[token for token in added if not token["special"]],
        post_processor=None,
    )
    return tokenizers.Tokenizer.from_str(json.dumps(changed))


def _types(part) -> Iterable[str]:
    """The types of a part of a tokenizer.json and of its members."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for members in part.values():
            if isinstance(members, list):
                for member in members:
                    yield from _types(member)

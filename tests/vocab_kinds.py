"""Texts in many scripts, and one vocabulary of every kind."""

import functools
import json
import pathlib

import pytest

from t5x_lite import vocab

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests/goldens"
SHARED = ROOT.parent / "shared/data/tokenizers"

TEXTS = (
    "Thank you for inviting me to your party last week.",
    "It is a truth universally acknowledged, that a single man in possession of a good "
    "fortune, must be in want of a wife.",
    "Die Straße nach Köln ist über 3,50 € länger; naïve café!",
    "Où est-ce qu'on va, l'année prochaine ? « Là-bas », dit-elle.",
    "¿Cuántos años tienes? ¡Mañana será otro día!",
    "我喜欢吃苹果。東京は日本の首都です。ガギグ",
    "Привет, мир! Ёлка и йод.",
    "مرحبا بالعالم، كيف حالك؟",
    "नमस्ते दुनिया",
    "한국어 문장입니다",
    "Ελληνικά ΣΊΣΥΦΟΣ",
    "İstanbul ŞÇĞ ǅ",
    "emoji 🎉👩‍👩‍👧 ok",
    "  two  spaces\tand\ttabs \n",
    "``quoted'' text isn't \"fine\" (don't, we'll, I'm)",
    "1,234,567.89 + 10% = $5; 2, 3, 12,5",
    "ﬁne ½ ① Ⅷ ａｂｃ Ａ．Ｂ",
    "\u00a0nbsp\u2028line\u200bzero\ufeffbom",
    "tab\x00nul\x07bell",
    "x" * 120,
    "def f(x):\n    return x**2  # the_square",
    "",
)
# What no text may turn into ids of their own.
SPELLED = "[MASK] [CLS] [SEP] <extra_id_0> <pad> </s> <s> <|endoftext|> <mask>"

# Name -> file (some only in ../shared), its sentinels, class in transformers.
FILES = {
    "bert": (SHARED / "bert_uncased_vocab.txt", "BertTokenizer"),
    "gpt": (SHARED / "openai_gpt_encoder_40000.json", "OpenAIGPTTokenizer"),
    "t5": (SHARED / "t5_32k.model", "T5Tokenizer"),
    "albert": (SHARED / "albert_30k-clean.model", "AlbertTokenizer"),
    "cased": (GOLDENS / "vocab_cased.txt", "BertTokenizer"),
    "bytebpe": (GOLDENS / "vocab_bytebpe.json", "GPT2Tokenizer"),
}
# Those of every checkout, for properties of all kinds.
KINDS = ("bytes", "unigram", "bpe", "cased", "bytebpe", "ends", "whole")


def file(name: str) -> pathlib.Path:
    path = FILES[name][0]
    if not path.exists():
        pytest.skip(f"{path.name} is not in ../shared/data/tokenizers")
    return path


@functools.cache
def heldout() -> list[str]:
    lines = (ROOT / "data/heldout.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def spec_of(kind: str, folder: pathlib.Path) -> str:
    """Where a vocabulary of this kind is; `folder` takes those that are made."""
    given = dict(bytes="bytes", unigram=ROOT / "data/vocab_4k.model")
    if kind in given:
        return str(given[kind])
    if kind in FILES:
        return str(file(kind))
    make = dict(bpe=_bpe, ends=_ends, whole=_whole)[kind]
    return make(folder)


def load(kind: str, folder: pathlib.Path, sentinels: int = 100) -> vocab.Vocab:
    return vocab.load(spec_of(kind, folder), sentinels)


def _bpe(folder: pathlib.Path) -> str:
    (folder / "text.txt").write_text(heldout()[0][:20_000])
    path = str(folder / "bpe.model")
    vocab.train(str(folder / "text.txt"), 400, path, kind="bpe")
    return path


def _ends(folder: pathlib.Path) -> str:
    """Like GPT's: pieces that end a word have </w>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(heldout()[0].splitlines(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "encoder.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "vocab.bpe").write_text(f"#version: 0.2\n{merges}\n")
    return str(folder / "encoder.json")


def _whole(folder: pathlib.Path) -> str:
    """Like T5's tokenizer.json, its 100 sentinels among its pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(heldout()[0].splitlines(), trainer)
    described = json.loads(tokenizer.to_str())
    pieces = described["model"]["vocab"]
    for i in reversed(range(100)):
        name = f"<extra_id_{i}>"
        described["added_tokens"].append(
            described["added_tokens"][0] | dict(id=len(pieces), content=name)
        )
        pieces.append([name, 0.0])
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return str(folder)

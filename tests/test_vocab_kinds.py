"""WordPiece, BPE and tokenizer.json: ids of others, marks, round trips, training."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from t5x_lite import vocab as vocabularies
from tests import vocab_kinds
from tests.vocab_kinds import GOLDENS, KINDS, SPELLED, TEXTS

IDS = json.loads((GOLDENS / "vocab.json").read_text())


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    loaded = {}

    def load(kind, sentinels=100):
        if (kind, sentinels) not in loaded:
            folder = tmp_path_factory.mktemp(kind)
            loaded[kind, sentinels] = vocab_kinds.load(kind, folder, sentinels)
        return loaded[kind, sentinels]

    return load


@pytest.mark.parametrize("name", sorted(IDS))
def test_ids_are_those_of_transformers(name, load):
    found = load(name).encode_batch(list(TEXTS))
    for text, ids, expected in zip(TEXTS, found, IDS[name]["ids"], strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == expected, text


# Ids from transformers' documentation and the authors' files.
@pytest.mark.parametrize(
    ("name", "sentinels", "expected"),
    [
        ("bert", 0, dict(size=30522, pad=0, unk=100, cls=101, sep=102, mask=103)),
        ("bert", 100, dict(size=30622, pad=0, eos=102, mask=103)),
        ("albert", 0, dict(size=30000, pad=0, unk=1, cls=2, sep=3, mask=4, eos=3)),
        ("gpt", 0, dict(pieces=40478, unk=0, pad=40478, eos=40479, size=40480)),
        ("t5", 100, dict(pieces=32000, size=32100, pad=0, eos=1, unk=2)),
        ("bytebpe", 0, dict(size=600, pad=0, eos=1, unk=-1)),
    ],
)
def test_special_ids_are_the_files_own(name, sentinels, expected, load):
    vocab = load(name, sentinels)
    for key, value in expected.items():
        if key in vocabularies.MARKS:
            assert vocab.special(key) == value, key
            assert value not in vocab.ordinary
            assert vocab.label(value) == f"[{key.upper()}]"
        else:
            ours = key if key in ("size", "pieces") else f"{key}_id"
            assert getattr(vocab, ours) == value, key


def test_robertas_marks(tmp_path):
    """<s> and </s> frame its texts (Liu et al. 2019; ids of roberta-base)."""
    pieces = json.loads((GOLDENS / "vocab_bytebpe.json").read_text())
    letters = [p for p in pieces if p not in ("<pad>", "<|endoftext|>")]
    names = ["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"]
    ids = {name: i for i, name in enumerate(names)}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    shutil.copy(GOLDENS / "vocab_bytebpe.bpe", tmp_path / "merges.txt")
    vocab = vocabularies.load(str(tmp_path), 0)
    assert (vocab.special("cls"), vocab.pad_id, vocab.special("sep")) == (0, 1, 2)
    assert (vocab.eos_id, vocab.unk_id, vocab.mask_id) == (2, 3, len(names) - 1)
    assert vocab.decode([vocab.mask_id, *vocab.encode(" a")]) == "<mask> a"
    with pytest.raises(ValueError, match=r"\[regular\] needs at least 1 sentinels"):
        vocab.special("regular")


@pytest.mark.parametrize("kind", KINDS)
def test_every_special_id_is_one_id(kind, load):
    vocab = load(kind)
    marks = {mark: vocab.special(mark) for mark in vocabularies.MARKS}
    assert len({*marks.values()}) == len(marks) or "cls" in vocab.own
    ids = [*marks.values(), vocab.pad_id, vocab.eos_id]
    assert all(0 <= i < vocab.size for i in ids)
    assert not {*ids, vocab.unk_id} & {*vocab.ordinary.tolist()}
    names = [name for i in range(vocab.size) for name in vocab.names(i)]
    assert len({*names}) == len(names) >= vocab.size
    for mark, i in marks.items():
        assert f"role {mark}" in vocab.names(i)
    assert vocab.sentinel(0) == vocab.size - 1
    assert "sentinel 0" in vocab.names(vocab.size - 1)


@pytest.mark.parametrize("kind", [*KINDS, "bert", "gpt", "t5", "albert"])
def test_no_text_spells_a_special_id(kind, load):
    vocab = load(kind)
    assert {*vocab.encode(SPELLED).tolist()} <= {*vocab.ordinary.tolist(), vocab.unk_id}


@pytest.mark.parametrize("kind", [*KINDS, "bert", "gpt", "t5", "albert"])
def test_what_is_decoded_encodes_to_the_same_ids(kind, load):
    vocab = load(kind)
    for text in (*TEXTS, *vocab_kinds.heldout()[0].splitlines()[:40]):
        ids = vocab.encode(text)
        back = vocab.decode(ids)
        if kind in ("bytes", "bytebpe"):
            assert back == text
        if vocab.unk_id not in ids:
            assert vocab.decode(vocab.encode(back)) == back, text
            if kind != "cased":  # its "##" pieces may be cut in another way
                assert vocab.encode(back).tolist() == ids.tolist(), text
    plain = "emma was here , and it was late"
    assert vocab.decode(vocab.encode(plain)) == plain


@pytest.mark.parametrize("kind", [*KINDS, "bert", "gpt", "t5", "albert"])
def test_filling_the_sentinels_in_gives_the_text_back(kind, load):
    vocab = load(kind)
    ids = vocab.encode("thank you for inviting me to your party")
    text = vocab.decode(ids)
    for start in range(len(ids)):
        for end in range(start + 1, min(start + 4, len(ids) + 1)):
            gapped = [*ids[:start], vocab.sentinel(0), *ids[end:]]
            fill = vocab.decode([vocab.sentinel(0), *ids[start:end], vocab.eos_id])
            fill = fill.removeprefix("<extra_id_0>")
            filled = vocab.decode(gapped).replace("<extra_id_0>", fill)
            assert filled.strip() == text
            inside = vocab.decode(ids[start:end], inside=True)
            assert inside.strip() == fill.strip()


@pytest.mark.parametrize("kind", [*KINDS, "bert", "gpt", "t5", "albert"])
def test_words_begin_where_the_text_has_a_space(kind, load):
    vocab = load(kind)
    text = "thank you for inviting me to your party"
    ids = np.array([[*vocab.encode(text), vocab.eos_id, vocab.special("cls")]])
    starts = vocab.starts_word(ids)[0]
    assert starts[-2:].all()
    cuts = [0, *np.flatnonzero(starts[:-2]).tolist(), len(starts) - 2]
    words = [vocab.decode(ids[0, a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert [w.strip() for w in words if w.strip()] == text.split()


OBJECTIVES = {
    "span_corruption": ("encoder_decoder", dict(density=0.15, mean_span=3.0)),
    "masked_lm": ("encoder", dict(density=0.15, units="word", sentence="nsp")),
    "causal_lm": ("decoder", {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objectives_run_with_every_kind(kind, name, load, tmp_path):
    from t5x_lite.data import pipeline, store

    vocab, (structure, knobs) = load(kind), OBJECTIVES[name]
    source = str(vocab_kinds.ROOT / "data/heldout.jsonl")
    cache = tmp_path / "stores"
    tokens = store.open_store(source, vocab, str(cache), progress=False)
    batches = pipeline.Batches(
        tokens,
        vocab,
        objective=name,
        knobs=knobs,
        structure=structure,
        inputs_length=48,
        batch_size=4,
        seed=0,
        rows=np.arange(4),
        evaluation=False,
    )
    batch = batches[0]
    streams = [s for s in batch.values() if isinstance(s, dict)]
    for stream in streams:
        read = stream["tokens"]
        assert 0 <= read.min() and read.max() < vocab.size
        if name == "masked_lm":
            assert (read[:, 0] == vocab.special("cls")).all()
            assert (read == vocab.special("sep")).any(axis=1).all()
            assert (read == vocab.mask_id).any()
    if name == "span_corruption":
        assert (batch["encoder"]["tokens"] == vocab.sentinel(0)).any(axis=1).all()
        assert (batch["decoder"]["targets"][:, -1] == vocab.eos_id).all()
    if name == "causal_lm":
        assert (batch["main"]["weights"] == 1).all()


def _broken(tmp_path, name, content) -> str:
    (tmp_path / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    return str(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "no list\nof pieces\n", "no line \\[UNK\\]"),
        ("a.txt", "[UNK]\na\nb\na\n", "line 2: 'a' stands in line 4 too"),
        ("a.txt", "[UNK]\n\nb\n", "line 2: ''.*or is empty"),
        ("a.txt", b"\xff\xfe[UNK]", "is not UTF-8.*must have a name that ends in"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[1]", "is not a JSON object"),
        (
            "a.json",
            '{"a": 0}',
            "merges are not beside it: a.bpe, merges.txt. Give both",
        ),
        ("a.json", '{"model": {"type": "X"}}', "not a tokenizer.json that tokenizers"),
    ],
)
def test_a_broken_file_says_what_is_wrong(name, content, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        vocabularies.load(_broken(tmp_path, name, content))


@pytest.mark.parametrize(
    ("pieces", "merges", "message"),
    [
        ('{"a": "0"}', "", "not a JSON object of pieces and their ids"),
        ('{"a": 0, "b": 1}', "a b", "line 1: 'a b' is not two pieces of"),
        ('{"a": 0, "b": 1, "ab": 2}', "a b c", "line 1: 'a b c' is not two"),
        ('{"a": 0, "b": 1, "ab": 2}', "a b", "254 of the 256 bytes have no piece"),
        ('{"a</w>": 0, "b": 3}', "", "2 pieces with ids from 0 to 3"),
    ],
)
def test_pieces_and_merges_that_do_not_fit(pieces, merges, message, tmp_path):
    path = _broken(tmp_path, "a.json", pieces)
    _broken(tmp_path, "a.bpe", f"{merges}\n")
    with pytest.raises(ValueError, match=message):
        vocabularies.load(path)
    assert [p.name for p in vocabularies.files(path)] == ["a.json", "a.bpe"]
    with pytest.raises(ValueError, match=message):
        vocabularies.load(f"{path},{tmp_path / 'a.bpe'}")


def test_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match="has none of tokenizer.json"):
        vocabularies.load(str(tmp_path))
    shutil.copy(GOLDENS / "vocab_cased.txt", tmp_path / "vocab.txt")
    assert vocabularies.load(str(tmp_path), 0).size == 600
    shutil.copy(GOLDENS / "vocab_bytebpe.json", tmp_path / "vocab.json")
    shutil.copy(GOLDENS / "vocab_bytebpe.bpe", tmp_path / "merges.txt")
    space = json.loads((tmp_path / "vocab.json").read_text())["\u0120"]
    assert vocabularies.load(str(tmp_path), 0).encode(" ").tolist() == [space]


def test_show(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(vocab_kinds.heldout()[0][:5000])
    (tmp_path / "vocab.bpe").write_text("of another vocabulary\n")
    path = str(tmp_path / "vocab.json")
    source = f"--input={tmp_path / 'text.txt'}"
    arguments = [source, "--kind=bytebpe", "--size=300", f"--output={path}"]
    vocabularies.main(["train", *arguments])
    assert (tmp_path / "merges.txt").exists()
    capsys.readouterr()
    vocabularies.main(["show", path, "--text=Emma", "--sentinels=0"])
    shown = capsys.readouterr().out
    assert "300 ids, of which 0 sentinels" in shown and "back: Emma" in shown


def test_sentinels_of_a_tokenizer_json_must_be_all(tmp_path):
    spec = vocab_kinds.spec_of("whole", tmp_path)
    with pytest.raises(ValueError, match="holds 100 sentinel pieces"):
        vocabularies.load(spec, sentinels=10)


# The same bytes in a process whose hashes are seeded otherwise.
TRAIN = """
import sys
from t5x_lite import vocab
source, kind, output = sys.argv[1:]
vocab.train(source, 450, output, kind=kind)
"""


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "bytebpe"])
def test_training_is_repeatable(kind, tmp_path, capsys):
    text = vocab_kinds.heldout()[0][:30_000]
    (tmp_path / "text.txt").write_text(text)
    source = str(tmp_path / "text.txt")
    end = dict(bpe=".model", wordpiece=".txt", bytebpe=".json")[kind]
    here, there = str(tmp_path / f"a{end}"), str(tmp_path / f"b{end}")
    arguments = [f"--input={source}", "--size=450", f"--output={here}"]
    vocabularies.main(["train", *arguments, f"--kind={kind}"])
    assert "550 ids, of which 100 sentinels" in capsys.readouterr().out
    env = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", TRAIN, source, kind, there]
    subprocess.run(command, env=env, check=True, capture_output=True)
    for a, b in zip(vocabularies.files(here), vocabularies.files(there), strict=True):
        assert _hash(a) == _hash(b)
    vocab = vocabularies.load(here)
    ids = vocab.encode(text)
    assert vocab.unk_id not in ids
    assert len(ids) < 0.7 * len(text)
    assert vocab.decode(ids).split() == text.split() or kind == "wordpiece"
    assert not list(tmp_path.glob("*.tmp"))


def _hash(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_uncased_wordpiece_vocabulary(tmp_path):
    (tmp_path / "text.txt").write_text("Émile, Zoë AND José\n" * 50)
    path = str(tmp_path / "v.txt")
    arguments = [f"--input={tmp_path / 'text.txt'}", "--kind=wordpiece", "--uncased"]
    with pytest.raises(ValueError, match="gives 3. pieces. Set that"):
        vocabularies.main(["train", *arguments, "--size=300", f"--output={path}"])
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kind=wordpiece", "--output=v.model"], "must end in .txt"),
        (["--kind=bytebpe", "--output=v.model"], "must end in .json"),
        (["--kind=bytebpe", "--output=v.json", "--uncased"], "--uncased is for"),
        (["--kind=bytebpe", "--output=v.json", "--size=90000"], "gives .* pieces"),
    ],
)
def test_train_refuses(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("some text\n")
    with pytest.raises(ValueError, match=message):
        vocabularies.main(["train", "--input=t.txt", *flags])
    assert {p.name for p in tmp_path.iterdir()} == {"t.txt"}

"""Vocabularies: ids, sentinels, round trips, the train command, the files of data/."""

import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from t5x_lite import vocab as vocabularies

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "data/vocab_4k.model")
T5_MODEL = ROOT.parent / "shared/data/tokenizers/t5_32k.model"
SPECS = ["bytes", MODEL]


def test_bytes_are_the_ids_of_byt5():
    vocab = vocabularies.load("bytes", sentinels=125)
    assert (vocab.size, vocab.pad_id, vocab.eos_id, vocab.unk_id) == (384, 0, 1, 2)
    assert vocab.encode("hé").tolist() == [107, 198, 172]
    assert vocab.decode([107, 198, 172, 1, 0, 0]) == "hé"
    assert vocab.decode([198]) == "\N{REPLACEMENT CHARACTER}"


def test_our_sentencepiece_vocabulary():
    vocab = vocabularies.load(MODEL)
    assert (vocab.size, vocab.sentinels) == (4100, 100)
    assert (vocab.pad_id, vocab.eos_id, vocab.unk_id) == (0, 1, 2)
    for line in (ROOT / "data/heldout.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        assert vocab.decode(vocab.encode(text)) == " ".join(text.split())
    assert vocab.decode(vocab.encode("日本 🎉")) == "日本 🎉"


def test_the_published_t5_vocabulary():
    if not T5_MODEL.exists():
        pytest.skip("the published T5 vocabulary is not in ../shared/data")
    vocab = vocabularies.load(str(T5_MODEL))
    assert (vocab.size, vocab.sentinel(0), vocab.sentinel(99)) == (32100, 32099, 32000)
    # Ids from the documentation of T5 in transformers.
    ids = vocab.encode("translate English to German: That is good.")
    assert ids.tolist() == [13959, 1566, 12, 2968, 10, 466, 19, 207, 5]


@pytest.mark.parametrize("spec", SPECS)
def test_sentinels_are_the_highest_ids_and_cannot_be_typed(spec):
    vocab = vocabularies.load(spec, sentinels=7)
    assert vocab.sentinel(0) == vocab.size - 1
    places = np.arange(7)
    assert vocab.sentinel(places).tolist() == [vocab.size - 1 - i for i in range(7)]
    assert vocab.encode("a <extra_id_0> b").max() < vocab.sentinel(6)
    with pytest.raises(ValueError, match="7 of them"):
        vocab.sentinel(7)
    with pytest.raises(ValueError, match="sentinels=-1"):
        vocabularies.load(spec, sentinels=-1)


@pytest.mark.parametrize("spec", SPECS)
def test_batches_encode_as_single_texts(spec):
    vocab = vocabularies.load(spec)
    texts = ["In the beginning", "", "Emma Woodhouse, handsome, clever, and rich"]
    ids = vocab.encode_batch(texts)
    assert all(i.dtype == np.int32 and i.ndim == 1 for i in ids)
    for text, batched in zip(texts, ids, strict=True):
        assert batched.tolist() == vocab.encode(text).tolist()


@pytest.mark.parametrize("spec", SPECS)
def test_filling_the_sentinels_in_gives_the_text_back(spec):
    vocab = vocabularies.load(spec)
    text = "Thank you for inviting me to your party"
    ids = vocab.encode(text)
    cut = len(ids) // 2
    for start, end in [(0, 1), (cut, cut + 2), (cut - 1, cut), (len(ids) - 2, None)]:
        span = ids[start:end]
        rest = ids[end:] if end else ids[:0]
        gapped = np.concatenate([ids[:start], [vocab.sentinel(0)], rest])
        target = np.concatenate([[vocab.sentinel(0)], span, [vocab.eos_id]])
        filling = vocab.decode(target).removeprefix("<extra_id_0>")
        filled = vocab.decode(gapped).replace("<extra_id_0>", filling)
        assert filled.strip() == text


def test_decode_refuses_ids_of_another_vocabulary():
    with pytest.raises(ValueError, match=r"ids from 5 to 4000 .* \[0, 359\)"):
        vocabularies.load("bytes").decode([5, 4000])


def test_fingerprints_tell_vocabularies_apart():
    loads = [("bytes", 100), ("bytes", 50), (MODEL, 100), (MODEL, 50)]
    fingerprints = [vocabularies.load(*arguments).fingerprint for arguments in loads]
    assert len(set(fingerprints)) == len(loads)
    assert vocabularies.load(MODEL).fingerprint == fingerprints[2]


def test_a_missing_or_broken_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file.*t5x_lite.vocab train"):
        vocabularies.load(str(tmp_path / "none.model"))
    broken = tmp_path / "broken.model"
    broken.write_bytes(Path(MODEL).read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        vocabularies.load(str(broken))


def _small_model(**options) -> bytes:
    model = io.BytesIO()
    lines = (ROOT / "data/heldout.jsonl").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[0][:4000].split(".")),
        model_writer=model,
        minloglevel=2,
        vocab_size=100,
        num_threads=1,
        **options,
    )
    return model.getvalue()


IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def test_a_model_without_padding_gets_an_id_for_it(tmp_path):
    (tmp_path / "a.model").write_bytes(_small_model())
    vocab = vocabularies.load(str(tmp_path / "a.model"), sentinels=7)
    assert (vocab.pieces, vocab.pad_id, vocab.size) == (100, 100, 108)
    # <unk>, <s>, </s> are SentencePiece's own 0, 1, 2.
    assert (vocab.unk_id, vocab.special("bos"), vocab.eos_id) == (0, 1, 2)


def test_a_model_with_sentinel_pieces_on_top_keeps_them(tmp_path):
    model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = model_pb2.ModelProto.FromString(_small_model(**IDS))
    for i in reversed(range(10)):
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = (
            f"<extra_id_{i}>",
            0.0,
            piece.USER_DEFINED,
        )
    path = str(tmp_path / "ten.model")
    Path(path).write_bytes(model.SerializeToString())
    vocab = vocabularies.load(path, sentinels=10)
    assert (vocab.size, vocab.sentinel(0)) == (110, 109)
    assert vocab.decode([109]) == "<extra_id_0>"
    with pytest.raises(ValueError, match="holds 10 sentinel pieces, ids 100 to 109"):
        vocabularies.load(path, sentinels=100)


def test_a_model_with_sentinel_pieces_elsewhere_is_refused(tmp_path):
    symbols = [f"<extra_id_{i}>" for i in range(3)]
    model = _small_model(**IDS, user_defined_symbols=symbols)
    (tmp_path / "low.model").write_bytes(model)
    with pytest.raises(ValueError, match="holds 3 sentinel pieces, ids 3 to 5"):
        vocabularies.load(str(tmp_path / "low.model"), sentinels=3)


def test_train_and_show_commands(tmp_path, capsys):
    source = str(ROOT / "data/heldout.jsonl")
    outputs = [str(tmp_path / name) for name in ("a.model", "b.model")]
    for output in outputs:
        arguments = [f"--input={source}", "--size=400", f"--output={output}"]
        vocabularies.main(["train", *arguments])
    assert Path(outputs[0]).read_bytes() == Path(outputs[1]).read_bytes()
    assert "500 ids, of which 100 sentinels" in capsys.readouterr().out
    vocabularies.main(["show", outputs[0], "--text=Emma"])
    assert "back: Emma" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size=100", "--output=v.model"], "--size=100"),
        (["--size=90000", "--output=v.model"], "--size=90000 does not fit"),
        (["--output=v"], "must end in .model"),
        (["--input=nothing*.txt", "--output=v.model"], "matches none"),
    ],
)
def test_train_refuses(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = (ROOT / "data/heldout.jsonl").read_text().splitlines()
    text = json.loads(lines[0])["text"]
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        vocabularies.main(["train", "--input=t.txt", *arguments])
    assert not (tmp_path / "v.model").exists()


def test_checksums_of_the_data_folder():
    for folder in (ROOT / "data", ROOT / "data/stages"):
        _check_table(folder)


def _check_table(folder: Path):
    table = (folder / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\S+)` \|.*`([0-9a-f]{64})` \|$", table, re.M))
    files = {p.name for p in folder.iterdir() if p.is_file()} - {"README.md"}
    assert set(rows) == files
    for name, expected in rows.items():
        content = (folder / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == expected, name

"""Converted weights are workdirs: trained on, with their vocabulary, and out again."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs.models import PRESETS
from t5x_lite import checkpoint, compatible, step, train, vocab
from t5x_lite.config import ModelConfig
from t5x_lite.interop import huggingface, workdirs
from tests import hf_dirs, parity, tiny
from tests.hf_dirs import SMALL, VOCAB, flattened, run

GOLDENS = parity.GOLDENS
SMOKE = (
    *("--config.steps=2", "--config.data.batch_size=8", "--config.checkpoint.every=2"),
    *("--config.data.inputs_length=32", "--config.eval_every=2"),
    *("--config.eval_batches=1", "--config.optim.warmup_steps=1"),
)


def tiny_source(preset: str, path: pathlib.Path, files: dict, **more) -> ModelConfig:
    """A directory of theirs with a random small model and tokenizer files."""
    shape = PRESETS[preset] | SMALL | dict(encoder_layers=2, decoder_layers=2)
    cfg = ModelConfig(**shape | more)
    path.mkdir()
    huggingface.write(path, cfg, hf_dirs.drawn(cfg), files=files)
    return cfg


@pytest.mark.parametrize(
    "again", ["same workdir", pytest.param("init_from", marks=pytest.mark.slow)]
)
def test_pretraining_goes_on_from_converted_weights(again, tmp_path, monkeypatch):
    """The first loss is that of these parameters; then they move."""
    files = {"spiece.model": pathlib.Path(VOCAB)}
    tiny_source("t5_1_1_small", tmp_path / "hf", files, vocab_size=4224)
    workdir = tmp_path / "run"
    run(f"--from=hf:{tmp_path / 'hf'}", f"--to={workdir}")
    about = json.loads((workdir / "config.json").read_text())["config"]
    assert about["data"]["vocab"] == str(workdir / "huggingface" / "spiece.model")
    assert about["data"]["sentinels"] == 100
    before = checkpoint.load_run(workdir)[2]
    to = workdir if again == "same workdir" else tmp_path / "new"
    more = () if to == workdir else (f"--config.init_from={workdir}",)
    found = {}

    def first(setup, state, batch):
        found["loss"] = step.batch_sums(
            *(setup.model, state["params"], batch, setup.cfg, setup.vocab.size)
        )[1]["tokens"]

    create = train.run.Setup.create_state

    def watched(setup, *args):
        state = create(setup, *args)
        jax.tree.map(np.testing.assert_array_equal, state["params"], before)
        assert int(state["step"]) == 0
        first(setup, state, setup.to_device(setup.train_batches[0]))
        return state

    monkeypatch.setattr(train.run.Setup, "create_state", watched)
    monkeypatch.setattr(train, "finish", lambda *_: None)  # samples of text
    flags = f"--config.data.cache_dir={tmp_path}", "--config.compile_cache=", *more
    data = pathlib.Path(VOCAB).parent
    flags += (
        f"--config.data.train={data / 'heldout.jsonl'}",
        f"--config.data.heldout={data / 'heldout.jsonl'}",
    )
    train.main(
        [f"--config={workdir / 'config.json'}", f"--workdir={to}", *SMOKE, *flags]
    )
    rows = [json.loads(x) for x in (to / "metrics.jsonl").read_text().splitlines()]
    nll, weight = float(found["loss"].nll), float(found["loss"].weight)
    assert rows[0]["step"] == 1
    np.testing.assert_allclose(rows[0]["loss"], nll / weight, rtol=1e-5)
    _, _, after, at, meta = checkpoint.load_run(to)
    assert at == 2 and "params_only" not in meta
    assert not np.array_equal(after["embedding"], before["embedding"])
    # And out again, with the tokenizer that came with them.
    run(f"--from={to}", f"--to=hf:{tmp_path / 'out'}")
    assert (tmp_path / "out" / "spiece.model").read_bytes() == pathlib.Path(
        VOCAB
    ).read_bytes()
    assert run("--diff", to, f"hf:{tmp_path / 'out'}") == 0


def test_another_model_is_not_trained_from_a_converted_workdir(tmp_path):
    files = {"spiece.model": pathlib.Path(VOCAB)}
    tiny_source("t5_1_1_small", tmp_path / "hf", files, vocab_size=4224)
    run(f"--from=hf:{tmp_path / 'hf'}", f"--to={tmp_path / 'run'}")
    cfg, _, meta = checkpoint.read_run(tmp_path / "run")
    data = dict(vocab=meta["data"]["vocab"], train="any")
    compatible.check_compatible(meta, cfg, data)
    free = dataclasses.replace(cfg, seed=5, optim=tiny.tiny_config().optim)
    compatible.check_compatible(meta, free, data)
    other = dataclasses.replace(cfg.model, activation="relu")
    with pytest.raises(ValueError, match="config.model.activation: 'gelu'") as error:
        compatible.check_compatible(meta, dataclasses.replace(cfg, model=other), data)
    assert "data.vocab" not in str(error.value)
    larger = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, vocab_size=384),
        data=dataclasses.replace(cfg.data, vocab="bytes"),
    )
    both = r"vocab_size: 4224 in .*384 now\n  - config.data.vocab: .*, 'bytes' now"
    with pytest.raises(ValueError, match=both):
        compatible.check_compatible(meta, larger, data)
    with pytest.raises(ValueError, match="data vocab"):
        compatible.check_compatible(meta, cfg, data | dict(vocab="other"))


def test_ids_that_the_embedding_has_not_get_rows_and_lose_them_again(tmp_path, capsys):
    """GPT-2's file has no padding piece, so ours adds one."""
    pieces = json.loads((GOLDENS / "vocab_bytebpe.json").read_text())
    merges = GOLDENS / "vocab_bytebpe.bpe"
    del pieces["<pad>"]  # the ids below move down by one
    (tmp_path / "vocab.json").write_text(
        json.dumps({piece: i - 1 for piece, i in pieces.items()})
    )
    files = {"vocab.json": tmp_path / "vocab.json", "merges.txt": merges}
    hf, workdir, out = (tmp_path / name for name in ("hf", "run", "out"))
    tiny_source("gpt2", hf, files, vocab_size=len(pieces))
    run(f"--from=hf:{hf}", f"--to={workdir}")
    cfg, _, params, _, meta = checkpoint.load_run(workdir)
    words = vocab.load(cfg.data.vocab, cfg.data.sentinels)
    compatible.check_vocab(meta, words)
    assert (
        len(pieces) < words.size <= cfg.model.vocab_size == params["embedding"].shape[0]
    )
    assert not np.asarray(params["embedding"][len(pieces) :]).any()
    run(f"--from={workdir}", f"--to=hf:{out}")
    capsys.readouterr()
    assert run("--diff", f"hf:{hf}", f"hf:{out}") == 0
    for name in files:
        assert (out / name).read_bytes() == (hf / name).read_bytes()


def test_bytes_of_byt5_need_no_file(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "ByT5Tokenizer"}'
    )
    files = {"tokenizer_config.json": tmp_path / "tokenizer_config.json"}
    tiny_source("byt5_small", tmp_path / "hf", files, vocab_size=384)
    run(f"--from=hf:{tmp_path / 'hf'}", f"--to={tmp_path / 'run'}")
    cfg, _, meta = checkpoint.read_run(tmp_path / "run")
    assert (cfg.data.vocab, cfg.data.sentinels) == ("bytes", 100)
    compatible.check_vocab(meta, vocab.load("bytes", 100))


def test_a_run_of_ours_takes_its_vocabulary_along(tiny_workdir, tmp_path):
    run(f"--from={tiny_workdir}", f"--to=hf:{tmp_path / 'out'}", "--step=3")
    about = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == "ByT5Tokenizer" and about["extra_ids"] == 100
    theirs = json.loads((tmp_path / "out" / "config.json").read_text())
    assert theirs["decoder_start_token_id"] == theirs["pad_token_id"] == 0
    _, _, params, _, _ = checkpoint.load_run(tiny_workdir, 3)
    found = huggingface.read(tmp_path / "out").params
    for name, array in flattened(params).items():
        np.testing.assert_array_equal(found[name], array)


# Family -> a preset of ours that is one, and what differs from it here.
CONTINUED: dict[str, tuple[str, dict]] = {
    "t5": ("t5_1_1_small", {}),
    "umt5": ("umt5_small", {}),
    "bert": ("bert_base", {}),
    "nezha": ("nezha_base", {}),
    "albert": ("albert_base", dict(d_embed=12)),
    "electra_discriminator": (
        *("electra_small", dict(d_embed=12, activation="gelu_exact")),
    ),
    "xlnet": ("xlnet_base", dict(memory_length=16)),
    "gpt": ("gpt", dict(d_ff=96)),
    "gpt2": ("gpt2", {}),
    "bart": ("bart_base", {}),
    "prophetnet": ("prophetnet_large", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", CONTINUED)
def test_every_family_goes_on_training(family, tmp_path, monkeypatch):
    preset, more = CONTINUED[family]
    monkeypatch.setattr(train, "finish", lambda *_: None)  # samples of text
    more = dict(vocab_size=4224, max_positions=160) | more
    tiny_source(preset, tmp_path / "hf", {}, **more)
    run(
        *(f"--from=hf:{tmp_path / 'hf'}", f"--to={tmp_path / 'run'}"),
        *(f"--vocab={VOCAB}", "--sentinels=100"),
    )
    _, _, before, _, meta = checkpoint.load_run(tmp_path / "run")
    assert meta["family"] == family
    data = pathlib.Path(VOCAB).parent / "heldout.jsonl"
    train.main(
        [
            f"--config={tmp_path / 'run' / 'config.json'}",
            *(f"--workdir={tmp_path / 'run'}", *SMOKE, "--config.compile_cache="),
            *(f"--config.data.train={data}", f"--config.data.heldout={data}"),
            f"--config.data.cache_dir={tmp_path}",
        ]
    )
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    losses = [
        row["loss"] for row in map(json.loads, text.splitlines()) if "loss" in row
    ]
    assert len(losses) == 2 and np.isfinite(losses).all()
    after = checkpoint.load_run(tmp_path / "run")[2]
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert moved["embedding"]


# Family -> the tokenizer file whose ids its workdir records.
TOKENIZERS = {
    **dict.fromkeys(("t5", "mt5", "umt5"), "spiece.model"),
    **dict.fromkeys(("bert", "ernie", "nezha", "electra"), "vocab.txt"),
    "electra_discriminator": "vocab.txt",
    **dict.fromkeys(("gpt", "gpt2", "bart", "roberta"), "vocab.json"),
}


@pytest.mark.parametrize("family", TOKENIZERS)
def test_the_tokenizer_of_a_family_becomes_the_vocabulary(family, tmp_path):
    sources = {
        "spiece.model": {"spiece.model": pathlib.Path(VOCAB)},
        "vocab.txt": {"vocab.txt": GOLDENS / "vocab_cased.txt"},
        "vocab.json": {
            "vocab.json": GOLDENS / "vocab_bytebpe.json",
            "merges.txt": GOLDENS / "vocab_bytebpe.bpe",
        },
    }
    name = TOKENIZERS[family]
    (tmp_path / "hf").mkdir()
    files = {
        file: pathlib.Path(shutil.copy(source, tmp_path / "hf" / file))
        for file, source in sources[name].items()
    }
    golden = dict(electra="electra_generator", mt5="t5_1_1").get(family) or family
    theirs, weights, _ = hf_dirs.load(golden)
    if family == "mt5":
        theirs["model_type"] = family
    hf_dirs.write(tmp_path / "weights", theirs, weights)
    fresh = family == "electra_discriminator"
    found = huggingface.read(tmp_path / "weights", family=family, fresh=fresh)
    found.extras["files"].update(files)
    made = workdirs.config_of(found, None, tmp_path / "run")
    if family == "bert":
        (tmp_path / "run").mkdir()
        workdirs.write(tmp_path / "run", made)
    assert made.cfg.data.vocab == str(tmp_path / "run" / "huggingface" / name)
    sentinels = 100 if name == "spiece.model" else 0
    words = vocab.load(str(files[name]), sentinels)
    assert made.cfg.data.sentinels == sentinels
    assert made.fingerprint == words.fingerprint
    assert made.cfg.model.vocab_size >= words.size
    if family == "bert":  # as it will be read
        again = vocab.load(made.cfg.data.vocab, sentinels)
        text = "In the beginning"
        np.testing.assert_array_equal(again.encode(text), words.encode(text))

"""`convert` says what it cannot do, or has to change, before it writes."""

import dataclasses
import json
import os
import pathlib

import numpy as np
import pytest

from t5x_lite import vocab
from t5x_lite.arrays import Lazy
from t5x_lite.interop import families, huggingface, t5x, workdirs
from tests import hf_dirs, t5x_reference
from tests import parity_families as pf
from tests.hf_dirs import VOCAB, run

EMBEDDING = "transformer.wte.weight"


def source_of(name: str, path: pathlib.Path, **changes) -> pathlib.Path:
    theirs, weights, _ = hf_dirs.load(name)
    return hf_dirs.write(path, theirs | changes, weights)


def test_another_vocabulary_goes_out_with_its_own_tokenizer_and_rows(tmp_path, capsys):
    hf = source_of("gpt2", tmp_path / "hf", eos_token_id=17)
    for name in ("vocab.json", "tokenizer_config.json"):
        (hf / name).write_text("{}")
    run(f"--from=hf:{hf}", f"--to={tmp_path / 'run'}", f"--vocab={VOCAB}")
    run(f"--from={tmp_path / 'run'}", f"--to=hf:{tmp_path / 'out'}")
    out = tmp_path / "out"
    assert (out / "spiece.model").read_bytes() == pathlib.Path(VOCAB).read_bytes()
    assert not (out / "vocab.json").exists()
    config = json.loads((out / "config.json").read_text())
    words = vocab.load(VOCAB, 0)
    assert config["eos_token_id"] == words.eos_id != 17
    assert config["vocab_size"] >= words.size
    table = huggingface.open_weights(out)[EMBEDDING]
    before = huggingface.open_weights(hf)[EMBEDDING]
    assert len(table) == config["vocab_size"]
    np.testing.assert_array_equal(table[: len(before)], before)


@pytest.mark.parametrize("trained", [False, True])
def test_added_rows_are_cut_only_while_they_are_zero(trained, tmp_path, capsys):
    source_of("gpt2", tmp_path / "hf")
    found = huggingface.read(tmp_path / "hf")
    made = workdirs.config_of(found, None, tmp_path / "run", spec=VOCAB)
    (tmp_path / "vocab.txt").write_text("theirs")
    params = dict(made.params)
    rows = found.cfg.vocab_size
    params["embedding"][-1, 3] += 0.5 * trained
    files = {"vocab.txt": tmp_path / "vocab.txt"}
    made = dataclasses.replace(made, params=Lazy.of(params), files=files)
    (tmp_path / "run").mkdir()
    workdirs.write(tmp_path / "run", made)
    run(f"--from={tmp_path / 'run'}", f"--to=hf:{tmp_path / 'out'}")
    table = huggingface.open_weights(tmp_path / "out")[EMBEDDING]
    said = capsys.readouterr().out
    if trained:
        np.testing.assert_array_equal(table, params["embedding"])
        assert "no longer zero" in said
    else:
        np.testing.assert_array_equal(table, params["embedding"][:rows])
        assert f"vocab_size={rows} was written" in said


def test_a_relative_workdir_is_found_from_elsewhere(tmp_path, monkeypatch):
    hf = source_of("t5", tmp_path / "hf")
    os.link(VOCAB, hf / "spiece.model")
    found = huggingface.read(hf)
    monkeypatch.chdir(tmp_path)
    made = workdirs.config_of(found, None, pathlib.Path("run"))
    assert made.cfg.data.vocab == str(tmp_path / "run" / "huggingface" / "spiece.model")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--from=hf:a", "--to=b", "--dtype=float16"], "--dtype does nothing with"),
        (["--from=hf:a", "--to=b", "--step=3"], "--step .*--from=hf:; it is for"),
        (["--from=t5x:a", "--to=b", "--fresh"], "--fresh .*it is for --from=hf:"),
        (["--from=t5x:a", "--to=b", "--family=t5"], "--family does nothing"),
        (["--from=a", "--to=hf:b", "--vocab=bytes"], "--vocab does nothing"),
        (["--from=a", "--to=hf:b", "--legacy"], "--legacy .*it is for --to=t5x:"),
        (["--from=a", "--to=t5x:b", "--shard_size=1"], "--shard_size does nothing"),
        (["--diff", "a", "b", "--step=1"], "--step does nothing with --diff"),
    ],
)
def test_flags_of_another_direction_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        run(*flags)


def test_a_family_that_config_json_contradicts_is_refused(tmp_path):
    hf = source_of("bert", tmp_path / "hf")
    with pytest.raises(ValueError, match="--family=ernie .*config.json has 'bert'"):
        run(f"--from=hf:{hf}", f"--to={tmp_path / 'run'}", "--family=ernie")


@pytest.mark.parametrize("value", [0, -4, "24", [24], None, 2.5, True, "missing"])
@pytest.mark.parametrize(
    "name, key",
    [
        ("bert", "hidden_size"),
        ("bert", "num_attention_heads"),
        ("gpt2", "n_embd"),
        ("bart", "encoder_attention_heads"),
        ("t5", "num_layers"),
        ("xlnet", "n_head"),
        ("electra_generator", "embedding_size"),
        ("roberta", "max_position_embeddings"),
    ],
)
def test_values_that_no_model_has_are_one_clear_error(name, key, value):
    theirs, _, _ = hf_dirs.load(name)
    theirs[key] = value
    if value == "missing":
        del theirs[key]
    family = hf_dirs.FAMILIES[name]
    with pytest.raises(ValueError, match=f"config of '{family}'.*Copy the model's own"):
        families.model_config(family, theirs)


@pytest.mark.parametrize(
    "change",
    [
        dict(hidden_act=["gelu"]),
        dict(layer_norm_eps="1e-12"),
        dict(layer_norm_eps=float("nan")),
        dict(hidden_dropout_prob="0.1"),
        dict(initializer_range=[0.02]),
    ],
)
def test_other_values_are_checked_too(change, tmp_path):
    hf = source_of("bert", tmp_path / "hf", **change)
    with pytest.raises(ValueError, match=f"{[*change][0]}.*Copy the model's own"):
        huggingface.read(hf)


def test_weights_that_are_no_floats_are_refused(tmp_path):
    theirs, weights, _ = hf_dirs.load("gpt2")
    weights[EMBEDDING] = weights[EMBEDDING].astype(np.int32)
    hf = hf_dirs.write(tmp_path / "hf", theirs, {})
    hf_dirs.safetensors_numpy.save_file(weights, hf / "model.safetensors")
    message = f"(?s)2 layers, gated.*config.json is of.*int32, .*: {EMBEDDING}"
    with pytest.raises(ValueError, match=message):
        huggingface.read(hf)


def test_values_that_are_not_finite_are_told(tmp_path, capsys):
    theirs, weights, _ = hf_dirs.load("gpt2")
    weights["transformer.ln_f.bias"][2] = np.nan
    hf = hf_dirs.write(tmp_path / "hf", theirs, weights)
    run(f"--from=hf:{hf}", f"--to={tmp_path / 'run'}")
    assert "note: stack/norm/bias has values that are not" in capsys.readouterr().out


def test_only_electra_is_told_of_its_two_halves(tmp_path):
    for name, told in (("electra_discriminator", True), ("bert", False)):
        theirs, weights, _ = hf_dirs.load(name)
        part = {k: a for k, a in weights.items() if "embeddings" in k}
        family = hf_dirs.FAMILIES[name]
        hf = hf_dirs.write(tmp_path / name, theirs, part)
        with pytest.raises(ValueError, match="Draw them with --fresh") as e:
            huggingface.read(hf, family=family)
        assert ("generator/" in str(e.value)) == told


def test_a_file_above_the_new_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file. Give a new directory"):
        run("--from=hf:a", f"--to={tmp_path / 'file' / 'x' / 'y'}")


def test_no_vocabulary_at_all_says_how_to_give_one():
    with pytest.raises(FileNotFoundError, match="--config.data.vocab=FILE, or convert"):
        vocab.load("")


def test_t5x_is_written_scanned_and_in_one_file(tmp_path):
    cfg = t5x_reference.UMT5
    flat = hf_dirs.drawn(cfg)
    t5x.write(tmp_path / "in", cfg, flat)
    run(f"--from=t5x:{tmp_path / 'in'}", f"--to={tmp_path / 'run'}")
    for how in ("scanned", "legacy"):
        run(f"--from={tmp_path / 'run'}", f"--to=t5x:{tmp_path / how}", f"--{how}")
        again = t5x.read(tmp_path / how).params
        for name in flat:
            np.testing.assert_array_equal(again[name], flat[name])


def test_goldens_are_read_by_the_stricter_rules():
    for name, family in hf_dirs.FAMILIES.items():
        if name not in ("t5", "t5_1_1"):
            families.model_config(family, json.loads(str(pf.load(name)["config"])))

"""Weights in and out: what is read is what was written, by the very tensors."""

import dataclasses
import json
import pathlib
import pickle
import shutil

import jax
import numpy as np
import pytest

from configs.models import PRESETS
from t5x_lite import arrays, checkpoint, parameters
from t5x_lite.config import ModelConfig
from t5x_lite.interop import families, hf_config, huggingface
from t5x_lite.model_config import generator_config
from tests import hf_dirs, parity
from tests import parity_families as pf
from tests.hf_dirs import SMALL, run

NAMES = sorted(hf_dirs.FAMILIES)


def source_of(name: str, path: pathlib.Path, **how) -> pathlib.Path:
    theirs, weights, _ = hf_dirs.load(name)
    return hf_dirs.write(path, theirs, weights, **how)


def nested(found) -> dict:
    return parameters.nested({tuple(n.split("/")): np.float32(found[n]) for n in found})


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_comes_back_bit_for_bit(name, tmp_path):
    """Sharded in, sharded otherwise out, tied weights once; the config too."""
    theirs, weights, _ = hf_dirs.load(name)
    source = hf_dirs.write(tmp_path / "source", theirs, weights, files=3)
    found = huggingface.read(source, fresh=name == "electra_discriminator")
    assert found.extras["family"] == hf_dirs.FAMILIES[name]
    out = tmp_path / "out"
    out.mkdir()
    huggingface.write(
        *(out, found.cfg, found.params),
        family=found.extras["family"],
        theirs=theirs,
        shard_bytes=20_000,
    )
    back = out / "discriminator" if found.cfg.generator_width else out
    again = huggingface.open_weights(back)
    assert set(again) == set(weights)
    for key, weight in weights.items():
        assert again[key].dtype == weight.dtype
        np.testing.assert_array_equal(again[key], weight, err_msg=key)
    config = json.loads((back / "config.json").read_text())
    assert {key: config[key] for key in theirs} == theirs
    assert len(list(back.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_the_one_whose_logits_and_gradients_are_compared(name, tmp_path):
    """With the goldens, in test_parity_families and test_parity_t5."""
    theirs, _, golden = hf_dirs.load(name)
    found = huggingface.read(
        source_of(name, tmp_path / "hf"), fresh=name == "electra_discriminator"
    )
    if name in ("t5", "t5_1_1"):
        cfg = ModelConfig(**json.loads(str(golden["config"])))
        want = families.from_hf("t5", pf.weights(golden | dict(copies="{}")), cfg)
    else:
        cfg = pf.config(name, golden)
        want = families.from_hf(pf.family(name), pf.weights(golden), cfg)
    if name == "electra_generator":  # here half of a model, there one of its own
        cfg = dataclasses.replace(generator_config(cfg), generator_width=0.0)
        want = want | want.pop("generator")
        want |= dict(inputs=want["inputs"] | dict(project=want.pop("project")))
        want["inputs"]["project_bias"] = want.pop("project_bias")
    ours = nested(found.params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(want)[0]:
        got = ours
        for key in path:
            got = got[key.key]
        np.testing.assert_array_equal(got, leaf)
    free = dict.fromkeys(("dropout", "init_std", "memory_length"), 0)
    free |= dict(generator_width=0.0, output_bias=False)
    if "bias" in ours.get("output", ()):
        free["output_bias"] = True
    same = [dataclasses.replace(c, **free) for c in (found.cfg, cfg)]
    assert same[0] == same[1]


@pytest.mark.parametrize("name", ["t5_1_1", "bert", "gpt2"])
def test_the_command_there_and_back(name, tmp_path, capsys):
    hf, workdir, back = (tmp_path / n for n in ("hf", "run", "back"))
    source_of(name, hf, files=2)
    (hf / "tokenizer_config.json").write_text('{"tokenizer_class": "Unknown"}')
    assert run(f"--from=hf:{hf}", f"--to={workdir}") == 0
    assert run(f"--from={workdir}", f"--to=hf:{back}") == 0
    capsys.readouterr()
    assert run("--diff", f"hf:{hf}", f"hf:{back}") == 0
    assert run("--diff", f"hf:{back}", workdir) == 0
    assert capsys.readouterr().out == "no difference\nno difference\n"
    assert (back / "tokenizer_config.json").read_text() == (
        hf / "tokenizer_config.json"
    ).read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "run"]
    cfg, _, params, step, meta = checkpoint.load_run(workdir)
    assert (step, meta["params_only"]) == (0, True)
    golden = pf.load(name)
    if name == "t5_1_1":
        parity.compare_logits(cfg.model, params, golden, golden)
    else:
        pf.compare_outputs(name, cfg.model, params, golden)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_files_are_read_and_written(dtype, tmp_path):
    hf, out = source_of("bert", tmp_path / "hf", dtype=dtype), tmp_path / "out"
    found = huggingface.read(hf)
    out.mkdir()
    huggingface.write(out, found.cfg, found.params, family="bert", dtype=dtype)
    there, back = (huggingface.open_weights(path) for path in (hf, out))
    assert set(there) == set(back)
    for key in there:
        assert back.slots[key].dtype == arrays.DTYPES[dtype]
        np.testing.assert_array_equal(there[key], back[key])
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype


def test_too_large_for_float16_is_refused_and_nothing_is_left(tmp_path):
    theirs, weights, _ = hf_dirs.load("gpt2")
    weights["transformer.wpe.weight"][3, 4] = 1e5
    hf_dirs.write(tmp_path / "hf", theirs, weights)
    run(f"--from=hf:{tmp_path / 'hf'}", f"--to={tmp_path / 'run'}")
    with pytest.raises(ValueError, match="1e.05, too large for float16"):
        run(
            *(f"--from={tmp_path / 'run'}", f"--to=hf:{tmp_path / 'out'}"),
            "--dtype=float16",
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]


def test_names_of_old_releases_and_of_models_without_a_head(tmp_path):
    theirs, weights, _ = hf_dirs.load("bert")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for name, array in weights.items()
    }
    old["bert.embeddings.position_ids"] = np.arange(31)
    found = huggingface.read(hf_dirs.write(tmp_path / "old", theirs, old))
    want = huggingface.read(hf_dirs.write(tmp_path / "new", theirs, weights)).params
    for name in want:
        np.testing.assert_array_equal(found.params[name], want[name])

    theirs, weights, _ = hf_dirs.load("gpt2")
    bare = {n.removeprefix("transformer."): a for n, a in weights.items()}
    found = huggingface.read(hf_dirs.write(tmp_path / "bare", theirs, bare))
    want = huggingface.read(hf_dirs.write(tmp_path / "whole", theirs, weights)).params
    for name in want:
        np.testing.assert_array_equal(found.params[name], want[name])


def test_a_body_alone_gets_a_fresh_head_only_if_asked(tmp_path, capsys):
    theirs, weights, _ = hf_dirs.load("bert")
    body = {
        name.removeprefix("bert."): array
        for name, array in weights.items()
        if name.startswith("bert.") and ".pooler." not in name
    }
    hf = hf_dirs.write(tmp_path / "hf", theirs, body)
    with pytest.raises(ValueError, match="output/norm/bias.* Draw them with --fresh"):
        run(f"--from=hf:{hf}", f"--to={tmp_path / 'run'}")
    run(f"--from=hf:{hf}", f"--to={tmp_path / 'run'}", "--fresh")
    assert "DRAWN, not in the files: output/transform\n" in capsys.readouterr().out
    cfg, net, params, _, _ = checkpoint.load_run(tmp_path / "run")
    drawn = parameters.init_params(net, jax.random.key(0))
    np.testing.assert_array_equal(
        params["output"]["transform"], drawn["output"]["transform"]
    )
    np.testing.assert_array_equal(
        params["embedding"], body["embeddings.word_embeddings.weight"]
    )


def test_electra_goes_out_and_comes_in_as_two_models(tmp_path):
    found = huggingface.read(
        source_of("electra_discriminator", tmp_path / "half"), fresh=True
    )
    out = tmp_path / "both"
    out.mkdir()
    assert huggingface.write(out, found.cfg, found.params) == []
    again = huggingface.read(out)
    assert again.cfg == dataclasses.replace(
        found.cfg, dropout=again.cfg.dropout, init_std=again.cfg.init_std
    )
    assert list(again.params) == list(found.params)
    for name in found.params:
        np.testing.assert_array_equal(again.params[name], found.params[name])
    weights = dict(huggingface.open_weights(out / "generator"))
    weights["electra.embeddings.LayerNorm.weight"] += 1
    shutil.rmtree(out / "generator")
    theirs = hf_config.write("electra", generator_config(found.cfg))
    hf_dirs.write(out / "generator", theirs, weights)
    with pytest.raises(ValueError, match="not trained together"):
        huggingface.read(out)


OURS: dict[str, dict] = {
    "t5_small": dict(head_dim=12),
    "t5_1_1_small": dict(decoder_layers=3),
    "umt5_small": {},
    "bert_base": {},
    "roberta_base": {},
    "albert_base": dict(d_embed=12),
    "xlnet_base": {},
    "gpt": dict(d_ff=96),
    "gpt2": {},
    "gpt3_125m": dict(window=0),
    "bart_base": {},
    "nezha_base": {},
    "prophetnet_large": {},
    "electra_small": dict(d_embed=12, activation="gelu_exact"),
}
FITS = {
    **dict(t5_small="t5", t5_1_1_small="t5", umt5_small="umt5", bert_base="bert"),
    **dict(roberta_base="bert", albert_base="albert", xlnet_base="xlnet", gpt="gpt"),
    **dict(gpt2="gpt2", gpt3_125m="gpt2", bart_base="bart", nezha_base="nezha"),
    **dict(prophetnet_large="prophetnet", electra_small="electra_discriminator"),
}


@pytest.mark.parametrize("preset", OURS)
def test_runs_of_ours_find_their_family_and_come_back(preset, tmp_path):
    shape = PRESETS[preset] | SMALL | dict(encoder_layers=2, decoder_layers=2)
    cfg = ModelConfig(**shape | dict(max_positions=40) | OURS[preset])
    flat = hf_dirs.drawn(cfg)
    huggingface.write(tmp_path, cfg, flat)
    found = huggingface.read(tmp_path)
    assert found.extras["family"] == FITS[preset]
    for name in flat:
        want = flat[name]
        if name == "inputs/positions":  # what is never read is not written
            want = want[cfg.position_offset - found.cfg.position_offset :]
        np.testing.assert_array_equal(found.params[name], want, err_msg=name)
    if any(name.endswith("inputs/positions") for name in flat):
        assert found.cfg.max_positions == cfg.max_positions


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(structure="prefix_lm"), "structure='prefix_lm'"),
        (dict(window=8), "window=8"),
        (dict(positions="sinusoidal"), "positions='sinusoidal'"),
    ],
)
def test_models_that_theirs_does_not_compute_are_refused(changes, reason, tmp_path):
    cfg = ModelConfig(**PRESETS["gpt2"] | changes)
    with pytest.raises(ValueError, match=f"(?s){reason}.*t5x_lite.export"):
        huggingface.write(tmp_path, cfg, {})
    assert not list(tmp_path.iterdir())


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_pickle_is_not_run(tmp_path):
    theirs, _, _ = hf_dirs.load("gpt2")
    hf, made = tmp_path / "hf", tmp_path / "made"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(theirs))
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil(made)}, 2))
    # Without torch the file is not opened; with it (`make parity`) only tensors are.
    with pytest.raises((ValueError, ImportError), match="save_pretrained|throw-away"):
        run(f"--from=hf:{hf}", f"--to={tmp_path / 'run'}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    pickle.loads((hf / "pytorch_model.bin").read_bytes())  # it would have
    assert made.exists()


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a\\b"])
def test_an_index_cannot_name_files_elsewhere(kind, name, tmp_path):
    hf = source_of("gpt2", tmp_path / "hf")
    (hf / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = dict(weight_map={"transformer.wte.weight": name})
    (hf / f"{kind}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="bare file names"):
        huggingface.read(hf)


def no_config(hf):
    (hf / "config.json").unlink()


def no_weights(hf):
    (hf / "model.safetensors").unlink()


def another_type(hf):
    (hf / "config.json").write_text('{"model_type": "llama"}')


def truncated(hf):
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def another_width(hf):
    theirs = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(theirs | dict(n_inner=40)))


@pytest.mark.parametrize(
    "harm, message",
    [
        (no_config, "has no config.json"),
        (no_weights, "holds no weights"),
        (another_type, "model_type='llama'; known are albert, bart"),
        (truncated, "damaged"),
        (another_width, r"shape \(24, 38\) instead of \(24, 40\)"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_made(harm, message, tmp_path):
    hf = source_of("gpt2", tmp_path / "hf")
    harm(hf)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(f"--from=hf:{hf}", f"--to={tmp_path / 'run'}")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_flags_that_make_no_sense(tmp_path):
    hf = source_of("gpt2", tmp_path / "hf")
    for flags, message in {
        (f"--from=hf:{hf}",): "--from and --to",
        (f"--from=hf:{hf}", f"--to=hf:{tmp_path / 'x'}"): "one of them is",
        (f"--from=t5:{hf}", f"--to={tmp_path / 'x'}"): "did you mean 't5x'",
        (f"--from=hf:{hf}", f"--to={hf}"): "exists. Give a new directory",
        (f"--from={tmp_path / 'no'}", f"--to=hf:{tmp_path / 'x'}"): "no checkpoint",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(*flags)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_diff_names_what_differs_the_worst_first(tmp_path, capsys):
    theirs, weights, _ = hf_dirs.load("gpt2")
    a = hf_dirs.write(tmp_path / "a", theirs, weights)
    weights = {name: array.copy() for name, array in weights.items()}
    weights["transformer.ln_f.bias"][1] += 0.25
    weights["transformer.wpe.weight"][2, 3] -= 3.0
    del weights["transformer.ln_f.weight"]
    weights["transformer.h.0.ln_1.bias"] = np.zeros(7, np.float32)
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].astype("f8")
    b = hf_dirs.write(tmp_path / "b", theirs, {})
    hf_dirs.safetensors_numpy.save_file(weights, b / "model.safetensors")
    assert run("--diff", f"hf:{a}", f"hf:{b}") == 1
    lines = capsys.readouterr().out.splitlines()
    assert "only in A  (24,) float32  transformer.ln_f.weight" in lines[:2]
    assert "shape (24,) in A, (7,) in B  transformer.h.0.ln_1.bias" in lines[:2]
    assert [line.split()[0] for line in lines[2:4]] == ["3", "0.25"]
    assert lines[4].startswith("0  ") and "float64 in B" in lines[4]
    assert lines[5] == f"4 of {len(weights) + 1} arrays differ"
    # A file alone, and NumPy's.
    np.savez(tmp_path / "c.npz", **weights)  # pyright: ignore[reportArgumentType]
    assert run("--diff", b / "model.safetensors", tmp_path / "c.npz") == 0

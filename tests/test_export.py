"""An export is the checkpoint, readable with NumPy alone, or it is refused."""

import contextlib
import json
import pathlib
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from t5x_lite import arrays, checkpoint, export, model, parameters
from tests.tiny import tiny_config


@pytest.fixture
def workdir(tiny_workdir):
    return tiny_workdir


@pytest.fixture(scope="module")
def exported(tiny_workdir, tmp_path_factory):
    """(an export, the model and parameters it was made from)"""
    out = tmp_path_factory.mktemp("exported") / "out"
    run(tiny_workdir, out)
    return out, *checkpoint.load_run(tiny_workdir)[1:3]


def run(workdir, output, *more: str):
    export.main([f"--workdir={workdir}", f"--output={output}", *more])


@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_numpy_alone_gives_the_parameters_back(workdir, tmp_path, layout, capsys):
    out = tmp_path / "deeper" / "out"
    run(workdir, out, f"--layers={layout}", "--verify")
    with np.load(out / "params.npz", allow_pickle=False) as archive:
        stored = dict(archive)
    query = "decoder/blocks/{}attention/query"
    if layout == "stacked":
        assert stored[query.format("")].shape == (2, 32, 4, 16)
    else:
        assert stored[query.format("01/")].shape == (32, 4, 16)
    cfg, net, params, step, _ = checkpoint.load_run(workdir)
    want, got = export.flatten(params), export.restack(stored)
    assert list(want) == list(got) == sorted(parameters.declared(net))
    for name in want:
        np.testing.assert_array_equal(want[name], got[name])
    about = json.loads((out / "config.json").read_text())
    assert (about["step"], about["layers"]) == (step, layout) == (5, layout)
    assert about["config"]["model"]["d_model"] == cfg.model.d_model == 32

    printed = capsys.readouterr().out
    assert f"{model.parameter_count(net):,}" in printed
    assert all(name in printed for name in stored)
    assert "bit-equal" in printed
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]


def test_load_gives_a_model_that_computes(workdir, tmp_path):
    run(workdir, tmp_path / "out", "--step=3")
    net, params = export.load(tmp_path / "out")
    _, _, want, step, _ = checkpoint.load_run(workdir, 3)
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, params, want)
    batch = export.fixed_batch(net.cfg)
    assert np.isfinite(export.logits(net.cfg, params, batch)).all()


CLOSE = re.compile(r"NumPy alone .* within (\S+) of the largest")


def stored_by(kind: str, out: pathlib.Path) -> dict:
    """The arrays of an export, read by other code: NumPy's and safetensors' own."""
    if kind == "npz":
        with np.load(out / "params.npz", allow_pickle=False) as archive:
            return dict(archive)
    if kind == "npy-dir":
        files = (out / "params").rglob("*.npy")
        return {
            file.relative_to(out / "params").with_suffix("").as_posix(): np.load(file)
            for file in files
        }
    return safetensors.numpy.load_file(out / "params.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", export.FORMATS)
def test_every_format_and_dtype_holds_the_rounded_checkpoint(
    kind, dtype, workdir, tmp_path, capsys
):
    out = tmp_path / "out"
    run(workdir, out, f"--format={kind}", f"--dtype={dtype}", "--verify")
    printed = capsys.readouterr().out
    assert "bit-equal" in printed
    found = CLOSE.search(printed)
    assert found is not None and float(found[1]) < 1e-5
    stored = stored_by(kind, out)
    params = checkpoint.load_run(workdir)[2]
    want = {k: jnp.asarray(v, dtype) for k, v in export.flatten(params).items()}
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    again = export.restack(arrays.open_arrays(out))
    assert list(again) == list(want)
    for name, array in export.restack(stored).items():
        bits = np.asarray(want[name])
        if dtype == "bfloat16" and kind != "safetensors":
            bits = bits.view(np.uint16)
        assert array.dtype == bits.dtype
        np.testing.assert_array_equal(array, bits)
        assert again[name].dtype == want[name].dtype
        np.testing.assert_array_equal(again[name], np.asarray(want[name]))


def test_bfloat16_bits_are_the_upper_half_of_float32s(workdir, tmp_path):
    """As the README decodes them."""
    run(workdir, tmp_path / "out", "--dtype=bfloat16")
    stored = stored_by("npz", tmp_path / "out")
    widened = (stored["embedding"].astype(np.uint32) << 16).view(np.float32)
    want = checkpoint.load_run(workdir)[2]["embedding"].astype("bfloat16")
    np.testing.assert_array_equal(widened, want.astype("float32"))


def test_values_too_large_for_float16_are_refused(tmp_path):
    big = {"a/b": np.array([1.0, -7e4], np.float32)}
    with pytest.raises(ValueError, match="a/b has values up to 7e[+]04, too large"):
        export.write(tmp_path / "out", big, {"dtype": "float16"})
    assert not list(tmp_path.iterdir())


def test_models_that_numpy_forward_has_not_say_so(tmp_path):
    cfg = tiny_config(model=dict(positions="functional")).model
    assert "no positions='functional'" in export.verify_with_numpy(
        tmp_path, cfg, {}, {}
    )


def test_numpys_logits_must_be_the_models(exported):
    out, net, params = exported
    batch = export.fixed_batch(net.cfg)
    params = params | {"embedding": params["embedding"] * 1.01}
    with pytest.raises(ValueError, match="differ from the model's by up to"):
        export.verify_with_numpy(out, net.cfg, params, batch)


def corrupt_bytes(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


def change_one_value(path):
    with np.load(path) as archive:
        stored = dict(archive)
    stored["encoder/blocks/00/mlp/up"][3, 4] += 1e-2
    np.savez(path, **stored)


def lose_a_layer(path):
    with np.load(path) as archive:
        stored = dict(archive)
    del stored["encoder/blocks/00/mlp/up"]
    np.savez(path, **stored)


def lose_an_array(path):
    with np.load(path) as archive:
        stored = dict(archive)
    del stored["output/kernel"]
    np.savez(path, **stored)


@pytest.mark.parametrize(
    "harm, message",
    [
        (corrupt_bytes, "damaged"),
        (truncate, "damaged"),
        (change_one_value, "logits differ"),
        (lose_a_layer, "are missing"),
        (lose_an_array, "kernel: None in the file"),
    ],
)
def test_verify_catches(harm, message, exported, tmp_path):
    out, net, params = exported
    copy = shutil.copytree(out, tmp_path / "out")
    harm(copy / "params.npz")
    with pytest.raises(ValueError, match=message):
        export.verify(copy, net, params)


def test_an_output_that_exists_is_only_replaced_when_asked(workdir, tmp_path):
    out = tmp_path / "out"
    run(workdir, out, "--step=3")
    before = (out / "params.npz").read_bytes()
    with pytest.raises(ValueError, match="--overwrite"):
        run(workdir, out)
    assert (out / "params.npz").read_bytes() == before
    run(workdir, out, "--overwrite")
    assert (out / "params.npz").read_bytes() != before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an export"):
        run(workdir, out, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("config", ['{"model_type": "t5"}', "[1]", "no JSON", None])
def test_a_directory_that_only_looks_like_an_export_is_kept(config, workdir, tmp_path):
    out = tmp_path / "foreign"
    out.mkdir()
    (out / "params.npz").write_text("mine")
    if config is not None:
        (out / "config.json").write_text(config)
    with pytest.raises(ValueError, match="not an export"):
        run(workdir, out, "--overwrite")
    assert (out / "params.npz").read_text() == "mine"


@pytest.mark.parametrize("kind", export.FORMATS)
def test_a_full_disk_leaves_nothing_and_keeps_the_old(kind, workdir, tmp_path):
    out, small = tmp_path / "out", tmp_path / "small"
    run(workdir, out, "--step=3", f"--format={kind}")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with largest_file(8_000), pytest.raises(OSError, match="nothing was changed"):
        run(workdir, out, "--overwrite", f"--format={kind}")
    with largest_file(8_000), pytest.raises(OSError, match="nothing was changed"):
        run(workdir, small, f"--format={kind}")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


@contextlib.contextmanager
def largest_file(size: int):
    """Writes of this process fail behind `size` bytes of a file, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    slot = arrays.Slot((free,), np.dtype(np.float32), lambda: pytest.fail("was read"))
    with pytest.raises(OSError, match="are free there"):
        export.write(tmp_path / "out", arrays.Lazy({"a": slot}), {})
    assert not list(tmp_path.iterdir())

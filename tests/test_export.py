"""An export is the checkpoint, readable with NumPy alone, or it is refused."""

import json
import shutil

import jax
import numpy as np
import pytest

from t5x_lite import checkpoint, export, model, parameters


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


def test_float16_is_compared_with_the_rounded_checkpoint(workdir, tmp_path, capsys):
    run(workdir, tmp_path / "out", "--dtype=float16", "--verify")
    assert "bit-equal" in capsys.readouterr().out
    assert export.read(tmp_path / "out")[0]["output/kernel"].dtype == np.float16


def corrupt_bytes(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


def change_one_value(path):
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["encoder/blocks/00/mlp/up"][3, 4] += 1e-2
    np.savez(path, **arrays)


def lose_a_layer(path):
    with np.load(path) as archive:
        arrays = dict(archive)
    del arrays["encoder/blocks/00/mlp/up"]
    np.savez(path, **arrays)


def lose_an_array(path):
    with np.load(path) as archive:
        arrays = dict(archive)
    del arrays["output/kernel"]
    np.savez(path, **arrays)


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


def test_a_failed_write_leaves_nothing_and_keeps_the_old(
    workdir, tmp_path, monkeypatch
):
    run(workdir, tmp_path / "out", "--step=3")
    before = (tmp_path / "out" / "params.npz").read_bytes()

    def full_disk(path, **arrays):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space"):
        run(workdir, tmp_path / "out", "--overwrite")
    with pytest.raises(OSError, match="No space"):
        run(workdir, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "params.npz").read_bytes() == before

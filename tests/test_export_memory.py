"""Exporting a model of 2 GB takes the memory of one array, not of the model."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from t5x_lite import arrays, checkpoint, model, parameters
from t5x_lite.config import CheckpointConfig
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parent.parent
# VmHWM and not ru_maxrss: the latter starts with what the parent had.
EXPORT = """
import sys
from t5x_lite import export
export.main(sys.argv[1:])
status = open("/proc/self/status").read()
print("peak", status.split("VmHWM:")[1].split()[0])
"""


def made_up(**shape):
    """A T5 v1.1 without its training run."""
    return tiny_config(
        model=dict(
            shape, relative_buckets=32, relative_max_distance=128, vocab_size=32_128
        )
    )


def save(workdir: pathlib.Path, cfg) -> dict:
    """A checkpoint of noise; -> bytes by name."""
    net, rng = model.build(cfg.model), np.random.default_rng(0)
    shapes = {n: p.get_value().shape for n, p in parameters.declared(net).items()}
    noise = {
        tuple(name.split("/")): rng.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    checkpoints = checkpoint.Checkpoints(workdir, CheckpointConfig())
    meta = checkpoint.make_meta(cfg, 0, {"vocab": ""})
    checkpoints.save(0, {"params": parameters.nested(noise)}, meta)
    checkpoints.close()
    return {name: 4 * int(np.prod(shape)) for name, shape in shapes.items()}


def peak(workdir, output, *more: str) -> int:
    """Bytes of resident memory that an export took at most."""
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc (Linux)")
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, f"--workdir={workdir}", f"--output={output}"]
        + list(more),
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=1200,
    )
    return 1024 * int(done.stdout.rsplit("peak", 1)[1])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """(workdir, bytes by name, peak of exporting almost nothing)"""
    path = tmp_path_factory.mktemp("memory")
    depth = dict(encoder_layers=7, decoder_layers=7)
    cfg = made_up(d_model=1024, d_ff=8192, heads=16, head_dim=64, **depth)
    sizes = save(path / "large", cfg)
    save(path / "small", made_up(d_model=8, d_ff=8, heads=1, head_dim=8))
    return path / "large", sizes, peak(path / "small", path / "bare")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "flags",
    [
        ("--format=npz",),
        ("--format=npy-dir", "--layers=stacked", "--dtype=float16"),
        ("--format=safetensors",),
        ("--format=safetensors", "--layers=stacked", "--dtype=bfloat16"),
    ],
    ids=" ".join,
)
def test_two_gigabytes_are_exported_array_by_array(flags, large, tmp_path):
    workdir, sizes, bare = large
    used = peak(workdir, tmp_path / "out", *flags) - bare
    total, largest = sum(sizes.values()), max(sizes.values())
    print(
        f"{' '.join(flags)}: model {total / 1e6:,.0f} MB, largest array "
        f"{largest / 1e6:,.0f} MB, bare process {bare / 1e6:,.0f} MB; above it "
        f"{used / 1e6:,.0f} MB, allowed {1.3 * largest / 1e6 + 1000:,.0f} MB"
    )
    assert total > 2e9
    assert used < 1.3 * largest + 1e9 < total
    stored = arrays.open_arrays(tmp_path / "out")
    assert sum(np.prod(slot.shape) for slot in stored.slots.values()) * 4 == total

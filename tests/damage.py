"""Damages checkpoints on disk."""

import contextlib
import pathlib
import shutil

from t5x_lite import checkpoint
from tests.tiny import tiny_config


def flip(path: pathlib.Path, at: int, bit: int = 0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def data_file(run: pathlib.Path, step: int) -> pathlib.Path:
    """Where the arrays of a checkpoint are."""
    found = (run / f"checkpoints/{step}/state/ocdbt.process_0/d").iterdir()
    return max(found, key=lambda p: p.stat().st_size)


@contextlib.contextmanager
def writer_of(run: pathlib.Path, **keep):
    made = checkpoint.Checkpoints(run, tiny_config(checkpoint=keep).checkpoint)
    try:
        yield made
    finally:
        made.close()


def lose_state(directory: pathlib.Path):
    shutil.rmtree(directory / "state")


def lose_meta(directory: pathlib.Path):
    (directory / "meta/metadata").unlink()

"""Files that are damaged or forged give what they hold or one clean error.

Clean is what a command shows as "error: ..." in one line: `cli.is_users`. The stores,
texts and checkpoints have fuzz tests of their own: see tests/RELIABILITY.md.
"""

import json
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from flax import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5x_lite import arrays, cli, config, dumps, guard, metrics, vocab
from t5x_lite.interop import huggingface, t5x_files
from tests.tiny import random_batch, tiny_config

FAST, SLOW = 40, 3000  # inputs for each kind of file

ARRAYS = {
    "b/kernel": np.arange(15, dtype=np.float32).reshape(3, 5),
    "a": np.array(2.5, np.float32),
    "ids": np.arange(6, dtype=np.int32),
}


def npz(folder: pathlib.Path):
    arrays.write_arrays(folder, ARRAYS, "npz")


def compressed(folder: pathlib.Path):
    np.savez_compressed(folder / "params.npz", **ARRAYS, allow_pickle=False)


def npy(folder: pathlib.Path):
    arrays.write_arrays(folder, ARRAYS, "npy-dir")


def one_safetensors(folder: pathlib.Path):
    safetensors.numpy.save_file(ARRAYS, folder / "model.safetensors")


def sharded(folder: pathlib.Path):
    arrays.write_safetensors(folder, ARRAYS, shard_bytes=40, stem="model")


def torch_index(folder: pathlib.Path):
    index = {"weight_map": {name: "pytorch_model-1.bin" for name in ARRAYS}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def t5x(folder: pathlib.Path):
    tree = {"target": {"a": {"b": ARRAYS["ids"]}}, "state": {"step": np.int32(3)}}
    content = {"version": 3, "optimizer": tree}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(content))


def lines(folder: pathlib.Path):
    rows = [{"step": i, "loss": 2.5 / i, "fingerprint": "0a"} for i in range(1, 9)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)


def rewinds(folder: pathlib.Path):
    about = {"step": 24, "loss": 9.5, "median": 3.0, "to": 20, "batches": [20, 25]}
    content = {"left_out": [[20, 6]], "rewinds": [about]}
    (folder / guard.REWINDS).write_text(json.dumps(content))


def dump(folder: pathlib.Path):
    about: dict[str, Any] = {"step": 7, "loss": float("nan"), "examples": [48, 55]}
    about |= {"vocab": vocab.load("bytes", 100).fingerprint}
    about |= {"config": config.to_json(tiny_config())}
    about |= {"gradient_norms": {"a/b": float("inf"), "c": 1.0}}
    dumps.write(folder / "nonfinite-7.npz", random_batch(), about)


def read_all(folder: pathlib.Path):
    found = arrays.open_arrays(folder)
    return {name: found[name].sum() for name in found}


def theirs(folder: pathlib.Path):
    about = {"model_type": "bert", "hidden_size": 32, "vocab_size": 128}
    (folder / "config.json").write_text(json.dumps(about))


def read_theirs(folder: pathlib.Path):
    try:
        huggingface.read(folder)
    except FileNotFoundError as e:
        assert "safetensors" in str(e)  # all that is read before the weights


def ours(folder: pathlib.Path):
    about = {"config": config.to_json(tiny_config())}
    (folder / "config.json").write_text(json.dumps(about))


def read_t5x(folder: pathlib.Path):
    return {k: np.asarray(v) for k, v in t5x_files.load(folder).items()}


def read_metrics(folder: pathlib.Path):
    metrics.read(folder / "metrics.jsonl")
    metrics.Writer(folder, 4).close()


# Kind of file -> (writes a good one into a folder, reads it).
KINDS: dict[str, tuple[Callable, Callable]] = {
    "npz": (npz, read_all),
    "compressed npz": (compressed, read_all),
    "npy": (npy, read_all),
    "safetensors": (one_safetensors, read_all),
    "index of safetensors": (sharded, huggingface.open_weights),
    "index of PyTorch": (torch_index, huggingface.open_weights),
    "config.json of theirs": (theirs, read_theirs),
    "config.json of ours": (ours, lambda d: cli.load_config(str(d / "config.json"))),
    "T5X msgpack": (t5x, read_t5x),
    "metrics.jsonl": (lines, read_metrics),
    "rewinds.json": (rewinds, guard.read),
    "dump": (dump, lambda folder: list(dumps.show(folder / "nonfinite-7.npz"))),
}

PLACES = st.floats(0.0, 1.0, exclude_max=True)
SPLICES = st.sampled_from(
    [b"", b"\0", b"\xff" * 8, b"../../x", b"[" * 3000, b"9" * 5000, b"-1", b"null"]
    + [b"|O", b"NaN", b"1e999", b"{}", b'"', b"\n", b"\xed\xa0\x80", b"/etc/passwd"]
)
EDITS = st.one_of(
    st.tuples(st.just("flip"), PLACES, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACES, st.just(0)),
    st.tuples(st.just("splice"), PLACES, st.one_of(SPLICES, st.binary(max_size=12))),
    st.tuples(st.just("over"), PLACES, st.one_of(SPLICES, st.binary(max_size=12))),
)
DAMAGE = st.one_of(st.lists(EDITS, min_size=1, max_size=4), st.binary(max_size=200))


def damaged(content: bytes, damage) -> bytes:
    """The content after some edits, or other bytes instead of it."""
    if isinstance(damage, bytes):
        return damage
    for how, place, what in damage:
        at = int(place * len(content))
        if how == "flip" and content:
            flipped = content[at] ^ (1 << what)
            content = content[:at] + bytes([flipped]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at]
        elif how in ("splice", "over"):
            behind = at + (len(what) if how == "over" else 0)
            content = content[:at] + what + content[behind:]
    return content


def check(folder: pathlib.Path, good: dict[str, bytes], read, name: str, damage):
    """Reads the files with one of them damaged; they are restored afterwards."""
    path = folder / name
    path.write_bytes(damaged(good[name], damage))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy, about sums of damaged numbers
            read(folder)
    except (FileNotFoundError, ImportError) as e:  # ImportError: torch is not here
        assert str(e)
    except Exception as e:
        assert cli.is_users(e), f"{type(e).__name__}: {e}"
    finally:
        for other, content in good.items():
            (folder / other).write_bytes(content)


def fuzz(kind: str, folder: pathlib.Path, examples: int):
    make, read = KINDS[kind]
    make(folder)
    good = {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    if kind != "index of PyTorch":
        read(folder)  # what is not damaged is read

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.sampled_from(sorted(good)), DAMAGE)
    def one(name, damage):
        check(folder, good, read, name, damage)

    one()


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_clean_errors(kind, tmp_path):
    fuzz(kind, tmp_path, FAST)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_files_are_clean_errors(kind, tmp_path):
    fuzz(kind, tmp_path, SLOW)

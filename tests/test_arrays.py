"""Arrays by name in files of every kind; hostile and damaged files are refused."""

import json
import pickle
import weakref
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from t5x_lite.arrays import (
    FORMATS,
    Lazy,
    Slot,
    open_arrays,
    write_arrays,
    write_safetensors,
)

RNG = np.random.default_rng(0)
ARRAYS = {
    "b/00/kernel": RNG.normal(size=(3, 5)).astype(np.float32),
    "a": np.array(2.5, np.float32),
    "b/01/kernel": RNG.normal(size=(5, 3)).astype(np.float32).T,
    "ids": np.arange(6, dtype=np.int32).reshape(1, 2, 3),
    "none": np.zeros((0, 4), np.float16),
    "short": np.arange(4).astype(ml_dtypes.bfloat16),
}


def same(found, want):
    assert set(found) == set(want)
    for name, array in want.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_was_written_is_read(kind, tmp_path):
    wanted = {k: v for k, v in ARRAYS.items() if k != "short" or kind == "safetensors"}
    write_arrays(tmp_path, wanted, kind)
    found = open_arrays(tmp_path)
    same(found, wanted)
    for name, slot in found.slots.items():
        assert (slot.shape, slot.dtype) == (wanted[name].shape, wanted[name].dtype)
    assert found.nbytes() == sum(array.nbytes for array in wanted.values())
    assert list(found) == (sorted(wanted) if kind != "npz" else list(wanted))


def test_npy_is_what_numpy_writes(tmp_path):
    floats = {k: v for k, v in ARRAYS.items() if k != "short"}
    write_arrays(tmp_path, floats, "npy-dir")
    for name, array in floats.items():
        np.save(tmp_path / "own.npy", np.ascontiguousarray(array).reshape(array.shape))
        ours = (tmp_path / "params" / f"{name}.npy").read_bytes()
        assert ours == (tmp_path / "own.npy").read_bytes()


def test_shards_hold_what_they_may_and_the_index_finds_them(tmp_path):
    wide = {f"w{i}": np.full((10,), i, np.float32) for i in range(7)}  # 40 bytes each
    wide["w3"] = np.full((50,), 3, np.float32)
    write_safetensors(tmp_path, wide, shard_bytes=100, stem="model")
    names = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == names
    held = [list(safetensors.numpy.load_file(tmp_path / name)) for name in names]
    want = ["w0", "w1"], ["w2"], ["w3"], ["w4", "w5"], ["w6"]
    assert tuple(sorted(names) for names in held) == want
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6 * 40 + 200
    same(open_arrays(tmp_path), wide)
    same(open_arrays(tmp_path / "model.safetensors.index.json"), wide)
    (tmp_path / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=names[1]):
        open_arrays(tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
def test_one_array_is_held_at_a_time(kind, tmp_path):
    """An array is read when the one before it is written and forgotten."""
    held: list[weakref.ref] = []

    def read() -> np.ndarray:
        assert all(ref() is None for ref in held)
        array = np.ones(3, np.float32)
        held.append(weakref.ref(array))
        return array

    slot = Slot((3,), np.dtype(np.float32), read)
    lazy = Lazy(dict.fromkeys("abc", slot))
    if kind == "safetensors":  # a shard holds copies
        write_safetensors(tmp_path, lazy, shard_bytes=12)
    else:
        write_arrays(tmp_path, lazy, kind, "float16")
    assert len(held) == len(open_arrays(tmp_path)) == 3


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a\\b", ".."]
)
def test_an_index_reads_no_other_folder(file, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.numpy.save_file({"w": np.ones(3)}, tmp_path / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(ValueError, match="not in its folder"):
        open_arrays(folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    np.save(tmp_path / "secret.npy", np.ones(3))
    (tmp_path / "out" / "params").mkdir(parents=True)
    (tmp_path / "out" / "params" / "w.npy").symlink_to(tmp_path / "secret.npy")
    with pytest.raises(ValueError, match="leads out of"):
        open_arrays(tmp_path / "out")


@pytest.mark.parametrize("name", ["../w", "/w", "a//b", "a/../../b", "a\\..\\b", ""])
@pytest.mark.parametrize("kind", FORMATS)
def test_no_name_leads_out_of_the_directory(kind, name, tmp_path):
    with pytest.raises(ValueError, match="cannot be the name"):
        write_arrays(tmp_path, {name: np.ones(3)}, kind)
    assert not list(tmp_path.rglob("*.npy"))


class Evil:
    """A pickle of this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_objects_are_refused(tmp_path):
    objects = np.array([Evil(str(tmp_path / "created"))], dtype=object)
    np.savez(tmp_path / "params.npz", w=objects)
    np.save(tmp_path / "w.npy", objects)
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(objects))
    for path in (tmp_path / "params.npz", tmp_path / "plain.npz"):
        with pytest.raises(ValueError, match="damaged"):
            open_arrays(path)
    (tmp_path / "params.npz").unlink()
    with pytest.raises(ValueError, match="pickled objects are not read"):
        open_arrays(tmp_path)
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_an_error(kind, tmp_path):
    write_arrays(tmp_path, {"w": np.ones(300, np.float32)}, kind)
    (path,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        open_arrays(tmp_path)


def test_a_flipped_bit_of_an_npz_is_an_error_when_it_is_read(tmp_path):
    write_arrays(tmp_path, {"v": np.zeros(9), "w": np.ones(3000)}, "npz")
    path = tmp_path / "params.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = open_arrays(path)
    assert not found["v"].any()
    with pytest.raises(ValueError, match="damaged"):
        found["w"]


def test_a_member_that_claims_more_than_it_holds(tmp_path):
    """It would take the memory of its header's shape."""
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as z, z.open("w.npy", "w") as f:
        about = {"descr": "<f4", "fortran_order": False, "shape": (2**50,)}
        np.lib.format.write_array_header_1_0(f, about)
    with pytest.raises(ValueError, match="do not hold"):
        open_arrays(tmp_path)


def test_what_holds_no_arrays_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no arrays"):
        open_arrays(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_arrays(tmp_path / "no.npz")
    (tmp_path / "w.txt").write_text("")
    with pytest.raises(ValueError, match="of no kind"):
        open_arrays(tmp_path / "w.txt")
    for name in "ab":
        safetensors.numpy.save_file(
            {name: np.ones(2)}, tmp_path / f"{name}.safetensors"
        )
    with pytest.raises(ValueError, match="a.safetensors, b.safetensors"):
        open_arrays(tmp_path)
    index = tmp_path / "m.safetensors.index.json"
    for content in ("[]", "{}", '{"weight_map": {"w": "a.safetensors"}}', "{"):
        index.write_text(content)
        with pytest.raises(ValueError, match="damaged"):
            open_arrays(index)

"""Named arrays in files, read and written one by one: npz, npy-dir, safetensors.

Imports neither jax nor flax: what is written here can be read where they are not.
.npy has no bfloat16: there it is uint16, the upper half of the float32's bits, and
"dtype": "bfloat16" in the config.json beside says so. safetensors has it natively.
"""

import contextlib
import functools
import json
import math
import pathlib
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

FORMATS = ("npz", "npy-dir", "safetensors")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
}
SHARD_BYTES = 256 * 2**20
INDEX = ".safetensors.index.json"
_BLOCK = 2**22  # values that are converted at a time
_SAFETENSORS = {
    **{"F64": "f8", "F32": "f4", "F16": "f2", "BF16": BFLOAT16, "BOOL": "?"},
    **{f"{kind.upper()}{8 * n}": f"{kind}{n}" for kind in "iu" for n in (1, 2, 4, 8)},
}


class Slot(NamedTuple):
    """What is known of an array before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def nbytes(self, dtype: np.dtype | None = None) -> int:
        """Of the whole array, as it is or in another dtype."""
        return math.prod(self.shape) * (dtype or self.dtype).itemsize


class Lazy(Mapping[str, np.ndarray]):
    """Arrays by name, each read anew when it is asked for.

    `slots` has their shapes and dtypes without reading anything.
    """

    def __init__(self, slots: dict[str, Slot]):
        self.slots = slots

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> "Lazy":
        """The same arrays, if these are not lazy yet."""
        if isinstance(arrays, Lazy):
            return arrays
        return cls(
            {
                name: Slot(
                    array.shape, array.dtype, functools.partial(np.asarray, array)
                )
                for name, array in arrays.items()
            }
        )

    def __getitem__(self, name: str) -> np.ndarray:
        return self.slots[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.slots

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    def nbytes(self, dtype: np.dtype | None = None) -> int:
        """Of all arrays together."""
        return sum(slot.nbytes(dtype) for slot in self.slots.values())


def open_arrays(path) -> Lazy:
    """The arrays of a file or directory, bfloat16 as ml_dtypes.bfloat16.

    Args:
      path: FILE.npz, FILE.safetensors, FILE.safetensors.index.json, a folder of .npy,
        or a directory with one of params.npz, params/ (of .npy) and safetensors: an
        export, or a model of Hugging Face.

    Raises:
      FileNotFoundError: if it holds no arrays, or a part of them is missing.
      ValueError: if it is damaged (also while reading an array), of another kind, or
        if a name leads out of its folder. Pickled objects are refused.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _open_directory(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Give a file or directory.")
    for end, opener in {
        ".npz": _open_npz,
        INDEX: _open_sharded,
        ".safetensors": _open_safetensors,
    }.items():
        if path.name.endswith(end):
            return opener(path)
    raise ValueError(
        f"{path} is of no kind that is known here: .npz, .safetensors, "
        f"FILE{INDEX}, or a directory of them or of .npy."
    )


def _open_directory(path: pathlib.Path) -> Lazy:
    if (path / "params.npz").is_file():
        return _open_npz(path / "params.npz")
    if (path / "params").is_dir():
        return _open_npy_dir(path / "params")
    files = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return open_arrays(files[0])
    if files:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds {names}. Give one of these files.")
    if any(path.rglob("*.npy")):
        return _open_npy_dir(path)
    raise FileNotFoundError(
        f"{path} holds no arrays: no params.npz, .npy or .safetensors (looked for "
        f"*{INDEX} too). Give the directory of an export or of a model."
    )


@contextlib.contextmanager
def _damage(path: pathlib.Path):
    """What the readers raise for a file that is not whole becomes one error."""
    try:
        yield
    except (
        *(zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError),
        *(tokenize.TokenError, SyntaxError, OverflowError),  # of NumPy's headers
        safetensors.SafetensorError,
    ) as e:
        raise ValueError(f"{path} is damaged: {e}. Make it or get it again.") from e


def _header(file: IO[bytes], size: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a .npy of `size` bytes."""
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"version {version} of .npy, known are {sorted(readers)}")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("pickled objects are not read")
    if file.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{size} bytes do not hold {dtype} {shape}")
    return shape, dtype


def _recorded(slots: dict[str, Slot], folder: pathlib.Path) -> Lazy:
    """uint16 is bfloat16 where the config.json of the folder says so."""
    about = folder / "config.json"
    if not about.is_file():
        return Lazy(slots)
    with _damage(about):
        content = json.loads(about.read_text())
    if not isinstance(content, dict) or content.get("dtype") != "bfloat16":
        return Lazy(slots)

    def view(slot: Slot) -> np.ndarray:
        return slot.read().view(BFLOAT16)

    return Lazy(
        {
            name: slot._replace(dtype=BFLOAT16, read=functools.partial(view, slot))
            if slot.dtype == np.uint16
            else slot
            for name, slot in slots.items()
        }
    )


def _open_npz(path: pathlib.Path) -> Lazy:
    def read(member: str) -> np.ndarray:
        with _damage(path), zipfile.ZipFile(path) as z, z.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    slots = {}
    with _damage(path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as file:
                shape, dtype = _header(file, info.file_size)
            name = info.filename.removesuffix(".npy")
            slots[name] = Slot(shape, dtype, functools.partial(read, info.filename))
    return _recorded(slots, path.parent)


def _open_npy_dir(folder: pathlib.Path) -> Lazy:
    def read(path: pathlib.Path) -> np.ndarray:
        with _damage(path), path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    slots = {}
    for path in sorted(folder.rglob("*.npy")):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is a link that leads out of {folder}. Remove it.")
        with _damage(path), path.open("rb") as file:
            shape, dtype = _header(file, path.stat().st_size)
        name = path.relative_to(folder).as_posix().removesuffix(".npy")
        slots[name] = Slot(shape, dtype, functools.partial(read, path))
    return _recorded(slots, folder.parent)


def _open_safetensors(path: pathlib.Path) -> Lazy:
    def read(name: str) -> np.ndarray:
        with _damage(path), safetensors.safe_open(path, framework="np") as file:
            return file.get_tensor(name)

    slots = {}
    with _damage(path), safetensors.safe_open(path, framework="np") as file:
        for name in file.keys():
            part = file.get_slice(name)
            if part.get_dtype() not in _SAFETENSORS:
                raise ValueError(f"{name} is {part.get_dtype()}, which NumPy has not")
            dtype = np.dtype(_SAFETENSORS[part.get_dtype()])
            shape = tuple(part.get_shape())
            slots[name] = Slot(shape, dtype, functools.partial(read, name))
    return Lazy(slots)


def _open_sharded(path: pathlib.Path) -> Lazy:
    with _damage(path):
        index = json.loads(path.read_text())
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict):
            raise ValueError("it has no weight_map of names to files")
    shards = {}
    for file in sorted({str(file) for file in files.values()}):
        # Both kinds of separators: the index may come from another system.
        if file in ("", ".", "..") or "/" in file or "\\" in file:
            raise ValueError(
                f"{path} names the file {file!r}, which is not in its folder. Only "
                "bare file names are read."
            )
        if not (path.parent / file).is_file():
            raise FileNotFoundError(
                f"{path.parent / file} is missing, which {path.name} names. Copy it "
                "there."
            )
        shards[file] = _open_safetensors(path.parent / file).slots
    for name, file in files.items():
        if name not in shards[file]:
            raise ValueError(f"{path} is damaged: {file} does not hold {name}.")
    return Lazy({name: shards[file][name] for name, file in files.items()})


def narrowed(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in `dtype`, rounded to nearest; the same object if it is already.

    Raises:
      ValueError: if a finite value is too large for it.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if np.any(np.isinf(out) & np.isfinite(array)):
        raise ValueError(
            f"{name} has values up to {np.nanmax(np.abs(array)):.3g}, too large for "
            f"{dtype}. Use bfloat16 or float32."
        )
    return out


def write_arrays(directory, arrays: Mapping, kind: str, dtype: str = "") -> None:
    """Writes into an existing directory; holds one array, or one shard, at a time.

    Args:
      arrays: by name, `Lazy` or not; they are read one after another in this order.
      kind: "npz": params.npz. "npy-dir": params/NAME.npy. "safetensors":
        params.safetensors, or shards and params.safetensors.index.json.
      dtype: a key of DTYPES; "" keeps the arrays' own.

    Raises:
      OSError: if it cannot be written; what is there of it is then of no use.
      ValueError: for a name that leads out of the directory, or see `narrowed`.
    """
    directory, lazy = pathlib.Path(directory), Lazy.of(arrays)
    to = DTYPES[dtype] if dtype else None
    for name in lazy:
        parts = name.replace("\\", "/").split("/")
        if not {"", ".", ".."}.isdisjoint(parts):
            raise ValueError(f"{name!r} cannot be the name of an array in a file.")
    if kind == "safetensors":
        write_safetensors(directory, lazy, dtype)
    elif kind == "npz":
        with zipfile.ZipFile(directory / "params.npz", "w") as archive:
            for name in lazy:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    _write_npy(file, name, lazy[name], to)
    elif kind == "npy-dir":
        for name in lazy:
            path = directory / "params" / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                _write_npy(file, name, lazy[name], to)
    else:
        raise ValueError(f"format {kind!r} is not known: {', '.join(FORMATS)}.")


def _write_npy(file: IO[bytes], name: str, array: np.ndarray, to: np.dtype | None):
    """As numpy.save, but converted and written block by block."""
    to = array.dtype if to is None else to
    stored = np.dtype(np.uint16) if to == BFLOAT16 else to
    descr = np.lib.format.dtype_to_descr(stored)
    about = {"descr": descr, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, about)
    flat = array.reshape(-1)
    for at in range(0, flat.size, _BLOCK):
        block = narrowed(name, flat[at : at + _BLOCK], to)
        file.write(block.view(stored).data)


def write_safetensors(
    directory,
    arrays: Mapping,
    dtype: str = "",
    shard_bytes: int = SHARD_BYTES,
    stem: str = "params",
    metadata: dict[str, str] | None = None,
) -> None:
    """STEM.safetensors, or STEM-00001-of-00002.safetensors ... and the index of these.

    A shard holds arrays of `shard_bytes` together, or a single larger one; stem "model"
    gives the names that Hugging Face looks for. Raises as `write_arrays`.
    """
    directory, lazy = pathlib.Path(directory), Lazy.of(arrays)
    to = DTYPES[dtype] if dtype else None
    shards: list[list[str]] = [[]]
    used = 0
    for name, slot in lazy.slots.items():
        if shards[-1] and used + slot.nbytes(to) > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += slot.nbytes(to)

    def own(name: str) -> np.ndarray:
        """Contiguous, and no view that would keep a whole stack of layers in memory."""
        array = lazy[name]
        array = narrowed(name, array, array.dtype if to is None else to)
        small = array.base is not None and array.nbytes <= shard_bytes
        return array.copy() if small else np.asarray(array, order="C")

    n, weight_map = len(shards), {}
    for i, names in enumerate(shards, 1):
        one = f"{stem}-{i:05d}-of-{n:05d}.safetensors"
        path = directory / (one if n > 1 else f"{stem}.safetensors")
        weight_map |= dict.fromkeys(names, path.name)
        try:
            shard = {name: own(name) for name in names}
            safetensors.numpy.save_file(shard, path, metadata)
            del shard
        except safetensors.SafetensorError as e:
            raise OSError(f"{path.name} cannot be written: {e}") from e
    if n > 1:
        index = {"metadata": {"total_size": lazy.nbytes(to)}, "weight_map": weight_map}
        (directory / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2) + "\n")

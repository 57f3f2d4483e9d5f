"""Files of T5X checkpoints: their arrays by name, and back.

Three kinds are read: the legacy single file (msgpack), T5X's own directory (msgpack
with a zarr array beside it for each large leaf), and what T5X wrote through Orbax. The
first two are written. Names are 'target/...' for parameters, 'state/...' for the
optimizer. No code in a file is run, and no array outside its directory is opened.
"""

import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import serialization, traverse_util

# What T5X writes since June 2021: bfloat16 is zarr's own. Before it was uint16.
VERSION = 3
CHUNK_BYTES = 64 * 2**20
PLACEHOLDER = "PLACEHOLDER://"
ORBAX = ("_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA")


def load(path: str | pathlib.Path) -> dict[str, Any]:
    """Name -> array, or `tensorstore.TensorStore` that is read when converted to one.

    Args:
      path: a checkpoint (file or directory), or a directory of `checkpoint_N`, of which
        the latest is taken.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged, or none of T5X.
    """
    path = _find(pathlib.Path(path))
    try:
        if path.is_dir() and not (path / "checkpoint").is_file():
            tree, version = _orbax(path), VERSION
        else:
            file = path / "checkpoint" if path.is_dir() else path
            tree = serialization.msgpack_restore(file.read_bytes())
            version = tree.get("version", VERSION) if isinstance(tree, dict) else 0
        if not isinstance(tree, dict):
            raise ValueError(f"it holds a {type(tree).__name__}, no names")
        for wrapper in ("optimizer", "_optimizer"):
            tree = tree.get(wrapper, tree)
        if "target" not in tree:
            raise ValueError(f"it has {sorted(map(str, tree))[:5]}, but no 'target'")
        wanted = {name: tree[name] for name in ("target", "state") if name in tree}
        flat = traverse_util.flatten_dict(
            wanted, sep="/", is_leaf=lambda _, x: _is_reference(x)
        )
        folder = path if path.is_dir() else path.parent
        found = {
            name: _leaf(folder, leaf, version)
            for name, leaf in flat.items()
            if leaf is not None
        }
    except (ValueError, TypeError, KeyError, AttributeError, EOFError) as e:
        raise ValueError(
            f"{path} is not a T5X checkpoint, or is damaged: {_short(e)}. Give "
            "the file or directory 'checkpoint_N' that T5X wrote."
        ) from e
    return found


def _find(path: pathlib.Path) -> pathlib.Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give a T5X checkpoint.")
    if path.is_file() or (path / "checkpoint").is_file():
        return path
    for inner in ("state", "default"):  # items of an Orbax manager
        if (path / inner).is_dir():
            return _find(path / inner)
    if any((path / name).exists() for name in ORBAX):
        return path
    steps = {
        int(step): child
        for child in path.glob("checkpoint_*")
        if (step := child.name.removeprefix("checkpoint_")).isdigit()
    }
    if not steps:
        raise FileNotFoundError(
            f"{path} holds no T5X checkpoint: neither a file 'checkpoint' nor "
            "'checkpoint_N'. Give one of these."
        )
    return _find(steps[max(steps)])


def _orbax(path: pathlib.Path) -> dict:
    """A checkpoint of today's Orbax as NumPy arrays, whatever devices wrote it."""
    path = path.absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        found: Any = checkpointer.metadata(path)
        tree = getattr(found, "item_metadata", found)
        tree = getattr(tree, "tree", tree)
        how = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            tree,
            is_leaf=lambda x: not isinstance(x, dict),
        )
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=how))


def _is_reference(x: Any) -> bool:
    return isinstance(x, dict) and {"driver", "kvstore"} <= set(x)


def _leaf(folder: pathlib.Path, leaf: Any, version: int) -> Any:
    if _is_reference(leaf):  # its path stands in it or, before 2022, beside it
        name = leaf["kvstore"].get("path") or leaf.get("path", "")
        return _open(folder, name.rstrip("/"), version)
    if isinstance(leaf, str) and leaf.startswith(PLACEHOLDER):
        return _open(folder, leaf.removeprefix(PLACEHOLDER), VERSION)
    if isinstance(leaf, str):
        raise ValueError(f"{leaf!r} is no array")
    return np.asarray(leaf)


def _open(folder: pathlib.Path, name: str, version: int) -> Any:
    if not name or "/" in name or "\\" in name or name in (".", ".."):
        raise ValueError(f"the array {name!r} would be outside of {folder}")
    kvstore = {"driver": "file", "path": f"{(folder / name).absolute()}/"}
    spec = {"driver": "zarr", "kvstore": kvstore}
    store = ts.open(spec, open=True, read=True).result()
    if version < VERSION and store.dtype.numpy_dtype == np.uint16:
        return store.read().result().view(ml_dtypes.bfloat16)
    return store


def _short(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:300]


def save(
    path: str | pathlib.Path, flat: Mapping[str, np.ndarray], *, legacy: bool = False
):
    """Writes arrays by their names so that T5X restores them.

    Args:
      path: what does not exist yet: a file if `legacy`, else a directory (or an
        empty one).

    Raises:
      FileExistsError: if it exists.
      OSError: if it cannot be written; nothing of it is left then.
    """
    path = pathlib.Path(path).absolute()
    if path.exists() and (legacy or not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists. Give a new name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(
        tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.tmp-")
    )
    try:
        leaves: dict[str, Any] = {
            name: array if legacy else _write(temporary, name, array)
            for name, array in flat.items()
        }
        tree = traverse_util.unflatten_dict(leaves, sep="/")
        content = serialization.msgpack_serialize(
            {"version": VERSION, "optimizer": tree}
        )
        (temporary / "checkpoint").write_bytes(content)
        if legacy:
            (temporary / "checkpoint").rename(path)
        else:
            temporary.chmod(0o755)
            temporary.rename(path)
    except ValueError as e:  # TensorStore's, of a full disk say
        raise OSError(f"writing {path} failed: {_short(e)}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: pathlib.Path, name: str, array: np.ndarray) -> Any:
    """Writes an array of more than one element and gives T5X's reference to it."""
    array = np.asarray(array)
    if array.size < 2:
        return array
    rows = max(1, CHUNK_BYTES // (array.nbytes // len(array)))
    spec = {
        "driver": "zarr",
        "dtype": array.dtype.name,
        "kvstore": {"driver": "file", "path": name.replace("/", ".")},
        "metadata": {
            "compressor": {"id": "gzip"},
            "shape": list(array.shape),
            "chunks": [min(rows, len(array)), *array.shape[1:]],
        },
    }
    here = {"driver": "file", "path": str(folder / spec["kvstore"]["path"])}
    store = ts.open(spec | {"kvstore": here}, create=True, open=False).result()
    store.write(array).result()
    return ts.Spec(spec).to_json()

"""Is a checkpoint what was saved?

Orbax loads a flipped byte silently: its data have no checksum of their own. So every
checkpoint's meta holds a sum for each array of the state (t5x_lite/checksums.py),
"float32 9f3a01cc", and its own SHA-256; `meta/files.sha256` has those of the small
files that Orbax keeps beside the arrays.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from t5x_lite import checksums
from t5x_lite.workdir import replace

_SEAL = "sha256"
SUMS = "checksums"
_FILES = "meta/files.sha256"


class Damaged(ValueError):
    """Something on disk is not what was written there."""


def check(expected: dict[str, str], tree, prefix: str = ""):
    """Compares arrays that were read with the checksums of those that were saved.

    An array that was converted to another dtype while it was read is passed over.
    All processes of a run must call it; all raise or none.

    Args:
      expected: of the checkpoint's meta; empty = it was written without any.
      prefix: of the names in `tree`, such as "params/".

    Raises:
      Damaged: naming the arrays.
    """
    if not expected:
        return
    bad = []
    for name, found in checksums.of_tree(tree).items():
        before = expected.get(prefix + name, "none")
        if before.split()[0] in ("none", found.split()[0]) and before != found:
            bad.append(prefix + name)
    if bad:
        raise Damaged(_listed("values are not those that were saved", bad))


def _listed(what: str, found: list[str]) -> str:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{what}: {', '.join(found[:3])}{more}"


# ---- the meta of a checkpoint -----------------------------------------------------


def sealed(meta: dict) -> dict:
    """The same with its own SHA-256."""
    return meta | {_SEAL: _digest(meta)}


def _digest(meta: dict) -> str:
    content = json.loads(json.dumps({k: v for k, v in meta.items() if k != _SEAL}))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_meta(directory: pathlib.Path) -> dict:
    """The meta of the checkpoint in `directory`.

    Raises:
      Damaged: it is not there, no JSON, or not what was written.
    """
    path = directory / "meta" / "metadata"
    try:
        meta = json.loads(path.read_text())
        if not isinstance(meta, dict) or not {"step", _SEAL} & {*meta}:
            raise ValueError("is no meta of a checkpoint")
    except (OSError, ValueError) as e:
        raise Damaged(f"meta/metadata: {first_line(e)}") from e
    # One without the other: a key itself is damaged.
    if (_SEAL in meta or SUMS in meta) and meta.get(_SEAL) != _digest(meta):
        raise Damaged("meta/metadata is not what was saved: its SHA-256 is another")
    return meta


def first_line(e: BaseException) -> str:
    """Of the message, with the type before it."""
    lines = f"{type(e).__name__}: {e}".strip().splitlines()
    return lines[0][:300]


# ---- a checkpoint on disk ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Found:
    """What `inspect` found: problems is empty if all is well.

    Attributes:
      problems: one line each, with the name of the array or file.
      arrays: how many were read.
      size: their bytes.
      summed: whether there were checksums to compare with.
    """

    problems: tuple[str, ...]
    arrays: int = 0
    size: int = 0
    summed: bool = False


def inspect(directory: pathlib.Path, tick: Callable[[int], Any] = int) -> Found:
    """Reads the checkpoint in `directory` and compares all of it with its checksums.

    By TensorStore alone, on this process alone, without any device: it does not matter
    what the run was. Holds one piece as it lies in the files, twice.

    Args:
      tick: is told of bytes as they are read.
    """
    try:
        problems = _bad_files(directory)
        expected = read_meta(directory).get(SUMS, {})
        stores = _open(directory / "state")
    except (Damaged, OSError) as e:
        return Found((str(e),))
    problems += [f"state: {name} is missing" for name in expected if name not in stores]
    size = 0
    for name, store in stores.items():
        try:
            if isinstance(store, Exception):
                raise store
            found, count = _of_stored(store, tick)
        except (ValueError, OSError, KeyError) as e:
            problems.append(f"state: {name} cannot be read: {first_line(e)}")
            continue
        size += count
        before = expected.get(name)
        if expected and found != (before or "").partition(" ")[2]:
            problems.append(f"state: {name} is not what was saved")
    return Found(tuple(problems), len(stores), size, bool(expected))


def list_files(directory: pathlib.Path):
    """Writes the SHA-256 of what Orbax keeps beside the arrays: names, shapes, marks.

    `sha256sum --check meta/files.sha256` in the checkpoint's folder reads it, too.
    """
    lines = "".join(f"{h}  {name}\n" for name, h in _beside(directory).items())
    replace(directory / _FILES, lines)


def _beside(directory: pathlib.Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(directory.rglob("*"))
        # `d` holds the arrays; the others are small.
        if path.is_file() and path.parent.name != "d" and path.name != "files.sha256"
    }


def _bad_files(directory: pathlib.Path) -> list[str]:
    path = directory / _FILES
    if not path.exists():  # killed right before it was written
        return []
    lines = (
        line.partition("  ") for line in path.read_text("utf-8", "replace").splitlines()
    )
    before = {name: digest for digest, _, name in lines}
    now = _beside(directory)
    return [
        f"{name} is {'not what was written' if name in now else 'missing'}"
        for name, digest in before.items()
        if now.get(name) != digest
    ]


def size_of(directory: pathlib.Path) -> int:
    """Bytes of the arrays of a checkpoint; 0 if that cannot be told."""
    try:
        stores = _open(directory / "state")
    except Damaged:
        return 0
    return sum(
        math.prod(s.shape) * s.dtype.numpy_dtype.itemsize
        for s in stores.values()
        if not isinstance(s, Exception)
    )


def _open(directory: pathlib.Path) -> dict[str, Any]:
    """Name -> TensorStore, or the error that opening it gave."""
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    opening = {}
    try:
        about = json.loads((directory / "_METADATA").read_text())
        for entry in about["tree_metadata"].values():
            if entry["value_metadata"]["skip_deserialize"]:
                continue
            keys = [str(k["key"]) for k in entry["key_metadata"]]
            kvstore = {"driver": "file", "path": f"{directory}/"}
            place = ".".join(keys) + "/"
            if about["use_ocdbt"]:
                base = f"file://{directory}/"
                kvstore = {"driver": "ocdbt", "base": base, "path": place}
            else:
                kvstore["path"] += place
            driver = "zarr3" if about["use_zarr3"] else "zarr"
            spec = {"driver": driver, "kvstore": kvstore}
            opening["/".join(keys)] = ts.open(spec, open=True, context=context)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise Damaged(f"state/_METADATA: {first_line(e)}") from e
    found = {}
    for name, future in opening.items():
        try:
            found[name] = future.result()
        except (ValueError, OSError, KeyError) as e:
            found[name] = e
    return found


def _of_stored(store, tick: Callable[[int], Any]) -> tuple[str, int]:
    """(sum in hex, bytes) of a stored array, one piece of the files after the other."""
    total = size = 0
    chunk = store.chunk_layout.read_chunk.shape or (0,) * store.rank
    for start, stop in _pieces(store.shape, chunk):
        place = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        piece = np.asarray(store[place].read().result())
        total += checksums.of_piece(piece, start, store.shape)
        size += piece.nbytes
        tick(piece.nbytes)
    return f"{total % 2**32:08x}", size


def _pieces(shape, piece) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, stop) of each piece of a grid."""
    ranges = [range(0, n, p or n or 1) for n, p in zip(shape, piece, strict=True)]
    for start in itertools.product(*ranges):
        ends = zip(start, piece, shape, strict=True)
        yield start, tuple(min(a + (p or n), n) for a, p, n in ends)

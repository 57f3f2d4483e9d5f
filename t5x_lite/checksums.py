"""Sums of arrays that tell when a byte of them has changed.

The sum of an array is that of all its words, each mixed with its place in the whole
array:

    sum over i of mix(word[i] XOR i * 0x9E3779B1)  mod 2^32

`mix` is the finalizer of MurmurHash3 (Austin Appleby, public domain), a bijection of 32
bits: any single damaged word changes the sum, and other damage goes unseen once in
2^32. The order of summing does not matter, so the sum is the same on every mesh, for
any number of processes, and read from files piece by piece.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

_CHUNK = 2**14  # words mixed at once, so that they stay in a core's cache


def of_tree(tree) -> dict[str, str]:
    """'params/encoder/norm/scale' -> 'float32 9f3a01cc' for every array of a tree.

    On CPUs each process sums its own shards where they lie; other devices do it in one
    program. All processes of a run must call it, and all get the same.
    """
    named = names(tree)
    leaves = [_plain(leaf) for leaf in named.values()]
    devices = {
        d.platform
        for leaf in leaves
        if isinstance(leaf, jax.Array)
        for d in leaf.sharding.device_set
    }
    sums = _by_host(leaves) if devices <= {"cpu"} else _by_device(leaves)
    dtypes = (_dtype(leaf) for leaf in named.values())
    return {
        name: f"{dtype} {int(each):08x}"
        for name, dtype, each in zip(named, dtypes, sums, strict=True)
    }


def names(tree) -> dict[str, Any]:
    """'opt/1/count' -> leaf; the names that Orbax has for them, too."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def _dtype(leaf) -> str:
    return str(leaf.dtype) if hasattr(leaf, "dtype") else str(np.asarray(leaf).dtype)


def _plain(leaf):
    """PRNG keys as their words, numbers as arrays."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


def _mixed(words, index):
    """uint32 -> uint32, of NumPy or jax; a bijection of the words at every index."""
    x = words ^ (index * np.uint32(0x9E3779B1))
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _by_host(leaves: list) -> np.ndarray:
    """uint32 [leaves]; XLA's CPU compiler would hold a copy of each array for it."""
    lead = jax.process_index() == 0
    own = np.zeros(len(leaves), np.uint64)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            for shard in leaf.addressable_shards:
                if shard.replica_id == 0:
                    start = [s.start or 0 for s in shard.index]
                    own[i] += of_piece(np.asarray(shard.data), start, leaf.shape)
        elif lead:
            own[i] = of_piece(leaf, [0] * leaf.ndim, leaf.shape)
    if jax.process_count() > 1:
        # 32 bits: jax has no others by default.
        parts = (own % 2**32).astype(np.uint32)
        own = np.asarray(multihost_utils.process_allgather(parts)).sum(0, np.uint64)
    return own % 2**32


def of_piece(piece: np.ndarray, start, shape) -> int:
    """What a piece, from `start` on, adds to the sum of an array of `shape`."""
    if not piece.size:
        return 0
    # A word is at most 4 bytes; of wider numbers there are several in the last axis.
    per = max(1, piece.dtype.itemsize // 4)
    unit = f"u{min(4, piece.dtype.itemsize)}"
    words = np.ascontiguousarray(piece).reshape(piece.shape or (1,)).view(unit)
    sizes, start = [*(shape or (1,))], [*(start or (0,))]
    sizes[-1], start[-1] = sizes[-1] * per, start[-1] * per
    # The axes from `d` on lie in the whole array as they lie here, without gaps.
    d = len(sizes) - 1
    while d and words.shape[d] == sizes[d]:
        d -= 1
    stride = math.prod(sizes[d + 1 :])
    offsets = np.array([start[d] * stride], np.uint64)
    for axis in range(d):
        places = np.arange(
            start[axis], start[axis] + words.shape[axis], dtype=np.uint64
        )
        step = np.uint64(math.prod(sizes[axis + 1 :]))
        offsets = np.add.outer(offsets, places * step).ravel()
    rows_RC = words.reshape(len(offsets), -1)
    R, C = rows_RC.shape
    counted_C = np.arange(min(C, _CHUNK), dtype=np.uint32)
    total = 0
    for r in range(0, R, max(1, _CHUNK // C)):
        block = rows_RC[r : r + max(1, _CHUNK // C)]
        for c in range(0, C, _CHUNK):
            part = block[:, c : c + _CHUNK].astype(np.uint32, copy=False)
            first = (offsets[r : r + len(block), None] + np.uint64(c)).astype(np.uint32)
            mixed = _mixed(part, first + counted_C[None, : part.shape[1]])
            total += int(mixed.sum(dtype=np.uint64))
    return total % 2**32


def _by_device(leaves: list) -> np.ndarray:
    arrays = [jnp.asarray(leaf) for leaf in leaves]
    return np.asarray(_sums(arrays, tuple(a.sharding for a in arrays)))


@functools.partial(jax.jit, static_argnums=1)
def _sums(arrays: list[jax.Array], shardings: tuple) -> jax.Array:
    """uint32 [arrays], in all processes."""
    sums = []
    for x, where in zip(arrays, shardings, strict=True):
        if where.memory_kind not in (None, "device"):  # offloaded
            x = jax.device_put(x, where.with_memory_kind("device"))
        if x.dtype == bool:
            x = x.astype(jnp.uint8)
        words = jax.lax.bitcast_convert_type(x, f"uint{min(32, 8 * x.dtype.itemsize)}")
        index, stride = jnp.zeros(words.shape, jnp.uint32), 1
        for axis in reversed(range(words.ndim)):
            places = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
            index += places * np.uint32(stride % 2**32)
            stride *= words.shape[axis]
        sums.append(jnp.sum(_mixed(words.astype(jnp.uint32), index), dtype=jnp.uint32))
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    found = jnp.stack(sums)
    if meshes:
        everywhere = NamedSharding(meshes[0], PartitionSpec())
        found = jax.lax.with_sharding_constraint(found, everywhere)
    return found

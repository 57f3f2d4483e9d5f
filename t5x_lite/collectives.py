"""The collectives of a compiled program: bytes, mesh axes, and time on the network.

Bytes are those that one device sends with the best known algorithm: of S bytes over n
devices an all-gather (S its result), a reduce-scatter and an all-to-all (S their
operand) send S (n-1)/n, an all-reduce twice that, a permutation S.
"""

import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from t5x_lite import hlo
from t5x_lite.hardware import Chip

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)


class Collective(NamedTuple):
    """One instruction.

    Attributes:
        kind: one of KINDS.
        sent: bytes that one device sends each time.
        groups: int [groups, n], partitions that take part together; of a permutation
            [pairs, 2], from and to.
        times: how often it runs in a step.
    """

    kind: str
    sent: float
    groups: np.ndarray
    times: int


def find(module: hlo.Module, devices: int) -> list[Collective]:
    """All collectives that a step runs, of more than one device each."""
    found, seen = [], set()
    for computation, i, times in module.executed():
        parts = module.within(i) if i.opcode == "fusion" else [(computation, i)]
        for inner, j in parts:
            kind = j.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if "chain_id=" in j.rest:
                # TPU: begin, parts and end of one that computation is fused into.
                key = (computation.name, j.attribute("channel_id"))
                if key in seen:
                    continue
                seen.add(key)
            size = sum(a.bytes for o in _data(j) for a in inner[o].shape)
            groups = _groups(j, devices)
            if kind == "all-reduce" and i.opcode == "fusion":
                # How TPUs write a reduce-scatter: a fusion that keeps only a shard.
                kept = sum(a.bytes for a in i.shape)
                if kept * groups.shape[1] <= size:
                    kind = "reduce-scatter"
            sent = _sent(kind, size, groups, devices)
            if sent:
                found.append(Collective(kind, sent, groups, times))
    return found


def _data(i: hlo.Instruction) -> list[str]:
    # A permutation into a given buffer also lists the buffer and the offsets.
    operands = i.operands
    return operands[:1] if i.opcode.startswith("collective-permute") else operands


def _sent(kind: str, size: float, groups: np.ndarray, devices: int) -> float:
    n = groups.shape[1]
    if kind == "collective-permute":
        moved = np.sum(groups[:, 0] != groups[:, 1])
        return size * float(moved) / devices
    if kind == "all-gather":
        return size * (n - 1)
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


_PAIR = re.compile(r"\{([\d,]+)\}")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_MESH = re.compile(r"'([^']+)'=(\d+)")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def _groups(i: hlo.Instruction, devices: int) -> np.ndarray:
    """The groups of an instruction, in any of the four ways of writing them."""
    if pairs := i.attribute("source_target_pairs"):
        return np.array([_ints(p) for p in _PAIR.findall(pairs)]).reshape(-1, 2)
    at = i.rest.find("replica_groups=")
    text = i.rest[at + len("replica_groups=") :] if at >= 0 else "{}"
    if text.startswith("mesh"):
        return _mesh_groups(text, devices)
    if text.startswith("["):
        found = _IOTA.match(text)
        assert found, text
        return _iota(text).reshape(_ints(found[1]))
    groups = _PAIR.findall(text[: text.find("}}") + 2]) if "{{" == text[:2] else []
    if not groups:
        return np.arange(devices)[None]
    return np.array([_ints(g) for g in groups])


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(text: str) -> np.ndarray:
    """'[4,4]<=[8,2]T(1,0)' or '[2,8]T(1,0)': numbers from 0 on, rearranged; flat."""
    found = _IOTA.match(text)
    assert found, text
    dims = _ints(found[2] or found[1])
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose(_ints(found[3])).ravel() if found[3] else numbers.ravel()


def _mesh_groups(text: str, devices: int) -> np.ndarray:
    """ "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", also parts "{'a':(2)2}"."""
    head, _, rest = text.partition("]")
    names, sizes = zip(*_MESH.findall(head), strict=True)
    sizes = [int(s) for s in sizes]
    axes = rest[rest.find("{") + 1 : rest.find("}")]
    ids = np.arange(devices)
    if found := re.match(r", device_ids=\(([^{]*)\) \{", rest):
        listed = found[1]
        ids = _iota(listed) if "[" in listed else np.array(_ints(listed))
    dims, moving = list(sizes), []
    for name, before, size in reversed(_AXIS.findall(axes)):
        axis = names.index(name)
        if size:  # only a part of the axis, `before` lies outside of it
            whole, inner = dims[axis], int(before) * int(size)
            dims[axis : axis + 1] = [int(before), int(size), whole // inner]
            moving = [m + 2 if m > axis else m for m in moving]
            axis += 1
        moving.insert(0, axis)
    grid = ids.reshape(dims)
    still = [d for d in range(grid.ndim) if d not in moving]
    n = math.prod(grid.shape[d] for d in moving)
    return grid.transpose([*still, *moving]).reshape(-1, n)


def axes_of(groups: np.ndarray, mesh: Mesh) -> str:
    """The mesh axes along which the members of a group differ, such as 'data+fsdp'."""
    at = np.stack(np.unravel_index(groups, mesh.devices.shape))
    differ = np.any(at != at[:, :, :1], axis=(1, 2))
    return "+".join(n for n, d in zip(mesh.axis_names, differ, strict=True) if d)


class Network:
    """Time that collectives take at least on the links of a machine.

    TPU: every dimension of a slice is a ring (a line if it does not wrap around), whose
    links carry at most their rate each way; devices of a group that are not neighbours
    share the links between them with others. Slices: what crosses them goes through
    the data-center network, the rest of the group helping. GPU: the same with hosts,
    and a switch inside. Latency is left out.
    """

    def __init__(self, chip: Chip, mesh: Mesh):
        self.chip = chip
        devices = list(mesh.devices.flat)
        if chip.is_tpu:
            self.island = np.array([getattr(d, "slice_index", 0) or 0 for d in devices])
            self.at = np.array([d.coords for d in devices])
        else:
            self.island = np.array([d.process_index for d in devices])
            self.at = np.arange(len(devices))[:, None]
        self.extent = self.at.max(axis=0) + 1

    def seconds(self, c: Collective) -> dict[str, float]:
        """Resource ('x', 'y', 'z', 'nvlink', 'network') -> seconds it is busy."""
        chip, group = self.chip, c.groups[0]
        if c.kind == "collective-permute":
            return self._permutation(c)
        islands, count = np.unique(self.island[group], return_counts=True)
        busy, n = {}, len(group)
        share = c.sent / (n - 1) * n if n > 1 else 0.0  # S, or 2 S of an all-reduce
        if len(islands) > 1:
            # Each island must take in what it does not hold, over all its members.
            inside = int(count.min())
            # What one has gathered the others need not fetch; not so of all-to-all.
            helpers = 1 if "all-to-all" in c.kind else inside
            busy["network"] = share * (1 - inside / n) / helpers / chip.dcn_bandwidth
            group = group[self.island[group] == islands[0]]
        if len(group) == 1:
            return busy
        inner = share * (len(group) - 1) / len(group)
        if not chip.is_tpu:
            return busy | {"nvlink": inner / chip.ici_bandwidth}
        rates = self._rates(group)
        hops = 1.0
        if "all-to-all" in c.kind:  # a quarter of the ring on average
            around = max(len(np.unique(self.at[group, d])) for d in range(3))
            hops = max(1.0, around / 4)
        total = sum(rates.values())
        return busy | {d: hops * inner / total for d in rates}

    def _rates(self, group: np.ndarray) -> dict[str, float]:
        """Bytes per second into a member along each dimension that the group spans."""
        chip, at = self.chip, self.at[group]
        rates = {}
        for d, name in enumerate("xyz"[: at.shape[1]]):
            places = np.unique(at[:, d])
            if len(places) == 1:
                continue
            stride = int(np.min(np.diff(places)))
            around = len(places) * stride == self.extent[d]
            wraps = chip.torus and self._wrapped(d) and around
            rates[name] = (2 if wraps else 1) * chip.ici_bandwidth / chip.links / stride
        return rates or {"core": 2 * chip.ici_bandwidth}

    def _wrapped(self, d: int) -> bool:
        """Three dimensions wrap around from a cube of 4x4x4 on, two at a full pod's."""
        cube = self.chip.links == 6
        asked = self.extent if cube else self.extent[d : d + 1]
        return bool(np.all(asked % self.chip.torus == 0))

    def _permutation(self, c: Collective) -> dict[str, float]:
        chip = self.chip
        source, target = c.groups[:, 0], c.groups[:, 1]
        if np.any(self.island[source] != self.island[target]):
            return {"network": c.sent / chip.dcn_bandwidth}
        if not chip.is_tpu:
            return {"nvlink": c.sent / chip.ici_bandwidth}
        steps = np.abs(self.at[source] - self.at[target])
        if chip.torus:
            steps = np.minimum(steps, np.abs(self.extent - steps))
        hops = np.median(steps, axis=0)
        link = chip.ici_bandwidth / chip.links
        # Half of a windowed product's permutations go the other way round.
        return {"xyz"[d]: h * c.sent / link / 2 for d, h in enumerate(hops) if h}


def summary(
    collectives: list[Collective], mesh: Mesh, chip: Chip | None
) -> tuple[list[dict], dict[str, float]]:
    """-> (rows by kind and axes: calls, bytes and seconds a step; busy seconds).

    Args:
      chip: None = no times.
    """
    network = Network(chip, mesh) if chip else None
    rows: dict[tuple[str, str], dict] = {}
    busy: dict[str, float] = {}
    for c in collectives:
        axes = axes_of(c.groups, mesh)
        row = rows.setdefault(
            (c.kind, axes),
            dict(kind=c.kind, axes=axes, calls=0, bytes=0.0, seconds=0.0),
        )
        row["calls"] += c.times
        row["bytes"] += c.times * c.sent
        if network:
            each = network.seconds(c)
            row["seconds"] += c.times * max(each.values(), default=0.0)
            for name, seconds in each.items():
                busy[name] = busy.get(name, 0.0) + c.times * seconds
    ordered = sorted(rows.values(), key=lambda r: -r["bytes"])
    return ordered, busy

"""Reads the text of a compiled program: what runs, how often, its matrix products.

XLA's own cost analysis counts the body of a loop once; here every instruction counts as
often as it runs.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BYTES = dict(
    pred=1, s4=0.5, u4=0.5, s8=1, u8=1, s16=2, u16=2, s32=4, u32=4, s64=8, u64=8,
    f16=2, bf16=2, f32=4, f64=8, c64=8, c128=16, token=0, opaque=0,
    f8e4m3fn=1, f8e5m2=1, f8e4m3=1, f8e4m3b11fnuz=1, f8e4m3fnuz=1, f8e5m2fnuz=1,
)  # fmt: skip
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{[\d,]*(?::([^}]*))?\})?")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLS = re.compile(
    r"(?:calls|to_apply|body|branch_computations|called_computations)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)


class Array(NamedTuple):
    """Shape of one array; `space` is its memory: "" the main one, "1" TPU's VMEM."""

    dtype: str
    dims: tuple[int, ...]
    space: str

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * BYTES[self.dtype]


class Instruction(NamedTuple):
    """`%name = shape opcode(argument), rest`; a tuple's shape is that of its leaves."""

    name: str
    shape: tuple[Array, ...]
    opcode: str
    argument: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.argument)

    def attribute(self, name: str) -> str:
        """What follows ` name=`, up to the next blank or comma outside of brackets."""
        at = self.rest.find(f" {name}=")
        return "" if at < 0 else _until(self.rest[at + len(name) + 2 :], ", ")

    def numbers(self, name: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", self.attribute(name))]


class Computation(dict[str, Instruction]):
    """Instructions by name, in order."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    @property
    def root(self) -> Instruction:
        return next(i for i in self.values() if i.root)

    def source(self, i: Instruction) -> Instruction:
        """What an instruction is but a view of."""
        while i.opcode in ("bitcast", "copy", "convert", "reshape", "transpose"):
            i = self[i.operands[0]]
        return i

    def users(self, name: str) -> list[Instruction]:
        """Who reads an instruction, views of it looked through."""
        found = []
        for i in self.values():
            if name in i.operands:
                viewed = i.opcode == "bitcast" and not i.root
                found += self.users(i.name) if viewed else [i]
        return found


class Module:
    """A compiled program from its text: `computations` by name, `entry`."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current = None
        for line in text.splitlines():
            if line[:1] != " ":
                if head := _HEAD.match(line):
                    current = self.computations[head[2]] = Computation(head[2])
                    self.entry = head[2] if head[1] else self.entry
            elif current is not None and (found := _LINE.match(line)):
                current[found[2]] = _instruction(found[2], found[3], bool(found[1]))

    def called(self, i: Instruction) -> list[Computation]:
        """The computations that an instruction runs, but for a loop's condition."""
        names = _NAME.findall(" ".join(_CALLS.findall(i.rest)))
        return [self.computations[n] for n in names]

    def trips(self, computation: Computation, loop: Instruction) -> int:
        """How often a loop runs: what XLA states, else from `i < n` of its condition.

        Raises:
          ValueError: neither says.
        """
        if stated := _TRIPS.search(loop.rest):
            return int(stated[1])
        condition = self.computations[_NAME.findall(loop.attribute("condition"))[0]]
        test = condition.root
        if test.opcode == "fusion":  # how CPUs write it
            test = self.called(test)[0].root
        sides = [condition[o] for o in condition.root.operands if o in condition]
        limits = [int(s.argument) for s in sides if s.opcode == "constant"]
        indices = [s for s in sides if s.opcode == "get-tuple-element"]
        if test.attribute("direction") != "LT" or len(limits) != 1 or not indices:
            raise ValueError(
                f"the loop {loop.name!r} does not say how often it runs: "
                f"{condition.root.rest[:80]!r}."
            )
        carried = computation[loop.operands[0]]
        first = computation.source(
            computation[carried.operands[indices[0].numbers("index")[0]]]
        )
        return limits[0] - (int(first.argument) if first.opcode == "constant" else 0)

    def executed(
        self, name: str = "", times: int = 1
    ) -> Iterator[tuple[Computation, Instruction, int]]:
        """(computation, instruction, how often it runs); a fusion is one instruction.

        Of a conditional the longest branch is taken.
        """
        computation = self.computations[name or self.entry]
        for i in computation.values():
            yield computation, i, times
            if i.opcode == "while":
                trips = self.trips(computation, i)
                yield from self.executed(self.called(i)[0].name, times * trips)
            elif i.opcode in ("call", "async-start"):
                yield from self.executed(self.called(i)[0].name, times)
            elif i.opcode == "conditional":
                longest = max(self.called(i), key=len)
                yield from self.executed(longest.name, times)

    def within(self, i: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """What a fusion is made of, fusions inside it too."""
        for computation in self.called(i):
            for j in computation.values():
                if j.opcode == "fusion":
                    yield from self.within(j)
                else:
                    yield computation, j


def _until(text: str, stops: str) -> str:
    """The start of `text` up to one of `stops`, or a bracket that it did not open."""
    depth = 0
    for i, c in enumerate(text):
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        if depth < 0 or (depth == 0 and c in stops):
            return text[:i]
    return text


def arrays(shape: str) -> tuple[Array, ...]:
    """'(f32[2,3]{1,0:S(1)}, s32[])' -> its leaves."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d) for d in dims.split(",") if d)
        found.append(Array(dtype, sizes, space[1] if space else ""))
    return tuple(found)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    if text.startswith("("):
        shape = "(" + _until(text[1:], "") + ")"
        rest = text[len(shape) :].lstrip()
    else:
        shape, _, rest = text.partition(" ")
    opcode, _, rest = rest.partition("(")
    argument = _until(rest, "")
    rest = rest[len(argument) + 1 :]
    return Instruction(name, arrays(shape), opcode, argument, rest, root)


def flops(module: Module) -> float:
    """Operations of all matrix products of one device, as often as they run."""
    total = 0.0
    for computation, i, times in module.executed():
        parts = module.within(i) if i.opcode == "fusion" else [(computation, i)]
        total += sum(times * _flops_of(inner, j) for inner, j in parts)
    return total


def _flops_of(computation: Computation, i: Instruction) -> float:
    if i.opcode == "dot":
        lhs = computation[i.operands[0]].shape[0].dims
        summed = math.prod(lhs[d] for d in i.numbers("lhs_contracting_dims"))
        return 2.0 * math.prod(i.shape[0].dims) * summed
    if i.opcode == "convolution":
        return _convolution(computation, i)
    return 0.0


def _convolution(computation: Computation, i: Instruction) -> float:
    """As XLA counts one: the pairs of a place in the window and a place of the output.

    The TPU compiler writes matrix products so, with batch dimensions as space.
    """
    lhs, rhs = (computation[o].shape[0].dims for o in i.operands[:2])
    out = i.shape[0].dims
    of_lhs, of_rhs, of_out = re.split("_|->", i.attribute("dim_labels"))
    window = dict(re.findall(r"(\w+)=([\w\-]+)", i.attribute("window")))

    def each(key: str, default: str, dims: int) -> list[str]:
        return window[key].split("x") if key in window else [default] * dims

    pairs = 1
    dims = sum(c.isdigit() for c in of_lhs)
    for d in range(dims):
        size, stride, spread, dilate = (
            int(each(key, "1", dims)[d])
            for key in ("size", "stride", "rhs_dilate", "lhs_dilate")
        )
        pad = int(each("pad", "0_0", dims)[d].split("_")[0])
        there = (lhs[of_lhs.index(str(d))] - 1) * dilate + 1
        outputs = np.arange(out[of_out.index(str(d))])[:, None] * stride - pad
        places = outputs + np.arange(size)[None] * spread
        pairs *= int(np.sum((places >= 0) & (places < there) & (places % dilate == 0)))
    groups = (i.numbers("batch_group_count") or [1])[0]
    batch, features = out[of_out.index("b")], out[of_out.index("f")]
    return 2.0 * pairs * batch * features * rhs[of_rhs.index("i")] / groups


# What moves no data: names, views, control, and the ends of asynchronous operations.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id "
    "replica-id opt-barrier domain while conditional call async-start".split()
)
# TPU's marks in a program; other custom calls are kernels.
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollective", "AssumeGather")
_SLICES = ("dynamic-slice", "slice", "gather", "slice-start")


def traffic(module: Module) -> float:
    """Bytes that one device moves to and from its main memory; an estimate.

    What every executed instruction reads and writes, fusions as a whole; of arrays that
    are only sliced or updated in place, the slice. Caches are left out of account.
    """
    total = 0.0
    for computation, i, times in module.executed():
        target = i.attribute("custom_call_target").strip('"')
        free = i.opcode in _FREE or target.startswith(_FREE_CALLS)
        if not free and not i.opcode.endswith(("-done", "-update")):
            total += times * _touched(module, computation, i)
    return total


def _main(shape: tuple[Array, ...]) -> float:
    return sum(a.bytes for a in shape if a.space == "")


def _touched(module: Module, computation: Computation, i: Instruction) -> float:
    operands = [computation[o].shape for o in i.operands]
    reads = [_main(shape) for shape in operands]
    if i.opcode in _SLICES:
        made = i.shape[-2] if i.opcode == "slice-start" else i.shape[0]
        return made.bytes * ((operands[0][0].space == "") + (made.space == ""))
    if i.opcode == "copy-start":  # (to, from, context)
        return _main(i.shape[:2])
    if i.opcode == "dynamic-update-slice":
        return 2 * reads[1]
    if i.opcode == "scatter":
        return 3 * reads[-1]
    if i.opcode != "fusion":
        # Some asynchronous ones list their operands among the results.
        listed = i.opcode.endswith("-start") and len(i.shape) == 2 * len(operands)
        return _main(i.shape) + (0.0 if listed else sum(reads))
    inner = module.called(i)[0]
    for j in inner.values():
        if j.opcode == "parameter" and reads[number := int(j.argument)]:
            reads[number] = min(reads[number], _read(inner, j))
    roots = [inner.root]
    if roots[0].opcode == "tuple":
        roots = [inner[o] for o in roots[0].operands]
    writes = 0.0
    for root, place in zip(roots, i.shape, strict=False):
        source = inner.source(root)
        in_place = source.opcode == "dynamic-update-slice"
        written = inner[source.operands[1]].shape[0] if in_place else place
        writes += written.bytes if place.space == "" else 0.0
    return sum(reads) + writes


def _read(inner: Computation, parameter: Instruction) -> float:
    """Bytes of a fusion's parameter that it reads."""
    total = 0.0
    for user in inner.users(parameter.name):
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += user.shape[0].bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] in (
            parameter.name,
            *(i.name for i in inner.values() if inner.source(i) is parameter),
        ):
            continue
        else:
            return math.inf
    return total

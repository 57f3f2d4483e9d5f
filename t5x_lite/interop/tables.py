"""Tables of names, read in both directions: our parameters and another code's weights.

Arrays are NumPy. A family is a literal dict of rows; see `t5.py` and `families.py`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import model, parameters
from t5x_lite.arrays import DTYPES, Lazy
from t5x_lite.config import ModelConfig


class Row(NamedTuple):
    """Where one of our parameters stands there.

    Attributes:
        theirs: their name; {i} stands for the layer.
        axes: "ours->theirs", a letter an axis; (NH) is one axis there, 1 an axis of
            length one; "" = the same array.
        part: (k, n): one of n arrays side by side along their last axis.
        roll: our row g is their row g - roll along the first axis.
    """

    theirs: str
    axes: str = ""
    part: tuple[int, int] = (0, 1)
    roll: int = 0


Rows = dict[str, Row]
FLOATS = (*DTYPES.values(), np.dtype(np.float64))
# Weights of linear layers: [inputs, outputs] here, [outputs, inputs] there.
LINEAR, HEADS_IN, HEADS_OUT = "IO->OI", "INH->(NH)I", "NHO->O(NH)"


@dataclasses.dataclass(frozen=True)
class Table:
    """All rows of a family, by our name; a config's model uses those that it has.

    Attributes:
        copies: their other names of a tied tensor -> the name of a row.
        unused: regexes of their weights that are accepted and not read.
        zeros: of their weights that are not read either, but must be zero.
        whole: are these rows of a whole model? Else the others are left out.
        left: regex of our names that have no place: drawn when such weights are read,
            left out when they are written; "" = none.
        zero: of our names: no parameters there, so that they must be zero.
    """

    rows: Mapping[str, Row]
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    whole: bool = True
    left: str = ""
    zero: tuple[str, ...] = ()


class Imported(NamedTuple):
    """What a reader of another code's checkpoint gives.

    Attributes:
        params: our flat name ('decoder/blocks/attention/query') -> array, all layers;
            may be `arrays.Lazy`.
        extras: what else was found; see the reader.
    """

    cfg: ModelConfig
    params: Mapping[str, np.ndarray]
    extras: dict


class Place(NamedTuple):
    """A row for one model: their name of each layer or the only one, shape of one."""

    row: Row
    theirs: list[str]
    shape: tuple[int, ...]


def dense(ours: str, theirs: str, axes: str = LINEAR, bias: str = "") -> Rows:
    """A weight with its bias, which differ in their names' ends."""
    outputs = {HEADS_IN: "NH->(NH)"}.get(axes, "")
    return {
        ours: Row(f"{theirs}.weight", axes),
        bias or f"{ours}_bias": Row(f"{theirs}.bias", outputs),
    }


def norm(ours: str, theirs: str) -> Rows:
    """A LayerNorm's scale and bias."""
    return {
        f"{ours}/scale": Row(f"{theirs}.weight"),
        f"{ours}/bias": Row(f"{theirs}.bias"),
    }


def under(ours: str, theirs: str, rows: Rows) -> Rows:
    """The rows with both names prefixed."""
    return {
        f"{ours}{name}": row._replace(theirs=f"{theirs}{row.theirs}")
        for name, row in rows.items()
    }


def places(table: Table, cfg: ModelConfig) -> dict[str, Place]:
    """Our name -> its place there, for every parameter of the model."""
    found, homeless = {}, []
    for ours, p in parameters.declared(model.build(cfg)).items():
        row, shape = table.rows.get(ours), p.get_value().shape
        if re.fullmatch(table.left, ours) or ours in table.zero:
            continue
        layered = "/blocks/" in ours and not cfg.share_layers
        if row is None or layered != ("{i}" in row.theirs):
            homeless.append(ours)
        elif layered:
            each = [row.theirs.format(i=i) for i in range(shape[0])]
            found[ours] = Place(row, each, shape[1:])
        else:
            found[ours] = Place(row, [row.theirs], shape)
    if homeless and table.whole:
        raise ValueError(
            f"{len(homeless)} parameter(s) of config.model have no place in this "
            f"family's weights: {homeless}. Set config.model to a shape of the family; "
            "t5x_lite/interop has its names."
        )
    return found


def to_theirs(table: Table, params: Mapping, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Our nested parameters -> their whole state dict, copies included."""

    def ours(name: str) -> np.ndarray:
        value = params
        for key in name.split("/"):
            value = value[key]
        return np.asarray(value)

    out = {name: read(ours) for name, (_, read) in recipes(table, cfg).items()}
    return out | {k: out[v] for k, v in table.copies.items() if k not in out}


Recipe = tuple[tuple[int, ...], Callable[[Callable[[str], np.ndarray]], np.ndarray]]


def recipes(table: Table, cfg: ModelConfig) -> dict[str, Recipe]:
    """Their name, without copies -> (shape, what makes the array).

    What makes it is given a function: our flat name -> array of all layers. Names that
    need the same of ours stand together.
    """
    parts: dict[str, dict[int, tuple[str, Place, int]]] = {}
    for ours, place in places(table, cfg).items():
        for i, name in enumerate(place.theirs):
            parts.setdefault(name, {})[place.row.part[0]] = ours, place, i

    def recipe(by: dict[int, tuple[str, Place, int]]) -> Recipe:
        sources = [by[k] for k in sorted(by)]

        def make(ours_of: Callable[[str], np.ndarray]) -> np.ndarray:
            each = []
            for ours, (row, theirs, shape), i in sources:
                one = ours_of(ours).reshape(len(theirs), *shape)[i]
                one = np.roll(one, -row.roll, axis=0) if row.roll else one
                each.append(_forward(one, row.axes))
            whole = np.concatenate(each, axis=-1) if len(each) > 1 else each[0]
            return np.ascontiguousarray(whole)

        _, (row, _, shape), _ = sources[0]
        return _their_shape(shape, row), make

    return {name: recipe(by) for name, by in parts.items()}


def from_theirs(
    table: Table, weights: Mapping[str, np.ndarray], cfg: ModelConfig
) -> dict:
    """Their state dict -> our nested parameters.

    Raises:
      ValueError: naming all weights that are missing, not of this model, of another
        shape, or that should be copies of another and are not.
    """
    all_places = places(table, cfg)
    check(table, all_places, weights, cfg)
    params: dict = {}
    for ours, place in all_places.items():
        *path, last = ours.split("/")
        at = params
        for key in path:
            at = at.setdefault(key, {})
        at[last] = gather(place, weights)
    return params


def gather(place: Place, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """One of our parameters, all layers, from their state dict."""
    row, theirs, shape = place
    each = [_back(_part(np.asarray(weights[n]), row), row, shape) for n in theirs]
    return np.stack(each) if "{i}" in row.theirs else each[0]


def check(
    table: Table,
    all_places: dict[str, Place],
    weights: Mapping[str, np.ndarray],
    cfg: ModelConfig,
):
    """Raises the ValueError of `from_theirs`; reads shapes, and copies and zeros."""
    problems = _problems(table, all_places, weights)
    if problems:
        one = cfg.structure != "encoder_decoder"
        last = cfg.structure in ("decoder", "prefix_lm")
        layers = f"{cfg.decoder_layers if last else cfg.encoder_layers}"
        raise ValueError(
            f"{len(problems)} weight(s) do not fit config.model ("
            f"{layers if one else f'{layers}+{cfg.decoder_layers}'} layers, gated="
            f"{cfg.gated}, tie_embeddings={cfg.tie_embeddings}, classes={cfg.classes});"
            " config.json is of another model, or config.model is not of the shape the "
            "weights were made with:\n  - " + "\n  - ".join(problems)
        )


def _problems(table: Table, all_places: dict[str, Place], weights) -> list[str]:
    wanted = {
        name: _their_shape(shape, row)
        for row, theirs, shape in all_places.values()
        for name in theirs
    }
    copies = {k: v for k, v in table.copies.items() if k not in wanted}
    zeros = {k for k in table.zeros if k in weights and k not in wanted}
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - set(weights))]
    for name in sorted(set(weights) - wanted.keys() - copies.keys() - zeros):
        if not any(re.fullmatch(pattern, name) for pattern in table.unused):
            problems.append(f"unexpected: {name}")
    for name, shape in wanted.items():
        if name in weights and (got := _shape(weights, name)) != shape:
            problems.append(f"shape {got} instead of {shape}: {name}")
        elif name in weights and (dtype := _dtype(weights, name)) not in FLOATS:
            problems.append(f"dtype {dtype}, which is no float: {name}")
    for copy, name in copies.items():
        both = [weights[n] for n in (copy, name) if n in weights]
        if not all(np.array_equal(w, both[0]) for w in both):
            problems.append(f"not equal to {name}: {copy}")
    problems += [f"not zero: {name}" for name in sorted(zeros) if weights[name].any()]
    return problems


def _shape(weights: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    return (
        weights.slots[name].shape
        if isinstance(weights, Lazy)
        else np.shape(weights[name])
    )


def _dtype(weights: Mapping[str, np.ndarray], name: str) -> np.dtype:
    held = weights.slots if isinstance(weights, Lazy) else weights
    dtype: Any = held[name].dtype
    return np.dtype(getattr(dtype, "numpy_dtype", dtype))  # tensorstore's has it


def _axes(axes: str) -> tuple[str, list[str]]:
    """ "INH->(NH)I" -> "INH", ["NH", "I"]; an axis of length one is ""."""
    ours, theirs = axes.split("->")
    groups = re.findall(r"\((\w+)\)|(\w)", theirs)
    return ours, [(many or one).replace("1", "") for many, one in groups]


def _grouped(shape, axes: str) -> tuple[int, ...]:
    if not axes:
        return tuple(shape)
    ours, groups = _axes(axes)
    sizes = dict(zip(ours, shape, strict=True))
    return tuple(math.prod(sizes[letter] for letter in group) for group in groups)


def _their_shape(shape, row: Row) -> tuple[int, ...]:
    *lead, last = _grouped(shape, row.axes)
    return (*lead, last * row.part[1])


def _forward(one: np.ndarray, axes: str) -> np.ndarray:
    if not axes:
        return one
    ours, groups = _axes(axes)
    order = [ours.index(letter) for letter in "".join(groups)]
    return one.transpose(order).reshape(_grouped(one.shape, axes))


def _part(theirs: np.ndarray, row: Row) -> np.ndarray:
    k, n = row.part
    return np.split(theirs, n, axis=-1)[k] if n > 1 else theirs


def _back(theirs: np.ndarray, row: Row, shape: tuple[int, ...]) -> np.ndarray:
    if row.axes:
        ours, groups = _axes(row.axes)
        letters = "".join(groups)
        sizes = dict(zip(ours, shape, strict=True))
        theirs = theirs.reshape([sizes[letter] for letter in letters])
        theirs = theirs.transpose([letters.index(letter) for letter in ours])
    return np.roll(theirs, row.roll, axis=0) if row.roll else theirs

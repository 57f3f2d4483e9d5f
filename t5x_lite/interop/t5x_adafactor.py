"""The state of T5X's Adafactor, to and from our optimizer's.

Both keep, of each layer's matrix, its squared gradients' means over rows and columns,
or all of them. They differ in which array is turned, and T5X takes rows and columns of
scanned layers and of kernels with heads apart by rules (the model's width is the row)
where it else takes them by size, as ours does.
"""

import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.tree_util import GetAttrKey

from t5x_lite import checkpoint, optim, parameters, state
from t5x_lite import model as model_lib
from t5x_lite.config import Config, ModelConfig
from t5x_lite.interop import tables
from t5x_lite.interop.tables import Table

SCANNED = re.compile(r"(encoder|decoder)/(layers|encoder|decoder)/(.+)")
STATES = ("v_row", "v_col", "v")
# The axis of a matrix in the model's width, which T5X's rules for scanned layers call
# its rows; all other matrices are factored by size, as ours.
WIDTH = {"query": 0, "key": 0, "value": 0, "out": 1, "wi": 0, "wi_0": 0, "wi_1": 0}
WIDTH |= {"wo": 1}
SMALLEST_FACTORED = 128


def _matrices(names: Table, cfg: ModelConfig) -> dict[str, tuple]:
    """Our name -> (their name of each layer, shape of a matrix here, turned there?)"""
    declared = parameters.declared(model_lib.build(cfg))
    found = {}
    for ours, (row, theirs, _) in tables.places(names, cfg).items():
        view = optim.view(declared[ours])
        shape = view.shape[1:] if view.stacked else view.shape
        found[ours] = (theirs, shape, row.axes in ("VE->EV", "KN->NK"))
    return found


def _factored(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The axes of v_row and v_col by size, or None: not factored (Shazeer & Stern)."""
    if len(shape) < 2 or min(shape) < SMALLEST_FACTORED:
        return None
    row, column = np.argsort(shape)
    return int(row), int(column)


def from_theirs(
    states: Mapping[str, Mapping[str, Any]],
    target: Mapping[str, Any],
    names: Table,
    cfg: ModelConfig,
) -> dict[str, dict[str, np.ndarray]]:
    """Theirs by parameter -> ours by our flat names.

    Args:
      states: their parameter -> {"v_row", "v_col", "v", "m"}.
      target: their parameter -> anything with its shape.
      names: of the unrolled model.

    Raises:
      ValueError: if theirs is not what our Adafactor would hold.
    """
    means = _means(states, target)
    opt = {}
    for ours, (theirs, shape, turned) in _matrices(names, cfg).items():
        each = [_ours(means.get(name), shape, turned, name) for name in theirs]
        stacked = "/blocks/" in ours
        opt[ours] = {
            field: np.stack([one[field] for one in each]) if stacked else each[0][field]
            for field in STATES
        }
    return opt


def _means(states: Mapping, target: Mapping) -> dict[str, dict]:
    """Unrolled name -> {"v": all} or {0: by the first axis, 1: by the last}."""
    found = {}
    for name, of_name in states.items():
        if name not in target or not set(STATES) <= set(of_name):
            raise ValueError(f"{name} has {sorted(of_name)}, not Adafactor's v_row ...")
        if np.size(of_name.get("m", 0)) > 1:
            raise ValueError(f"{name} has momentum 'm', which ours has not")
        shape = tuple(np.shape(target[name]))
        found |= _of_layers(name, shape, *(np.asarray(of_name[f]) for f in STATES))
    return found


def _of_layers(name: str, shape, row, column, v) -> dict[str, dict]:
    scanned = SCANNED.fullmatch(name)
    layers = [name]
    if scanned:
        stack, _, rest = scanned.groups()
        layers = [f"{stack}/layers_{i}/{rest}" for i in range(shape[1])]
    if v.shape == tuple(shape):
        each = np.moveaxis(v, 1, 0) if scanned else v[None]
        return {layer: {"v": one} for layer, one in zip(layers, each, strict=True)}
    width = WIDTH.get(name.split("/")[-2])
    at = _factored(shape) if len(shape) == 2 else (width, 1 - (width or 0))
    if at is None or None in at:
        raise ValueError(f"{name} {shape} has neither v nor v_row and v_col for it")
    by = dict(zip(at, (row, column), strict=True))
    # The layers stood behind the first axis of the whole array.
    first = np.moveaxis(by[0], 1, 0) if scanned else by[0]
    first, last = (a.reshape(len(layers), -1) for a in (first, by[1]))
    return {
        layer: {0: a, 1: b} for layer, a, b in zip(layers, first, last, strict=True)
    }


def _ours(mean: dict | None, shape, turned: bool, name: str) -> dict[str, np.ndarray]:
    at, none = _factored(shape), np.zeros(1, np.float32)
    if mean is None or ("v" in mean) != (at is None):
        has = "no state" if mean is None else f"another kind than ours for {shape}"
        raise ValueError(f"{name} has {has}")
    if at is None:
        v = mean["v"].T if turned else mean["v"].reshape(shape)
        return dict(v_row=none, v_col=none, v=v)
    row, column = (mean[1 - axis if turned else axis] for axis in at)
    if (row.size, column.size) != (shape[at[0]], shape[at[1]]):
        raise ValueError(f"{name} has v_row, v_col {row.shape}, {column.shape}")
    return dict(v_row=row, v_col=column, v=none)


def to_theirs(opt: Mapping, names: Table, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Ours by parameter -> theirs by 'parameter/field', unrolled."""
    found, none = {}, np.zeros(1, np.float32)
    for ours, (theirs, shape, turned) in _matrices(names, cfg).items():
        for i, name in enumerate(theirs):
            one = {f: a[i] if "/blocks/" in ours else a for f, a in opt[ours].items()}
            at = _factored(shape)
            row, column, v = none, none, one["v"]
            if at is None:
                v = v.T if turned else v
            else:
                by = dict(zip(at, (one["v_row"], one["v_col"]), strict=True))
                by = {1 - axis: a for axis, a in by.items()} if turned else by
                at = _factored(shape[::-1] if turned else shape) or (0, 1)
                row, column = by[at[0]], by[at[1]]
            fields = dict(v_row=row, v_col=column, v=v, m=none)
            found |= {f"{name}/{field}": array for field, array in fields.items()}
    return found


def optax_state(cfg: Config, opt: Mapping, step: int) -> Any:
    """The optimizer's part of our train state, of NumPy arrays, at a step.

    Args:
      opt: Adafactor's state, as `t5x.read` gives it.

    Raises:
      ValueError: if the config's optimizer is another, or has other shapes.
    """
    if cfg.optim.name != "adafactor":
        raise ValueError(
            f"config.optim.name={cfg.optim.name!r}, but the state is Adafactor's. Set "
            "it to 'adafactor', or start with a fresh state."
        )

    def fill(path, leaf):
        name, field = _place(path)
        if field == "count":
            return np.full(leaf.shape, step, leaf.dtype)
        value = np.asarray(opt[name][field], leaf.dtype)
        if value.shape != leaf.shape:
            raise ValueError(
                f"{field} of {name} is {value.shape}, but config.model has {leaf.shape}"
                ". Set config.model to the shape the state was made with."
            )
        return value

    return jax.tree.map_with_path(fill, _shapes(cfg))


def _shapes(cfg: Config) -> Any:
    net = model_lib.build(cfg.model)
    tx = optim.make(cfg, net)
    init = functools.partial(state.init, net, tx)
    return jax.eval_shape(init, jax.random.key(0))["opt"]


def opt_in(workdir, step: int = -1) -> dict[str, dict[str, np.ndarray]] | None:
    """Adafactor's state in a checkpoint of ours; None if it has another or none.

    Raises:
      FileNotFoundError, ValueError: if there is no such checkpoint.
    """
    cfg, step, meta = checkpoint.read_run(workdir, step)
    if cfg.optim.name != "adafactor" or meta.get("params_only"):
        return None
    path = pathlib.Path(workdir).absolute() / "checkpoints" / str(step) / "state"
    item = {"opt": _shapes(cfg)}
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    with ocp.PyTreeCheckpointer() as checkpointer:
        args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        return opt_of(checkpointer.restore(path, args=args)["opt"])


def opt_of(tree: Any) -> dict[str, dict[str, np.ndarray]]:
    """The inverse of `optax_state`: Adafactor's state by our flat names.

    Raises:
      ValueError: if it is another optimizer's.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, field = _place(path)
        if field in STATES:
            found.setdefault(name, {})[field] = np.asarray(leaf)
    if not found:
        raise ValueError(
            "this optimizer state is not Adafactor's, and T5X's T5 has no other. "
            "Write the parameters alone."
        )
    return found


def _place(path) -> tuple[str, str]:
    """Of a leaf of optax's state: the parameter's name, and the field."""
    fields = [key.name for key in path if isinstance(key, GetAttrKey)]
    return optim.name_of(path).removeprefix("trained/"), fields[-1] if fields else ""

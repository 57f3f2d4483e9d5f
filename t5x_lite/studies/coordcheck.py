"""Do activations keep their size when a model grows? A check of its parametrisation.

    python -m t5x_lite.study coordcheck --config=configs/gpt2.py:study
    python -m t5x_lite.study coordcheck --config=configs/gpt2.py:study --grow=depth \\
        --sizes=2,4,8,16 --config.optim.name=adafactor --config.optim.learning_rate=0.1

Trains the config's model at several widths (or depths) for a few steps, under the
standard parametrisation and under muP, and compares the mean |x| of each activation
(Yang et al. 2022, appendix D.1). What grows with width learns too fast there: its rate
will not carry over. Under muP only attention scores and logits depend on width, and
only at the start, where they shrink. Prints a table; draws coordcheck.png and writes
coordcheck.json.

The rate is the config's peak, constant; dropout is off. The base is the config's own if
it is a muP config, else the smallest size.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from t5x_lite import (
    cli,
    config,
    embeddings,
    layers,
    optim,
    parameters,
    run,
    stack,
    webpage,
)
from t5x_lite.kernels import attention
from t5x_lite.model import bind, build
from t5x_lite.model_config import ModelConfig, base_config, with_base
from t5x_lite.step import make_train_step
from t5x_lite.studies import costs, figures

PARAMETRISATIONS = {"standard": "standard", "mup": "muP"}  # and what figures call them
GROW = ("heads", "head_dim", "depth")
# What is looked at, in the order of drawing, and the class whose output it is.
OUTPUTS = {
    "input": embeddings.Inputs,
    "scores": None,
    "attention": layers.Attention,
    "feed-forward": layers.FeedForward,
    "block": stack.Block,
    "logits": None,
    "classes": embeddings.Classes,
    "replaced": None,
}
KINDS = tuple(OUTPUTS)


@dataclasses.dataclass(frozen=True)
class Flags:
    grow: str  # the width by the number of heads or by their size, or the depth
    sizes: tuple[int, ...]
    steps: int
    seeds: int

    @property
    def unit(self) -> str:
        return "layers" if self.grow == "depth" else "d_model"


class Sizes(NamedTuple):
    """[sizes]: mean |x| before and after training, and mean |x - x before|."""

    start: np.ndarray
    end: np.ndarray
    change: np.ndarray


def main(argv: list[str] | None = None):
    raw, given = cli.parse_config(
        __doc__,
        argv,
        output=("runs/coordcheck", "directory of the picture and the table"),
        grow=("heads", "width by heads or head_dim, or depth"),
        sizes=("", "widths or depths; empty = 32,64,128,256 or 2,4,8,16"),
        steps=("4", "training steps"),
        seeds=("3", "runs of each model, averaged"),
    )
    flags = parse(given)
    setup = run.Setup.of(config.freeze(raw))
    cfg, output = setup.cfg, pathlib.Path(given.output)
    output.mkdir(parents=True, exist_ok=True)
    batches = [setup.train_batches.whole(i) for i in range(flags.steps)]
    found = check(cfg, batches, flags, setup.vocab.size, say=print)
    print(table(found, flags))
    figure = draw(found, flags)
    figure.suptitle(f"{cfg.model.structure}, {cfg.optim.name}, {flags.seeds} seeds")
    means = {
        way: {
            name: {which: x.tolist() for which, x in sizes._asdict().items()}
            for name, sizes in of.items()
        }
        for way, of in found.items()
    }
    told = dataclasses.asdict(flags) | dict(config=config.to_json(cfg), means=means)
    picture = webpage.png(figure, figures.DPI)
    written = {".json": json.dumps(told, indent=1).encode(), ".png": picture}
    for suffix, content in written.items():
        temporary = output / f"coordcheck{suffix}.part"
        temporary.write_bytes(content)
        print(f"wrote {temporary.replace(output / f'coordcheck{suffix}')}")


def parse(given) -> Flags:
    """The checked flags.

    Raises:
      ValueError: naming the flag, its value and what is allowed.
    """
    if given.grow not in GROW:
        raise ValueError(f"--grow={given.grow}: allowed are {', '.join(GROW)}.")
    usual = "2,4,8,16" if given.grow == "depth" else "32,64,128,256"
    try:
        sizes = {int(size) for size in (given.sizes or usual).split(",")}
        steps, seeds = int(given.steps), int(given.seeds)
        fine = min(*sizes, steps, seeds) >= 1 and len(sizes) > 1
    except ValueError:
        fine = False
    if not fine:
        raise ValueError(
            f"--sizes={given.sizes} --steps={given.steps} --seeds={given.seeds}: whole "
            "numbers from 1 are needed, and two sizes or more, as in --sizes=32,64."
        )
    return Flags(given.grow, tuple(sorted(sizes)), steps, seeds)


def check(
    cfg: config.Config, batches: list, flags: Flags, used_ids: int, say=None
) -> dict[str, dict[str, Sizes]]:
    """Parametrisation -> activation -> its sizes.

    Args:
      batches: one for each step, as `data.pipeline.Batches` makes them.
      used_ids: vocabulary size.
      say: told about each model, or None.

    Raises:
      ValueError: the config cannot have such a size, or muP does not cover it.
    """
    # All are checked before the first is trained.
    ways = {
        way: [at_size(cfg, way, size, flags) for size in flags.sizes]
        for way in PARAMETRISATIONS
    }
    found = {}
    for way, configs in ways.items():
        rows = []
        for size, at in zip(flags.sizes, configs, strict=True):
            if say:
                say(f"{way}, {flags.unit} {size}: {flags.seeds} x {flags.steps} steps")
            row = measure(at, batches, flags.seeds, used_ids)
            if flags.grow == "depth":  # of each kind the last one can be compared
                row = {name.split()[0]: means for name, means in row.items()}
            rows.append(row)
        found[way] = {
            name: Sizes(*np.array([row[name] for row in rows]).T) for name in rows[0]
        }
    return found


def at_size(cfg: config.Config, way: str, size: int, flags: Flags) -> config.Config:
    """The config at a size, under a parametrisation whose base is the config's own, or
    the smallest size; with a constant rate and nothing random after the init.

    Raises:
      ValueError: the shape cannot have that size, or muP does not cover it.
    """
    m = cfg.model
    shape = resized(dataclasses.replace(m, parametrisation="standard"), size, flags)
    if way == "mup" and m.parametrisation == "mup":
        shape = with_base(shape, base_config(m))
    elif way == "mup":
        least = flags.sizes[0]
        deep = least if flags.grow == "depth" else 0
        shape = dataclasses.replace(shape, base_layers=deep)
        shape = with_base(shape, resized(m, least, flags))
    peak = cfg.optim.learning_rate
    if cfg.optim.schedule == "rsqrt":
        peak *= max(cfg.optim.warmup_steps, 1) ** -0.5
    plain = dict(scan=False, remat="none", attention="einsum", dtype="float32")
    optimizer = dict(
        learning_rate=peak, schedule="constant", warmup_steps=0, offload=False
    )
    return costs.resolved(
        cfg,
        {"model": dataclasses.asdict(shape) | plain | dict(dropout=0.0)}
        | {f"optim.{key}": value for key, value in optimizer.items()},
    )


def resized(m: ModelConfig, size: int, flags: Flags) -> ModelConfig:
    """The same proportions at another width, or another depth."""
    if flags.grow == "depth":
        return dataclasses.replace(m, encoder_layers=size, decoder_layers=size)
    grown = {name: getattr(m, name) * size for name in ("d_model", "d_ff", flags.grow)}
    for name, product in grown.items():
        if product % m.d_model:
            raise ValueError(
                f"--sizes: at d_model={size}, config.model.{name}={getattr(m, name)} "
                f"(at d_model={m.d_model}) is no whole number. Choose other sizes, or "
                "another --grow."
            )
    return dataclasses.replace(m, **{k: v // m.d_model for k, v in grown.items()})


def measure(
    cfg: config.Config, batches: list, seeds: int, used_ids: int
) -> dict[str, tuple[float, float, float]]:
    """Activation of the first batch -> a row of `Sizes`. All seeds run at once."""
    net = build(cfg.model)
    tx = optim.make(cfg, net)
    train_step = make_train_step(net, tx, cfg, used_ids)
    watched = {k: v for k, v in batches[0].items() if k != "fingerprint"}

    def trained(params, batches):
        state = {"params": params, "opt": tx.init(params), "step": jnp.int32(0)}
        state, _ = jax.lax.scan(train_step, state, batches)
        return state["params"]

    keys = jax.vmap(jax.random.key)(jnp.arange(seeds) + cfg.seed)
    params = jax.jit(jax.vmap(functools.partial(parameters.init_params, net)))(keys)
    look = jax.jit(jax.vmap(functools.partial(activations, net, batch=watched)))
    before = look(params)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    after = look(jax.jit(jax.vmap(trained, in_axes=(0, None)))(params, stacked))

    def size(x) -> float:
        return float(np.abs(x).mean())

    def place(name: str) -> tuple[int, int]:
        kind, number = name.split()
        return KINDS.index(kind), int(number)

    return {
        name: (
            size(before[name]),
            size(after[name]),
            size(np.asarray(after[name]) - before[name]),
        )
        for name in sorted(before, key=place)
    }


def activations(net, params: dict, batch: dict) -> dict[str, jax.Array]:
    """Activation -> its numbers, float32.

    The names count up: 'block 3' is the third block of the whole model.
    """
    found: dict[str, jax.Array] = {}

    def note(kind: str, x):
        number = next(i for i in itertools.count(1) if f"{kind} {i}" not in found)
        found[f"{kind} {number}"] = x.astype(jnp.float32)

    def watched(kind: str, call):
        def wrapper(*args, **kwargs):
            out = call(*args, **kwargs)
            note(kind, out[0] if isinstance(out, tuple) else out)
            return out

        return wrapper

    def scores(q_BTNH, k_BSNH, v_BSNH, visible_BTS, bias=None, *rest, **more):
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH)
        note("scores", scores_BNTS if bias is None else scores_BNTS + bias)
        return einsum(q_BTNH, k_BSNH, v_BSNH, visible_BTS, bias, *rest, **more)

    einsum = attention.KERNELS["einsum"]
    with contextlib.ExitStack() as patches:
        for kind, cls in OUTPUTS.items():
            if cls:
                wrapper = watched(kind, cls.__call__)
                patches.enter_context(mock.patch.object(cls, "__call__", wrapper))
        patches.enter_context(mock.patch.dict(attention.KERNELS, einsum=scores))
        bound: Any = bind(net, params)
        out = bound.outputs(batch)
        note("logits", bound.logits(out.cells_BKE))
        if hasattr(bound, "scores"):  # ELECTRA's discriminator
            stream = batch["main"]
            note("replaced", bound.scores(stream, stream["tokens"]))
    return found


def exponent(sizes, means) -> float:
    """a of means ~ sizes^a, by least squares on logarithms; nan if one is 0 or nan."""
    means = np.asarray(means, float)
    if not (np.isfinite(means).all() and (means > 0).all()):
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(means), 1)[0])


def table(found: dict[str, dict[str, Sizes]], flags: Flags) -> str:
    """Sizes after the last step, and how each grows: as size to which power?"""
    lines = []
    for way, of in found.items():
        wide = max(map(len, of))
        heads = "".join(f"{size:>9}" for size in flags.sizes)
        lines += [
            "",
            f"{PARAMETRISATIONS[way]}: mean |x| after {flags.steps} steps at "
            f"{flags.unit} = ..., and a in {flags.unit}^a",
            "of |x| at the start, |x| at the end and the change between them",
            f"{'':{wide}}{heads}{'start':>11}{'end':>8}{'change':>8}",
        ]
        for name, each in of.items():
            means = "".join(f"{x:9.3g}" for x in each.end)
            start, end, change = (exponent(flags.sizes, x) for x in each)
            lines.append(f"{name:{wide}}{means}{start:+11.2f}{end:+8.2f}{change:+8.2f}")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, Sizes]], flags: Flags) -> Figure:
    """A column of panels a parametrisation, a row each field of `Sizes`."""
    told = {
        "start": "mean |x| at the start",
        "end": f"mean |x| after {flags.steps} steps",
        "change": "mean |x - x at the start|",
    }
    figure = Figure(figsize=(8.6, 9.4), layout="constrained")
    axes = figure.subplots(3, len(found), sharex=True, sharey="row", squeeze=False)
    colours = dict(zip(KINDS, colormaps["tab10"](range(10)), strict=False))
    for (row, which), (column, way) in itertools.product(
        enumerate(told), enumerate(found)
    ):
        ax = axes[row, column]
        for name, each in found[way].items():
            kind = name.split()[0]
            alike = [n for n in found[way] if n.split()[0] == kind]
            shade = 0.35 + 0.65 * (alike.index(name) + 1) / len(alike)
            means = getattr(each, which)
            ax.plot(flags.sizes, means, "o-", color=colours[kind], alpha=shade, ms=3)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(flags.sizes, [str(size) for size in flags.sizes])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    for ax, way in zip(axes[0], found, strict=True):
        ax.set_title(PARAMETRISATIONS[way])
    for ax, label in zip(axes[:, 0], told.values(), strict=True):
        ax.set_ylabel(label)
    for ax in axes[-1]:
        ax.set_xlabel(flags.unit)
    there = {name.split()[0] for of in found.values() for name in of}
    handles = [
        Line2D([], [], color=colours[kind], marker="o", ms=3, label=kind)
        for kind in KINDS
        if kind in there
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False,
                  title="darker: later")  # fmt: skip
    return figure

"""Do activations keep their size when a model grows? A check of its parametrisation.

    python -m t5x_lite.study coordcheck --config=configs/gpt2.py:study
    python -m t5x_lite.study coordcheck --config=configs/gpt2.py:study --axis=depth \\
        --sizes=2,4,8,16 --config.optim.name=adafactor --config.optim.learning_rate=0.1

Trains the config's model at several widths (or depths) for a few steps, under the
standard parametrisation and under muP, and compares the mean |x| of each activation
(Yang et al. 2022, appendix D.1). What grows with width learns too fast there: its rate
will not carry over. Under muP only attention scores and logits change with width, and
only at the start, where they shrink. Draws coordcheck.png (mean |x|) and change.png
(mean |x - x at the start|), writes coordcheck.json and prints both as a table.

The rate is the config's peak, constant; dropout is off. The base is the config's own if
it is a muP config, else the smallest size.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from t5x_lite import cli, config, embeddings, layers, optim, parameters, run, stack
from t5x_lite.kernels import attention
from t5x_lite.model import bind, build
from t5x_lite.model_config import ModelConfig, base_config, problems, with_base
from t5x_lite.step import make_train_step

PARAMETRISATIONS = ("standard", "mup")
# What is looked at, in the order of drawing, and the class whose output it is.
OUTPUTS = {
    "input": embeddings.Inputs,
    "attention": layers.Attention,
    "feed-forward": layers.FeedForward,
    "block": stack.Block,
    "classes": embeddings.Classes,
}
KINDS = ("input", "scores", "attention", "feed-forward", "block", "logits", "classes",
         "replaced")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Flags:
    axis: str  # width or depth
    sizes: tuple[int, ...]
    steps: int
    seeds: int
    grow: str  # heads or head_dim


class Sizes(NamedTuple):
    """Means over all numbers of an activation, and over seeds.

    value, change: [sizes, 1 + steps] of |x| and |x - x before training|.
    """

    value: np.ndarray
    change: np.ndarray


def main(argv: list[str] | None = None):
    raw, given = cli.parse_config(
        __doc__,
        argv,
        output=("runs/coordcheck", "directory of the pictures and the table"),
        axis=("width", "what grows: width or depth"),
        sizes=("", "widths or depths; empty = 32,64,128,256 or 2,4,8,16"),
        steps=("4", "training steps"),
        seeds=("3", "runs of each model, averaged"),
        grow=("heads", "what makes attention wider: heads or head_dim"),
    )
    flags = parse(given)
    cfg = config.freeze(raw)
    pictures = pathlib.Path(given.output)
    pictures.mkdir(parents=True, exist_ok=True)
    setup = run.Setup.of(dataclasses.replace(cfg, model=base_config(cfg.model)))
    # The ids and entities that the setup counted belong to the muP model too.
    counted = {
        name: getattr(setup.cfg.model, name) for name in ("vocab_size", "entities")
    }
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **counted))
    batches = [setup.train_batches.whole(i) for i in range(flags.steps)]
    found = check(cfg, batches, flags, setup.vocab.size, say=print)
    print(table(found, flags))
    heading = f"{cfg.model.structure}, {cfg.optim.name}, means of {flags.seeds} seeds"
    draw(found, flags, "value", heading, pictures / "coordcheck.png")
    draw(found, flags, "change", heading, pictures / "change.png")
    means = {
        way: {
            name: {k: mean.tolist() for k, mean in each._asdict().items()}
            for name, each in of.items()
        }
        for way, of in found.items()
    }
    report = dataclasses.asdict(flags) | dict(config=config.to_json(cfg), means=means)
    (pictures / "coordcheck.json").write_text(json.dumps(report, indent=1))
    print(f"wrote coordcheck.png, change.png and coordcheck.json to {pictures}")


def parse(given) -> Flags:
    """The checked flags.

    Raises:
      ValueError: naming the flag, its value and what is allowed.
    """
    for name, allowed in (
        ("axis", ("width", "depth")),
        ("grow", ("heads", "head_dim")),
    ):
        if getattr(given, name) not in allowed:
            raise ValueError(
                f"--{name}={getattr(given, name)!r}: allowed are "
                f"{' and '.join(allowed)}."
            )
    usual = "32,64,128,256" if given.axis == "width" else "2,4,8,16"
    try:
        sizes = tuple(int(size) for size in (given.sizes or usual).split(","))
        steps, seeds = int(given.steps), int(given.seeds)
    except ValueError as e:
        raise ValueError(
            f"--sizes={given.sizes} --steps={given.steps} --seeds={given.seeds}: write "
            "whole numbers, sizes with commas between them."
        ) from e
    if min(*sizes, steps, seeds) < 1 or len(set(sizes)) < 2:
        raise ValueError(
            f"--sizes={given.sizes} --steps={steps} --seeds={seeds}: each must be at "
            "least 1, and there must be two sizes or more."
        )
    return Flags(given.axis, tuple(sorted(set(sizes))), steps, seeds, given.grow)


def check(
    cfg: config.Config, batches: list, flags: Flags, used_ids: int, say=None
) -> dict[str, dict[str, Sizes]]:
    """Parametrisation -> activation -> its sizes.

    Args:
      batches: one for each step, as `data.pipeline.Batches` makes them.
      used_ids: vocabulary size.
      say: told about each model, or None.
    """
    found = {}
    for way in PARAMETRISATIONS:
        rows = []
        for size in flags.sizes:
            if say:
                say(f"{way}, {flags.axis} {size}: {flags.seeds} x {flags.steps} steps")
            model = parametrised(cfg.model, way, size, flags)
            rows.append(measure(still(cfg, model), batches, flags, used_ids))
        # Deeper models have more activations of a kind; the last ones compare.
        if flags.axis == "depth":
            rows = [
                {name.split(" ")[0]: of for name, of in row.items()} for row in rows
            ]
        found[way] = {
            name: Sizes(*np.stack([row[name] for row in rows], axis=1))
            for name in rows[0]
        }
    return found


def still(cfg: config.Config, model: ModelConfig) -> config.Config:
    """A config with this model, a constant rate and nothing random after the init."""
    o = cfg.optim
    peak = o.learning_rate
    if o.schedule == "rsqrt":
        peak *= max(o.warmup_steps, 1) ** -0.5
    model = dataclasses.replace(
        model,
        dropout=0.0,
        scan=False,
        remat="none",
        attention="einsum",
        dtype="float32",
    )
    o = dataclasses.replace(
        o, learning_rate=peak, schedule="constant", warmup_steps=0, offload=False
    )
    return dataclasses.replace(cfg, model=model, optim=o)


def parametrised(m: ModelConfig, way: str, size: int, flags: Flags) -> ModelConfig:
    """The model at a size, under a parametrisation whose base is the config's own, or
    the smallest size.

    Raises:
      ValueError: the shape cannot have that size, or muP does not cover it.
    """
    plain = dataclasses.replace(m, parametrisation="standard")
    own_base = m.parametrisation == "mup"
    at = resized(plain, size, flags)
    if way == "standard":
        return at
    base = base_config(m) if own_base else resized(plain, flags.sizes[0], flags)
    if not own_base:
        deep = flags.sizes[0] if flags.axis == "depth" else 0
        at = dataclasses.replace(at, base_layers=deep)
    at = with_base(at, base)
    if wrong := list(problems(at)):
        raise ValueError("\n  - ".join([f"at {flags.axis} {size}:", *wrong]))
    return at


def resized(m: ModelConfig, size: int, flags: Flags) -> ModelConfig:
    """The same proportions at another width, or another depth."""
    if flags.axis == "depth":
        return dataclasses.replace(m, encoder_layers=size, decoder_layers=size)
    grown = ("d_model", "d_ff", flags.grow)
    for name in grown:
        if getattr(m, name) * size % m.d_model:
            raise ValueError(
                f"--sizes: at d_model={size}, config.model.{name}={getattr(m, name)} "
                f"(at d_model={m.d_model}) is no whole number. Choose other sizes, or "
                "--grow=heads or head_dim."
            )
    return dataclasses.replace(
        m, **{name: getattr(m, name) * size // m.d_model for name in grown}
    )


def measure(
    cfg: config.Config, batches: list, flags: Flags, used_ids: int
) -> dict[str, np.ndarray]:
    """Activation -> [2, 1 + steps], means over seeds of |x| and |x - x at the start|.

    All on the first batch. The whole is one compiled program, all seeds at once.
    """
    net = build(cfg.model)
    tx = optim.make(cfg, net)
    train_step = make_train_step(net, tx, cfg, used_ids)
    watched = {k: v for k, v in batches[0].items() if k != "fingerprint"}

    def trained(key, batches):
        params = parameters.init_params(net, key)
        state = {"params": params, "opt": tx.init(params), "step": jnp.int32(0)}
        shapes = jax.eval_shape(lambda: activations(net, params, watched))
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def step(carry, batch):
            state, start = carry
            now = activations(net, state["params"], watched)
            first = state["step"] == 0
            start = jax.tree.map(lambda a, b: jnp.where(first, a, b), now, start)
            means = {
                name: jnp.stack(
                    [jnp.mean(jnp.abs(x)), jnp.mean(jnp.abs(x - start[name]))]
                )
                for name, x in now.items()
            }
            return (train_step(state, batch)[0], start), means

        return jax.lax.scan(step, (state, start), batches)[1]

    keys = jax.vmap(jax.random.key)(jnp.arange(flags.seeds) + cfg.seed)
    # One more than is trained on: each is looked at before.
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches, batches[-1])
    found = jax.jit(jax.vmap(trained, in_axes=(0, None)))(keys, stacked)

    def place(name: str) -> tuple[int, int]:
        kind, _, number = name.partition(" ")
        return KINDS.index(kind), int(number)

    return {
        name: np.asarray(found[name]).mean(axis=0).T
        for name in sorted(found, key=place)
    }


def activations(net, params: dict, batch: dict) -> dict[str, jax.Array]:
    """Activation -> its numbers, in the order of computation.

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

    def scores(q_BTNH, k_BSNH, v_BSNH, visible_BTS, bias=None, *rest):
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH)
        note("scores", scores_BNTS if bias is None else scores_BNTS + bias)
        return attention.einsum(q_BTNH, k_BSNH, v_BSNH, visible_BTS, bias, *rest)

    with contextlib.ExitStack() as patches:
        for kind, cls in OUTPUTS.items():
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
    unit = "d_model" if flags.axis == "width" else "layers"
    lines = []
    for way, of in found.items():
        wide = max(map(len, of))
        heads = "".join(f"{size:>9}" for size in flags.sizes)
        lines += [
            "",
            f"{way}: mean |x| after {flags.steps} steps at {unit} = ..., and a in "
            f"{unit}^a, of |x| at the start, |x| at the end and the change",
            f"{'':{wide}}{heads}{'start':>11}{'end':>8}{'change':>8}",
        ]
        for name, s in of.items():
            means = "".join(f"{x:9.3g}" for x in s.value[:, -1])
            powers = (s.value[:, 0], s.value[:, -1], s.change[:, -1])
            start, end, change = (exponent(flags.sizes, p) for p in powers)
            lines.append(f"{name:{wide}}{means}{start:+11.2f}{end:+8.2f}{change:+8.2f}")
    return "\n".join(lines)


def draw(found, flags: Flags, which: str, heading: str, path: pathlib.Path):
    """One row of panels a parametrisation, one column a step.

    Args:
      which: field of `Sizes`.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    first = 0 if which == "value" else 1
    measure = "mean |x|" if which == "value" else "mean |x - x at the start|"
    panels = min(5, flags.steps + 1 - first)
    steps = sorted({round(s) for s in np.linspace(first, flags.steps, panels)})
    ways = list(found)
    colours = dict(zip(KINDS, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(
        len(ways),
        len(steps),
        figsize=(2.6 * len(steps) + 2.2, 2.9 * len(ways) + 0.6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    grid = itertools.product(enumerate(ways), enumerate(steps))
    for (row, way), (column, step) in grid:
        ax, of = axes[row, column], found[way]
        for name, s in of.items():
            kind = name.split(" ")[0]
            alike = [n for n in of if n.split(" ")[0] == kind]
            shade = 0.35 + 0.65 * (alike.index(name) + 1) / len(alike)
            means = getattr(s, which)[:, step]
            ax.plot(flags.sizes, means, "o-", color=colours[kind], alpha=shade,
                    markersize=3, linewidth=1.2)  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(flags.sizes, [str(size) for size in flags.sizes])
        ax.minorticks_off()
        ax.grid(True, alpha=0.3)
        if row == 0:
            ax.set_title("at the start" if step == 0 else f"after step {step}")
        if column == 0:
            ax.set_ylabel(f"{'muP' if way == 'mup' else way}\n{measure}")
        if row == len(ways) - 1:
            ax.set_xlabel("d_model" if flags.axis == "width" else "layers")
    kinds = {name.split(" ")[0] for of in found.values() for name in of}
    handles = [
        Line2D([], [], color=colours[kind], marker="o", markersize=3, label=kind)
        for kind in KINDS
        if kind in kinds
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False,
                  title="darker: later")  # fmt: skip
    figure.suptitle(heading)
    figure.savefig(path, dpi=110)
    plt.close(figure)

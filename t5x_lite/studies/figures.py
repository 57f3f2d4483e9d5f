"""The figures of a study, each by a function that returns it or why there is none."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import cm, colors, ticker
from matplotlib.figure import Figure

from t5x_lite.studies import analysis, compare
from t5x_lite.studies.analysis import Analysis, Cell, Family

DPI = 110
MOST_RANKED = 40
LOSS = "loss (nats per predicted token)"
FLOPS = "training compute (FLOPs)"


def parameters(found: Analysis) -> str:
    """Label of an axis of N."""
    return f"parameters N ({found.settings.parameters.replace('_', '-')})"


def loss_label(found: Analysis) -> str:
    """Label of an axis of the study's loss."""
    kind = found.settings.loss
    if kind == "train":
        return f"training {LOSS}"
    scores = {r.score for c in found.cells for r in c.records}
    own = scores == {"loss"} if kind == "heldout" else False
    name = "" if own else (", ".join(sorted(scores)) if kind == "heldout" else kind)
    name = name.removesuffix("loss").replace("_", " ").strip()
    return f"{name}: held-out {'' if 'error' in name else LOSS}".strip(" :")


def _panels(names: Sequence[str], width=5.6, height=4.2, most=2):
    """(figure, one axes for each name, titled unless there is but one)."""
    columns = min(most, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(axes, names, strict=False):
        ax.grid(alpha=0.25, linewidth=0.6)
        if len(names) > 1:
            ax.set_title(name, fontsize=10)
    return figure, axes[: len(names)]


def _scale(values) -> tuple[Any, bool]:
    """Colours on a log scale, and whether there is anything to tell apart."""
    low, high = float(np.min(values)), float(np.max(values))
    varies = high > 1.05 * low
    norm = colors.LogNorm(low, high if varies else 2 * low)
    return cm.ScalarMappable(norm, "viridis"), varies


def _log(axis):
    """A log axis whose labels keep clear of each other over a short range too."""
    low, high = sorted(axis.get_view_interval())
    if high < 150 * low:
        steps = (1.0, 2.0, 5.0) if high < 30 * low else (1.0, 3.0)
        axis.set_major_locator(ticker.LogLocator(subs=steps))
    axis.set_major_formatter(ticker.FuncFormatter(_short))
    axis.set_minor_formatter(ticker.NullFormatter())


def _short(value: float, _) -> str:
    """50000 -> '50k', 2e6 -> '2M', 5e12 -> '5e12'."""
    for size, unit in ((1e9, ""), (1e6, "M"), (1e3, "k"), (1.0, "")):
        if value >= size:
            whole = unit or size == 1.0
            return (
                f"{value / size:g}{unit}" if whole else f"{value:.0e}".replace("+", "")
            )
    return f"{value:g}"


def curves(found: Analysis) -> Figure | str:
    """Training loss of every cell against its compute, seeds averaged."""
    groups = {f.name: f.cells for f in found.families}
    if len(groups) > 6:
        groups = {"objectives differ, so do their losses": found.cells}
    groups = {
        name: [c for c in group if len(c.curve()) > 1] for name, group in groups.items()
    }
    groups = {name: group for name, group in groups.items() if group}
    if not groups:
        return "No run has noted its training loss."
    figure, axes = _panels(list(groups))
    scale, varies = _scale([c.N for group in groups.values() for c in group])
    by_size = varies and max(map(len, groups.values())) > 8
    for ax, group in zip(axes, groups.values(), strict=True):
        tops, bottoms = [], []
        for k, cell in enumerate(group):
            curve = np.asarray(cell.curve(), float)
            flops = curve[:, 0] / curve[-1, 0] * cell.C
            style = dict(color=scale.to_rgba(cell.N)) if by_size else {}
            if not by_size:
                style = dict(
                    color=f"C{k % 10}", linestyle=("-", "--", ":")[k // 10 % 3]
                )
            ax.plot(flops, curve[:, 1], linewidth=1.1, label=cell.name, **style)
            tops.append(curve[len(curve) // 12 :, 1].max())
            bottoms.append(curve[:, 1].min())
        room = 0.05 * (max(tops) - min(bottoms))
        ax.set(xlabel=FLOPS, ylabel=f"training {LOSS}")
        ax.set_xscale("log")
        if room:
            ax.set_ylim(min(bottoms) - room, max(tops) + room)
        if not by_size:
            ax.legend(
                fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0),
                borderaxespad=0.2,
            )  # fmt: skip
    ends = np.array([ax.get_xlim() for ax in axes])
    for ax in axes:
        ax.set_xlim(ends.min(), ends.max())
        _log(ax.xaxis)
    if by_size:
        bar = figure.colorbar(scale, ax=list(axes), label=parameters(found))
        _log(bar.ax.yaxis)
    return figure


def isoflop(found: Analysis) -> Figure | str:
    """Loss against size at equal compute, with the parabolas of approach 2."""
    drawn = [f for f in found.families if f.slices and f.scales]
    if not drawn:
        return "No family has a budget with three sizes that differ enough for a law."
    figure, axes = _panels([f.name for f in drawn])
    for ax, f in zip(axes, drawn, strict=True):
        scale, _ = _scale([s.C for s in f.slices])
        for s in f.slices:
            color = scale.to_rgba(s.C)
            N, loss = f.points.N[s.rows], f.points.loss[s.rows]
            spread = [_spread(f.cells[i]) for i in s.rows]
            ax.errorbar(N, loss, spread, fmt="o", ms=4, color=color, capsize=2, lw=0.8)
            x = np.linspace(np.log(N.min()), np.log(N.max()), 60)
            ax.plot(
                np.exp(x),
                np.polyval(s.parabola, x - s.middle),
                color=color,
                linewidth=1.2,
                label=f"{s.C:.2g}" + ("" if s.N else " (no minimum)"),
            )
            if s.N:
                bottom = np.polyval(s.parabola, np.log(s.N) - s.middle)
                ax.plot(s.N, bottom, "*", ms=11, color=color, mec="black", mew=0.6)
        ax.set(xlabel=parameters(found), ylabel=loss_label(found))
        ax.set_xscale("log")
        _log(ax.xaxis)
        ax.legend(
            title="FLOPs", fontsize=7, title_fontsize=8, loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )  # fmt: skip
    return figure


def _spread(cell: Cell) -> float:
    return float(cell.losses.std(ddof=1)) if len(cell.losses) > 1 else 0.0


def frontier(found: Analysis, f: Family) -> Figure | str:
    """Compute-optimal N, D and loss against the budget, with their intervals."""
    powers = [p for p in (*f.isoflop.values(), *f.approach1.values())]
    single = f.kaplan["C"]
    if isinstance(f.law, str) and all(isinstance(p, str) for p in (*powers, single)):
        return "No law could be fitted, so there is no frontier."
    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    axes = figure.subplots(1, 3)
    least, most = float(f.points.C.min()), float(f.points.C.max())
    C = np.geomspace(least, max(10 * most, *found.settings.budgets, 0.0), 40)
    law = analysis.frontier(f, C)
    for ax, name, label in zip(
        axes,
        ("N", "D", "loss"),
        (parameters(found), "training tokens D", loss_label(found)),
        strict=True,
    ):
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set(xscale="log", xlabel=FLOPS, ylabel=label)
        ax.axvline(most, color="grey", linewidth=0.9, linestyle=":")
        ax.text(
            most, 0.97, " largest run", color="grey", fontsize=8, va="top",
            transform=ax.get_xaxis_transform(),
        )  # fmt: skip
        if law is not None and np.isfinite(law[name][0]).all():
            middle, low, high = law[name]
            low, high = np.maximum(low, middle / 1e3), np.minimum(high, middle * 1e3)
            ax.plot(C, middle, color="C0", label="L(N, D), approach 3")
            level = f"{100 * found.settings.level:g} % interval"
            ax.fill_between(C, low, high, color="C0", alpha=0.2, lw=0, label=level)
            _limits(ax, name, f, middle, low, high)
        if name != "loss":
            ax.set_yscale("log")
            _optima(ax, f, name)
    ax = axes[2]
    losses = [c.mean for c in f.cells]
    ax.plot([c.C for c in f.cells], losses, ".", color="grey", label="cells", zorder=1)
    if not isinstance(single, str):
        ax.plot(
            C, [single.at(c).value for c in C], "--", color="C3", label="power of C"
        )
    _held(ax, f)
    for ax in axes:
        ax.legend(fontsize=8)
        _log(ax.xaxis)
    for ax in axes[:2]:
        _log(ax.yaxis)
    figure.suptitle(f"Compute-optimal frontier, {f.name}", fontsize=11)
    return figure


def _limits(ax, name, f: Family, middle, low, high):
    """Keeps an interval that the data do not bound from setting the scale."""
    shown = np.concatenate([middle, getattr(f.points, name)])
    bottom, top = float(shown.min()), float(shown.max())
    if name != "loss":
        ax.set_ylim(bottom / 3, top * 3)
        return
    span = top - bottom
    least, most = min(float(low.min()), bottom), max(float(high.max()), top)
    ax.set_ylim(
        max(bottom - span / 2, least - span / 20, 0.0),
        min(top + span / 2, most + span / 20),
    )


def _optima(ax, f: Family, name: str):
    good = [s for s in f.slices if s.N is not None]
    if good:
        ax.plot(
            [s.C for s in good], [getattr(s, name) for s in good],
            "*", ms=10, color="C1", mec="black", mew=0.5,
            label="parabolas, approach 2",
        )  # fmt: skip
    if f.envelope is not None:
        some = slice(None, None, max(1, len(f.envelope.C) // 40))
        y = getattr(f.envelope, name)
        ax.plot(
            f.envelope.C[some], y[some], "x", ms=4, color="C2",
            label="envelope, approach 1",
        )  # fmt: skip


def _held(ax, f: Family):
    """The cells of the largest budget and what the others had predicted."""
    for k, h in enumerate(f.leave_out.held):
        first = k == 0
        ax.plot(
            h.C, h.measured, "o", ms=6, mfc="none", mec="black",
            label="left out, measured" if first else None,
        )  # fmt: skip
        if h.law is None or not np.isfinite([h.law.low, h.law.high]).all():
            continue
        # Beside the point, so that both can be seen.
        down, up = h.law.value - h.law.low, h.law.high - h.law.value
        ax.errorbar(
            h.C * 1.25 ** (1 + k), h.law.value, [[max(0, down)], [max(0, up)]],
            fmt="d", ms=4, color="C4", capsize=2, lw=1,
            label="left out, predicted" if first else None,
        )  # fmt: skip


def depth_and_width(cell: Cell) -> tuple[str, int] | None:
    """('4' or '4+2' layers, d_model) by the config."""
    model = cell.records[0].config.get("model", {})
    if "d_model" not in model:
        return None
    encoder, decoder = model.get("encoder_layers"), model.get("decoder_layers")
    structure = model.get("structure")
    if structure == "encoder_decoder":
        depth = f"{encoder}+{decoder}"
    else:
        depth = encoder if structure in ("encoder", "permuted") else decoder
    if depth is None:
        return None
    return str(depth), int(model["d_model"])


def heat_map(found: Analysis) -> Figure | str:
    """Loss by depth and width; the lowest where several cells share them."""
    drawn = []
    for f in found.families:
        shapes = [depth_and_width(c) for c in f.cells]
        known = {s for s in shapes if s is not None}
        if len({d for d, _ in known}) > 1 or len({w for _, w in known}) > 1:
            drawn.append((f, shapes))
    if not drawn:
        return "Depth and width are the same in all cells."
    figure, axes = _panels([f.name for f, _ in drawn])
    for ax, (f, shapes) in zip(axes, drawn, strict=True):
        shared = _heat(ax, f.cells, shapes)
        ax.set(xlabel="width d_model", ylabel="layers")
        title = f.name if len(drawn) > 1 else ""
        if shared > 1:
            title += f"\nthe lowest of up to {shared} cells each"
        ax.set_title(title.strip(), fontsize=10)
        figure.colorbar(ax.images[0], ax=ax, label=loss_label(found))
    return figure


def _heat(ax, chosen: Sequence[Cell], shapes) -> int:
    known = [s for s in shapes if s is not None]
    depths = sorted({d for d, _ in known}, key=lambda d: [int(x) for x in d.split("+")])
    widths = sorted({w for _, w in known})
    table: dict[tuple[int, int], list[Cell]] = {}
    for cell, shape in zip(chosen, shapes, strict=True):
        if shape is not None:
            place = depths.index(shape[0]), widths.index(shape[1])
            table.setdefault(place, []).append(cell)
    losses = np.full((len(depths), len(widths)), np.nan)
    for place, there in table.items():
        losses[place] = min(c.mean for c in there)
    image = ax.imshow(losses, cmap="viridis_r", origin="lower", aspect="auto")
    middle = np.nanmean([image.norm.vmin, image.norm.vmax])
    for (row, column), there in table.items():
        best = min(there, key=lambda c: c.mean)
        spread = f"\n±{_spread(best):.3f}" if len(best.losses) > 1 else ""
        ax.text(
            column, row, f"{best.mean:.3f}{spread}", ha="center", va="center",
            fontsize=8, color="white" if best.mean > middle else "black",
        )  # fmt: skip
    ax.set_xticks(range(len(widths)), widths)
    ax.set_yticks(range(len(depths)), depths)
    ax.grid(False)
    return max(map(len, table.values()))


def ranking(found: Analysis) -> Figure | str:
    """All cells in order of their loss, each with the interval of its own seeds."""
    groups = {c.name: c.cells for c in found.comparisons}
    if not groups:
        return "There are no two cells whose losses can be compared."
    names = list(groups)
    most = max(min(len(g), MOST_RANKED) for g in groups.values())
    height = 1.3 + 0.24 * most
    wide = 7.5 if len(names) == 1 else 6.0
    figure, axes = _panels(names, width=wide, height=height)
    for ax, name in zip(axes, names, strict=True):
        ordered = groups[name]
        shown = ordered[:MOST_RANKED]
        for y, cell in enumerate(shown):
            n = len(cell.losses)
            ax.plot(cell.losses, [y] * n, "|", color="grey", ms=7)
            reach = compare.reach(cell.losses, found.settings.level) or None
            ax.errorbar(cell.mean, y, xerr=reach, fmt="o", ms=4, color="C0", capsize=2)
        ax.set_yticks(range(len(shown)), [c.name for c in shown], fontsize=7)
        ax.set_ylim(len(shown) - 0.4, -0.6)
        ax.set_xlabel(loss_label(found))
        if len(shown) < len(ordered):
            text = f"the best {len(shown)} of {len(ordered)} cells"
            ax.set_title(f"{name}: {text}" if len(names) > 1 else text, fontsize=10)
    return figure


def all_figures(found: Analysis) -> dict[str, tuple[str, str, Figure | str]]:
    """File name -> (heading, what it shows, the figure or why there is none)."""
    percent = f"{100 * found.settings.level:g} %"
    told: dict[str, tuple[str, str, Figure | str]] = {
        "cells": (
            "Cells compared",
            f"Mean of the seeds (dot) with its {percent} interval by the cell's own "
            "seeds (Student's t; none of one seed); ticks are single runs.",
            ranking(found),
        ),
        "curves": (
            "Training curves",
            "Seeds averaged. A rate that still falls makes the middle of a run look "
            "worse than a run that ends there.",
            curves(found),
        ),
        "depth_width": (
            "Depth × width",
            "Mean of the seeds, ± their standard deviation.",
            heat_map(found),
        ),
        "isoflop": (
            "Equal compute",
            "A colour is a budget, a star the minimum of its parabola; bars are the "
            "standard deviation of seeds.",
            isoflop(found),
        ),
    }
    for k, f in enumerate(f for f in found.families if f.scales):
        told[f"frontier_{k + 1}" if k else "frontier"] = (
            f"Compute-optimal frontier, {f.name}",
            f"Bands are {percent} intervals of L(N, D); right of the dotted line "
            "nothing was run. Left out: the largest budget, predicted from the others; "
            "the predictions are drawn to the right of where they belong, each a bit "
            "further, so that they can be seen apart.",
            frontier(found, f),
        )
    if not any(f.scales for f in found.families):
        why = "All cells of a family have about the same size or budget."
        told["frontier"] = ("Compute-optimal frontier", "", why)
    return told

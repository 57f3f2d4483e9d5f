"""Draws held-out loss against learning rate for each width, and prints the best rates.

python -m configs.studies.mup_transfer.figure RESULTS.jsonl
"""

import pathlib
import statistics
import sys

from matplotlib import colormaps
from matplotlib.figure import Figure

from configs.studies.mup_transfer.config import BASE_WIDTH, RATES, WIDTHS
from t5x_lite import webpage
from t5x_lite.studies import figures, records

WAYS = {"standard": "standard", "mup": f"muP, base {BASE_WIDTH}"}


def losses(results: str) -> dict[tuple[str, int], dict[float, list[float]]]:
    """(parametrisation, d_model) -> rate -> held-out losses, a seed each."""
    found = {}
    for record in records.read(results):
        model, rate = record.config["model"], record.config["optim"]["learning_rate"]
        width = model["d_model"]
        # At the base both are the same model.
        ways = WAYS if width == BASE_WIDTH else [model["parametrisation"]]
        for way in ways:
            of = found.setdefault((way, width), {})
            of.setdefault(rate, []).append(record.loss())
    return found


def main(results: str):
    found = losses(results)
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    panels = figure.subplots(1, len(WAYS), sharey=True)
    colours = colormaps["viridis"]([0.1, 0.45, 0.8])
    print("| parametrisation | d_model | best rate | its loss | at the base's best |")
    print("| --- | --- | --- | --- | --- |")
    for ax, (way, title) in zip(panels, WAYS.items(), strict=True):
        means = {
            width: {
                r: statistics.mean(of) for r, of in sorted(found[way, width].items())
            }
            for width in WIDTHS
        }
        base_best = min(means[BASE_WIDTH], key=means[BASE_WIDTH].__getitem__)
        for width, colour in zip(WIDTHS, colours, strict=True):
            of = means[width]
            best = min(of, key=of.__getitem__)
            print(
                f"| {way} | {width} | {best:.4f} | {of[best]:.3f} | "
                f"{of[base_best]:.3f} |"
            )
            spread = [[min(found[way, width][r]) for r in of]]
            spread.append([max(found[way, width][r]) for r in of])
            ax.plot(of.keys(), of.values(), "o-", color=colour, ms=3,
                    label=f"d_model {width}")  # fmt: skip
            ax.fill_between(list(of), *spread, color=colour, alpha=0.2, linewidth=0)
            ax.plot(best, of[best], "*", color=colour, ms=12)
        ax.axvline(base_best, color="grey", linewidth=0.8, linestyle=":")
        ax.set(title=title, xlabel="peak learning rate", xscale="log")
        ax.set_xticks(RATES, [f"2^{k}" for k in range(-10, -3)])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss (nats per byte)")
    panels[0].legend(frameon=False)
    path = pathlib.Path(__file__).with_name("figure.png")
    path.write_bytes(webpage.png(figure, figures.DPI))


if __name__ == "__main__":
    main(*sys.argv[1:])

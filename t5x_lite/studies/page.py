"""The report of a study: PNG figures, and one HTML page that holds everything."""

import html
import json
import pathlib
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5x_lite import webpage
from t5x_lite.studies import compare, figures, summary
from t5x_lite.studies.analysis import Analysis, Cell
from t5x_lite.studies.commands_fit import flat
from t5x_lite.studies.commands_fit import text as laws_as_text

PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$style
.is::marker { content: "✓ "; color: #1a7f37; }
.not::marker { content: "✗ "; color: #b3261e; }
</style>
<h1>$title</h1>
<p class="note">$about</p>
<nav>$contents</nav>
<h2 id="summary">In words</h2>
$notes
<h3>What the data support</h3>
$supported
<h3>What they do not</h3>
$unsupported
$figures
<h2 id="laws">Scaling laws</h2>
<pre>$laws</pre>
<h2 id="cells">Cells</h2>
<p class="note">$cells_note</p>
<div class="scroll">$cells</div>
<h2 id="configs">Configs</h2>
<p>What all cells share:</p>
<details><summary>common config</summary><pre>$common</pre></details>
$configs
</html>
""")


def write(found: Analysis, output: pathlib.Path, name: str) -> pathlib.Path:
    """Writes OUTPUT/figures/*.png and OUTPUT/report.html; returns the page's path."""
    folder = output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    blocks, contents = [], [("summary", "In words")]
    for key, (heading, caption, figure) in figures.all_figures(found).items():
        contents.append((key, heading))
        path = folder / f"{key}.png"
        if isinstance(figure, str):
            path.unlink(missing_ok=True)  # one of an earlier report would mislead
            body = f'<p class="note">No figure: {html.escape(figure)}</p>'
        else:
            path.write_bytes(webpage.png(figure, figures.DPI))
            body = webpage.image(path.read_bytes(), heading, caption)
        blocks.append(f'<h2 id="{key}">{html.escape(heading)}</h2>\n{body}')
    contents += [("laws", "Laws"), ("cells", "Cells"), ("configs", "Configs")]
    page = PAGE.substitute(
        title=html.escape(f"Study {name}"),
        style=webpage.STYLE,
        about=html.escape(_about(found)),
        contents=" ".join(
            f'<a href="#{key}">{html.escape(label)}</a>' for key, label in contents
        ),
        figures="\n".join(blocks),
        laws=html.escape("\n".join(laws_as_text(found)).strip()),
        cells_note=html.escape(
            f"{figures.loss_label(found).capitalize()}: mean of the seeds ± their "
            "standard deviation. Better than: cells whose loss is higher by more than "
            "noise explains (Games-Howell; of more than "
            f"{compare.MOST_PAIRED} cells the best one alone is compared). A cell's "
            "name leads to its config."
        ),
        cells=cells_table(found),
        **_sentences(found),
        **_configs(found.cells),
    )
    path = output / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _about(found: Analysis) -> str:
    revisions = sorted({r.revision for c in found.cells for r in c.records})
    return (
        f"Loss: {figures.loss_label(found)}. {figures.parameters(found)}. "
        f"Intervals of {100 * found.settings.level:g} %. Code at "
        f"{', '.join(revisions)}."
    )


def _sentences(found: Analysis) -> dict[str, str]:
    told = summary.summarise(found)

    def listed(kind: str, empty: str) -> str:
        items = [s.text for s in told if s.kind == kind] or [empty]
        # A sentence may start with the name of a coefficient.
        return (
            "<ul>"
            + "".join(
                f'<li class="{kind}">{html.escape(t[:1].upper() + t[1:])}</li>\n'
                for t in items
            )
            + "</ul>"
        )

    return dict(
        notes="".join(
            f"<p>{html.escape(s.text)}</p>" for s in told if s.kind == "note"
        ),
        supported=listed("is", "Nothing beyond the numbers themselves."),
        unsupported=listed("not", "Nothing was found wanting."),
    )


def cells_table(found: Analysis) -> str:
    """One row for each cell, in the study's order."""
    head = (
        "cell", "seeds", "loss", "parameters N", "embedding", "tokens D", "D / N",
        "FLOPs C", "minutes a run", "better than",
    )  # fmt: skip
    rows = []
    for k, cell in enumerate(found.cells):
        n = len(cell.losses)
        spread = f" ± {cell.losses.std(ddof=1):.4f}" if n > 1 else ""
        embedding = cell.records[0].parameters.get("embedding")
        minutes = np.mean([r.wall_seconds for r in cell.records]) / 60
        values = (
            f"{n}",
            f"{cell.mean:.4f}{spread}",
            f"{cell.N:,.0f}",
            "" if embedding is None else f"{embedding:,}",
            f"{cell.D:.3g}",
            f"{cell.D / cell.N:.3g}",
            f"{cell.C:.3g}",
            f"{minutes:.2f}",
            html.escape(_better_than(found, cell)),
        )
        link = f'<a href="#config-{k}">{html.escape(cell.name)}</a>'
        rows.append(f"<tr><td>{link}</td>" + "".join(f"<td>{v}</td>" for v in values))
    titles = "".join(f"<th>{h}</th>" for h in head)
    return f"<table><tr>{titles}</tr>\n" + "</tr>\n".join(rows) + "</tr></table>"


def _better_than(found: Analysis, cell: Cell) -> str:
    for compared in found.comparisons:
        if cell in compared.cells:
            worse = compared.worse_than(cell)
            if len(worse) == len(compared.cells) - 1:
                return "all others"
            return ", ".join(c.name for c in worse)
    return ""


def _configs(chosen: Sequence[Cell]) -> dict[str, str]:
    """The common part of all configs, and for each cell what it adds."""
    configs = [flat(cell.records[0].config) for cell in chosen]
    shared = {
        k: v
        for k, v in configs[0].items()
        if all(c.get(k, _NONE) == v for c in configs)
    }
    shared.pop("seed", None)
    blocks = []
    for k, (cell, config) in enumerate(zip(chosen, configs, strict=True)):
        own = {key: v for key, v in config.items() if key not in shared}
        seeds = ", ".join(str(r.seed) for r in cell.records)
        own["seed"] = f"each of {seeds}" if len(cell.records) > 1 else seeds
        blocks.append(
            f'<div id="config-{k}"><h3>{html.escape(cell.name)}</h3>\n'
            f"<pre>{html.escape(_lines(own))}</pre></div>"
        )
    return dict(common=html.escape(_lines(shared)), configs="\n".join(blocks))


_NONE = object()


def _lines(flat: dict[str, Any]) -> str:
    return "\n".join(
        f"config.{key} = {v if key == 'seed' else json.dumps(v)}"
        for key, v in sorted(flat.items())
    )

"""The page of a run: one HTML file that needs nothing beside it."""

import html
import json
import pathlib
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from t5x_lite import checkpoint, heads, metrics, probe, run, samples, webpage
from t5x_lite.model import trained_stream

PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$style
.example { border-left: 3px solid #ddd; padding: 0 0.8rem; margin: 1rem 0;
  overflow-wrap: anywhere; }
.read { color: #555; }
mark { color: #000; border-radius: 3px; padding: 0 1px; }
rt { color: #a33; font-size: 0.65em; }
.written { white-space: pre-wrap; }
.scale span { padding: 0 0.6rem; }
</style>
<h1>$title</h1>
<p class="note">$about</p>
<nav>$contents</nav>
$blocks
</html>
""")
# Not drawn by themselves: parts of others, or of no use as a curve.
_OTHER = ("step", "loss", "fingerprint", "epoch", "unigram_loss", "heldout_tokens")
_COLOURS = colormaps["RdYlGn"]


def write(path: pathlib.Path, title: str, about: str, sections: Iterable) -> None:
    """Writes the page in one stroke.

    Args:
      sections: (key, heading, HTML); those without HTML are left out.
    """
    kept = [s for s in sections if s[2]]
    text = PAGE.substitute(
        title=html.escape(title),
        style=webpage.STYLE,
        about=html.escape(about),
        contents=" ".join(
            f'<a href="#{key}">{html.escape(name)}</a>' for key, name, _ in kept
        ),
        blocks="\n".join(
            f'<h2 id="{key}">{html.escape(name)}</h2>\n{body}'
            for key, name, body in kept
        ),
    )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def probed(workdir: pathlib.Path, step: int, text: str, count: int):
    """-> (a sentence about the checkpoint, sections that ask the model).

    Args:
      text: whose attention is drawn; "" = the beginning of the first held-out example.
      count: held-out examples.
    """
    try:
        cfg, net, params, at, _ = checkpoint.load_run(workdir, step)
    except FileNotFoundError as e:
        return f"No examples: {e}", []
    try:
        setup = run.Setup.of(run.alone(cfg), jax.devices()[:1])
    except (OSError, ValueError) as e:
        return f"No examples, the data are not here: {e}", []
    whole = next(iter(setup.heldouts.values()))[0]
    batch = probe.rows_of(whole, count * heads.rows(cfg.model))
    words, sections = setup.vocab, []
    stream = batch[trained_stream(cfg.model)]
    if stream["weights"].any():
        body = _or_why(lambda: examples(probe.predictions(net, params, batch, words)))
        sections.append(("examples", "Examples", body))
    body = _or_why(lambda: _written(samples.samples(setup, params, count)))
    sections.append(("samples", "What the model writes", body))
    one = probe.of_text(text, cfg.model, words) if text else probe.beginning(batch)

    def maps() -> str:
        found = probe.attention_maps(net, params, one)
        return attention(found, probe.names(one, found, words))

    sections.append(("attention", "Attention", _or_why(maps)))
    return f"Examples and attention are of the checkpoint of step {at}.", sections


def _or_why(make: Callable[[], str]) -> str:
    """The HTML of a part, or why this model refuses it: the rest of the page stands."""
    try:
        return make()
    except ValueError as e:
        why = html.escape(str(e))
        return f'<p class="note">Cannot be shown of this model: {why}</p>'


def _written(lines: list[str]) -> str:
    text = html.escape("\n".join(lines))
    return f'<pre class="written">{text}</pre>' if lines else ""


def curves(rows: Sequence[dict[str, Any]]) -> str:
    """Loss against the step, then every other number of metrics.jsonl, small."""
    if not rows:
        return '<p class="note">metrics.jsonl holds no line yet.</p>'
    named: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and np.isfinite(value):
                named.setdefault(name, []).append((row["step"], value))
    losses = Figure(figsize=(9, 4.5), layout="constrained")
    axes = losses.subplots()
    for name in named:
        if name in ("loss", "unigram_loss") or name.startswith("heldout_loss"):
            style = dict(loss="-", unigram_loss="--").get(name, "o-")
            label = dict(loss="training", unigram_loss="unigram, held-out")
            faint: dict[str, Any] = {}
            if name == "loss":
                faint = dict(alpha=0.5, linewidth=0.8)
            x, y = zip(*named[name], strict=True)
            axes.plot(x, y, style, label=label.get(name, name), **faint)
    axes.set(xlabel="step", ylabel="loss (nats)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    shown = webpage.image(webpage.png(losses), "Loss", "Loss of training and held-out.")
    others = [n for n in named if n not in _OTHER and not n.startswith("heldout_loss")]
    if not others:
        return shown
    columns = 3
    lines = -(-len(others) // columns)
    small = Figure(figsize=(10, 1.9 * lines), layout="constrained")
    grid = small.subplots(lines, columns, squeeze=False)
    for cell, name in zip(grid.flat, others, strict=False):
        x, y = zip(*named[name], strict=True)
        cell.plot(x, y, ".-" if len(x) < 30 else "-", linewidth=0.8)
        cell.set_title(name, fontsize=9)
        cell.tick_params(labelsize=7)
    for cell in list(grid.flat)[len(others) :]:
        cell.set_axis_off()
    caption = "All other numbers of metrics.jsonl against the step."
    return shown + webpage.image(webpage.png(small), "Other numbers", caption)


def evaluations(workdir: pathlib.Path) -> str:
    """A table of every evaluation-*.json, and of forgetting.json."""
    tables = []
    for path in sorted(workdir.glob("evaluation-*.json")):
        found = flat(_json(path))
        rows = [(name, _number(value)) for name, value in found.items()]
        tables.append(f"<h3>{html.escape(path.name)}</h3>\n")
        tables.append(webpage.table(("metric", "value"), rows))
    path = workdir / "forgetting.json"
    if path.is_file():
        rows = [(n, _number(v)) for n, v in flat(_json(path)).items()]
        tables.append("<h3>Held-out losses of the stages before</h3>\n")
        tables.append(webpage.table(("stage", "value"), rows))
    return "".join(tables)


def examples(probed: Sequence[probe.Probed]) -> str:
    """What is read in grey; what is predicted on the colour of its probability.

    A token that the model would have chosen is shown with the probability it has. Any
    other is shown on the colour of the truth's, with the model's choice above it.
    """
    scale = "".join(
        f'<span style="background:{_colour(p)}">{p:g}</span>'
        for p in (0.01, 0.1, 0.25, 0.5, 0.75, 1.0)
    )
    parts = [
        '<p class="note">Held-out examples. Coloured: predicted tokens, by the '
        "probability that the model gives to the true one, which is shown; above it "
        "what the model holds most likely, if that is another. Each is predicted from "
        f'the true text that it may see.</p><p class="scale">{scale}</p>'
    ]
    for one in probed:
        parts.append('<div class="example">')
        if one.read:
            text = "".join(piece.text for piece in one.read)
            parts.append(f'<p class="read">{html.escape(text)}</p>')
        parts.append(f"<p>{''.join(map(_piece, one.predicted))}</p></div>")
    return "\n".join(parts)


def _piece(piece: probe.Piece) -> str:
    text = html.escape(piece.text)
    if not piece.guess:
        return f'<span class="read">{text}</span>'
    told = f"{piece.text!r}: {piece.p:.3f}; {piece.guess!r}: {piece.p_guess:.3f}"
    if piece.guess != piece.text:
        text = f"<ruby>{text}<rt>{html.escape(piece.guess)}</rt></ruby>"
    return (
        f'<mark style="background:{_colour(piece.p)}" title="{html.escape(told)}">'
        f"{text}</mark>"
    )


def _colour(p: float) -> str:
    red, green, blue, _ = (int(255 * x) for x in _COLOURS(0.15 + 0.7 * p))
    return f"rgb({red},{green},{blue})"


def attention(maps: dict[str, np.ndarray], names: dict[str, tuple[list, list]]) -> str:
    """For each kind: the last layer's mean over heads with words, then all heads.

    Args:
      maps: kind -> weights [L, N, T, S].
      names: kind -> (names of the queries, names of the keys).
    """
    shown = []
    for kind, weights_LNTS in maps.items():
        L, N = weights_LNTS.shape[:2]
        queries, keys = names[kind]
        T, S = len(queries), len(keys)
        size = min(12.0, 2.0 + 0.25 * max(T, S))
        large = Figure(figsize=(size, size * (T + 4) / (S + 4)), layout="constrained")
        axes = large.subplots()
        axes.imshow(weights_LNTS[-1, :, :T, :S].mean(axis=0), cmap="Blues", vmin=0)
        axes.set_xticks(range(S), keys, rotation=90, fontsize=8)
        axes.set_yticks(range(T), queries, fontsize=8)
        axes.set(xlabel="sees", ylabel="token")
        caption = f"{kind}: the last of {L} layers, mean of its {N} heads."
        shown.append(webpage.image(webpage.png(large), kind, caption))
        heads = Figure(figsize=(1.3 * N + 0.8, 1.3 * L + 0.4), layout="constrained")
        grid = heads.subplots(L, N, squeeze=False)
        for layer in range(L):
            for head in range(N):
                cell = grid[layer, head]
                cell.imshow(weights_LNTS[layer, head, :T, :S], cmap="Blues", vmin=0)
                cell.set_xticks([])
                cell.set_yticks([])
                if layer == 0:
                    cell.set_title(f"head {head}", fontsize=7)
            grid[layer, 0].set_ylabel(f"layer {layer}", fontsize=7)
        caption = f"{kind}: every head of every layer."
        shown.append(webpage.image(webpage.png(heads), f"{kind}, heads", caption))
    return "\n".join(shown)


def settings(config: dict, workdir: pathlib.Path) -> str:
    """The config, flat; what the run was on; its starts."""
    lines = "\n".join(
        f"config.{name} = {json.dumps(value)}"
        for name, value in sorted(flat(config.get("config", config), ".").items())
    )
    shown = [f"<details open><summary>config</summary><pre>{html.escape(lines)}</pre>"]
    shown.append("</details>")
    path = workdir / "summary.txt"
    if path.is_file():
        text = html.escape(path.read_text(encoding="utf-8", errors="replace"))
        shown.append("<details><summary>parameters, mesh, packages, command</summary>")
        shown.append(f"<pre>{text}</pre></details>")
    return "\n".join(shown)


def environment(config: dict, sessions: Sequence[dict]) -> str:
    """Versions and devices of the last start, and a line for each start."""
    versions = config.get("versions", {})
    rows = [(k, str(v)) for k, v in versions.items()]
    rows.append(("devices", ", ".join(map(str, config.get("devices", [])))))
    shown = webpage.table(("what", "is"), rows)
    if sessions:
        keys = list(dict.fromkeys(k for s in sessions for k in flat(s)))
        lines = [[_number(flat(s).get(k, "")) for k in keys] for s in sessions]
        shown += "<h3>Starts</h3>\n" + webpage.table(keys, lines)
    return shown


def flat(tree: Any, between: str = " / ", before: str = "") -> dict[str, Any]:
    """Nested dicts -> names joined with `between`; lists stay."""
    if not isinstance(tree, dict):
        return {before: tree}
    found = {}
    for key, value in tree.items():
        name = f"{before}{between}{key}" if before else str(key)
        found |= flat(value, between, name)
    return found


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        return {"cannot be read": str(e)}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rows_of(workdir: pathlib.Path) -> tuple[list[dict], list[dict]]:
    """(metrics.jsonl, sessions.jsonl) of a run."""
    read = metrics.read
    return read(workdir / "metrics.jsonl"), read(workdir / "sessions.jsonl")

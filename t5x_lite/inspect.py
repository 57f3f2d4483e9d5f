"""Prints a few examples of a config the way a person reads them.

    python -m t5x_lite.inspect --config=configs/bert.py:study
    python -m t5x_lite.inspect --config=configs/xlnet.py:study --cells=48 --png=see.png
    python -m t5x_lite.inspect --dump=runs/demo/nonfinite-1234.npz

For each example: what every stream reads, what is predicted where (and with what
weight), and who sees whom: a row is a query, a column a key, # = visible. Takes every
--config.a.b=VALUE that training takes; nothing is trained.

With --dump instead of --config: the batch at which a run stopped, as text, and the
gradient of each parameter.
"""

import pathlib
import sys

import numpy as np

from t5x_lite import cli, config, dumps, model, run
from t5x_lite.visibility import Cells, visible
from t5x_lite.vocab import Vocab


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if any(arg.partition("=")[0] == "--dump" for arg in argv):
        parser = cli.parser(__doc__)
        parser.add_argument("--dump", help="the .npz that the error of a run names")
        path = pathlib.Path(parser.parse_args(argv).dump)
        for line in dumps.show(path):
            print(line)
        return
    raw, flags = cli.parse_config(
        __doc__,
        argv,
        examples=("2", "examples to print"),
        step=("0", "step whose batch is shown"),
        cells=("32", "cells of a stream to show in the matrix; 0 = none"),
        png=("", "also draw the first example's matrices into this file"),
    )
    numbers = {}
    for name in ("examples", "step", "cells"):
        value = getattr(flags, name)
        if not value.isdecimal():
            raise ValueError(f"--{name}={value}: a number of 0 or more is needed.")
        numbers[name] = int(value)
    setup = run.Setup.of(config.freeze(raw))
    batch = setup.train_batches[numbers["step"]]
    print(setup.headline())
    for b in range(min(numbers["examples"], len(setup.train_batches.rows))):
        one = {
            name: {k: v[b : b + 1] for k, v in stream.items()}
            for name, stream in batch.items()
            if isinstance(stream, dict)
        }
        print(f"\n===== example {b}, fingerprint {int(batch['fingerprint'][b]):08x}")
        for name, stream in one.items():
            describe(name, stream, setup.vocab)
        matrices = masks(setup.cfg.model, one)
        memory = one["memory"]["tokens"].shape[1] if "memory" in one else 0
        if numbers["cells"]:
            for title, seen in matrices.items():
                hidden = memory if title.startswith("main") else 0
                print(f"\n{title}: who sees whom")
                if hidden:
                    print(f"  (and the {hidden} cells of memory, which all see)")
                seen = seen[:, hidden:]
                print("\n".join(as_text(seen, one, numbers["cells"])))
        if flags.png and b == 0:
            draw(matrices, pathlib.Path(flags.png))
            print(f"\nwrote {flags.png}")


def describe(name: str, stream: dict, words: Vocab):
    """What a stream reads, and what is predicted of it."""
    tokens_T = stream["tokens"][0]
    read = " ".join(words.label(int(i)) for i in tokens_T if i != words.pad_id)
    print(f"{name} reads {len(tokens_T)} cells: {read}")
    if (
        len(np.unique(stream["positions"][0])) != len(tokens_T)
        or stream["positions"][0, 0]
    ):
        print(f"  positions {stream['positions'][0].tolist()}")
    if "labels" in stream:
        print(f"  label of the example: {int(stream['labels'][0])}")
    if "targets" not in stream:
        return
    T = len(tokens_T)
    targets_K, weights_K = stream["targets"][0], stream["weights"][0]
    places_K = stream["places"][0] if "places" in stream else np.arange(len(targets_K))
    shown = []
    for place, target, weight in zip(places_K, targets_K, weights_K, strict=True):
        if weight:
            at = f"{place}" if place < T else f"stream {place // T + 1}:{place % T}"
            factor = "" if weight == 1 else f" x{weight:.2f}"
            shown.append(f"{at}→{words.label(int(target))}{factor}")
    print(f"  predicts {len(shown)}: {' '.join(shown)}")


def masks(cfg: config.ModelConfig, one: dict) -> dict[str, np.ndarray]:
    """Title -> bool [queries, keys], made by the very code that the model runs."""
    found = {}
    for name, stream in one.items():
        before = one.get("memory") if name == "main" else None
        found[name] = np.asarray(model.context(cfg, stream, before).visible_BTS)[0]
        if cfg.window and name == "main":
            banded = model.context(cfg, stream, before).banded_BTS
            found[f"{name}, banded layers"] = np.asarray(banded)[0]
    if "decoder" in one:
        cells = (Cells.of(one[n]) for n in ("decoder", "encoder"))
        query, key = cells
        query = query._replace(ranks_BT=np.maximum(query.ranks_BT, 0))
        found["decoder to encoder"] = np.asarray(visible(query, key))[0]
    return found


def as_text(seen: np.ndarray, one: dict, cells: int) -> list[str]:
    """The first `cells` queries of every stream, and as many keys."""
    queries, keys = seen.shape
    lines = []
    lengths = [s["tokens"].shape[1] for s in one.values() if "targets" in s]
    T = lengths[0] if queries % lengths[0] == 0 else queries
    for start in range(0, queries, T):
        if start:
            lines.append(f"  query stream {start // T}:")
        for q in range(start, start + min(T, cells)):
            row = "".join("#" if x else "." for x in seen[q, :cells])
            lines.append(f"  {q - start:4} {row}{' …' if keys > cells else ''}")
        if cells < T:
            lines.append("       …")
    return lines


def draw(matrices: dict[str, np.ndarray], path: pathlib.Path):
    """The matrices as one picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(matrices), figsize=(5 * len(matrices), 5), layout="constrained"
    )
    for ax, (title, seen) in zip(np.atleast_1d(axes), matrices.items(), strict=True):
        ax.imshow(seen, cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
        ax.set(title=title, xlabel="key", ylabel="query")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    cli.run(main)

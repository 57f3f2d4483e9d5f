"""One page of a run to look at: curves, metrics, examples, attention, config.

    python -m t5x_lite.report --workdir=runs/demo
    python -m t5x_lite.report --workdir=runs/demo --text="It is a truth acknowledged" \\
        --output=demo.html

Writes WORKDIR/report.html, a single file that opens anywhere: loss curves and every
other number of metrics.jsonl, evaluations, held-out examples coloured by the
probabilities of what is predicted, what the model writes, attention maps of a sentence,
config and environment. Of a run whose data are not here, or that has no checkpoint yet,
the page holds the rest and says so.
"""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys

import jax
import numpy as np
from flax import nnx

from t5x_lite import __version__, cli, metrics, parameters, state
from t5x_lite.config import Config

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorstore",
    "sentencepiece",
    "ml-collections",
    "numpy",
)


def main(argv: list[str] | None = None):
    parser = cli.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of a training run")
    parser.add_argument("--output", help="page to write; default WORKDIR/report.html")
    parser.add_argument("--text", default="", help="sentence of the attention maps")
    parser.add_argument("--step", type=int, default=-1, help="checkpoint; -1 = latest")
    parser.add_argument("--examples", type=int, default=4, help="held-out examples")
    flags = parser.parse_args(argv)
    workdir = pathlib.Path(flags.workdir)
    if flags.examples < 1:
        raise ValueError(f"--examples={flags.examples} must be at least 1.")
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(
            f"--workdir={flags.workdir} has no config.json: it is not the directory of "
            "a training run. Give that of `train --workdir`."
        )
    output = pathlib.Path(flags.output or workdir / "report.html")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"--output={output}: its directory is missing.")
    write_page(workdir, output, flags)
    print(f"report  {output}")


def write_page(workdir: pathlib.Path, output: pathlib.Path, flags):
    from t5x_lite import report_page as page  # draws: not for every start

    about = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    rows, sessions = page.rows_of(workdir)
    asked, probed = page.probed(workdir, flags.step, flags.text, flags.examples)
    versions = about.get("versions", {})
    last = rows[-1]["step"] if rows else 0
    page.write(
        output,
        f"Run {workdir.absolute().name}",
        f"Step {last}; code at {versions.get('git', 'unknown')}. {asked}",
        [
            ("curves", "Curves", page.curves(rows)),
            ("metrics", "Evaluations", page.evaluations(workdir)),
            *probed,
            ("config", "Config", page.settings(about, workdir)),
            ("environment", "Environment", page.environment(about, sessions)),
        ],
    )


def git_revision() -> str:
    """Revision of the source tree, '+' if it has changes, 'unknown' outside git."""
    here = pathlib.Path(__file__).parent

    def git(*args):
        return subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, check=False
        )

    try:
        revision = git("rev-parse", "--short=12", "HEAD")
    except FileNotFoundError:
        return "unknown"
    if revision.returncode:
        return "unknown"
    dirty = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return revision.stdout.strip() + ("+" if dirty else "")


def versions() -> dict[str, str]:
    """Versions a result depends on."""
    found = {"python": platform.python_version(), "t5x_lite": __version__}
    found["git"] = git_revision()
    for name in PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found


def summary(cfg: Config, model: nnx.Module, abstract_state: dict, shapes) -> str:
    """Parameters with shapes and shardings, FLOPs, packages and devices as text.

    Args:
      shapes: of the streams, as in `metrics.forward_flops`.
    """
    params = parameters.declared(model)
    flat = jax.tree.leaves(abstract_state["params"])
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.spec
        for path, leaf in jax.tree.leaves_with_path(abstract_state["params"])
    }
    count = sum(leaf.size for leaf in flat)
    per_example = metrics.forward_flops(cfg.model, shapes)
    per_step = 3 * per_example * cfg.data.batch_size
    width = max(map(len, params))
    lines = [
        f"{'parameter':{width}}  {'shape':22} {'axes':34} mesh axes",
        *(
            f"{name:{width}}  {p.get_value().shape!s:22} "
            f"{', '.join(map(str, p.get_metadata()['axes'])):34} {tuple(specs[name])}"
            for name, p in params.items()
        ),
        "",
        f"parameters        {count:,}",
        f"state             {state.size_bytes(abstract_state) / 2**20:,.1f} MiB "
        "(parameters and optimizer, all devices)",
        f"batch             {cfg.data.batch_size} x "
        + ", ".join(
            f"{name}: {T} cells, {K} predicted" + (f", {G} query streams" if G else "")
            for name, (T, K, G) in shapes.items()
        ),
        f"FLOPs per step    {per_step:.4e} (matrix products, forward x 3)",
        f"mesh              {dict(cfg.sharding.__dict__, rules=None)} "
        f"over {jax.device_count()} device(s) in {jax.process_count()} process(es)",
        f"devices           {', '.join(sorted({d.device_kind for d in jax.devices()}))}"
        f" on {platform.platform()}",
        "packages          " + " ".join(f"{k}={v}" for k, v in versions().items()),
        "command           " + " ".join(sys.argv),
    ]
    return "\n".join(lines) + "\n"


def plot_loss(rows: list[dict], path, unigram: float | None):
    """Draws training and held-out loss against the step into a PNG.

    Args:
      rows: of metrics.jsonl.
      unigram: loss of the baseline, drawn as a line.
    """
    import matplotlib  # half a second that no start has to wait for

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    heldout = [(r["step"], r["heldout_loss"]) for r in rows if "heldout_loss" in r]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
        window = max(1, len(losses) // 40)
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        middle = steps[(window - 1) // 2 :][: len(smooth)]
        axes.plot(middle, smooth, color="C0", label=f"training, mean of {window} steps")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o-", color="C1", label="held-out")
    if unigram is not None:
        axes.axhline(unigram, color="C3", linestyle="--", label="unigram, held-out")
    axes.set(xlabel="step", ylabel="loss (nats per target token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    cli.run(main)

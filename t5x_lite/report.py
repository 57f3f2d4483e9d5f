"""What a run leaves for people: summary.txt and loss.png."""

import importlib.metadata
import pathlib
import platform
import subprocess
import sys

import jax
import numpy as np
from flax import nnx

from t5x_lite import __version__, metrics, parameters, state
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

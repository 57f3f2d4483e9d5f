"""Train a small ELMo (Peters et al. 2018) on the words of a text, as characters.

    python -m t5x_lite.elmo --train=data/train.jsonl --heldout=data/heldout.jsonl \\
        --steps=200 --workdir=runs/elmo

Two language models share a character CNN and a softmax: one reads forward, one
backward. Prints their held-out perplexity beside that of word frequencies, and writes
WORKDIR/words.txt and WORKDIR/export (params.npz, config.json). There is no resume: a
run that was stopped starts again.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import tqdm

from t5x_lite import cli, export
from t5x_lite.bilm import DIRECTIONS, ElmoConfig, Pretrained, zero_state
from t5x_lite.data import sources
from t5x_lite.data import words as words_lib
from t5x_lite.model import bind
from t5x_lite.parameters import init_params


def optimizer(rate: float = 0.2, clip: float = 10.0) -> optax.GradientTransformation:
    """Adagrad with TensorFlow's constants after clipping the gradient's norm."""
    adagrad = optax.adagrad(rate, initial_accumulator_value=1.0, eps=0.0)
    return optax.chain(optax.clip_by_global_norm(clip), adagrad)


def train_step(model: Pretrained, tx: optax.GradientTransformation, negatives: int = 0):
    """A jitted (params, opt, state, batch, key) -> (params, opt, state, losses)."""

    def objective(params, state, batch, key):
        losses, after = bind(model, params).loss(batch, state, key, negatives)
        length = batch["forward"]["targets"].shape[1]
        # As bilm-tf: the sum over a window's words, else Adagrad hardly moves.
        return length * (losses["forward"] + losses["backward"]) / 2, (losses, after)

    def step(params, opt, state, batch, key):
        of_params = jax.grad(objective, has_aux=True)
        gradient, (losses, after) = of_params(params, state, batch, key)
        updates, opt = tx.update(gradient, opt, params)
        return optax.apply_updates(params, updates), opt, after, losses

    return jax.jit(step, donate_argnums=(0, 1))


def evaluate(model: Pretrained, params: dict, batches: list[dict]) -> dict[str, float]:
    """Direction -> perplexity over batches that follow each other."""
    loss = jax.jit(lambda params, batch, state: bind(model, params).loss(batch, state))
    state = zero_state(model.cfg, len(batches[0]["forward"]["targets"]))
    found = []
    for batch in tqdm.tqdm(batches, desc="held out", leave=False):
        losses, state = loss(params, batch, state)
        found.append([losses[d] for d in DIRECTIONS])
    means = np.exp(np.mean(np.array(found), axis=0))
    return {d: float(m) for d, m in zip(DIRECTIONS, means, strict=True)}


def unigram_perplexity(counts_V: np.ndarray, batches: list[dict]) -> float:
    """Of the batches' targets by the frequencies of words, each seen once more."""
    log_V = np.log((counts_V + 1) / np.sum(counts_V + 1))
    targets = np.array([[batch[d]["targets"] for d in DIRECTIONS] for batch in batches])
    return float(np.exp(-np.mean(log_V[targets])))


def main(argv: list[str] | None = None):
    parser = cli.parser(__doc__)
    parser.add_argument("--train", required=True, help="text; see data/sources.py")
    parser.add_argument("--heldout", required=True, help="held-out text")
    cli.add_reading(parser)
    parser.add_argument("--workdir", required=True, help="directory to write to")
    for name, default, text in (
        ("steps", 200, "updates"),
        ("vocab_size", 4000, "words that are predicted; the rest are unknown"),
        ("batch_size", 16, "windows of a batch"),
        ("length", 20, "words of a window"),
        ("units", 256, "of an LSTM"),
        ("projection", 64, "size of a word's vector and of an LSTM's output"),
        ("negatives", 0, "words of a sampled softmax; 0 = the full softmax"),
    ):
        text = f"{text} (default {default})"
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--learning_rate", type=float, default=0.2, help="of Adagrad")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches")
    parser.add_argument("--overwrite", action="store_true", help="replace the export")
    flags = parser.parse_args(argv)
    for name in ("steps", "units", "projection"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name}={getattr(flags, name)} must be at least 1.")
    if flags.negatives < 0 or flags.seed < 0:
        raise ValueError("--negatives and --seed must be 0 or more.")
    workdir = pathlib.Path(flags.workdir)
    export.check_output(workdir / "export", flags.overwrite)

    sizes = flags.batch_size, flags.length
    text = words_lib.Text(flags.train, sources.Options.of(flags))
    vocab = words_lib.WordVocab.most_frequent(text, flags.vocab_size)
    batches = words_lib.windows(text, vocab, *sizes)
    of_heldout = words_lib.Text(flags.heldout, sources.Options.of(flags))
    heldout = words_lib.windows(of_heldout, vocab, *sizes)
    each = range(max(1, len(of_heldout.stream_N) // (sizes[0] * sizes[1])))
    heldout = [heldout(0, step) for step in each]
    workdir.mkdir(parents=True, exist_ok=True)
    vocab.save(workdir / "words.txt")

    filters = ((1, 16), (2, 16), (3, 32), (4, 64))
    cfg = ElmoConfig(
        filters=filters, units=flags.units, projection=flags.projection, highway=1
    )
    model, tx = Pretrained(cfg, vocab.size), optimizer(flags.learning_rate)
    key = jax.random.key(flags.seed)
    params = init_params(model, key)
    opt, state = tx.init(params), zero_state(cfg, flags.batch_size)
    step_fn = train_step(model, tx, flags.negatives)
    with tqdm.tqdm(total=flags.steps, desc="training") as bar:
        for step in range(flags.steps):
            batch, own = batches(flags.seed, step), jax.random.fold_in(key, step)
            params, opt, state, losses = step_fn(params, opt, state, batch, own)
            if step % 10 == 0:
                bar.set_postfix({d: f"{losses[d]:.3f}" for d in DIRECTIONS})
            bar.update()

    counts_V = np.bincount(vocab.ids(text.words)[text.stream_N], minlength=vocab.size)
    found = evaluate(model, params, heldout)
    unigram = unigram_perplexity(counts_V, heldout)
    about: dict[str, Any] = dict(
        step=flags.steps,
        config=dataclasses.asdict(cfg),
        flags=vars(flags),
        heldout_perplexity=found | {"unigram": unigram},
    )
    export.write(workdir / "export", export.flatten(params), about)
    print(
        f"held-out perplexity: forward {found['forward']:.1f}, backward "
        f"{found['backward']:.1f}; unigram {unigram:.1f} ({vocab.size} words)"
    )
    print(f"wrote {workdir / 'export'} and {workdir / 'words.txt'}")


if __name__ == "__main__":
    cli.run(main)

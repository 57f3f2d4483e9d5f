"""Held-out loss of a checkpoint, next to the loss of the unigram baseline.

    python -m t5x_lite.evaluate --workdir=runs/demo
    python -m t5x_lite.evaluate --workdir=runs/demo --step=200 --data=my/text.jsonl

Prints one line of JSON and writes it to WORKDIR/evaluation-STEP.json.
"""

import dataclasses
import json
import math
import pathlib
import re

import jax
import numpy as np
import tqdm

from t5x_lite import checkpoint, cli, generate, run, sharding, step
from t5x_lite.data import sources


def main(argv: list[str] | None = None):
    parser = cli.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of a training run")
    parser.add_argument("--step", type=int, default=-1, help="checkpoint; -1 = latest")
    parser.add_argument("--data", help="held-out text, instead of the run's own")
    flags = parser.parse_args(argv)
    cfg, _, params, at, meta = checkpoint.load_run(flags.workdir, flags.step)
    one = dataclasses.replace(cfg.sharding, data=-1, fsdp=1, tensor=1)
    cfg = dataclasses.replace(cfg, sharding=one)
    if flags.data:
        data = dataclasses.replace(cfg.data, heldout=flags.data)
        cfg = dataclasses.replace(cfg, data=data)
    setup = run.Setup.of(cfg, jax.devices()[:1])
    checkpoint.check_vocab(meta, setup.vocab)
    with sharding.use(setup.mesh, cfg.sharding.rules):
        eval_step = jax.jit(step.make_eval_step(setup.model, cfg, setup.vocab.size))
        result = {"step": at, "data": cfg.data.heldout}
        result |= heldout(setup, eval_step, params)
    result["unigram_loss"] = setup.unigram_loss()
    path = pathlib.Path(flags.workdir) / f"evaluation-{at}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def heldout(setup: run.Setup, eval_step, params) -> dict:
    """Loss, accuracy and perplexity over the held-out batches, per target token."""
    totals: dict[str, np.ndarray] = {}
    steps = setup.heldout_steps()
    for i in tqdm.tqdm(
        steps, "held-out", leave=False, disable=not setup.lead, delay=1.0
    ):
        sums = eval_step(params, setup.to_device(setup.heldout_batches[i]))
        for name, each in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0.0) + np.asarray(each, np.float64)
    _, nll, z, correct, weight = totals["tokens"]
    loss = float(nll / weight)
    return {
        checkpoint.METRIC: loss,
        "heldout_perplexity": math.exp(min(loss, 700.0)),
        "heldout_accuracy": float(correct / weight),
        "heldout_z_loss": float(z / weight),
        "heldout_tokens": int(weight),
    } | {f"heldout_{k}": v for k, v in others(totals).items()}


def others(sums: dict) -> dict[str, float]:
    """Loss and accuracy of the losses beside that of the tokens."""
    found = {}
    for name, each in sums.items():
        if name != "tokens":
            _, nll, _, correct, weight = map(float, each)
            found[f"{name}_loss"] = nll / max(weight, 1.0)
            found[f"{name}_accuracy"] = correct / max(weight, 1.0)
    return found


def sample_sentences(source: str, count: int, seed: int) -> list[str]:
    """`count` sentences of 60 to 140 characters from the documents of a source."""
    rng = np.random.default_rng(seed)
    found = []
    for document in sources.documents(source):
        sentences = re.split(r"(?<=[.!?]) ", document.replace("\n", " "))
        fitting = [s for s in sentences if 60 <= len(s) <= 140 and s.count(" ") > 7]
        found += fitting[:20]
        if len(found) > 50 * count:
            break
    picked = rng.permutation(len(found))[:count]
    return [found[i] for i in picked]


def print_samples(setup: run.Setup, params, count: int = 4):
    """Prints held-out sentences with gaps, what the model fills in, and the truth.

    Only for models that have learned to fill gaps: encoder-decoders with sentinels.
    """
    learned = setup.cfg.objective["name"] in ("span_corruption", "ul2")
    if not learned or setup.cfg.model.structure != "encoder_decoder":
        return
    rng = np.random.default_rng(setup.cfg.seed)
    texts = sample_sentences(setup.cfg.data.heldout, count, setup.cfg.seed)
    if not texts:
        return
    gapped = []
    for text in texts:
        words = text.split()
        for third in (0, 1):
            at = rng.integers(1, len(words) // 2 - 1) + third * (len(words) // 2)
            words[at : at + int(rng.integers(1, 3))] = ["___"]
        gapped.append(" ".join(words))
    filled = generate.fill(setup.model, params, setup.vocab, gapped)
    print("held-out sentences, their gaps filled in by the model:")
    for truth, gaps, fill in zip(texts, gapped, filled, strict=True):
        print(f"  text   {truth}\n  gaps   {gaps}\n  model  {fill}\n")


if __name__ == "__main__":
    cli.run(main)

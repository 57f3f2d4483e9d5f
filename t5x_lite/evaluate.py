"""Held-out loss of a checkpoint, next to the loss of the unigram baseline.

    python -m t5x_lite.evaluate --workdir=runs/demo
    python -m t5x_lite.evaluate --workdir=runs/demo --step=200 --data=my/text.jsonl

Prints one line of JSON and writes it to WORKDIR/evaluation-STEP.json. Several processes
(see t5x_lite/distributed.py) evaluate together a model that fits no single device.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from t5x_lite import (
    checkpoint,
    cli,
    distributed,
    generate,
    prompts,
    run,
    sharding,
    step,
)
from t5x_lite.data import sources
from t5x_lite.model import trained_stream

LONGEST = 32  # tokens of a sample
CONTEXT = 12  # tokens shown before the first that is predicted
WIDTH = 200  # characters of an example


def main(argv: list[str] | None = None):
    parser = cli.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of a training run")
    parser.add_argument("--step", type=int, default=-1, help="checkpoint; -1 = latest")
    parser.add_argument("--data", help="held-out text, instead of the run's own")
    flags = parser.parse_args(argv)
    with distributed.join(lambda: distributed.identity(flags=vars(flags))) as peers:
        cfg, at, meta = checkpoint.read_run(flags.workdir, flags.step)
        peers.check_same({"checkpoint": at})
        peers.show()
        # Alone one device is enough; several processes share the run's own layout.
        alone = dict(fsdp=1, tensor=1, sequence=1, dcn_data=-1, dcn_fsdp=1)
        sizes = {} if peers.count > 1 else alone
        mesh = dataclasses.replace(cfg.sharding, data=-1, **sizes)
        cfg = dataclasses.replace(cfg, sharding=mesh)
        if flags.data:
            data = dataclasses.replace(cfg.data, heldout=flags.data)
            cfg = dataclasses.replace(cfg, data=data)
        setup = run.Setup.of(cfg, jax.devices()[:1] if peers.count == 1 else None)
        checkpoint.check_vocab(meta, setup.vocab)
        result = {"step": at, "data": cfg.data.heldout}
        with sharding.use(setup.mesh, setup.cfg.sharding.rules):
            params = checkpoint.load_params(
                flags.workdir, at, setup.abstract_state["params"]
            )
            eval_step = step.make_eval_step(setup.model, setup.cfg, setup.vocab.size)
            result |= heldout(setup, jax.jit(eval_step), params)
        result["unigram_loss"] = setup.unigram_loss()
        if peers.lead:
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


@contextlib.contextmanager
def on_lead(setup: run.Setup, params: dict) -> Iterator[dict | None]:
    """Within: the whole parameters on one device of the lead, None on other processes.

    All processes call it. None on the lead too, with a word, if they do not fit there.
    """
    if jax.process_count() == 1:
        yield params
        return
    device = jax.local_devices()[0]
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    room = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    # Beside an optimizer with two moments; the same answer on every process.
    if 4 * size > room:
        setup.say(f"no samples: {size / 2**30:.1f} GiB of parameters on one device")
        yield None
        return
    # One at a time: for a moment each device holds the whole of it.
    whole = jax.tree.map(
        lambda x: multihost_utils.process_allgather(x, tiled=True), params
    )
    if not setup.lead:
        yield None
        return
    sizes = {axis: 1 for axis in setup.mesh.shape} | dict(dcn_data=-1, dcn_fsdp=1)
    one = dataclasses.replace(setup.cfg.sharding, **sizes)
    with sharding.use(sharding.make_mesh(one, [device]), one.rules):
        yield jax.device_put(whole, device)


def print_samples(setup: run.Setup, params, count: int = 4):
    """Prints what the model makes of a few held-out examples, and the truth.

    Sentences with gaps or without their end, if the model learned to complete these;
    else places that it predicts in the text. Nothing for other text-to-text tasks.
    """
    try:
        lines = samples(setup, params, count)
    except Exception as e:  # a picture for people may not fail hours of training
        lines = [f"no samples to show: {type(e).__name__}: {e}"]
    if lines:
        print("\n".join(map(prompts.printable, lines)))


def samples(setup: run.Setup, params, count: int) -> list[str]:
    """Lines of text, see `print_samples`."""
    stream = setup.heldout_batches[0][trained_stream(setup.cfg.model)]
    if "places" in stream:
        return in_place(setup, params, count)
    try:
        task = prompts.task_of(setup.cfg)
    except ValueError:
        return []  # BART, MASS, ...
    rng = np.random.default_rng(setup.cfg.seed)
    texts = sample_sentences(setup.cfg.data.heldout, count, setup.cfg.seed)
    if not texts:
        return []
    given = []
    for text in texts:
        words = text.split()
        if task.kind == "continue":
            words = words[: len(words) // 2]
        else:
            for third in (0, 1):
                at = rng.integers(1, len(words) // 2 - 1) + third * (len(words) // 2)
                words[at : at + int(rng.integers(1, 3))] = ["___"]
        given.append(" ".join(words))
    made = generate.fill(
        setup.model, params, setup.vocab, given, task=task, max_length=LONGEST
    )
    lines = ["held-out sentences, what the model wrote in [brackets]:"]
    for truth, one in zip(texts, made, strict=True):
        lines += [f"  text   {truth}", f"  model  {one}", ""]
    return lines


def in_place(setup: run.Setup, params, count: int) -> list[str]:
    """A window of a few held-out examples, their predicted places marked."""
    words, batch = setup.vocab, setup.heldout_batches[0]
    few = {
        name: {k: v[:count] for k, v in stream.items()}
        for name, stream in batch.items()
        if isinstance(stream, dict)
    }
    used_V = np.ones(words.size, bool)
    with sharding.unconstrained():
        ids_BK, _ = generate.predict(setup.model, params, few, used_V)
    ids_BK, main = np.asarray(ids_BK), few["main"]
    T = main["tokens"].shape[1]
    lines = ["held-out text, predicted places as [read→predicted|truth]:"]
    for b in range(len(ids_BK)):
        shown = [_spaced(words.label(int(i))) for i in main["tokens"][b]]
        # Of several query streams the first.
        chosen_K = (main["weights"][b] > 0) & (main["places"][b] < T)
        places_K = main["places"][b][chosen_K]
        if not len(places_K):
            continue
        for place, *ids in zip(
            places_K, ids_BK[b][chosen_K], main["targets"][b][chosen_K], strict=True
        ):
            read = shown[place]
            guess, truth = (_spaced(words.label(int(i))) for i in ids)
            before = "" if read == truth else f"{read.strip(' []')}→"
            space = " " * (truth[0] == " ")
            shown[place] = f"{space}[{before}{guess.strip()}|{truth.strip()}]"
        shown = shown[max(0, int(places_K.min()) - CONTEXT) :]
        fits = int((np.cumsum([len(piece) for piece in shown]) <= WIDTH).sum())
        more = " …" if fits < len(shown) else ""
        lines.append(f"  {''.join(shown[:fits]).strip()}{more}")
    return lines


def _spaced(label: str) -> str:
    """A piece as it stands in a text."""
    return label.replace("\u2581", " ") or " "


if __name__ == "__main__":
    cli.run(main)

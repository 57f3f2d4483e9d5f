"""A few held-out examples and what a model makes of them, for people."""

import re

import numpy as np

from t5x_lite import evaluate_tasks, generate, prompts, run, sharding
from t5x_lite.data import custom_tasks, mixture, sources
from t5x_lite.data.task_batches import HeadExamples, TaskBatches
from t5x_lite.model import trained_stream
from t5x_lite.settings import Settings

LONGEST = 32  # tokens of a sample
CONTEXT = 12  # tokens shown before the first that is predicted
WIDTH = 200  # characters of an example


def sample_sentences(
    source: str, options: sources.Options, count: int, seed: int
) -> list[str]:
    """`count` sentences of 60 to 140 characters from the documents of a source."""
    rng = np.random.default_rng(seed)
    found = []
    for document in sources.documents(source, options=options):
        sentences = re.split(r"(?<=[.!?]) ", document.replace("\n", " "))
        fitting = [s for s in sentences if 60 <= len(s) <= 140 and s.count(" ") > 7]
        found += fitting[:20]
        if len(found) > 50 * count:
            break
    picked = rng.permutation(len(found))[:count]
    return [found[i] for i in picked]


def print_samples(setup: run.Setup, params, count: int = 4):
    """Prints what the model makes of a few held-out examples, and the truth.

    Sentences with gaps or without their end, if the model learned to complete these;
    answers to labelled tasks; else places that it predicts in the text. Nothing for
    other text-to-text objectives.
    """
    try:
        lines = samples(setup, params, count)
    except Exception as e:  # a picture for people may not fail hours of training
        lines = [f"no samples to show: {type(e).__name__}: {e}"]
    if lines:
        print("\n".join(map(prompts.printable, lines)))


def samples(setup: run.Setup, params, count: int) -> list[str]:
    """Lines of text, see `print_samples`."""
    if setup.cfg.data.tasks:
        return _answers(setup, params, count)
    stream = setup.heldout_batches[0][trained_stream(setup.cfg.model)]
    if "places" in stream:
        return in_place(setup, params, count)
    try:
        task = prompts.task_of(setup.cfg)
    except ValueError:
        return []  # BART, MASS, ...
    rng = np.random.default_rng(setup.cfg.seed)
    texts = []
    for source in mixture.sources_of(setup.cfg, "heldout")[:1]:
        texts = sample_sentences(source.spec, source.options, count, setup.cfg.seed)
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


def _answers(setup: run.Setup, params, count: int) -> list[str]:
    """What a model of labelled tasks answers to a few held-out examples."""
    batches = setup.heldout_batches
    if not isinstance(batches, TaskBatches):
        return []  # a mixture's first member is text
    made = batches.made
    if isinstance(made, HeadExamples):
        found = evaluate_tasks.of_few(setup, params, made, count)
    else:
        task = custom_tasks.find(made.records[0][0], setup.cfg.data.custom_tasks)
        given = setup.model, params, setup.vocab, made, task
        longest = Settings(max_length=setup.cfg.data.targets_length)
        found = evaluate_tasks.of_text(*given, longest, limit=count)
    rows = [dict(row) for row in found.texts]
    if found.probabilities is not None:
        for row, shares_K in zip(rows, found.probabilities, strict=True):
            row["probability"] = float(shares_K.max())
    lines = ["held-out examples, what the model answered:"]
    for row in rows:
        for name, value in row.items():
            short = " ".join(_said(value).split())
            lines.append(f"  {name:11} {short[:WIDTH]}{' …' * (len(short) > WIDTH)}")
        lines.append("")
    return lines


def _said(value) -> str:
    if isinstance(value, list):
        return " ".join(value)
    return f"{value:.3f}" if isinstance(value, float) else value


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

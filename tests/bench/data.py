"""Speed of the data path, side by side with others.   python -m tests.bench.data

Prints the median of alternating rounds on one core and the ratio to each peer:
(a) ready store -> windows -> span corruption -> batch, in raw tokens per second;
(b) building the store, against plain SentencePiece encoding of the same text;
(c) from raw text to all batches of an epoch, tokenising included.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from t5x_lite import vocab as vocabularies
from t5x_lite.data import sources
from t5x_lite.data.pipeline import Batches
from t5x_lite.data.store import open_store

DATA = Path(__file__).resolve().parents[2] / "data"
RAW, INPUTS, TARGETS, BATCH = 568, 512, 114, 128


class PerExampleCollator:
    """A NumPy collator of the usual kind: a mask per example, filters per batch.

    In the manner of `FlaxDataCollatorForT5MLM` of Hugging Face's run_t5_mlm_flax.py:
    the same steps and the same work, written anew.
    """

    def __init__(self, vocab, rng):
        self.vocab, self.rng = vocab, rng

    def __call__(self, examples: list[dict]) -> dict[str, np.ndarray]:
        ids = np.array([example["input_ids"] for example in examples])
        mask = np.stack([self._mask(ids.shape[1]) for _ in examples])
        inputs = self._filter(ids, self._sentinels(mask.astype(np.int8)))
        labels = self._filter(ids, self._sentinels((~mask).astype(np.int8)))
        assert inputs.shape[1] == INPUTS and labels.shape[1] == TARGETS
        decoder = np.zeros_like(labels)
        decoder[:, 1:] = labels[:, :-1]
        return {"input_ids": inputs, "labels": labels, "decoder_input_ids": decoder}

    def _mask(self, length: int) -> np.ndarray:
        noise = min(max(int(np.round(length * 0.15)), 1), length - 1)
        spans = max(int(np.round(noise / 3.0)), 1)

        def lengths(items):
            first = np.arange(items - 1) < spans - 1
            self.rng.shuffle(first)
            segment = np.cumsum(np.pad(first, [[1, 0]]))
            return np.unique(segment, return_counts=True)[1]

        both = np.stack([lengths(length - noise), lengths(noise)], axis=1)
        starts = np.cumsum(both.reshape(-1))[:-1]
        indicator = np.zeros(length, np.int8)
        indicator[starts] = True
        return np.cumsum(indicator) % 2 == 1

    def _sentinels(self, mask: np.ndarray) -> np.ndarray:
        starts = mask - np.roll(mask, 1, axis=-1) * mask
        starts[:, 0] = mask[:, 0]
        ids = np.where(starts != 0, np.cumsum(starts, axis=-1), starts)
        ids = np.where(ids != 0, self.vocab.size - ids, 0)
        return ids - (mask - starts)

    def _filter(self, ids: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
        full = np.where(sentinels != 0, sentinels, ids)
        kept = full[full >= 0].reshape(len(ids), -1)
        eos = np.full((len(ids), 1), self.vocab.eos_id, np.int32)
        return np.concatenate([kept, eos], axis=-1)


def seqio_library():
    """(seqio, T5's preprocessors, TensorFlow), single-threaded; None if not installed.

    By name, because they are not installed with this project:
    `pip install seqio t5 tensorflow-cpu` in an environment of its own.
    """
    if not all(importlib.util.find_spec(name) for name in ("seqio", "t5")):
        return None
    tf = importlib.import_module("tensorflow")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    seqio = importlib.import_module("seqio")
    return seqio, importlib.import_module("t5.data.preprocessors"), tf


def seqio_features(seqio, vocab_path: str):
    vocabulary = seqio.SentencePieceVocabulary(vocab_path, extra_ids=100)
    return {n: seqio.Feature(vocabulary, add_eos=True) for n in ("inputs", "targets")}


def seqio_finished(seqio, data, features):
    """With EOS, at fixed lengths, in batches: an iterator over arrays."""
    data = seqio.preprocessors.append_eos(data, features)
    lengths = {"inputs": INPUTS, "targets": TARGETS}
    data = seqio.trim_and_pad_dataset(data, lengths)
    return iter(data.batch(BATCH).as_numpy_iterator())


def seqio_batches(library, tokens: np.ndarray, vocab_path: str):
    """T5's TensorFlow preprocessors over windows that are tokenised and cut."""
    seqio, t5_preprocessors, tf = library
    features = seqio_features(seqio, vocab_path)
    data = tf.data.Dataset.from_tensor_slices({"targets": tokens}).repeat()
    data = t5_preprocessors.denoise(
        data,
        features,
        noise_density=0.15,
        noise_mask_fn=functools.partial(
            t5_preprocessors.random_spans_noise_mask, mean_noise_span_length=3.0
        ),
        inputs_fn=t5_preprocessors.noise_span_to_unique_sentinel,
        targets_fn=t5_preprocessors.nonnoise_span_to_unique_sentinel,
    )
    return seqio_finished(seqio, data, features)


def seqio_epoch(library, texts: list[str], vocab_path: str):
    """T5's pretraining task over raw text, once: tokenise, concatenate, cut, corrupt.

    The preprocessors of `c4_v220_span_corruption` in T5's task registry.
    """
    seqio, t5_preprocessors, tf = library
    features = seqio_features(seqio, vocab_path)
    data = tf.data.Dataset.from_tensor_slices({"targets": texts})
    data = seqio.preprocessors.tokenize(
        data, features, copy_pretokenized=False, with_eos=False
    )
    data = seqio.preprocessors.append_eos(data, features)
    lengths = {"inputs": INPUTS, "targets": TARGETS}
    data = t5_preprocessors.span_corruption(data, lengths, features)
    return seqio_finished(seqio, data, features)


def core_seconds() -> float:
    """CPU time of this process, all its threads and ended children: less disturbed by
    other work on the machine than a clock, and what is made ahead counts."""
    return time.process_time() + sum(os.times()[2:4])


def rounds(runs: dict[str, Callable[[], float]], count: int) -> dict[str, float]:
    """Median of `count` alternating rounds; each run returns its rate."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm up
    for _ in range(count):
        for name, run in runs.items():
            rates[name].append(run())
    return {name: statistics.median(values) for name, values in rates.items()}


def span_batches(store, vocab) -> Batches:
    return Batches(
        store,
        vocab,
        objective="span_corruption",
        knobs={"density": 0.15, "mean_span": 3.0},
        structure="encoder_decoder",
        inputs_length=INPUTS,
        batch_size=BATCH,
        seed=0,
    )


def bench_batches(cache: str, steps: int, count: int) -> dict[str, float]:
    path = str(DATA / "vocab_4k.model")
    vocab = vocabularies.load(path)
    store = open_store(str(DATA / "train.jsonl"), vocab, cache, progress=False)
    batches = span_batches(store, vocab)
    assert (batches.raw_length, batches.shapes["decoder"][1]) == (RAW, TARGETS)
    tokens = store.windows(np.arange(0, store.n_tokens - RAW, RAW), RAW)
    rng = np.random.default_rng(0)
    # The collator's own loader hands it lists; arrays are its faster case.
    examples = [{"input_ids": row} for row in tokens]
    collator = PerExampleCollator(vocab, rng)
    position = iter(range(10**9))

    def rate(make, batches_made):
        start = core_seconds()
        for _ in range(batches_made):
            make()
        return BATCH * RAW * batches_made / (core_seconds() - start)

    def peer():
        chosen = rng.integers(0, len(examples), BATCH)
        return collator([examples[i] for i in chosen])

    runs = {
        "ours": lambda: rate(lambda: batches[next(position)], steps),
        "per-example collator": lambda: rate(peer, max(steps // 5, 1)),
    }
    library = seqio_library()
    if library is not None:
        theirs = seqio_batches(library, tokens, path)
        # Enough batches that those it made ahead while others ran do not count.
        runs["seqio + T5"] = lambda: rate(lambda: next(theirs), max(steps // 2, 1))
    return rounds(runs, count)


def bench_store(cache: str, count: int) -> dict[str, float]:
    """Megabytes of text per second."""
    path = str(DATA / "vocab_4k.model")
    vocab = vocabularies.load(path)
    # Several copies under one name each: a build of a few hundred milliseconds.
    for i in range(4):
        target = Path(cache) / f"text{i}.jsonl"
        target.write_bytes((DATA / "train.jsonl").read_bytes())
    source = str(Path(cache) / "text*.jsonl")
    texts = list(sources.documents(source))
    size = sum(len(t.encode()) for t in texts) / 1e6

    import sentencepiece

    plain = sentencepiece.SentencePieceProcessor(model_file=path)

    def build():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            start = time.perf_counter()
            open_store(source, vocab, folder, progress=False)
            return size / (time.perf_counter() - start)

    def encode():
        start = time.perf_counter()
        plain.encode(texts, out_type=int)
        return size / (time.perf_counter() - start)

    return rounds({"ours": build, "plain SentencePiece": encode}, count)


def bench_epoch(cache: str, count: int) -> dict[str, float]:
    """From raw text to every batch of one epoch, tokenising included: MB of text/s."""
    path = str(DATA / "vocab_4k.model")
    vocab = vocabularies.load(path)
    source = str(DATA / "train.jsonl")
    texts = list(sources.documents(source))
    size = sum(len(t.encode()) for t in texts) / 1e6

    def ours():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            start = core_seconds()
            store = open_store(source, vocab, folder, progress=False, processes=1)
            batches = span_batches(store, vocab)
            for step in range(batches.examples_per_epoch // BATCH):
                batches[step]
            return size / (core_seconds() - start)

    def theirs():
        start = core_seconds()
        for _ in seqio_epoch(library, texts, path):
            pass
        return size / (core_seconds() - start)

    library = seqio_library()
    return rounds({"ours": ours} | ({"seqio + T5": theirs} if library else {}), count)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40, help="batches a round")
    parser.add_argument("--json", help="file to write the ratios to")
    args = parser.parse_args(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as cache:
        made = bench_batches(cache, args.steps, args.rounds)
        built = bench_store(cache, args.rounds)
        whole = bench_epoch(cache, min(args.rounds, 3))
    ratios = {}
    print(f"store -> batch ({BATCH} x {RAW} raw tokens, one core), M raw tokens/s:")
    for name, value in made.items():
        ratios[f"batches vs {name}"] = made["ours"] / value
        print(f"  {name:24} {value / 1e6:8.2f}   ours is {made['ours'] / value:.2f} x")
    if "seqio + T5" not in made:
        print("  seqio + T5                not installed (see seqio_library)")
    print("goals: 1.2 x the collator, 5 x seqio + T5")
    print("text -> store (one core), MB/s:")
    for name, value in built.items():
        print(f"  {name:24} {value:8.2f}")
    ratios["store build time vs plain SentencePiece"] = (
        built["plain SentencePiece"] / built["ours"]
    )
    print(
        "  building takes "
        f"{ratios['store build time vs plain SentencePiece']:.2f} x the time of plain "
        "encoding (goal: at most 1.2 x)"
    )
    print("text -> batches of one epoch, tokenising included (one core), MB/s:")
    for name, value in whole.items():
        ratios[f"text to batches vs {name}"] = whole["ours"] / value
        ours = whole["ours"] / value
        print(f"  {name:24} {value:8.2f}   ours is {ours:.2f} x")
    print("goal: 1.0 x seqio + T5")
    if args.json:
        Path(args.json).write_text(json.dumps(ratios, indent=1))
    return ratios


if __name__ == "__main__":
    main()

"""Makes batches.json: digests of the bytes of the first batches of several data paths.

    python -m tests.goldens.make_batches            # writes it: only to add a case
    python -m tests.goldens.make_batches --check    # on another Python, machine, NumPy

A digest that differs means that every run made before sees other batches: a change that
causes it must be meant, and said in CHANGELOG.md. The texts are those of data/ and two
small ones made here; no JAX is needed.
"""

import hashlib
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

from t5x_lite import config, vocab
from t5x_lite.data import mixture, packing
from t5x_lite.data.batches import AnyBatches

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATH = pathlib.Path(__file__).with_name("batches.json")
STEPS, BATCH = 5, 48

TEXT = dict(train=str(ROOT / "data/heldout.jsonl"))
SPANS = dict(name="span_corruption", density=0.15, mean_span=3.0)
SENTENCES = dict(name="masked_lm", sentence="nsp")
# name -> (structure, objective, keys of config.data)
CASES: dict[str, tuple[str, dict, dict]] = {
    "windows": ("encoder_decoder", SPANS, dict()),
    "pieces": ("prefix_lm", SPANS, dict(vocab=str(ROOT / "data/vocab_4k.model"))),
    "documents": ("encoder", SENTENCES, dict()),
    "static noise": ("encoder", SENTENCES, dict(static_noise=True)),
    "mixture": ("encoder_decoder", SPANS, dict(mixture=True)),
    "packed task": ("decoder", SPANS, dict(tasks=("upper",))),
    "task and text": (
        "encoder_decoder",
        SPANS,
        dict(tasks=("upper",), mixture=True, targets_length=17, inputs_length=70),
    ),
}


def batches(name: str, folder: pathlib.Path, **changes) -> AnyBatches:
    """The batches of a case; `changes` are of the arguments of `mixture.train`."""
    structure, objective, keys = CASES[name]
    (folder / "letters.txt").write_text("\n\n".join(_words(40, seed=1)))
    rows = [f"{text}\t{text[:9].upper()}" for text in _words(300, seed=2)]
    (folder / "upper.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    raw: Any = config.defaults()
    task = dict(train="upper.tsv", inputs=("text",), head="", metrics=("exact_match",))
    data = TEXT | dict(
        inputs_length=64,
        targets_length=24,
        batch_size=BATCH,
        cache_dir=str(folder / "stores"),
        task_dir=str(folder),
        custom_tasks=dict(upper=task),
    )
    data |= keys
    if data.pop("mixture", False):
        data["mixture"] = dict(
            book=dict(train=TEXT["train"], heldout=TEXT["train"], rate=2.0),
            letters=dict(train=str(folder / "letters.txt"), rate=1.0),
        )
        data["rate_changes"] = ((2, "letters", 6.0),)
    raw = raw.to_dict()
    raw["data"] |= data
    raw["model"]["structure"], raw["objective"], raw["seed"] = structure, objective, 11
    cfg = config.freeze(raw)
    return mixture.train(cfg, vocab.load(cfg.data.vocab, 100), **changes)


def _words(count: int, seed: int) -> list[str]:
    """Texts of 2 to 12 invented words, the same on every machine."""
    numbers = np.random.Generator(np.random.Philox(seed)).random((count, 13))
    texts = []
    for first, *others in numbers:
        used = others[: 2 + int(first * 11)]
        texts.append(
            " ".join("aeiou"[int(u * 5)] * (1 + int(u * 35) % 7) for u in used)
        )
    return texts


def digest(batch: dict[str, Any]) -> str:
    """Of all bytes of a batch, with the names, types and shapes of its arrays."""
    found = hashlib.sha256()
    for name, stream in sorted(batch.items()):
        fields = stream if isinstance(stream, dict) else {"": stream}
        for field, values in sorted(fields.items()):
            found.update(f"{name}/{field} {values.dtype} {values.shape}".encode())
            found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()[:16]


def packs() -> str:
    """Of which examples share a row."""
    numbers = np.random.Generator(np.random.Philox(5)).random((2500, 2))
    lengths_X2 = (numbers**2 * (200, 60)).astype(np.int64) + 1
    made = packing.pack(lengths_X2, (256, 80), seed=3)
    content = (
        made.examples.astype("<i8").tobytes() + made.offsets.astype("<i8").tobytes()
    )
    return hashlib.sha256(content).hexdigest()[:16]


def digests(folder: pathlib.Path) -> dict[str, Any]:
    found: dict[str, Any] = {"packs": packs()}
    for name in CASES:
        made = batches(name, folder)
        found[name] = [digest(made[step]) for step in (*range(STEPS), 10**6)]
    return found


def main():
    with tempfile.TemporaryDirectory() as folder:
        found = digests(pathlib.Path(folder))
    if "--check" not in sys.argv:
        PATH.write_text(json.dumps(found, indent=1) + "\n")
    different = [k for k, v in json.loads(PATH.read_text()).items() if found[k] != v]
    print(
        f"Python {sys.version.split()[0]}, NumPy {np.__version__}: differ:", different
    )
    sys.exit(bool(different))


if __name__ == "__main__":
    main()

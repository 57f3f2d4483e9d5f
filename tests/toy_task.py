"""A small task of one's own, as batches; and where the real tasks' files lie."""

import csv
import pathlib

import numpy as np
import pytest

from t5x_lite import vocab
from t5x_lite.data import task_batches
from tests.tiny import tiny_config

SHARED = pathlib.Path(__file__).resolve().parents[1].parent / "shared/data/tasks"


def shared(name: str) -> str:
    if not (SHARED / name).exists():
        pytest.skip("the tasks' files are not in ../shared/data/tasks")
    return str(SHARED)


def custom(folder: pathlib.Path, **more) -> dict:
    """A config's tables for a small TSV task of one's own."""
    rng = np.random.default_rng(0)
    with (folder / "toy.tsv").open("w", newline="") as f:
        rows = csv.writer(f, delimiter="\t")
        rows.writerow(["text", "label"])
        for i in range(70):
            label = ("good", "bad")[i % 2]
            rows.writerow([f"{i}{f' {label}' * int(rng.integers(2, 9))}", label])
    toy = dict(train=str(folder / "toy.tsv"), inputs=("text",), classes=("bad", "good"))
    return dict(
        tasks=("toy",),
        custom_tasks=dict(toy=toy | more),
        batch_size=8,
        inputs_length=64,
        targets_length=16,
    )


def opened(folder, structure="encoder_decoder", data=None, model=None, **sections):
    cfg = tiny_config(
        data=custom(folder) | (data or {}),
        model=dict(structure=structure, vocab_size=384) | (model or {}),
        **sections,
    )
    words = vocab.load("bytes")
    train = task_batches.train(cfg, words)
    return cfg, words, train, task_batches.heldouts(cfg, words)["toy"]

"""Generation beside transformers': settings, batches, and our side of the comparison.

What theirs wrote are arrays as `goldens/make_generation.py` stores them; this module
needs no torch.
"""

from typing import Any

import numpy as np

from t5x_lite import beam, decoding, model
from t5x_lite.interop import huggingface
from t5x_lite.parameters import nested

NEW = 14
LENGTHS = (11, 4, 7)  # tokens of each row
PREFIX = (7, 9, 7)
HF: dict[str, Any] = dict(length_norm="length")
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": dict(),
    "greedy_blocked": dict(no_repeat_ngram=2, min_length=6),
    "greedy_prefix": dict(no_repeat_ngram=1),
    "beams": HF | dict(beams=4, length_penalty=1.0, early_stopping="false"),
    "beams_first": HF
    | dict(beams=3, length_penalty=0.0, early_stopping="true", num_return=3),
    "beams_long": HF
    | dict(
        beams=4,
        length_penalty=2.0,
        early_stopping="never",
        no_repeat_ngram=2,
        num_return=2,
    ),
    "beams_prefix": HF
    | dict(
        beams=3,
        length_penalty=0.6,
        early_stopping="false",
        min_length=5,
        no_repeat_ngram=3,
        num_return=2,
    ),
}


def prefix_of(name: str) -> tuple[int, ...]:
    return PREFIX if name.endswith("prefix") else ()


def draw_rows(rng: np.random.Generator, vocab: int) -> list[np.ndarray]:
    return [rng.integers(3, vocab, length).astype(np.int32) for length in LENGTHS]


def stream(rows: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Rows padded at their end."""
    length = max(map(len, rows))
    tokens = np.stack([np.pad(row, (0, length - len(row))) for row in rows])
    segments = np.stack([np.arange(length) < len(row) for row in rows])
    places = np.tile(np.arange(length, dtype=np.int32), (len(rows), 1))
    return dict(
        tokens=tokens,
        segments=segments.astype(np.int32),
        positions=places * segments,
        ranks=np.zeros_like(places),
    )


def ours(path, rows: list[np.ndarray], name: str, eos: int, start: int):
    """-> (ids int [B, num_return, NEW], 0 from EOS on; scores [B, num_return])."""
    found = huggingface.read(path)
    params = nested({tuple(n.split("/")): found.params[n] for n in found.params})
    how: dict[str, Any] = SETTINGS[name] | dict(
        eos_id=eos, used_ids=found.cfg.vocab_size, pad_id=start, max_length=NEW
    )
    how["prefixes"] = [prefix_of(name)] * len(rows)
    net, many = model.build(found.cfg), how.get("num_return", 1)
    if how.get("beams", 1) > 1:
        ids_BKT, score_BK = beam.search(net, params, stream(rows), **how)
    else:
        ids_BT, score_B = decoding.generate(net, params, stream(rows), **how)
        ids_BKT, score_BK = np.asarray(ids_BT)[:, None], np.asarray(score_B)[:, None]
    return cut(np.asarray(ids_BKT)[:, :many], eos), np.asarray(score_BK)[:, :many]


def cut(ids_BKT: np.ndarray, eos: int) -> np.ndarray:
    """EOS and what follows it become 0."""
    over_BKT = np.maximum.accumulate(ids_BKT == eos, axis=-1)
    return np.where(over_BKT, 0, ids_BKT)


def compare(path, arrays: dict[str, np.ndarray], names=tuple(SETTINGS)) -> None:
    """Settings of a model: ids are the same, scores within float32's rounding."""
    rows = [row[row >= 0] for row in arrays["rows"]]
    eos, start = int(arrays["eos"]), int(arrays["start"])
    for name in names:
        ids_BKT, score_BK = ours(path, rows, name, eos, start)
        np.testing.assert_array_equal(ids_BKT, arrays[f"{name}/ids"], err_msg=name)
        if f"{name}/scores" in arrays:
            np.testing.assert_allclose(
                score_BK, arrays[f"{name}/scores"], rtol=2e-4, atol=1e-5, err_msg=name
            )

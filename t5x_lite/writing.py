"""Many texts written by a model: batches of few shapes, a key for each sample."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from t5x_lite import beam, decoding, prompts, sharding
from t5x_lite.sampling import sample_keys
from t5x_lite.settings import Settings
from t5x_lite.vocab import Vocab


class Written(NamedTuple):
    """What a model wrote: ids without EOS and prefix, score, did it end with EOS?"""

    ids: np.ndarray
    score: float
    ended: bool


def continue_all(
    model: Any,
    params: dict,
    words: Vocab,
    rows: Sequence[np.ndarray],
    settings: Settings | None = None,
    *,
    prefixes: Sequence[Sequence[int] | np.ndarray] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    first: int = 0,
    progress: bool = False,
) -> list[list[Written]]:
    """Writes behind rows of ids, in the order given; `settings.num_return` texts each.

    Rows of about the same length are decoded together, padded to few lengths, so that
    there are few shapes to compile. Under `sharding.use` batches are split over the
    mesh. What is drawn for a row depends on `seed` and its number alone.

    Args:
      rows: what the encoder reads, or the prompt of a decoder or prefix-LM, int [T].
      prefixes: ids that each row's answer begins with.
      first: number of the first row, if these are a part of others.
      progress: show a progress bar.

    Returns:
      A list a row, best first (samples: as drawn). Beam search may find fewer.

    Raises:
      ValueError: for a model that does not decode, a row too long for it.
    """
    how = settings or Settings()
    prefixes = prefixes or [()] * len(rows)
    copies = how.num_return if how.temperature else 1
    size = batch_size if first else prompts.power_of_two(max(len(rows), 1))
    size = sharding.rounded(min(batch_size, size))
    fixed = dict(eos_id=words.eos_id, used_ids=words.size, pad_id=words.pad_id)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: dict[int, list[Written]] = {}
    with tqdm.tqdm(total=len(rows), unit="text", disable=not progress) as bar:
        for begin in range(0, len(rows), size):
            chosen = by_length[begin : begin + size]
            empty = size - len(chosen)
            parts = [rows[i] for i in chosen] + [np.zeros(0, np.int32)] * empty
            stream = prompts.pad_rows(parts, size, words.pad_id)
            forced = [prefixes[i] for i in chosen] + [()] * empty
            if how.beams > 1:
                ids, score = beam.search(
                    model,
                    params,
                    stream,
                    prefixes=forced,
                    **fixed,
                    **dataclasses.asdict(how),
                )
            else:
                numbers = first + np.array([*chosen, *[0] * empty])
                ids, score = decoding.generate(
                    model,
                    params,
                    {k: np.repeat(v, copies, axis=0) for k, v in stream.items()},
                    key=sample_keys(seed, numbers, copies),
                    prefixes=[ids for ids in forced for _ in range(copies)],
                    **fixed,
                    **dataclasses.asdict(how),
                )
            ids_BKT = np.asarray(ids).reshape(size, -1, how.max_length)
            score_BK = np.asarray(score).reshape(size, -1)
            for i, each, scores in zip(chosen, ids_BKT, score_BK, strict=False):
                made = [_written(*one, words) for one in zip(each, scores, strict=True)]
                kept = [one for one in made if one.score > -np.inf] or made[:1]
                found[i] = kept[: how.num_return]
            bar.update(len(chosen))
    return [found[i] for i in range(len(rows))]


def _written(ids_T: np.ndarray, score: np.floating, words: Vocab) -> Written:
    ended = bool((ids_T == words.eos_id).any())
    ids_T = prompts.until_eos(ids_T, words)
    return Written(ids_T, float(score), ended)

"""Masked language modelling beside entities that are aligned with their mentions."""

import dataclasses
import functools

import numpy as np

from t5x_lite.example import Example, Passages, places_of
from t5x_lite.objectives import masking
from t5x_lite.objectives import units as units_lib
from t5x_lite.objectives.draws import Draws
from t5x_lite.vocab import Vocab


@dataclasses.dataclass(frozen=True)
class Entities:
    """A file of entities: how they are written, and what is known of them.

    Attributes:
        phrases: length in tokens -> mentions of that length, see `units.by_length`.
        of_phrase_P: int64 [P], the entity in [0, count) that a phrase is a mention of.
        count: how many entities there are.
        embeddings_EC: float32 [count, d_entity], or None: to be learned.
    """

    phrases: dict
    of_phrase_P: np.ndarray
    count: int
    embeddings_EC: np.ndarray | None


def masked_lm_entities(
    tokens: np.ndarray | Passages,
    rng: Draws,
    vocab: Vocab,
    *,
    entities: str,
    entity_random: float = 0.05,
    entity_mask: float = 0.15,
    density: float = 0.15,
    mask: float = 0.8,
    random: float = 0.1,
    sentence: str = "none",
) -> Example:
    """Masked LM and the denoising entity auto-encoder (Zhang et al. 2019, section 3.4).

    Mentions are found in the text as it was: the longest first, then the leftmost. The
    first token of each is aligned with its entity, some of them wrongly or not at all;
    the entities of all mentions are predicted.

    Args:
        tokens, rng, vocab: see `masking.masked_lm`.
        entities: file of the mentions and entities, see `load_entities`.
        entity_random: share of the mentions that are aligned with another entity, all
            equally likely.
        entity_mask: share of the mentions whose entity is not given.
        density, mask, random, sentence: see `masking.masked_lm`; ERNIE: sentence="nsp".

    Returns:
        Example with M = T // 2 mentions; those that a row does not have are 0.

    Raises:
        ValueError, FileNotFoundError: a knob is out of range, a file is not usable.
    """
    if min(entity_random, entity_mask) < 0 or entity_random + entity_mask >= 1:
        raise ValueError(
            f"entity_random={entity_random}, entity_mask={entity_mask}: shares of 0 or "
            "more are needed, together below 1 (ERNIE: 0.05 and 0.15)."
        )
    known = load_entities(entities, vocab)
    example = masking.masked_lm(
        tokens,
        rng,
        vocab,
        density=density,
        mask=mask,
        random=random,
        sentence=sentence,
    )
    places_BM, truth_BM = mentions(original(example), vocab, known)
    fate_BM = rng.uniform(truth_BM.shape[1])
    step_BM = 1 + np.floor(rng.uniform(truth_BM.shape[1]) * (known.count - 1))
    other_BM = (truth_BM - 1 + step_BM.astype(np.int32)) % known.count + 1
    read_BM = np.where(fate_BM < entity_random + entity_mask, 0, truth_BM)
    read_BM = np.where(fate_BM < entity_random, other_BM, read_BM)
    return dataclasses.replace(
        example,
        entities_BM=np.where(truth_BM > 0, read_BM, 0).astype(np.int32),
        entity_places_BM=places_BM,
        entity_targets_BM=truth_BM,
    )


def original(example: Example) -> np.ndarray:
    """The tokens before masking: int32 [B, T]."""
    assert example.places_BK is not None
    tokens_BT = example.tokens_BT.copy()
    rows_B1 = np.arange(len(tokens_BT))[:, None]
    hidden_BK = example.weights_BK > 0
    rows_BK = np.broadcast_to(rows_B1, hidden_BK.shape)
    at = rows_BK[hidden_BK], example.places_BK[hidden_BK]
    tokens_BT[at] = example.targets_BK[hidden_BK]
    return tokens_BT


def mentions(
    tokens_BT: np.ndarray, vocab: Vocab, known: Entities
) -> tuple[np.ndarray, np.ndarray]:
    """Where entities are mentioned, and which ones.

    Returns:
        (places_BM int32, the first token of each mention from the left; entities_BM
        int32, from 1), both 0 where a row has no more; M = T // 2.
    """
    starts_BT = units_lib.unit_starts(tokens_BT, vocab, "word")
    numbers_BT, _ = units_lib.find_phrases(tokens_BT, starts_BT, known.phrases)
    places_BM, there_BM = places_of(numbers_BT >= 0, tokens_BT.shape[1] // 2)
    numbers_BM = np.take_along_axis(numbers_BT, places_BM, axis=1)
    entities_BM = np.where(there_BM > 0, known.of_phrase_P[numbers_BM] + 1, 0)
    return places_BM, entities_BM.astype(np.int32)


@functools.lru_cache(maxsize=2)
def load_entities(path: str, vocab: Vocab) -> Entities:
    """Reads a file of mentions and their entities.

    A .txt has a mention a line. An .npz has what `python -m t5x_lite.data.mining
    phrases` writes (`phrases` int [P, n] padded with -1, `vocab`) and may have
    `entities` int [P], the entity of each phrase (else each phrase is its own), and
    `embeddings` float [E, d_entity], such as TransE's (Bordes et al. 2013).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or one of another vocabulary.
    """
    phrases = units_lib.read_phrases(path, vocab, "entities")
    of_phrase_P, embeddings_EC = np.arange(len(phrases)), None
    if not path.endswith(".txt"):
        with np.load(path, allow_pickle=False) as file:
            of_phrase_P = file["entities"] if "entities" in file else of_phrase_P
            embeddings_EC = file["embeddings"] if "embeddings" in file else None
    if of_phrase_P.shape != (len(phrases),) or of_phrase_P.dtype.kind not in "iu":
        raise ValueError(
            f"entities={path!r} has `entities` of {of_phrase_P.dtype}"
            f"{list(of_phrase_P.shape)}; integers [{len(phrases)}] are needed, one for "
            "each of its `phrases`."
        )
    count = int(of_phrase_P.max(initial=-1)) + 1
    if embeddings_EC is not None:
        shape, kind = embeddings_EC.shape, embeddings_EC.dtype.kind
        if kind != "f" or len(shape) != 2 or shape[0] < count:
            raise ValueError(
                f"entities={path!r} has `embeddings` of {embeddings_EC.dtype}"
                f"{list(shape)}; floats [{count} or more, d_entity] are needed."
            )
        count, embeddings_EC = shape[0], embeddings_EC.astype(np.float32, copy=False)
    if count < 2 or of_phrase_P.min() < 0:
        raise ValueError(
            f"entities={path!r} holds {count} entities, the smallest number is "
            f"{of_phrase_P.min(initial=0)}: two or more from 0 on are needed."
        )
    tables = units_lib.by_length(phrases)
    return Entities(tables, of_phrase_P.astype(np.int64), count, embeddings_EC)

"""Mine a corpus for masking: phrases (ERNIE) and tables of similar pieces (MacBERT).

examples:
  python -m t5x_lite.data.mining phrases --data='data/train.jsonl' \\
      --vocab=data/vocab_4k.model --output=phrases.npz
  python -m t5x_lite.data.mining similar --data='data/train.jsonl' \\
      --vocab=data/vocab_4k.model --output=similar.npy
"""

import collections
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite import vocab as vocabularies
from t5x_lite.data import sources
from t5x_lite.objectives import units
from t5x_lite.vocab import Vocab


def mine_phrases(
    windows: Iterable[np.ndarray],
    vocab: Vocab,
    *,
    longest: int = 4,
    min_count: int = 10,
    min_pmi: float = 3.0,
    most: int = 50_000,
    memory: int = 5_000_000,
) -> dict[str, Any]:
    """Word n-grams that stand together more often than their words' counts explain.

    The measure is pointwise mutual information (Church and Hanks 1990), in nats:
    log p(n-gram) - sum of log p(word), divided by n - 1 joints.

    Args:
        windows: int32 [T] tokens each, of any length; no phrase crosses two.
        vocab: says where words begin; punctuation that does not begin a word belongs
            to the word before it.
        longest: most words of a phrase, 2 or more.
        min_count: how often it occurs at least.
        min_pmi: least PMI per joint.
        most: how many phrases to keep, those of the highest count * PMI.
        memory: above so many different n-grams the rarest are forgotten.

    Returns:
        phrases int32 [P, n] padded with -1, counts int64 [P], pmi float32 [P], vocab
        (fingerprint): what `masked_lm`'s `spans` reads once it is saved as .npz.

    Raises:
        ValueError: longest < 2, or nothing is frequent enough.
    """
    if longest < 2:
        raise ValueError(f"longest={longest}: a phrase has 2 words or more.")
    counts: list[collections.Counter] = [collections.Counter() for _ in range(longest)]
    for tokens_T in windows:
        words = _words(np.asarray(tokens_T, np.int32), vocab)
        for n, counter in enumerate(counts, start=1):
            counter.update(zip(*(words[i:] for i in range(n)), strict=False))
            if len(counter) > memory:
                _forget(counter, memory // 2)
    total = max(sum(counts[0].values()), 1)
    single = {word: np.log(c / total) for (word,), c in counts[0].items()}
    found = []
    for counter in counts[1:]:
        for words, count in counter.items():
            if count < min_count or b"" in words or not all(w in single for w in words):
                continue
            pmi = np.log(count / total) - sum(single[w] for w in words)
            pmi /= len(words) - 1
            if pmi >= min_pmi:
                found.append((-count * pmi, b"".join(words), count, pmi))
    if not found:
        raise ValueError(
            f"no phrase of 2 to {longest} words occurs {min_count} times with a PMI of "
            f"{min_pmi}. Lower --min_count or --min_pmi, or give more text."
        )
    found = sorted(found)[:most]
    rows = [np.frombuffer(ids, np.int32) for _, ids, _, _ in found]
    phrases_Pn = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row_n, ids_n in zip(phrases_Pn, rows, strict=True):
        row_n[: len(ids_n)] = ids_n
    return {
        "phrases": phrases_Pn,
        "counts": np.array([count for _, _, count, _ in found], np.int64),
        "pmi": np.array([pmi for *_, pmi in found], np.float32),
        "vocab": np.array(vocab.fingerprint),
    }


def similar_words(
    windows: Iterable[np.ndarray],
    vocab: Vocab,
    *,
    k: int = 10,
    width: int = 5,
    dims: int = 100,
    min_count: int = 20,
) -> np.ndarray:
    """The k pieces of text nearest to each, by the company they keep.

    Positive PMI of co-occurrence within `width` tokens, truncated SVD with the square
    roots of the singular values, cosine (Levy et al. 2015, sections 2-3). A piece that
    begins a word is only compared with others that do.

    Args:
        windows: int32 [T] tokens each.
        k: how many similar pieces; fewer than k + 1 candidates leave -1.
        width: tokens to either side that count as company.
        dims: dimensions of the SVD.
        min_count: rarer pieces get no row and are in none.

    Returns:
        int32 [V, k], nearest first, -1 = none: what `masked_lm`'s `similar` reads.

    Raises:
        ValueError: too little text.
    """
    from scipy import sparse
    from scipy.sparse import linalg

    V = vocab.size
    counts_V = np.zeros(V, np.int64)
    pairs_VV = sparse.csr_matrix((V, V), dtype=np.float64)
    for tokens_T in _blocks(windows, vocab):
        counts_V += np.bincount(tokens_T, minlength=V)
        for distance in range(1, width + 1):
            left, right = tokens_T[:-distance], tokens_T[distance:]
            once = np.ones(len(left))
            pairs_VV = pairs_VV + sparse.csr_matrix((once, (left, right)), (V, V))
    ordinary = vocab.ordinary
    kept = ordinary[counts_V[ordinary] >= min_count]
    if len(kept) < 3:
        raise ValueError(
            f"{len(kept)} pieces occur {min_count} times or more. Lower --min_count or "
            "give more text."
        )
    pairs = (pairs_VV + pairs_VV.T).tocsr()[kept][:, kept].tocoo()
    sums = np.asarray(pairs.sum(axis=1)).reshape(-1)
    pmi = np.log(pairs.data * sums.sum() / (sums[pairs.row] * sums[pairs.col]))
    ppmi = sparse.csr_matrix((np.maximum(pmi, 0), (pairs.row, pairs.col)), pairs.shape)
    # A fixed start of the iteration makes the result repeatable.
    start = np.random.default_rng(0).normal(size=len(kept))
    vectors, values, _ = linalg.svds(ppmi, k=min(dims, len(kept) - 1), v0=start)
    vectors = vectors * np.sqrt(np.maximum(values, 0))
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.maximum(norms, 1e-12)
    begins = vocab.starts_word(np.stack([kept, kept], axis=1))[:, 1]
    table = np.full((V, k), -1, np.int32)
    for like in (True, False):
        _nearest(table, kept[begins == like], vectors[begins == like])
    return table


def _nearest(table_Vk: np.ndarray, ids_P: np.ndarray, vectors_PD: np.ndarray) -> None:
    """Fills the rows of these ids with the nearest others among them."""
    k = min(table_Vk.shape[1], len(ids_P) - 1)
    for first in range(0, len(ids_P) if k > 0 else 0, 1024):
        rows = np.arange(first, min(first + 1024, len(ids_P)))
        cosine = vectors_PD[rows] @ vectors_PD.T
        cosine[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        table_Vk[ids_P[rows], :k] = ids_P[nearest]


def _words(tokens_T: np.ndarray, vocab: Vocab) -> list[bytes]:
    """The words as bytes of their ids; b"" for marks and EOS."""
    if not tokens_T.size:
        return []
    starts_T = units.unit_starts(tokens_T[None], vocab, "word")[0]
    text_T = units.is_text(tokens_T, vocab)
    begins = np.flatnonzero(starts_T).tolist()
    data, size = tokens_T.tobytes(), tokens_T.itemsize
    bounds = itertools.pairwise([*begins, len(tokens_T)])
    return [data[i * size : j * size] if text_T[i] else b"" for i, j in bounds]


def _forget(counter: collections.Counter, keep: int) -> None:
    kept = dict(counter.most_common(keep))
    counter.clear()
    counter.update(kept)


def _blocks(windows: Iterable[np.ndarray], vocab: Vocab) -> Iterator[np.ndarray]:
    """Joins windows into blocks of about a million tokens, EOS between them."""
    held, size = [], 0
    for tokens_T in windows:
        held += [tokens_T, np.array([vocab.eos_id], np.int32)]
        size += len(tokens_T) + 1
        if size >= 2**20:
            yield np.concatenate(held)
            held, size = [], 0
    if held:
        yield np.concatenate(held)


def _documents(
    spec: str, options: sources.Options, vocab: Vocab
) -> Iterator[np.ndarray]:
    """Tokens of each document, with a progress bar."""
    import tqdm

    with tqdm.tqdm(unit="B", unit_scale=True, desc="reading text") as bar:
        texts = sources.documents(spec, options=options, progress=bar.update)
        while batch := list(itertools.islice(texts, 64)):
            yield from vocab.encode_batch(batch)


def main(argv: list[str] | None = None):
    from t5x_lite import cli  # not at the top: the data path needs no command line

    parser = cli.parser(__doc__)
    parser.prog = "python -m t5x_lite.data.mining"
    commands = parser.add_subparsers(dest="command", required=True)
    phrases = commands.add_parser(
        "phrases", help="n-grams of words that belong together"
    )
    phrases.add_argument(
        "--longest", type=int, default=4, help="most words of a phrase"
    )
    phrases.add_argument("--min_count", type=int, default=10, help="least occurrences")
    phrases.add_argument("--min_pmi", type=float, default=3.0, help="nats per joint")
    phrases.add_argument("--most", type=int, default=50_000, help="phrases to keep")
    similar = commands.add_parser("similar", help="pieces that stand in similar places")
    similar.add_argument("--k", type=int, default=10, help="similar pieces of each")
    similar.add_argument("--width", type=int, default=5, help="tokens to either side")
    similar.add_argument("--dims", type=int, default=100, help="dimensions of the SVD")
    similar.add_argument("--min_count", type=int, default=20, help="least occurrences")
    for command in (phrases, similar):
        command.add_argument("--data", required=True, help="text; see data/sources.py")
        cli.add_reading(command)
        command.add_argument("--vocab", required=True, help="'bytes' or a .model file")
        command.add_argument("--output", required=True, help="the file to write")
    args = parser.parse_args(argv)
    ending = ".npz" if args.command == "phrases" else ".npy"
    if not args.output.endswith(ending):
        raise ValueError(f"--output={args.output!r}: the name must end in {ending}.")
    vocab = vocabularies.load(args.vocab)
    texts = _documents(args.data, sources.Options.of(args), vocab)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    if args.command == "phrases":
        knobs = {
            n: getattr(args, n) for n in ("longest", "min_count", "min_pmi", "most")
        }
        mined = mine_phrases(texts, vocab, **knobs)
        np.savez(args.output, **mined)
        rows = [[i for i in row if i >= 0] for row in mined["phrases"][:10].tolist()]
        shown = ", ".join(vocab.decode(row).strip() for row in rows)
        print(f"wrote {args.output}: {len(mined['phrases'])} phrases; first: {shown}")
    else:
        knobs = {n: getattr(args, n) for n in ("k", "width", "dims", "min_count")}
        table_Vk = similar_words(texts, vocab, **knobs)
        np.save(args.output, table_Vk, allow_pickle=False)
        rows = int((table_Vk[:, 0] >= 0).sum())
        print(f"wrote {args.output}: {rows} of {len(table_Vk)} ids have similar ones")


if __name__ == "__main__":
    from t5x_lite import cli

    cli.run(main)

"""Fill the gaps of a text with a trained model.

    python -m t5x_lite.generate --workdir=runs/demo \\
        --text="It is a truth ___ acknowledged, that a ___ man"
    python -m t5x_lite.generate --workdir=runs/demo --input=gaps.txt \\
        --output=filled.jsonl --temperature=0.8 --top_p=0.95 --seed=1

A gap is ___ (three underscores or more) or <extra_id_0>, <extra_id_1>, ...; gaps are
numbered from left to right. Fills are printed in [brackets]. --input holds one text a
line; blank lines are skipped. --output gets one JSON object a text: text, filled,
fills, score (the sum of the fills' log-probabilities).
"""

import json
import os
import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np
import tqdm

from t5x_lite import checkpoint, cli, decoding, run, sharding, vocab
from t5x_lite.vocab import Vocab

GAP = re.compile(r"_{3,}|<extra_id_\d+>")
# A private-use character: no tokenizer joins it with its neighbours.
MARK = "\ue000"
SHORTEST_BUCKET = 32


class Filled(NamedTuple):
    """A text, what was put into each of its gaps, and its score (log-probability)."""

    pieces: list[str]
    fills: list[str]
    score: float

    def joined(self, marks: str = "[]") -> str:
        """The whole text, each fill between the two marks ('' = none)."""
        left, right = marks or ("", "")
        parts = [f"{left}{fill}{right}" for fill in self.fills] + [""]
        return "".join(a + b for a, b in zip(self.pieces, parts, strict=True))


def main(argv: list[str] | None = None):
    parser = cli.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of a training run")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="a text with gaps")
    given.add_argument("--input", help="a file with one such text a line")
    parser.add_argument("--output", help="a .jsonl file to write")
    parser.add_argument("--step", type=int, default=-1, help="checkpoint; -1 = latest")
    parser.add_argument(
        "--max_length", type=int, default=64, help="tokens of all fills"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--top_k", type=int, default=0, help="0 = all tokens")
    parser.add_argument("--top_p", type=float, default=0.0, help="0 = all tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--batch_size", type=int, default=16, help="texts at a time")
    flags = parser.parse_args(argv)
    # Every error of the input comes before the model is read.
    decoding.Sampling(flags.temperature, flags.top_k, flags.top_p)
    for name in ("max_length", "batch_size"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name}={getattr(flags, name)} must be at least 1.")
    if flags.output and not pathlib.Path(flags.output).absolute().parent.is_dir():
        raise FileNotFoundError(f"--output={flags.output}: its directory is missing.")
    if flags.input:
        texts = read_texts(flags.input)
    else:
        split_gaps(flags.text)
        texts = [flags.text]

    cfg, model, params, _, meta = checkpoint.load_run(flags.workdir, flags.step)
    run.prepare_jax(cfg)
    words = vocab.load(cfg.data.vocab, cfg.data.sentinels)
    checkpoint.check_vocab(meta, words)
    found = fill_all(
        model,
        params,
        words,
        texts,
        max_length=flags.max_length,
        sampling=decoding.Sampling(flags.temperature, flags.top_k, flags.top_p),
        seed=flags.seed,
        batch_size=flags.batch_size,
        progress=flags.input is not None,
    )
    for one in found:
        # An untrained model over bytes also writes control characters.
        print("".join(c if c.isprintable() else "\ufffd" for c in one.joined()))
    if flags.output:
        write_jsonl(flags.output, texts, found)


def read_texts(path: str) -> list[str]:
    """The non-blank lines of a file, each with a gap.

    Raises:
      FileNotFoundError, ValueError: naming the file and the line.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--input={path}: there is no such file.")
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise ValueError(f"--input={path} is not UTF-8 text: {e}.") from e
    if not any(line.strip() for line in lines):
        raise ValueError(f"--input={path} is empty. Put one text with ___ on a line.")
    for number, line in enumerate(lines, 1):
        if line.strip():
            split_gaps(line, f"--input={path}, line {number}")
    return [line for line in lines if line.strip()]


def split_gaps(text: str, where: str = "the text") -> list[str]:
    """The pieces around the gaps of a text: one more than it has gaps.

    Raises:
      ValueError: if there is no gap.
    """
    pieces = GAP.split(text)
    if len(pieces) == 1:
        raise ValueError(
            f"{where} has no gap to fill: {text[:60]!r}. Mark gaps with ___ (three "
            "underscores)."
        )
    return pieces


def encode_gaps(pieces: list[str], words: Vocab) -> np.ndarray:
    """Ids [T] int32 of the pieces with sentinels 0, 1, ... between them, then EOS.

    The space before a gap belongs to the fill, as it does in training.
    """
    if len(pieces) - 1 > words.sentinels:
        raise ValueError(
            f"the text has {len(pieces) - 1} gaps, but the vocabulary "
            f"{words.spec!r} has {words.sentinels} sentinels. Split the text."
        )
    ids = []
    for i, piece in enumerate(pieces):
        last = i == len(pieces) - 1
        ids.append(_encode_piece(piece if last else piece.rstrip(), i > 0, words))
        ids.append([words.eos_id if last else words.sentinel(i)])
    return np.concatenate(ids).astype(np.int32)


def _encode_piece(piece: str, inside: bool, words: Vocab) -> np.ndarray:
    """Ids of a piece; SentencePiece would begin it with a space of its own."""
    if not inside or not piece or piece[0].isspace():
        return words.encode(piece)
    mark = words.encode(MARK)
    return words.encode(MARK + piece)[len(mark) :]


def parse_fills(ids: np.ndarray, gaps: int, words: Vocab) -> list[str]:
    """Text of each gap in what the model wrote: '<0> a <1> b EOS'; '' if left out.

    Runs of white space become one space, as the output has a line a text.
    """
    ids = np.asarray(ids)
    ids = ids[: np.argmax(ids == words.eos_id)] if (ids == words.eos_id).any() else ids
    first = words.size - words.sentinels
    cuts = np.flatnonzero(ids >= first)
    fills = [""] * gaps
    # Backwards, so that the first of a sentinel written twice counts.
    ends = np.append(cuts, len(ids))[1:]
    for begin, end in zip(cuts[::-1], ends[::-1], strict=True):
        gap = words.size - 1 - int(ids[begin])
        if gap < gaps:
            name = f"<extra_id_{gap}>"
            text = words.decode(ids[begin:end]).removeprefix(name)
            fills[gap] = " ".join(text.split())
    return fills


def fill(model, params, words: Vocab, texts: list[str], **settings) -> list[str]:
    """The texts with their gaps filled in [brackets]; settings as in `fill_all`."""
    return [one.joined() for one in fill_all(model, params, words, texts, **settings)]


def fill_all(
    model,
    params,
    words: Vocab,
    texts: list[str],
    *,
    max_length: int = 64,
    sampling: decoding.Sampling | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
) -> list[Filled]:
    """Fills the gaps of many texts, in the order given.

    Texts of about the same length are decoded together, padded to few lengths, so that
    there are few shapes to compile.

    Args:
      max_length: tokens the model may write for one text.
      sampling: how tokens are drawn; None = greedy.
      progress: show a progress bar.

    Raises:
      ValueError: for a text without a gap or with more gaps than sentinels.
    """
    how = sampling or decoding.Sampling()
    pieces = [split_gaps(text) for text in texts]
    rows = [encode_gaps(p, words) for p in pieces]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: dict[int, Filled] = {}
    with tqdm.tqdm(total=len(rows), unit="text", disable=not progress) as bar:
        for begin in range(0, len(rows), batch_size):
            chosen = by_length[begin : begin + batch_size]
            stream = pad_rows([rows[i] for i in chosen], batch_size, words.pad_id)
            with sharding.unconstrained():
                tokens_BT, score_B = decoding.generate(
                    model,
                    params,
                    stream,
                    max_length=max_length,
                    eos_id=words.eos_id,
                    used_ids=words.size,
                    temperature=how.temperature,
                    top_k=how.top_k,
                    top_p=how.top_p,
                    key=jax.random.fold_in(jax.random.key(seed), begin),
                    pad_id=words.pad_id,
                )
            tokens_BT, score_B = np.asarray(tokens_BT), np.asarray(score_B)
            for row, i in enumerate(chosen):
                fills = parse_fills(tokens_BT[row], len(pieces[i]) - 1, words)
                found[i] = Filled(pieces[i], fills, float(score_B[row]))
            bar.update(len(chosen))
    return [found[i] for i in range(len(rows))]


def pad_rows(rows: list[np.ndarray], batch_size: int, pad_id: int) -> dict:
    """An encoder stream [B, S]; S and B are powers of two, or `batch_size`."""
    S = max(SHORTEST_BUCKET, _power_of_two(max(map(len, rows))))
    B = min(batch_size, _power_of_two(len(rows)))
    tokens_BS = np.full((B, S), pad_id, np.int32)
    segments_BS = np.zeros((B, S), np.int32)
    for i, row in enumerate(rows):
        tokens_BS[i, : len(row)] = row
        segments_BS[i, : len(row)] = 1
    positions_BS = np.tile(np.arange(S, dtype=np.int32), (B, 1))
    return {
        "tokens": tokens_BS,
        "positions": positions_BS,
        "segments": segments_BS,
        "ranks": np.zeros((B, S), np.int32),
    }


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def write_jsonl(path: str, texts: list[str], found: list[Filled]):
    """One object a text, written in one stroke."""
    temporary = pathlib.Path(f"{path}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        for text, one in zip(texts, found, strict=True):
            row = dict(
                text=text, filled=one.joined(""), fills=one.fills, score=one.score
            )
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    cli.run(main)

"""Fill the gaps of a text with a trained model, or continue it.

    python -m t5x_lite.generate --workdir=runs/demo \\
        --text="It is a truth ___ acknowledged, that a ___ man"
    python -m t5x_lite.generate --workdir=runs/bert --text="the ___ of God"
    python -m t5x_lite.generate --workdir=runs/gpt --text="Once upon" \\
        --temperature=0.8 --top_p=0.95 --seed=1
    python -m t5x_lite.generate --workdir=runs/demo --input=gaps.txt \\
        --output=filled.jsonl

What a model does is what it was trained to do:
  span_corruption, ul2, iid_denoising   fills gaps, however long
  structure encoder (masked_lm, ...)    fills gaps of --gap_tokens tokens each
  causal_lm, prefix_lm                  continue the text until EOS or --max_length

A gap is ___ (three underscores or more) or <extra_id_0>, <extra_id_1>, ...; gaps are
numbered from left to right. What the model writes is printed in [brackets]. --input
holds one text a line; blank lines are skipped. --output gets one JSON object a text:
text, filled, fills, score (the sum of the log-probabilities of what was written).
"""

import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from t5x_lite import checkpoint, cli, decoding, prompts, run, sharding, vocab
from t5x_lite import model as model_lib
from t5x_lite.prompts import Filled, Task
from t5x_lite.sampling import Sampling, draw
from t5x_lite.vocab import Vocab


def main(argv: list[str] | None = None):
    parser = cli.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="directory of a training run")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="a text with gaps, or to continue")
    given.add_argument("--input", help="a file with one such text a line")
    parser.add_argument("--output", help="a .jsonl file to write")
    parser.add_argument("--step", type=int, default=-1, help="checkpoint; -1 = latest")
    parser.add_argument(
        "--max_length", type=int, default=64, help="tokens written for one text"
    )
    parser.add_argument(
        "--gap_tokens", type=int, default=1, help="tokens of a gap, of an encoder"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--top_k", type=int, default=0, help="0 = all tokens")
    parser.add_argument("--top_p", type=float, default=0.0, help="0 = all tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--batch_size", type=int, default=16, help="texts at a time")
    flags = parser.parse_args(argv)
    # Every error that needs no model comes before it is read.
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p)
    for name in ("max_length", "batch_size", "gap_tokens"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name}={getattr(flags, name)} must be at least 1.")
    if flags.output and not pathlib.Path(flags.output).absolute().parent.is_dir():
        raise FileNotFoundError(f"--output={flags.output}: its directory is missing.")
    lines = read_lines(flags.input) if flags.input else {"the text": flags.text}

    cfg, model, params, _, meta = checkpoint.load_run(flags.workdir, flags.step)
    run.prepare_jax(cfg)
    task = prompts.task_of(cfg)
    if flags.gap_tokens > 1 and task.kind != "masks":
        raise ValueError(
            f"--gap_tokens={flags.gap_tokens} is for encoders, which fill in place; "
            "this model decides itself how much it writes. Leave it out."
        )
    for where, text in lines.items():
        prompts.split(text, task, where)
    texts = list(lines.values())
    words = vocab.load(cfg.data.vocab, cfg.data.sentinels)
    checkpoint.check_vocab(meta, words)
    found = fill_all(
        model,
        params,
        words,
        texts,
        task=task,
        max_length=flags.max_length,
        gap_tokens=flags.gap_tokens,
        sampling=sampling,
        seed=flags.seed,
        batch_size=flags.batch_size,
        progress=flags.input is not None,
    )
    for one in found:
        print(prompts.printable(one.joined()))
    if flags.output:
        write_jsonl(flags.output, texts, found)


def read_lines(path: str) -> dict[str, str]:
    """The non-blank lines of a file, each under a name that says where it stands.

    Raises:
      FileNotFoundError, ValueError: naming the file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--input={path}: there is no such file.")
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise ValueError(f"--input={path} is not UTF-8 text: {e}.") from e
    if not any(line.strip() for line in lines):
        raise ValueError(f"--input={path} is empty. Put one text on a line.")
    return {
        f"--input={path}, line {number}": line
        for number, line in enumerate(lines, 1)
        if line.strip()
    }


def fill(model, params, words: Vocab, texts: list[str], **settings) -> list[str]:
    """The texts with what was written in [brackets]; settings as in `fill_all`."""
    return [one.joined() for one in fill_all(model, params, words, texts, **settings)]


def fill_all(
    model,
    params,
    words: Vocab,
    texts: list[str],
    *,
    task: Task | None = None,
    max_length: int = 64,
    gap_tokens: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
) -> list[Filled]:
    """Fills the gaps of many texts, or continues them, in the order given.

    Texts of about the same length are decoded together, padded to few lengths, so that
    there are few shapes to compile.

    Args:
      task: what the model learned (`prompts.task_of`); None = gaps behind sentinels.
      max_length: tokens the model may write for one text, unless it fills in place.
      gap_tokens: tokens of each gap that is filled in place.
      sampling: how tokens are drawn; None = greedy.
      progress: show a progress bar.

    Raises:
      ValueError: for a text without a gap, with more gaps than sentinels, or longer
        than the model has positions for.
    """
    how, task = sampling or Sampling(), task or Task()
    pieces = [prompts.split(text, task) for text in texts]
    rows = [prompts.encode(p, words, task, gap_tokens) for p in pieces]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: dict[int, Filled] = {}
    with tqdm.tqdm(total=len(rows), unit="text", disable=not progress) as bar:
        for begin in range(0, len(rows), batch_size):
            chosen = by_length[begin : begin + batch_size]
            stream = prompts.pad_rows(
                [rows[i] for i in chosen], batch_size, words.pad_id
            )
            key = jax.random.fold_in(jax.random.key(seed), begin)
            with sharding.unconstrained():
                if task.kind == "masks":
                    ids, score_B = fill_masks(model, params, words, stream, how, key)
                else:
                    ids, score_B = decoding.generate(
                        model,
                        params,
                        stream,
                        max_length=max_length,
                        eos_id=words.eos_id,
                        used_ids=words.size,
                        temperature=how.temperature,
                        top_k=how.top_k,
                        top_p=how.top_p,
                        key=key,
                        pad_id=words.pad_id,
                    )
            ids, score_B = np.asarray(ids), np.asarray(score_B)
            for row, i in enumerate(chosen):
                gaps, ids_T = len(pieces[i]) - 1, ids[row]
                if task.kind == "masks":
                    ids_T = ids_T[: gaps * gap_tokens]
                fills = prompts.parse(ids_T, gaps, words, task)
                found[i] = Filled(pieces[i], fills, float(score_B[row]))
            bar.update(len(chosen))
    return [found[i] for i in range(len(rows))]


def fill_masks(model, params, words: Vocab, stream: dict, how: Sampling, key=None):
    """(tokens [B, K] for the [MASK] of a stream, left to right, score float32 [B])."""
    streams = prompts.masked_streams(stream, words, model.cfg.query_streams)
    allowed_V = np.isin(np.arange(words.size), words.ordinary)
    ids_BK, logp_BK = predict(model, params, streams, allowed_V, how, key)
    weights_BK = streams["main"]["weights"]
    return ids_BK, np.sum(np.asarray(logp_BK) * weights_BK, axis=1)


def predict(
    model: Any,
    params: dict,
    batch: dict,
    allowed_V: np.ndarray,
    how: Sampling | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws every predicted place of a batch by itself, all in one pass.

    Args:
      batch: streams as in training; targets and weights are not read.
      allowed_V: bool by id, the ids that may be drawn.

    Returns:
      (tokens int32 [B, K], their log-probabilities among the allowed, float32 [B, K]).
    """
    how = how or Sampling()
    for name, stream in batch.items():
        longest = int(np.max(np.asarray(stream["positions"]))) + 1
        decoding.check_room(model.cfg, longest, f"the {name} stream")
    allowed_V = np.pad(allowed_V, (0, model.cfg.vocab_size - len(allowed_V)))
    return _predict(params, batch, allowed_V, how.key(key), model.cfg, how)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _predict(params, batch, allowed_V, key, cfg, how):
    cast = jax.tree.map(lambda p: p.astype(cfg.dtype), params)
    bound: Any = model_lib.bind(model_lib.build(cfg), cast)
    logits_BKV = bound.logits(bound.outputs(batch).cells_BKE)
    B, K, V = logits_BKV.shape
    logits_XV = jnp.where(allowed_V[None], logits_BKV.reshape(B * K, V), -jnp.inf)
    tokens_X = draw(logits_XV, key, how)
    logp_XV = jax.nn.log_softmax(logits_XV, axis=-1)
    logp_X1 = jnp.take_along_axis(logp_XV, tokens_X[:, None], axis=-1)
    return tokens_X.reshape(B, K), logp_X1.reshape(B, K)


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

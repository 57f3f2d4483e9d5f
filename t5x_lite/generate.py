"""Fill the gaps of a text with a trained model, or continue it.

    python -m t5x_lite.generate --workdir=runs/demo \\
        --text="It is a truth ___ acknowledged, that a ___ man"
    python -m t5x_lite.generate --workdir=runs/bert --text="the ___ of God"
    python -m t5x_lite.generate --workdir=runs/gpt --text="Once upon" \\
        --temperature=0.8 --top_p=0.95 --seed=1 --num_return=3
    python -m t5x_lite.generate --workdir=runs/gpt --input=texts.jsonl \\
        --output=made.jsonl --beams=4 --length_penalty=0.6 --no_repeat_ngram=3
    python -m t5x_lite.generate --workdir=runs/prefix_lm --text="It was late." \\
        --prefix="She" --min_length=10

What a model does is what it was trained to do:
  span_corruption, ul2, iid_denoising   fills gaps, however long
  structure encoder (masked_lm, ...)    fills gaps of --gap_tokens tokens each
  causal_lm, prefix_lm                  continue the text until EOS or --max_length

A gap is ___ (three underscores or more) or <extra_id_0>, <extra_id_1>, ...; gaps are
numbered from left to right. What the model writes is printed in [brackets].

--input is a .jsonl file, an object with "text" (or --field) a line, or has one text a
line; blank lines are skipped. --output grows by one JSON object a text, in their order:
id (if the text has one), text, filled, fills, score (the sum of the log-probabilities
of what was written; of a beam over the norm of its length), others (--num_return). An
interrupted command goes on when it is given again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from t5x_lite import (
    answers,
    checkpoint,
    cli,
    compatible,
    decoding,
    parameters,
    prompts,
    run,
    sharding,
    vocab,
)
from t5x_lite import model as model_lib
from t5x_lite.config import Config, ShardingConfig
from t5x_lite.prompts import Filled, Task
from t5x_lite.sampling import Sampling, draw, folded, row_keys, sample_keys
from t5x_lite.settings import EARLY_STOPPING, LENGTH_NORMS, Settings
from t5x_lite.vocab import Vocab
from t5x_lite.writing import Written, continue_all

# Settings of texts that are written one token after the other.
WRITING = ("min_length", "beams", "no_repeat_ngram", "num_return", "prefix")


def parser() -> cli.Parser:
    made, default = cli.parser(__doc__), Settings()
    made.add_argument("--workdir", required=True, help="directory of a training run")
    given = made.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="a text with gaps, or to continue")
    given.add_argument("--input", help="a file of such texts: .jsonl, or one a line")
    made.add_argument("--field", default="text", help="of a .jsonl --input")
    made.add_argument("--output", help="a .jsonl file to write, or to go on with")
    made.add_argument("--step", type=int, default=-1, help="checkpoint; -1 = latest")
    made.add_argument("--prefix", default="", help="what every answer begins with")
    made.add_argument("--gap_tokens", type=int, default=1, help="of a gap, encoders")
    made.add_argument("--seed", type=int, default=0, help="of the samples")
    made.add_argument("--batch_size", type=int, default=16, help="texts at a time")
    made.add_argument("--data", type=int, default=1, help="devices a batch is split on")
    made.add_argument(
        "--tensor", type=int, default=1, help="devices a layer is split on"
    )
    for name, about in (
        ("max_length", "tokens written for one text"),
        ("min_length", "tokens before its end"),
        ("temperature", "0 = greedy"),
        ("top_k", "0 = all tokens"),
        ("top_p", "0 = all tokens"),
        ("beams", "width of beam search; 1 = none"),
        ("length_penalty", "of a beam, exponent alpha; 0 = none"),
        ("no_repeat_ngram", "tokens that may not come again in a row; 0 = any"),
        ("num_return", "answers for each text: beams, or samples"),
    ):
        value = getattr(default, name)
        made.add_argument(f"--{name}", type=type(value), default=value, help=about)
    made.add_argument(
        "--length_norm",
        default=default.length_norm,
        choices=[*LENGTH_NORMS],
        help="wu: ((5 + n) / 6)^alpha, length: n^alpha",
    )
    made.add_argument(
        "--early_stopping",
        default=default.early_stopping,
        choices=EARLY_STOPPING,
        help="of beams: never before nothing can be better; others as transformers",
    )
    return made


def main(argv: list[str] | None = None):
    flags = parser().parse_args(argv)
    # Every error that needs no model comes before it is read.
    names = [field.name for field in dataclasses.fields(Settings)]
    try:
        settings = Settings(**{name: getattr(flags, name) for name in names})
    except ValueError as e:
        raise ValueError(f"--{e}") from e
    for name in ("batch_size", "gap_tokens", "data", "tensor"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name}={getattr(flags, name)} must be at least 1.")
    if flags.output:
        answers.check_directory(flags.output)
    texts = [answers.Text(flags.text)]
    if flags.input:
        texts = answers.read(flags.input, flags.field)

    cfg, model, params, step, meta = checkpoint.load_run(flags.workdir, flags.step)
    run.prepare_jax(cfg)
    task = prompts.task_of(cfg)
    _check_task(flags, task)
    words = vocab.load(cfg.data.vocab, cfg.data.sentinels)
    compatible.check_vocab(meta, words)
    prefix = prompts.prefix(flags.prefix, words, task)
    for text in texts:
        pieces = prompts.split(text.text, task, text.where)
        ids = prompts.encode(pieces, words, task, flags.gap_tokens)
        if task.kind != "masks":
            room = (len(ids), len(prefix), settings.max_length, text.where)
            decoding.check_fits(model.cfg, *room)
    fill = functools.partial(
        fill_all,
        model,
        words=words,
        task=task,
        settings=settings,
        prefix=prefix,
        gap_tokens=flags.gap_tokens,
        seed=flags.seed,
        batch_size=flags.batch_size,
    )
    with _devices(flags, cfg, model, params) as params:
        if not flags.output:
            for begin in range(0, len(texts), flags.batch_size):
                part = [t.text for t in texts[begin : begin + flags.batch_size]]
                for one in fill(params, texts=part, first=begin):
                    for each in (one, *one.others):
                        print(prompts.printable(each.joined()), flush=True)
            return
        about = _about(flags, settings, step, meta)
        with answers.Answers(flags.output, about, len(texts)) as out:
            _write(out, texts, flags.batch_size, functools.partial(fill, params))


def _check_task(flags, task: Task):
    if flags.gap_tokens > 1 and task.kind != "masks":
        raise ValueError(
            f"--gap_tokens={flags.gap_tokens} is for encoders, which fill in place; "
            "this model decides itself how much it writes. Leave it out."
        )
    default = parser()
    for name in WRITING if task.kind == "masks" else ():
        if getattr(flags, name) != default.get_default(name):
            raise ValueError(
                f"--{name}={getattr(flags, name)} is for models that write one token "
                "after the other; an encoder fills all places at once. Leave it out."
            )


def _about(flags, settings: Settings, step: int, meta: dict) -> dict:
    """Everything that the answers depend on, by the name of its flag."""
    kept = ("prefix", "gap_tokens", "seed", "batch_size", "data", "tensor", "field")
    known = json.dumps(meta, sort_keys=True, default=str).encode()
    texts = answers.digest(flags.input) if flags.input else flags.text
    return (
        dict(step=step, checkpoint=hashlib.sha256(known).hexdigest(), input=texts)
        | {name: getattr(flags, name) for name in kept}
        | dataclasses.asdict(settings)
    )


def _write(out: answers.Answers, texts: list[answers.Text], batch_size: int, fill):
    """Answers what is left, batch by batch.

    Batches begin at the same texts whenever it was interrupted: the same shapes and
    neighbours give the same answers, to the last bit.
    """
    with tqdm.tqdm(total=len(texts), initial=out.done, unit="text") as bar:
        for begin in range(0, len(texts), batch_size):
            part = texts[begin : begin + batch_size]
            left = part[max(0, out.done - begin) :]
            if not left:
                continue
            found = fill(texts=[text.text for text in part], first=begin)
            made = [answers.row(t, f) for t, f in zip(part, found, strict=True)]
            out.append(made[len(part) - len(left) :])
            bar.update(len(left))


@contextlib.contextmanager
def _devices(flags, cfg: Config, model, params):
    """The parameters, spread over a mesh if --data or --tensor ask for one."""
    count = flags.data * flags.tensor
    if count == 1:
        yield params
        return
    if count > len(jax.devices()):
        raise ValueError(
            f"--data={flags.data}, --tensor={flags.tensor} need {count} devices, here "
            f"are {len(jax.devices())}."
        )
    sizes = ShardingConfig(data=flags.data, fsdp=1, tensor=flags.tensor, sequence=1)
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    with sharding.use(mesh, cfg.sharding.rules):
        yield parameters.spread(model, params, mesh, cfg.sharding.rules)


def fill(
    model, params, words: Vocab, texts: list[str], *, max_length: int = 64, **how
) -> list[str]:
    """The texts with what was written in [brackets], greedily; `how` of `fill_all`."""
    settings = Settings(max_length=max_length)
    found = fill_all(model, params, words, texts, settings=settings, **how)
    return [one.joined() for one in found]


def fill_all(
    model: Any,
    params: dict,
    words: Vocab,
    texts: list[str],
    *,
    task: Task | None = None,
    settings: Settings | None = None,
    prefix: Sequence[int] | np.ndarray = (),
    gap_tokens: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    first: int = 0,
    progress: bool = False,
) -> list[Filled]:
    """Fills the gaps of many texts, or continues them, in the order given.

    Args:
      task: what the model learned (`prompts.task_of`); None = gaps behind sentinels.
      settings, seed, batch_size, first, progress: as in `continue_all`; what fills in
        place reads temperature, top_k and top_p only.
      prefix: ids that every answer begins with (`prompts.prefix`).
      gap_tokens: tokens of each gap that is filled in place.

    Raises:
      ValueError: for a text without a gap, with more gaps than sentinels, or longer
        than the model has positions for.
    """
    how, task = settings or Settings(), task or Task()
    pieces = [prompts.split(text, task) for text in texts]
    rows = [prompts.encode(p, words, task, gap_tokens) for p in pieces]
    if task.kind == "masks":
        sampling = how.sampling
        found = _in_place(model, params, words, rows, sampling, seed, batch_size, first)
    else:
        found = continue_all(
            model,
            params,
            words,
            rows,
            how,
            prefixes=[prefix] * len(rows),
            seed=seed,
            batch_size=batch_size,
            first=first,
            progress=progress,
        )
    filled = []
    for each, written in zip(pieces, found, strict=True):
        gaps, made = len(each) - 1, []
        for ids, score, _ in written:
            ids = np.append(prefix, ids).astype(np.int32)
            made.append(Filled(each, prompts.parse(ids, gaps, words, task), score))
        filled.append(made[0]._replace(others=made[1:]))
    return filled


def _in_place(model, params, words, rows, how, seed, batch_size, first):
    found = []
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        stream = prompts.pad_rows(part, batch_size, words.pad_id)
        numbers_B = first + begin + np.arange(len(stream["tokens"]))
        keys_B = sample_keys(seed, numbers_B)
        with sharding.unconstrained():
            ids, score_B = fill_masks(model, params, words, stream, how, keys_B)
        gaps_B = (stream["tokens"] == words.mask_id).sum(axis=1)
        for row in range(len(part)):
            ids_T = np.asarray(ids)[row, : gaps_B[row]]
            found.append([Written(ids_T, float(score_B[row]), True)])
    return found


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
    rows = len(next(iter(batch.values()))["tokens"])
    keys_B = row_keys(key, rows, how)
    return _predict(params, batch, allowed_V, keys_B, model.cfg, how)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _predict(params, batch, allowed_V, keys_B, cfg, how):
    cast = jax.tree.map(lambda p: p.astype(cfg.dtype), params)
    bound: Any = model_lib.bind(model_lib.build(cfg), cast)
    logits_BKV = bound.logits(bound.outputs(batch).cells_BKE)
    B, K, V = logits_BKV.shape
    logits_XV = jnp.where(allowed_V[None], logits_BKV.reshape(B * K, V), -jnp.inf)
    keys_BK = jax.vmap(lambda key: folded(key, jnp.arange(K)))(keys_B)
    tokens_X = draw(logits_XV, keys_BK.reshape(-1), how)
    logp_XV = jax.nn.log_softmax(logits_XV, axis=-1)
    logp_X1 = jnp.take_along_axis(logp_XV, tokens_X[:, None], axis=-1)
    return tokens_X.reshape(B, K), logp_X1.reshape(B, K)


if __name__ == "__main__":
    cli.run(main)

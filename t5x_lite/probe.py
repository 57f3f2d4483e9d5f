"""What a trained model says about given examples: its guesses, and where it looks."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import layouts, model, prompts, sharding
from t5x_lite.config import ModelConfig
from t5x_lite.example import STREAM, Example, Pair
from t5x_lite.kernels import attention
from t5x_lite.vocab import Vocab

LONGEST = 48  # tokens of the text whose attention is drawn


class Piece(NamedTuple):
    """One token of an example as people read it.

    text: as it stands in the text; of a predicted one the truth.
    guess: what the model holds most likely there; "" = the token is only read.
    p, p_guess: probabilities of the truth and of the guess.
    """

    text: str
    guess: str = ""
    p: float = 0.0
    p_guess: float = 0.0


class Probed(NamedTuple):
    """An example: what is only read, and the stream that is predicted."""

    read: list[Piece]
    predicted: list[Piece]


def rows_of(batch: dict, count: int) -> dict:
    """The first `count` rows of a batch's streams."""
    return {
        name: {k: np.asarray(v[:count]) for k, v in stream.items()}
        for name, stream in batch.items()
        if isinstance(stream, dict)
    }


def predictions(net, params: dict, batch: dict, words: Vocab) -> list[Probed]:
    """The examples of a batch with what the model predicts, given the true text before.

    Args:
      batch: streams of [B, T] with targets, a few rows.
    """
    cfg: ModelConfig = net.cfg
    stream = batch[model.trained_stream(cfg)]
    targets_BK = stream["targets"]
    with sharding.unconstrained():
        found = _probabilities(params, batch, words.size, cfg)
    p_BK, guesses_BK, p_guess_BK = map(np.asarray, found)
    probed = []
    for b in range(len(targets_BK)):
        chances = (targets_BK[b], guesses_BK[b], p_BK[b], p_guess_BK[b])
        predicted = list(_predicted(stream, b, chances, words))
        read = []
        if "encoder" in batch:
            read = [Piece(_text(i, words)) for i in _kept(batch["encoder"], b)]
        probed.append(Probed(read, predicted))
    return probed


def _probabilities(params, batch, used_ids: int, cfg: ModelConfig):
    """-> (p of the targets, guesses, their p), each [B, K]."""

    def of(params, batch):
        cast = jax.tree.map(lambda p: p.astype(cfg.dtype), params)
        bound: Any = model.bind(model.build(cfg), cast)
        logits_BKV = bound.logits(bound.outputs(batch).cells_BKE)[..., :used_ids]
        p_BKV = jax.nn.softmax(logits_BKV, axis=-1)
        targets_BK1 = batch[model.trained_stream(cfg)]["targets"][..., None]
        p_BK = jnp.take_along_axis(p_BKV, targets_BK1, axis=-1)[..., 0]
        return p_BK, jnp.argmax(p_BKV, axis=-1), jnp.max(p_BKV, axis=-1)

    return jax.jit(of)(params, batch)


def _kept(stream: dict, b: int) -> np.ndarray:
    return stream["tokens"][b][stream["segments"][b] > 0]


def _predicted(stream: dict, b: int, chances, words: Vocab) -> Iterator[Piece]:
    T, weights_K = stream["tokens"].shape[1], stream["weights"][b]

    def told(k: int) -> Piece:
        target, guess, p, p_guess = (each[k] for each in chances)
        there = _text(target, words), _text(guess, words)
        return Piece(*there, float(p), float(p_guess))

    if "places" in stream:  # in place; of several query streams the first
        at = {
            int(place) % T: k
            for k, place in reversed(list(enumerate(stream["places"][b])))
            if weights_K[k] > 0
        }
        for t in np.flatnonzero(stream["segments"][b] > 0):
            token = stream["tokens"][b][t]
            yield told(at[t]) if t in at else Piece(_text(token, words))
        return
    # Each cell predicts the token after it.
    if stream["ranks"][b][0] == 0 and weights_K[0] == 0:
        yield Piece(_text(stream["tokens"][b][0], words))
    for k in range(min(T, len(weights_K))):
        if weights_K[k] > 0:
            yield told(k)
        elif stream["segments"][b][k] > 0 and chances[0][k] != words.pad_id:
            yield Piece(_text(chances[0][k], words))


def _text(token: int, words: Vocab) -> str:
    return words.label(int(token)).replace("\u2581", " ") or " "


def attention_maps(net, params: dict, batch: dict) -> dict[str, np.ndarray]:
    """Attention weights of the batch's first row, by kind, float32 [L, N, T, S].

    Kinds: "self-attention" of a single stack; "encoder", "decoder" and "decoder to
    encoder" of an encoder-decoder. Computed layer by layer on the reference kernel.
    """
    plain = dict(scan=False, remat="none", attention="einsum", unpadded=False)
    cfg = dataclasses.replace(net.cfg, **plain)
    seen: list[np.ndarray] = []

    def watched(*args, of_weights=None):
        def note(weights_BNTS):
            seen.append(np.asarray(weights_BNTS[0], np.float32))
            return 0.0 if of_weights is None else of_weights(weights_BNTS)

        return einsum(*args, of_weights=note)

    einsum = attention.KERNELS["einsum"]
    cast = jax.tree.map(lambda p: jnp.asarray(p).astype(cfg.dtype), params)
    one = rows_of(batch, 1)
    with (
        sharding.unconstrained(),
        mock.patch.dict(attention.KERNELS, einsum=watched),
        jax.disable_jit(),
    ):
        bound: Any = model.bind(model.build(cfg), cast)
        if cfg.generator_width:  # ELECTRA: the discriminator, which is used afterwards
            bound.scores(one["main"], one["main"]["tokens"])
        else:
            bound.outputs(one)
    if cfg.structure != "encoder_decoder":
        # XLNet first reads its memory, layer by layer, too.
        return {"self-attention": np.stack(seen[-cfg.depth :])}
    L = cfg.encoder_layers
    decoder = seen[L:]
    return {
        "encoder": np.stack(seen[:L]),
        "decoder": np.stack(decoder[::2]),
        "decoder to encoder": np.stack(decoder[1::2]),
    }


def of_text(text: str, cfg: ModelConfig, words: Vocab) -> dict:
    """A batch of one row that reads a text; an encoder-decoder's decoder reads it, too.

    Raises:
        ValueError: the text has no token.
    """
    ids_T = words.encode(text)[:LONGEST]
    if not len(ids_T):
        raise ValueError(f"--text={text!r} has no token. Give some words.")
    if cfg.structure == "encoder_decoder":
        ids_1T = np.append(ids_T, words.eos_id).astype(np.int32)[None]
        return layouts.encoder_decoder(Pair(ids_1T, ids_1T), words)
    if cfg.structure == "encoder":
        ids_T = [words.special("cls"), *ids_T, words.special("sep")]
    ids_1T = np.array(ids_T, np.int32)[None]
    causal = cfg.structure == "decoder"
    ranks_1T = np.arange(ids_1T.shape[1], dtype=np.int32)[None] if causal else None
    nothing = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32)
    return layouts.single(Example(ids_1T, *nothing, ranks_BT=ranks_1T), words)


def beginning(batch: dict) -> dict:
    """The first cells of the first row's streams, which are only read."""
    kept = {}
    for name, stream in batch.items():
        there = int(np.sum(stream["segments"][0] == stream["segments"][0, 0]))
        of_cells = (k for k in (*STREAM, "types") if k in stream)
        kept[name] = {k: stream[k][:1, : min(LONGEST, there)] for k in of_cells}
    return kept


def names(batch: dict, maps: dict, words: Vocab) -> dict[str, tuple[list, list]]:
    """(tokens of the queries, of the keys) for the axes of each map."""

    def of(stream: dict) -> list[str]:
        kept = stream["tokens"][0][stream["segments"][0] > 0]
        return [prompts.printable(_text(i, words).strip()) for i in kept]

    read = {name: of(stream) for name, stream in batch.items()}
    axes = {
        "self-attention": ("main", "main"),
        "encoder": ("encoder", "encoder"),
        "decoder": ("decoder", "decoder"),
        "decoder to encoder": ("decoder", "encoder"),
    }
    found = {kind: (read[axes[kind][0]], read[axes[kind][1]]) for kind in maps}
    if "memory" in batch:  # XLNet's keys begin with it
        main = read["main"]
        found["self-attention"] = main, read["memory"] + main
    return found

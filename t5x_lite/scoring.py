"""How probable a model finds a text: log P(text | what is given), token by token.

A decoder, a prefix-LM and an encoder-decoder read the text themselves, each token from
those before it. An encoder hides one token after the other and predicts it from all
others: a pseudo-log-likelihood (Salazar et al. 2020, section 2), which is comparable
between texts of one model only.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from t5x_lite import decoding, prompts, sharding
from t5x_lite import model as model_lib
from t5x_lite.config import Config
from t5x_lite.data.alignment import Aligner
from t5x_lite.example import Example, Pair
from t5x_lite.layouts import LAYOUTS, single
from t5x_lite.vocab import Vocab

SHORTEST = 16  # lengths are powers of two from here on, so that few shapes compile


class Ask(NamedTuple):
    """Ids that are read, and those behind them whose probability is asked for.

    skip: the first ids of `text` that only steer the model (a sentinel).
    after: what an encoder reads behind the text.
    """

    given: np.ndarray
    text: np.ndarray
    skip: int = 0
    after: np.ndarray = np.zeros(0, np.int32)


def texts(
    net: Any,
    params: dict,
    words: Vocab,
    cfg: Config,
    texts: list[str],
    given: str = "",
    *,
    batch_size: int = 32,
) -> list[float]:
    """log P(text | given) of each text, in nats, without the end of the text.

    Args:
      net, params: a model; params of float32.
      cfg: of its run, which says how its inputs begin and end.
      given: what the texts go on from, a space between them.

    Raises:
      ValueError: a structure that gives no probability of a text, or texts that are
        longer than its positions.
    """
    asks = [ask(words, cfg, given, text) for text in texts]
    found = tokens(net, params, words, asks, batch_size=batch_size)
    return [float(logp_T.sum()) for logp_T in found]


def ask(words: Vocab, cfg: Config, given: str, text: str) -> Ask:
    """What a model reads for a text that goes on from `given`, as in its training.

    A model of gaps reads the first sentinel in place of the text, as in "the given
    <extra_id_0>", and writes it before the text.
    """
    space = Aligner(words).space if given and not given[-1:].isspace() else ""
    given_ids = np.asarray(words.encode(given), np.int32)
    text_ids = np.asarray(words.encode(space + text), np.int32)
    kind, before, after = prompts.task_of(cfg)

    def ids(names) -> np.ndarray:
        found = [words.eos_id if n == "eos" else words.special(n) for n in names]
        return np.array(found, np.int32)

    start, end = ids(before), ids(after)
    if kind == "gaps":
        sentinel = np.array([words.sentinel(0)], np.int32)
        read = np.concatenate([start, given_ids, sentinel, end])
        return Ask(read, np.concatenate([sentinel, text_ids]), skip=1)
    if kind == "masks":
        return Ask(np.concatenate([start, given_ids]), text_ids, after=end)
    return Ask(np.concatenate([start, given_ids, end]), text_ids)


def tokens(
    net: Any,
    params: dict,
    words: Vocab,
    asks: list[Ask],
    *,
    batch_size: int = 32,
    progress: str = "",
) -> list[np.ndarray]:
    """Log-probability of each token of `text`, float32 [T], in the order given.

    Args:
      progress: what the bar is called; "" = none.
    """
    if net.cfg.structure == "permuted" or net.cfg.query_streams:
        raise ValueError(
            f"config.model.structure={net.cfg.structure!r}, query_streams="
            f"{net.cfg.query_streams}: texts are scored by encoder, decoder, "
            "encoder_decoder and prefix_lm without query streams."
        )
    hides = net.cfg.structure == "encoder"
    rows = [(i, k) for i, a in enumerate(asks) for k in range(len(a.text))]
    if not hides:
        rows = [(i, 0) for i in range(len(asks))]

    def size(row) -> int:
        return len(asks[row[0]].given) + len(asks[row[0]].text)

    found = [np.zeros(len(a.text), np.float32) for a in asks]
    rows.sort(key=size)
    with tqdm.tqdm(
        total=len(rows), desc=progress or None, disable=not progress, delay=1.0
    ) as bar:
        for begin in range(0, len(rows), batch_size):
            chosen = rows[begin : begin + batch_size]
            filled = chosen + chosen[:1] * (batch_size - len(chosen))
            make = _hidden if hides else _shifted
            batch = make([(asks[i], k) for i, k in filled], net.cfg.structure, words)
            for name, stream in batch.items():
                longest = (
                    int((stream["positions"] * (stream["segments"] > 0)).max()) + 1
                )
                decoding.check_room(net.cfg, longest, f"the {name} stream")
            with sharding.unconstrained():
                logp_BK = np.asarray(_logp(params, batch, net.cfg, words.size))
            (trained,) = (s for s in batch.values() if "targets" in s)
            for b, (i, k) in enumerate(chosen):
                if hides:
                    found[i][k] = logp_BK[b, 0]
                else:
                    found[i][:] = logp_BK[b, trained["weights"][b] > 0]
            bar.update(len(chosen))
    return [logp_T[a.skip :] for a, logp_T in zip(asks, found, strict=True)]


def _shifted(asked: list[tuple[Ask, int]], structure: str, words: Vocab):
    """Pairs in the layout of their structure."""
    pair = Pair(
        _padded([a.given for a, _ in asked], words.pad_id),
        _padded([a.text for a, _ in asked], words.pad_id),
    )
    return LAYOUTS[structure](pair, words)


def _hidden(asked: list[tuple[Ask, int]], structure: str, words: Vocab):
    """The k-th token of each text hidden."""
    rows = [np.concatenate([a.given, a.text, a.after]) for a, _ in asked]
    tokens_BT = _padded(rows, words.pad_id)
    places_B1 = np.array([[len(a.given) + k] for a, k in asked], np.int32)
    targets_B1 = np.take_along_axis(tokens_BT, places_B1, axis=1)
    np.put_along_axis(tokens_BT, places_B1, words.mask_id, axis=1)
    weights_B1 = np.ones_like(targets_B1, np.float32)
    return single(Example(tokens_BT, targets_B1, weights_B1, places_B1), words)


def _padded(rows: list[np.ndarray], pad_id: int) -> np.ndarray:
    T = max(SHORTEST, prompts.power_of_two(max(map(len, rows))))
    padded_BT = np.full((len(rows), T), pad_id, np.int32)
    for b, row in enumerate(rows):
        padded_BT[b, : len(row)] = row
    return padded_BT


@functools.partial(jax.jit, static_argnums=(2, 3))
def _logp(params, batch, cfg, used_ids):
    """float32 [B, K]: log-probability of each target."""
    bound: Any = model_lib.bind(model_lib.build(cfg), params, cfg.dtype)
    (stream,) = (s for s in batch.values() if "targets" in s)
    logits_BKV = bound.logits(bound.outputs(batch).cells_BKE).astype(jnp.float32)
    unused_11V = jnp.arange(logits_BKV.shape[-1])[None, None] >= used_ids
    logits_BKV = jnp.where(unused_11V, -jnp.inf, logits_BKV)
    hit_BK = jnp.take_along_axis(logits_BKV, stream["targets"][..., None], axis=-1)
    return hit_BK[..., 0] - jax.nn.logsumexp(logits_BKV, axis=-1)

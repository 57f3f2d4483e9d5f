"""Cached decoding is the uncached forward pass; samples follow the softmax."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import decoding, generate, model, parameters, prompts, sampling, vocab
from tests import tiny

B, S, T, USED, EOS = 3, 10, 12, 100, 1


CLASSIC: dict[str, Any] = dict(
    norm="layer", bias=True, gated=False, scale_attention=True, tie_embeddings=True
)
GPT: dict[str, Any] = CLASSIC | dict(structure="decoder", positions="learned")
# Every way to decode: of one stack, or behind an encoder.
MODELS: dict[str, dict[str, Any]] = {
    "t5_1_1": {},
    "t5": dict(tie_embeddings=True, scan=False, remat="none"),
    "shared": dict(share_layers=True, share_stacks=True),
    "bart": CLASSIC | dict(positions="learned", position_offset=2, norm_order="post"),
    "gpt": GPT | dict(norm_order="post"),
    "gpt2": GPT,
    "gpt3": GPT | dict(window=3),
    "sinusoidal": GPT | dict(positions="sinusoidal", scan=False, remat="none"),
    "t5_decoder": dict(structure="decoder"),
    "umt5_decoder": dict(structure="decoder", positions="bias_per_layer"),
    "t5_prefix": dict(structure="prefix_lm"),
    "gpt3_prefix": GPT | dict(structure="prefix_lm", window=3),
}


def make(name: str = "t5_1_1"):
    net = build(name)
    return net, random_params(name)


@functools.cache
def build(name: str):
    cfg = dataclasses.replace(tiny.tiny_config().model, **MODELS[name])
    return model.build(cfg)


@functools.cache
def random_params(name: str):
    """Biases start at zero: with others, every path counts."""
    params = parameters.init_params(build(name), jax.random.key(0))
    return jax.tree.map(
        lambda p: p + 0.02 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )


def ragged(rng, lengths=(10, 4, 7)) -> dict:
    stream = tiny.stream(rng, len(lengths), S, causal=False)
    for row, length in enumerate(lengths):
        stream["tokens"][row, length:] = 0
        stream["segments"][row, length:] = 0
    return stream


def forced_logits(net, params, read: dict, tokens_BT) -> np.ndarray:
    """Logits [B, T, V] of the uncached forward pass for each of `tokens_BT`."""
    tokens_BT = np.asarray(tokens_BT)
    B, T = tokens_BT.shape
    positions_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))

    @jax.jit
    def forward(params, batch):
        bound: Any = model.bind(net, params)
        return bound.logits(bound.outputs(batch).cells_BKE)

    if net.cfg.structure == "encoder_decoder":
        decoder = {
            "tokens": np.pad(tokens_BT, ((0, 0), (1, 0)))[:, :-1],
            "positions": positions_BT,
            "segments": np.ones_like(positions_BT),
            "ranks": positions_BT,
        }
        return np.asarray(forward(params, {"encoder": read, "decoder": decoder}))
    # The prompt, then the answer directly behind it, then padding: as in training.
    counts_B1 = (read["segments"] > 0).sum(axis=1, keepdims=True)
    whole_BS = np.concatenate([read["tokens"], np.zeros_like(tokens_BT)], axis=1)
    places_BT = counts_B1 + positions_BT
    np.put_along_axis(whole_BS, places_BT, tokens_BT, axis=1)
    places_BS = np.tile(np.arange(whole_BS.shape[1], dtype=np.int32), (B, 1))
    causal = net.cfg.structure == "decoder"
    main = {
        "tokens": whole_BS,
        "positions": places_BS,
        "segments": (places_BS < counts_B1 + T).astype(np.int32),
        "ranks": np.where((places_BS < counts_B1) & ~np.array(causal), 0, places_BS),
    }
    logits_BSV = np.asarray(forward(params, {"main": main}))
    return np.take_along_axis(logits_BSV, places_BT[..., None] - 1, axis=1)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_cached_step_gives_the_uncached_logits(name, strict_dtypes):
    net, params = make(name)
    rng = np.random.default_rng(0)
    read = ragged(rng)
    tokens_BT = rng.integers(3, USED, (B, T)).astype(np.int32)
    tokens_BT[1, 5:] = [EOS] + [0] * (T - 6)  # a row that has ended: EOS, padding
    want_BTV = forced_logits(net, params, read, tokens_BT)

    @jax.jit
    def all_steps(params):
        decoder = decoding.model_for(params, net.cfg)
        given = decoding.given(net.cfg, read, None, 0, T)
        start = decoding.begin(decoder, given, T, 0)

        def step(carry, index):
            last_B1, caches = carry
            logits_BV, caches = decoder.step(
                last_B1, start.index + index, caches, start.cells, start.memory
            )
            next_B1 = jax.lax.dynamic_slice_in_dim(tokens_BT, index, 1, axis=1)
            return (next_B1, caches), logits_BV

        last_B1 = start.history_BS[:, start.index, None]
        first = (last_B1, start.caches)
        return jax.lax.scan(step, first, jnp.arange(T))[1]

    with jax.default_matmul_precision("highest"):
        got_TBV = np.asarray(all_steps(params))
    np.testing.assert_allclose(got_TBV.swapaxes(0, 1), want_BTV, atol=2e-5, rtol=0)


def expected(net, params, read, settings, tokens_BT, score_B):
    """Asserts that greedy tokens and scores are those of uncached forward passes."""
    tokens_BT = np.asarray(tokens_BT)
    logits_BTV = forced_logits(net, params, read, tokens_BT)[..., :USED]
    logp_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    for row in range(B):
        eos = np.flatnonzero(tokens_BT[row] == settings["eos_id"])
        n = eos[0] + 1 if eos.size else T
        np.testing.assert_array_equal(
            tokens_BT[row, :n], logits_BTV[row, :n].argmax(-1)
        )
        assert not tokens_BT[row, n:].any()
        score = logp_BTV[row, np.arange(n), tokens_BT[row, :n]].sum()
        np.testing.assert_allclose(score_B[row], score, rtol=1e-4)


@pytest.mark.parametrize("name", ["t5_1_1", "gpt3", "t5_prefix"])
def test_greedy_is_the_argmax_of_the_uncached_forward(name, strict_dtypes):
    net, params = make(name)
    read = ragged(np.random.default_rng(1))
    settings: dict[str, Any] = dict(max_length=T, eos_id=EOS, used_ids=USED)
    found = decoding.generate(net, params, read, **settings)
    expected(net, params, read, settings, *found)
    # Call a token that row 0 really writes EOS: then its row ends there.
    settings["eos_id"] = int(found[0][0, 4])
    found = decoding.generate(net, params, read, **settings)
    assert (np.asarray(found[0][0]) == settings["eos_id"]).sum() == 1
    expected(net, params, read, settings, *found)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(structure="encoder"), "structure='encoder' does not decode"),
        (dict(structure="permuted"), "structure='permuted' does not decode"),
        (GPT | dict(query_streams=1), "query_streams=1 does not decode"),
        (GPT | dict(positions="functional"), "positions='functional' does not"),
        (GPT | dict(max_positions=20), "needs 21 positions.*max_positions=20"),
    ],
)
def test_models_that_cannot_are_refused(changes, message):
    cfg = dataclasses.replace(tiny.tiny_config().model, **changes)
    read = ragged(np.random.default_rng(2))
    with pytest.raises(ValueError, match=message):
        decoding.generate(
            model.build(cfg), {}, read, max_length=T, eos_id=EOS, used_ids=USED
        )


@pytest.mark.parametrize("name", ["t5_1_1", "t5_prefix"])
def test_rows_do_not_depend_on_padding_or_their_neighbours(name):
    net, params = make(name)
    encoder = ragged(np.random.default_rng(2))
    settings: dict[str, Any] = dict(max_length=T, eos_id=EOS, used_ids=USED)
    together, _ = decoding.generate(net, params, encoder, **settings)
    alone = {k: v[1:2, :4] for k, v in encoder.items()}
    one, _ = decoding.generate(net, params, alone, **settings)
    np.testing.assert_array_equal(one[0], together[1])


def test_padded_ids_are_never_written():
    net, params = make()
    # Make the padded ids by far the most likely ones.
    head = params["output"]["kernel"]
    head = head.at[USED:].set(50.0 * head[:28])
    params = params | {"output": {"kernel": head}}
    encoder = ragged(np.random.default_rng(3))
    for temperature in (0.0, 1.0):
        tokens_BT, _ = decoding.generate(
            net,
            params,
            encoder,
            max_length=T,
            eos_id=EOS,
            used_ids=USED,
            temperature=temperature,
            key=jax.random.key(1),
        )
        assert np.max(tokens_BT) < USED


def test_rows_without_tokens_end_at_once():
    net, params = make()
    encoder = ragged(np.random.default_rng(4), lengths=(10, 0, 7))
    tokens_BT, score_B = decoding.generate(
        net, params, encoder, max_length=T, eos_id=EOS, used_ids=USED
    )
    assert not np.any(tokens_BT[1]) and score_B[1] == 0.0 and np.any(tokens_BT[0])


@pytest.mark.parametrize(
    "top_k, top_p, support",
    [
        (0, 0.0, range(8)),
        (3, 0.0, (1, 4, 6)),
        (1, 0.0, (4,)),
        (99, 0.0, range(8)),
        (0, 0.5, (1, 4)),
        (0, 0.29, (4,)),
        (0, 1e-30, (4,)),
        (0, 0.9, (0, 1, 3, 4, 6)),
        (2, 0.9, (1, 4)),
    ],
)
def test_samples_follow_the_softmax_over_exactly_the_support(
    top_k, top_p, support, strict_dtypes
):
    p_V = np.array([0.10, 0.25, 0.02, 0.11, 0.30, 0.05, 0.14, 0.03], np.float32)
    n = 20_000
    how = sampling.Sampling(0.5, top_k, top_p)
    # Temperature 0.5 of logits log(p) / 2 is p again.
    logits_BV = jnp.broadcast_to(jnp.log(p_V)[None] * 0.5, (n, 8))
    keys_B = sampling.row_keys(jax.random.key(0), n, how)
    ids_B = np.asarray(sampling.draw(logits_BV, keys_B, how))
    want_V = np.zeros(8)
    want_V[list(support)] = p_V[list(support)]
    want_V *= n / want_V.sum()
    counts_V = np.bincount(ids_B, minlength=8)
    assert set(np.flatnonzero(counts_V)) == set(support)
    inside_V = want_V > 0
    gap_V = (counts_V - want_V)[inside_V]
    chi2 = np.sum(gap_V**2 / want_V[inside_V])
    assert chi2 < 26.0  # 1 - 5e-4 quantile with 7 degrees of freedom


def test_ties_keep_exactly_k():
    kept = sampling.restrict(jnp.zeros((2, 6)), top_k=2)
    np.testing.assert_array_equal(np.isfinite(kept), [[1, 1, 0, 0, 0, 0]] * 2)


def test_a_seed_repeats_its_sample():
    net, params = make()
    encoder = ragged(np.random.default_rng(5))

    def sample(seed):
        key = jax.random.key(seed)
        tokens_BT, _ = decoding.generate(
            net,
            params,
            encoder,
            max_length=T,
            eos_id=EOS,
            used_ids=USED,
            temperature=1.0,
            key=key,
        )
        return np.asarray(tokens_BT)

    np.testing.assert_array_equal(sample(0), sample(0))
    assert (sample(0) != sample(1)).any()


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=-1.0),
        dict(temperature=1.0, top_p=1.5),
        dict(temperature=1.0, top_k=-1),
        dict(top_k=5),
        dict(temperature=float("nan")),
    ],
)
def test_settings_out_of_range_are_refused(settings):
    name = list(settings)[-1]
    with pytest.raises(ValueError, match=f"{name}="):
        sampling.Sampling(**settings)


# ---- filling gaps

TEXTS = [
    ("It is a truth ___ acknowledged, that a ___ man", ["universally", "single"]),
    ("___, she said<extra_id_7>.", ["No", " twice"]),
    ("un____able", ["believ"]),
    ("___", ["everything"]),
    ("a ___ " + "long " * 20 + "___", ["very", "text"]),
]


def split(text: str) -> list[str]:
    return prompts.split(text, prompts.Task())


@pytest.fixture(params=["bytes", "data/vocab_4k.model"])
def words(request):
    return vocab.load(request.param, 100)


def test_fill_puts_what_the_model_writes_into_the_gaps(words, monkeypatch):
    """With a stub in place of the model that answers every input rightly."""
    answers = {}
    for text, fills in TEXTS:
        ids = prompts.encode(split(text), words)
        assert ids[-1] == words.eos_id and (ids != words.pad_id).all()
        sentinels = ids[ids >= words.size - words.sentinels]
        np.testing.assert_array_equal(
            sentinels, [words.sentinel(i) for i in range(len(fills))]
        )
        parts = [[words.sentinel(i), *words.encode(f)] for i, f in enumerate(fills)]
        answers[tuple(ids)] = [*sum(parts, []), words.eos_id]

    def stub(model, params, stream, *, max_length, **_):
        rows, longest = stream["tokens"].shape
        assert rows <= 2 and longest & (longest - 1) == 0
        out = np.zeros((rows, max_length), np.int32)
        for row, (tokens, segments) in enumerate(
            zip(stream["tokens"], stream["segments"], strict=True)
        ):
            answer = answers.get(tuple(tokens[segments > 0]), [])
            out[row, : len(answer)] = answer
        return out, np.arange(rows, dtype=np.float32)

    monkeypatch.setattr(decoding, "generate", stub)
    filled = generate.fill(None, None, words, [t for t, _ in TEXTS], batch_size=2)
    assert filled[0] == (
        "It is a truth [universally] acknowledged, that a [single] man"
    )
    assert filled[1] == "[No], she said[twice]."
    assert filled[2] == "un[believ]able"
    assert filled[3] == "[everything]"
    assert filled[4] == "a [very] " + "long " * 20 + "[text]"


def test_encoding_gives_the_text_back_without_its_gaps(words):
    ids = prompts.encode(split("He came ___, and ___ off."), words)
    assert words.decode(ids) == "He came<extra_id_0>, and<extra_id_1> off."


def test_fills_are_parsed_from_any_output(words):
    s, eos = words.sentinel, words.eos_id
    x, y = words.encode("x"), words.encode("y")

    def parse(*parts):
        return prompts.parse_fills(np.concatenate(parts), 2, words)

    assert parse([s(0)], x, [s(1)], y, [eos], [s(0)]) == ["x", "y"]
    assert parse([s(1)], y, [s(0)], x) == ["x", "y"]  # order does not matter
    assert parse(x, [s(0)], [eos]) == ["", ""]  # before a sentinel: no gap's
    assert parse([s(0)], x, [s(0)], y) == ["x", ""]  # the first one counts
    assert parse([s(5)], x, [s(1)], y) == ["", "y"]


def test_texts_that_cannot_be_filled_are_refused(words):
    with pytest.raises(ValueError, match="no gap"):
        split("nothing_to__fill")
    with pytest.raises(ValueError, match="101 gaps.*100 sentinels"):
        prompts.encode(split("___ " * 101), words)

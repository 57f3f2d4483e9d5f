"""ELMo: published outputs, LSTM and loss from their equations, causality, windows."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import bilm, elmo, export, heads
from t5x_lite.config import ShardingConfig
from t5x_lite.data import words
from t5x_lite.interop import elmo as interop
from t5x_lite.model import bind, parameter_count
from t5x_lite.parameters import declared, init_params
from t5x_lite.sharding import make_mesh, spec
from tests import parity

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = ROOT.parent / "shared/data/weights/elmo_fixture"
TINY = bilm.ElmoConfig(
    char_dim=3,
    filters=((1, 4), (2, 4), (3, 8)),
    highway=1,
    projection=6,
    units=10,
    dropout=0.0,
)
KEY = jax.random.key(0)
SENTENCES = ["The cat sat on the mat .".split(), ["Ωmega", "x" * 60]]


@pytest.fixture(scope="module")
def golden():
    with np.load(parity.GOLDENS / "elmo.npz", allow_pickle=False) as file:
        return dict(file)


def random_params(net, scale=0.5):
    """Larger than at the start, so that gates and clips are all used."""
    params = init_params(net, KEY)
    return jax.tree.map(
        lambda p: p + scale * jax.random.normal(jax.random.key(p.size), p.shape), params
    )


def bilm_weights(golden):
    return {
        name.removeprefix("weights/"): a
        for name, a in golden.items()
        if name.startswith("weights/")
    }


def test_the_published_outputs_with_state_carried_over_ten_batches(golden):
    cfg = interop.config(json.loads(str(golden["options"])))
    params = interop.from_bilm(bilm_weights(golden), cfg)
    run = jax.jit(lambda c, s: bind(bilm.Bilm(cfg), params)(c, s))
    sentences = json.loads(str(golden["sentences"]))
    state = bilm.zero_state(cfg, 3)
    for i in range(10):
        batch = [sentences[k][i].split() for k in range(3)]
        h_LBTE, state = run(words.characters(batch), state)
        for k, sentence in enumerate(batch):
            want = np.concatenate(golden[f"top/{k}/{i}"], axis=-1)
            got = h_LBTE[-1, k, 1 : len(sentence) + 1]
            np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def test_bad_weights_are_all_named(golden):
    cfg = interop.config(json.loads(str(golden["options"])))
    weights = bilm_weights(golden)
    weights["softmax"] = weights.pop("char_embed")
    weights["CNN/b_cnn_0"] = np.zeros(9, np.float32)
    with pytest.raises(ValueError, match="3 array") as error:
        interop.from_bilm(weights, cfg)
    text = str(error.value)
    assert "missing: char_embed" in text and "unexpected: softmax" in text
    assert "shape (9,) instead of (4,): CNN/b_cnn_0" in text
    options = json.loads(str(golden["options"]))
    options["char_cnn"]["activation"] = "tanh"
    with pytest.raises(ValueError, match="activation='tanh'"):
        interop.config(options)


def test_an_hdf5_file_against_the_equations():
    pytest.importorskip("h5py", reason="h5py is not installed (extra: elmo)")
    if not FIXTURE.exists():
        pytest.skip("bilm-tf's test model is not in ../shared/data")
    cfg = interop.config(json.loads((FIXTURE / "options.json").read_text()))
    weights = interop.read(str(FIXTURE / "lm_weights.hdf5"))
    params = interop.from_bilm(weights, cfg)
    sentences = json.loads((FIXTURE / "lm_embeddings_sentences.json").read_text())
    characters_BTC = words.characters([s.split() for s in sentences[0][:3]])
    state = bilm.zero_state(cfg, 3)
    h_LBTE, _ = bind(bilm.Bilm(cfg), params)(characters_BTC, state)
    for row in range(3):
        length = int((characters_BTC[row, :, 0] > 0).sum())
        want = numpy_bilm(params, cfg, characters_BTC[row, :length])
        got = h_LBTE[:, row, :length]
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)


def numpy_bilm(params, cfg, characters_TC):
    """All layers [1 + L, T, 2 P] of one sentence, in float64, word by word."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    w = params["words"]
    vectors = []
    for word in characters_TC:
        e_CD = w["embedding"][word - 1]
        y_F = []
        for i, (width, _) in enumerate(cfg.filters):
            slides = [e_CD[j : j + width] for j in range(len(word) - width + 1)]
            y = [np.tensordot(s, w[f"filter_{i}"], 2) for s in slides]
            y_F.append(np.maximum(np.max(y, axis=0) + w[f"filter_bias_{i}"], 0))
        x = np.concatenate(y_F)
        for n in range(cfg.highway):
            h = {name: value[n] for name, value in w["highway"].items()}
            gate = 1 / (1 + np.exp(-(x @ h["carry"] + h["carry_bias"])))
            new = np.maximum(x @ h["transform"] + h["transform_bias"], 0)
            x = gate * new + (1 - gate) * x
        vectors.append(x @ w["project"] + w["project_bias"])
    found: list = [[np.concatenate([v, v]) for v in vectors]]
    sides = {}
    for direction, way in (("forward", 1), ("backward", -1)):
        x, sides[direction] = vectors[::way], []
        for n in range(cfg.layers):
            one = {name: value[n] for name, value in params[direction].items()}
            y = numpy_lstm(one, cfg, x)
            x = [a + b for a, b in zip(x, y, strict=True)] if cfg.skip and n else y
            sides[direction].append(x[::way])
    for n in range(cfg.layers):
        found.append(np.concatenate([side[n] for side in sides.values()], axis=-1))
    return np.array(found)


def numpy_lstm(p, cfg, x):
    """Sak et al. 2014 without peepholes; forget bias 1, both clips."""
    c, h, out = np.zeros(cfg.units), np.zeros(cfg.projection), []
    for x_t in x:
        i, j, f, o = np.tensordot(x_t, p["input"], 1) + np.tensordot(h, p["hidden"], 1)
        i, j, f, o = np.array([i, j, f, o]) + p["bias"]
        i, f, o = (1 / (1 + np.exp(-z)) for z in (i, f + 1, o))
        c = np.clip(f * c + i * np.tanh(j), -cfg.cell_clip, cfg.cell_clip)
        h = (o * np.tanh(c)) @ p["project"]
        h = np.clip(h, -cfg.projection_clip, cfg.projection_clip)
        out.append(h)
    return out


@pytest.mark.parametrize("skip", [True, False])
def test_the_equations(skip, strict_dtypes):
    # Small clips, so that both bite.
    cfg = dataclasses.replace(TINY, skip=skip, cell_clip=0.4, projection_clip=0.5)
    net = bilm.Bilm(cfg)
    params = random_params(net)
    characters_BTC = words.characters(SENTENCES)
    h_LBTE, _ = bind(net, params)(characters_BTC, bilm.zero_state(cfg, 2))
    for row, sentence in enumerate(SENTENCES):
        length = len(sentence) + 2
        want = numpy_bilm(params, cfg, characters_BTC[row, :length])
        np.testing.assert_allclose(h_LBTE[:, row, :length], want, atol=2e-5, rtol=1e-4)
        assert not h_LBTE[1:, row, length:].any() or skip
    unclipped = dataclasses.replace(cfg, cell_clip=9.0, projection_clip=9.0)
    other, _ = bind(bilm.Bilm(unclipped), params)(
        characters_BTC, bilm.zero_state(cfg, 2)
    )
    assert np.abs(other - h_LBTE).max() > 0.05


@pytest.mark.parametrize("direction", bilm.DIRECTIONS)
def test_no_output_depends_on_words_not_yet_read(direction):
    T, P = 5, TINY.projection
    net = bilm.Bilm(TINY)
    bound = bind(net, random_params(net))
    state = bilm.zero_state(TINY, 1)[direction]

    def top(x_BTP):
        return bound.read(direction, x_BTP, jnp.ones((1, T), bool), state)[0][-1, 0]

    jacobian = jax.jacobian(top)(jax.random.normal(KEY, (1, T, P)))
    depends_TT = np.abs(np.asarray(jacobian))[:, :, 0].max(axis=(1, 3)) > 0
    lower = np.tri(T, dtype=bool)
    np.testing.assert_array_equal(
        depends_TT, lower if direction == "forward" else lower.T
    )


def test_the_state_runs_on_and_padding_leaves_it_alone():
    net = bilm.Bilm(TINY)
    bound = bind(net, random_params(net))
    characters_BTC = words.characters(SENTENCES[:1])
    zero = bilm.zero_state(TINY, 1)
    whole, after = bound(characters_BTC, zero)
    first, state = bound(characters_BTC[:, :4], zero)
    second, state = bound(characters_BTC[:, 4:], state)
    forward = slice(0, TINY.projection)
    joined = np.concatenate([first, second], axis=2)
    np.testing.assert_allclose(joined[..., forward], whole[..., forward], atol=1e-5)
    padded = np.pad(characters_BTC, ((0, 0), (0, 3), (0, 0)))
    again, after_padded = bound(padded, zero)
    np.testing.assert_allclose(again[:, :, :-3], whole, atol=1e-6)
    for direction in bilm.DIRECTIONS:
        for a, b in zip(after[direction], after_padded[direction], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(state["forward"].cell, after["forward"].cell, atol=1e-5)


def tiny_batch(vocab_size=7):
    rng = np.random.default_rng(0)
    characters_BTC = words.characters(SENTENCES)
    targets = rng.integers(0, vocab_size, (2, *characters_BTC.shape[:2])).astype("i4")
    return {
        d: dict(characters=characters_BTC, targets=targets[i])
        for i, d in enumerate(bilm.DIRECTIONS)
    }


def test_the_loss_from_its_equation():
    net = bilm.Pretrained(TINY, 7)
    params, batch = random_params(net), tiny_batch()
    losses, _ = bind(net, params).loss(batch, bilm.zero_state(TINY, 2))
    W, b = (np.asarray(params[name], np.float64) for name in ("head", "head_bias"))
    for side, direction in enumerate(bilm.DIRECTIONS):
        nll = []
        for row, sentence in enumerate(SENTENCES):
            length = len(sentence) + 2
            window = {name: a[row, :length] for name, a in batch[direction].items()}
            top = numpy_bilm(params["bilm"], TINY, window["characters"])[-1]
            p_TV = np.exp(np.split(top, 2, axis=-1)[side] @ W.T + b)
            p_TV /= p_TV.sum(axis=-1, keepdims=True)
            nll += [-np.log(p[t]) for p, t in zip(p_TV, window["targets"], strict=True)]
        np.testing.assert_allclose(losses[direction], np.mean(nll), rtol=1e-5)


def test_sampled_softmax_tends_to_the_full_one():
    net = bilm.Pretrained(TINY, 50)
    bound = bind(net, random_params(net, 0.3))
    batch, state = tiny_batch(50), bilm.zero_state(TINY, 2)
    full, _ = bound.loss(batch, state)
    few, _ = bound.loss(batch, state, KEY, negatives=5)
    many, _ = bound.loss(batch, state, KEY, negatives=200_000)
    for direction in bilm.DIRECTIONS:
        np.testing.assert_allclose(many[direction], full[direction], rtol=5e-3)
        assert abs(few[direction] - full[direction]) > 1e-3
    with pytest.raises(ValueError, match="negatives=5 needs a key"):
        bound.loss(batch, state, negatives=5)


def test_dropout_needs_a_key_and_keeps_the_mean():
    x = jnp.ones((100, 100))
    assert bilm.dropout(x, 0.1, None) is x
    y = bilm.dropout(x, 0.1, KEY)
    assert 0.08 < float(jnp.mean(y == 0)) < 0.12
    assert abs(float(jnp.mean(y)) - 1) < 0.02


def test_scalar_mix():
    mix = heads.Mix(3)
    h_LBTE = jax.random.normal(KEY, (3, 2, 4, 5))
    start = bind(mix, init_params(mix, KEY))(h_LBTE)
    np.testing.assert_allclose(start, np.mean(h_LBTE, axis=0), rtol=1e-5, atol=1e-6)
    weights = np.log(np.array([1.0, 2.0, 5.0], np.float32))
    bound = bind(mix, {"weights": jnp.asarray(weights), "gamma": jnp.asarray([4.0])})
    want = (h_LBTE[0] * 1 + h_LBTE[1] * 2 + h_LBTE[2] * 5) / 8 * 4
    np.testing.assert_allclose(bound(h_LBTE), want, rtol=1e-4, atol=1e-5)


def test_the_published_model_has_93_6_million_parameters():
    assert parameter_count(bilm.Bilm(bilm.ElmoConfig())) == 93_600_848


def test_every_axis_has_a_rule():
    cfg = ShardingConfig(data=-1, fsdp=2, tensor=2)
    mesh = make_mesh(cfg)
    for name, p in declared(bilm.Pretrained(bilm.ElmoConfig(), 8000)).items():
        axes = p.get_metadata()["axes"]
        spec(name, axes, p.get_value().shape, cfg.rules, mesh)


def test_characters_are_those_of_bilm():
    found = words.characters([["hé"], ["a" * 60, "b"]])
    assert found.shape == (2, 4, 50) and found.dtype == np.int32
    begin, end, pad = 259, 260, 261
    assert found[0, 0].tolist() == [begin, 257, end] + [pad] * 47
    assert found[0, 2].tolist() == [begin, 258, end] + [pad] * 47
    assert found[0, 1].tolist() == [begin, 105, 196, 170, end] + [pad] * 45
    assert found[1, 1].tolist() == [begin] + [98] * 48 + [end]
    assert not found[0, 3].any()
    assert words.characters([]).shape == (0, 0, 50)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.txt"
    lines = [f"one two {'three ' * 3} n{i}, don't." for i in range(30)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_the_word_vocabulary(source, tmp_path):
    text = words.Text(source)
    line = [text.words[i] for i in text.stream_N[:11]]
    assert line == "<S> one two three three three n0 , don't . </S>".split()
    vocab = words.WordVocab.most_frequent(text, 6)
    assert vocab.words == ["<S>", "</S>", "<UNK>", "three", "one", "two"]
    vocab.save(tmp_path / "words.txt")
    again = words.WordVocab.load(tmp_path / "words.txt")
    assert again.words == vocab.words
    assert again.ids(["two", "n0", "<S>"]).tolist() == [5, 2, 0]
    with pytest.raises(ValueError, match="occurs once"):
        words.WordVocab([*vocab.words, "two"])
    with pytest.raises(ValueError, match="size=3"):
        words.WordVocab.most_frequent(text, 3)


def test_windows_read_on_in_both_directions(source):
    text = words.Text(source)
    vocab = words.WordVocab.most_frequent(text, 1000)
    batch = words.windows(text, vocab, 3, 4)
    stream = vocab.ids(text.words)[text.stream_N]
    # Word id -> its characters: shows that inputs and targets belong together.
    found = words.characters([text.words[2:]])[0]
    found = np.concatenate([found[[0, -1]], found[1:-1]])[text.stream_N]
    table = dict(zip(stream.tolist(), found, strict=True))
    N = len(stream)
    epoch = -(-N // 12)
    seen = {d: [] for d in bilm.DIRECTIONS}
    for step in range(epoch):
        for direction in bilm.DIRECTIONS:
            seen[direction].append(batch(5, step)[direction])
    for direction, way in (("forward", 1), ("backward", -1)):
        order = seen[direction][::way]
        targets = np.concatenate([w["targets"] for w in order], axis=1)
        inputs = np.concatenate([w["characters"] for w in order], axis=1)
        for row in range(3):
            text_row, other = targets[row].tolist(), inputs[row]
            shifted = (
                zip(text_row[:-1], other[1:], strict=True)
                if way == 1
                else zip(text_row[1:], other[:-1], strict=True)
            )
            assert all((table[word] == c).all() for word, c in shifted)
        assert set(targets.ravel().tolist()) == set(table)
    again = words.windows(text, vocab, 3, 4)(5, 2)
    jax.tree.map(np.testing.assert_array_equal, batch(5, 2), again)
    assert (batch(6, 2)["forward"]["targets"] != again["forward"]["targets"]).any()
    with pytest.raises(ValueError, match=f"of {N} words"):
        words.windows(text, vocab, N, 4)


def test_the_command_learns_and_writes_an_export(source, tmp_path, capsys):
    args = [f"--train={source}", f"--heldout={source}", f"--workdir={tmp_path / 'run'}"]
    args += ["--steps=30", "--batch_size=4", "--length=8", "--units=16"]
    elmo.main([*args, "--projection=8", "--vocab_size=30"])
    printed = capsys.readouterr().out
    forward, backward, unigram = map(
        float, re.findall(r"(?:forward|backward|unigram) ([\d.]+)", printed)
    )
    assert max(forward, backward) < 0.8 * unigram
    arrays, about = export.read(tmp_path / "run/export")
    assert about["step"] == 30 and about["config"]["units"] == 16
    assert words.WordVocab.load(tmp_path / "run/words.txt").size == 30
    cfg = bilm.ElmoConfig(**about["config"])
    want = declared(bilm.Pretrained(cfg, 30))
    shapes = {name: p.get_value().shape for name, p in want.items()}
    assert {name: a.shape for name, a in arrays.items()} == shapes
    with pytest.raises(ValueError, match="--overwrite"):
        elmo.main(args)
    with pytest.raises(ValueError, match="--steps=0"):
        elmo.main([*args, "--steps=0"])


def test_the_help_says_that_there_is_no_resume(capsys):
    with pytest.raises(SystemExit):
        elmo.main(["--help"])
    assert "no resume" in capsys.readouterr().out

"""Heads against NumPy, in every structure, and against transformers' classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from t5x_lite import example, heads, model, parameters, step
from t5x_lite.config import ConfigError
from t5x_lite.model_config import STRUCTURES
from tests import tiny

B, T, D = 6, 5, 32


# An encoder and a decoder alone differ from these in their ranks.
EACH = [
    pytest.param(s, marks=[pytest.mark.slow] if s in ("encoder", "decoder") else [])
    for s in STRUCTURES
]
HEADS = {
    "class": dict(head="class", classes=3),
    "unpooled": dict(head="class", classes=3, head_pooler=False),
    "regression": dict(head="regression"),
    "choice": dict(head="choice", choices=3),
    "similarity": dict(head="similarity", classes=3),
    "similarity_number": dict(head="similarity", classes=1),
    "tags": dict(head="tags", classes=4),
    "span": dict(head="span"),
}


def fields(rng: np.random.Generator, batch: int = B, length: int = T) -> dict:
    """Every field that heads read; the last example of each kind only fills up."""
    values = rng.normal(size=batch).astype(np.float32)
    values[-2:] = np.nan
    labels = rng.integers(0, 3, batch).astype(np.int32)
    labels[-3:] = -1
    span = np.sort(rng.integers(0, length, (batch, 2)), axis=1).astype(np.int32)
    span[-1] = -1
    allowed = rng.integers(0, 2, (batch, length)).astype(np.int32)
    allowed[np.arange(batch)[:, None], span] = 1
    return dict(
        pooled=rng.integers(0, length, batch).astype(np.int32),
        labels=labels,
        values=values,
        tags=rng.integers(-1, 4, (batch, length)).astype(np.int32),
        span=span,
        allowed=allowed,
    )


def head_of(name: str):
    shape = dict(structure="encoder") | HEADS[name]
    cfg = tiny.tiny_config(model=shape, data=dict(batch_size=B)).model
    net = heads.Head(cfg)
    params = parameters.init_params(net, jax.random.key(1))
    params = jax.tree.map(lambda p: p + 0.1, params)  # biases are drawn as zeros
    return cfg, net, params


def by_numpy(name: str, params: dict, y_BTD: np.ndarray, stream: dict) -> np.ndarray:
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    if name in ("tags", "span"):
        logits = y_BTD @ p["kernel"] + p["bias"]
        if name == "span":
            logits = np.where(stream["allowed"][..., None] > 0, logits, -1e9)
        return logits
    h = y_BTD[np.arange(B), stream["pooled"]]
    if name != "unpooled":
        h = np.tanh(h @ p["pooler"] + p["pooler_bias"])
    if name.startswith("similarity"):  # "added element-wise before" the linear layer
        h = h[0::2] + h[1::2]
    logits = h @ p["kernel"] + p["bias"]
    return logits.reshape(-1, 3) if name == "choice" else logits


def loss_by_numpy(name: str, logits: np.ndarray, stream: dict) -> tuple[float, int]:
    """(summed loss, how many)"""

    def nll(logits, labels):
        kept = labels >= 0
        log_p = special.log_softmax(logits[kept], axis=-1)
        return -log_p[np.arange(kept.sum()), labels[kept]].sum(), kept.sum()

    n = dict(choice=3, similarity=2, similarity_number=2).get(name, 1)
    if name in ("regression", "similarity_number"):
        values = stream["values"][::n]
        kept = np.isfinite(values)
        return ((logits[kept, 0] - values[kept]) ** 2).sum(), kept.sum()
    if name == "tags":
        return nll(logits.reshape(-1, 4), stream["tags"].reshape(-1))
    if name == "span":
        ends = [nll(logits[..., e], stream["span"][:, e]) for e in (0, 1)]
        return (ends[0][0] + ends[1][0]) / 2, ends[0][1]
    return nll(logits, stream["labels"][::n])


@pytest.mark.parametrize("name", HEADS)
def test_logits_and_loss_are_numpys(name):
    rng = np.random.default_rng(0)
    cfg, net, params = head_of(name)
    stream, y_BTD = fields(rng), rng.normal(size=(B, T, D)).astype(np.float32)
    example_fields = {k: v for k, v in example.OPTIONAL.items() if k in stream}
    assert {k: str(v.dtype) for k, v in stream.items()} == {
        k: f.dtype for k, f in example_fields.items()
    }
    logits = model.bind(net, params)(jnp.asarray(y_BTD), stream)
    expected = by_numpy(name, params, y_BTD, stream)
    np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=2e-5)
    sums = heads.sums(cfg, logits, stream, 0.0)
    total, count = loss_by_numpy(name, expected, stream)
    np.testing.assert_allclose(sums.nll, total, rtol=2e-5)
    assert sums.weight == count > 0
    said = heads.predictions(cfg, logits)
    if name == "tags":
        share = special.softmax(expected, axis=-1).max(axis=-1)
        np.testing.assert_allclose(said["probability"], share, rtol=2e-5)
        right = (said["tags"] == stream["tags"]) & (stream["tags"] >= 0)
        assert sums.correct == right.sum()
    if name == "span":
        ends = np.stack([said["start_logits"], said["end_logits"]]).argmax(-1)
        assert sums.correct == (ends == stream["span"].T).all(0).sum()


def task_batch(structure: str, seed: int = 0, head: str = "class") -> dict:
    """A batch of a labelled task as `data/task_batches.py` makes it."""
    batch = tiny.random_batch(seed)
    stream = batch["decoder"]
    if structure in ("encoder", "permuted"):
        stream["ranks"] = np.zeros_like(stream["ranks"])
    stream |= fields(np.random.default_rng(seed), *stream["tokens"].shape)
    if structure != "encoder_decoder":
        batch = {"main": stream, "fingerprint": batch["fingerprint"]}
    return batch


@pytest.mark.parametrize("structure", EACH)
def test_a_head_in_every_structure(structure):
    """The auxiliary loss adds lambda times the mean; without it no output layer."""
    batch = task_batch(structure)
    example.check(batch, 128)
    batch.pop("fingerprint")
    shape = dict(structure=structure, head="class", classes=3)
    if structure == "permuted":
        shape |= dict(query_streams=1, positions="transformer_xl", types=1)
    alone, helped = (
        tiny.tiny_config(model=shape, loss=dict(lm_weight=w)) for w in (0.0, 0.5)
    )
    net = model.build(alone.model)
    params = parameters.init_params(net, jax.random.key(0))

    def both(params):
        one, sums = step.batch_sums(net, params, batch, alone, 100)
        two, more = step.batch_sums(net, params, batch, helped, 100)
        said = step.make_predict_step(net, alone)(params, batch)
        return one, (two, sums, more, said["logits"])

    if structure == "prefix_lm":
        both_and = jax.jit(jax.value_and_grad(both, has_aux=True))
        (one, found), grads = both_and(params)
        assert not np.any(grads["output"]["kernel"])
        assert np.any(grads["head"]["kernel"]) and np.any(grads["embedding"])
    else:
        one, found = jax.jit(both)(params)
    two, sums, more, logits = found
    assert set(sums) == {"head"} and set(more) == {"head", "tokens"}
    np.testing.assert_allclose(one, sums["head"].nll / sums["head"].weight, rtol=1e-6)
    tokens = more["tokens"].objective / more["tokens"].weight
    np.testing.assert_allclose(two, one + 0.5 * tokens, rtol=1e-6)
    right = (np.argmax(logits, -1) == batch[stream_of(structure)]["labels"]).sum()
    assert logits.shape == (8, 3) and sums["head"].correct == right


def stream_of(structure: str) -> str:
    return "decoder" if structure == "encoder_decoder" else "main"


def test_rows_of_an_example_stay_in_one_microbatch():
    """Pairs of rows are seen together; all of them once."""
    rows = jnp.arange(12)

    def seen(params, part, key):
        pairs = part.reshape(-1, 2)
        together = jnp.all(pairs[:, 0] + 1 == pairs[:, 1])
        return (jnp.sum(2.0**part), together.astype(jnp.int32)), jnp.zeros(())

    (total, together), _ = step.accumulate(seen, {}, rows, None, 3, "float32", 2)
    assert total == 2.0**12 - 1 and together == 3


def test_mix_is_equation_1_of_elmo():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(3, 2, 4, 8)).astype(np.float32)
    weights, gamma = rng.normal(size=3).astype(np.float32), np.float32(1.7)
    params = dict(weights=jnp.asarray(weights), gamma=jnp.asarray([gamma]))
    mixed = model.bind(heads.Mix(3), params)(jnp.asarray(states))
    shares = special.softmax(weights.astype(np.float64))
    expected = gamma * sum(s * h for s, h in zip(shares, states, strict=True))
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_a_mix_of_the_last_layer_alone_is_the_plain_head(scan):
    """Of L + 1 states the last one is what a head reads without a mix."""
    shape = dict(structure="decoder", head="tags", classes=4, scan=scan)
    plain = tiny.tiny_config(model=shape)
    mixing = tiny.tiny_config(model=shape | dict(mix_layers=True))
    batch = task_batch("decoder")
    batch.pop("fingerprint")
    net = model.build(mixing.model)
    params = parameters.init_params(net, jax.random.key(0))
    assert params["mix"]["weights"].shape == (3,)
    params["mix"]["weights"] = jnp.asarray([-1e4, -1e4, 0.0])
    mixed = model.bind(net, params).outputs(batch).head
    params.pop("mix")
    own = model.bind(model.build(plain.model), params).outputs(batch).head
    np.testing.assert_allclose(mixed, own, rtol=1e-5, atol=1e-6)


def test_baselines_by_hand():
    def cfg(name):
        return tiny.tiny_config(model=dict(structure="encoder") | HEADS[name]).model

    train = [dict(labels=np.array([0, 0, 1, -1])), dict(labels=np.array([0, 2, 0]))]
    held = [dict(labels=np.array([1, 0, -1]))]
    # Seen 0: 4, 1: 1, 2: 1; each once more: 5, 2 and 2 of 9.
    wanted = -(np.log(2 / 9) + np.log(5 / 9)) / 2
    assert np.isclose(heads.baseline(cfg("class"), train, held), wanted)
    train = [dict(values=np.array([1.0, 3.0, np.nan], np.float32))]
    held = [dict(values=np.array([2.0, 5.0], np.float32))]
    assert np.isclose(heads.baseline(cfg("regression"), train, held), 4.5)
    held = [dict(span=np.array([[1, 1], [-1, -1]]), allowed=np.ones((2, 7), np.int32))]
    assert np.isclose(heads.baseline(cfg("span"), [], held), np.log(7))


@pytest.mark.parametrize(
    "shape, named",
    [
        (dict(head="class"), "classes=0"),
        (dict(head="span", classes=2), "classes=2"),
        (dict(head="choice"), "choices=0"),
        (dict(head="tags", classes=3, choices=4), "choices=4"),
        (dict(mix_layers=True), "mix_layers"),
        (
            dict(head="class", classes=2, generator_width=0.5, transform_output=True),
            "ELECTRA",
        ),
    ],
)
def test_what_does_not_fit_is_named(shape, named):
    with pytest.raises(ConfigError, match=named):
        tiny.tiny_config(model=dict(structure="encoder") | shape)


def test_labels_beyond_the_classes_are_refused():
    cfg = tiny.tiny_config(model=dict(structure="encoder", head="class", classes=2))
    stream = fields(np.random.default_rng(0))
    stream["labels"][0] = 4
    with pytest.raises(ValueError, match="config.model.classes=2.*Set it to 5"):
        heads.check_batch(cfg.model, stream)
    with pytest.raises(ValueError, match="pooled"):
        heads.check_batch(cfg.model, {"labels": stream["labels"]})

"""Schedules, regex tables, freezing, and Adafactor per matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite import model, optim, parameters
from tests.tiny import tiny_config


def rates(steps=100, **values):
    schedule = optim.schedule(tiny_config(steps=steps, optim=values))
    return np.array([np.asarray(schedule(i)) for i in range(steps + 1)])


def test_rsqrt_is_flat_then_falls_with_the_root():
    r = rates(schedule="rsqrt", learning_rate=1.0, warmup_steps=16)
    assert r[0] == r[16] == 0.25
    assert r[64] == pytest.approx(1 / 8) and r[100] == pytest.approx(1 / 10)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_warm_up_peak_and_end(name):
    r = rates(schedule=name, learning_rate=2.0, warmup_steps=10, final_fraction=0.1)
    assert r[0] == 0.0 and r[5] == pytest.approx(1.0) and r[10] == pytest.approx(2.0)
    assert r[100] == pytest.approx(0.2)
    assert (np.diff(r[10:]) <= 1e-7).all()
    if name == "linear":
        assert r[55] == pytest.approx(1.1)
    if name == "cosine":
        assert r[55] == pytest.approx(1.1)
    if name == "wsd":
        assert r[80] == pytest.approx(2.0) and r[90] == pytest.approx(1.1)


NAMES = ["a/kernel", "a/scale", "b/kernel"]


def test_table_takes_the_first_match():
    got = optim.table("k", ((".*scale", 0.0), ("a/.*", 0.5), (".*", 1.0)), NAMES)
    assert got == {"a/kernel": 0.5, "a/scale": 0.0, "b/kernel": 1.0}


@pytest.mark.parametrize(
    "rules, words",
    [
        ((("a/.*", 1.0),), "no row for parameter 'b/kernel'"),
        ((("c/.*", 1.0), (".*", 1.0)), "no parameter takes the row 'c/"),
        ((("(", 1.0),), "is no .regex, number. row"),
        ((("a", "x"),), "is no .regex, number. row"),
    ],
)
def test_table_errors(rules, words):
    with pytest.raises(ValueError, match=words):
        optim.table("config.optim.lr_rules", rules, NAMES)


def setup(**values) -> Any:
    cfg = tiny_config(
        model=dict(d_model=128, heads=8),
        optim=dict(learning_rate=0.1, schedule="constant", warmup_steps=0) | values,
    )
    net = model.build(cfg.model)
    params = parameters.init_params(net, jax.random.key(0))
    grads = parameters.init_params(net, jax.random.key(1))
    return optim.make(cfg, net), params, grads


def test_adafactor_of_stacked_layers_is_optax_on_each_matrix():
    tx, params, grads = setup(name="adafactor")
    reference = optax.adafactor(learning_rate=0.1, min_dim_size_to_factor=128)
    state = tx.init(params)
    at = ("encoder", "blocks", "attention", "query")

    def leaf(tree: Any, layer: int) -> Any:
        for part in at:
            tree = tree[part]
        return tree[layer].reshape(128, 128)

    own = {i: reference.init(leaf(params, i)) for i in range(2)}
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        for i in range(2):
            want: Any
            want, own[i] = reference.update(leaf(grads, i), own[i], leaf(params, i))
            np.testing.assert_allclose(leaf(updates, i), want, rtol=1e-5)


def test_lamb_of_stacked_layers_is_optax_on_each_layer():
    tx, params, grads = setup(
        name="lamb", weight_decay=0.01, decay_rules=((".*", 1.0),), eps=1e-6
    )
    reference = optax.lamb(0.1, 0.9, 0.999, 1e-6, weight_decay=0.01)

    def layers(tree):
        """Each layer's arrays as leaves of their own."""

        def split(path, leaf):
            stacked = any(k.key == "blocks" for k in path)
            return {str(i): x for i, x in enumerate(leaf)} if stacked else leaf

        return jax.tree.map_with_path(split, tree)

    state, expected_state = tx.init(params), reference.init(layers(params))
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        expected, expected_state = reference.update(
            layers(grads), expected_state, layers(params)
        )
    for a, b in zip(
        jax.tree.leaves(layers(updates)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lamb"])
def test_a_zero_rate_freezes_without_state_or_share_in_the_norm(name):
    rules = (("embedding|output/kernel", 0.0), (".*", 1.0))
    tx, params, grads = setup(name=name, lr_rules=rules, clip_norm=1.0)
    grads["embedding"] = jnp.full_like(grads["embedding"], 1e6)
    state = tx.init(params)
    updates, _ = tx.update(grads, state, params)
    assert not np.asarray(updates["embedding"]).any()
    assert np.abs(np.asarray(updates["decoder"]["norm"]["scale"])).max() > 1e-4
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert params["embedding"].shape not in shapes


def test_rate_multipliers_and_weight_decay_follow_their_tables():
    common = dict(name="adamw", weight_decay=0.0)
    tx, params, grads = setup(**common)
    plain, _ = tx.update(grads, tx.init(params), params)
    tx, _, _ = setup(**common, lr_rules=(("encoder/.*", 0.5), (".*", 1.0)))
    slow, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(
        slow["encoder"]["norm"]["scale"], 0.5 * plain["encoder"]["norm"]["scale"]
    )
    np.testing.assert_array_equal(slow["embedding"], plain["embedding"])
    tx, _, _ = setup(**common | dict(weight_decay=0.5))
    decayed, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(
        decayed["embedding"] - plain["embedding"],
        -0.1 * 0.5 * params["embedding"],
        atol=1e-6,
    )
    for stack in ("encoder", "decoder"):
        np.testing.assert_array_equal(
            decayed[stack]["norm"]["scale"], plain[stack]["norm"]["scale"]
        )

"""LoRA: the paper's formula, merging, freezing, in every structure."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from t5x_lite import lora, model, optim, parameters, state, step
from t5x_lite.model_config import STRUCTURES
from tests import tiny

ALL = r".*/(attention|cross|mlp)/(query|key|value|out|up|gate|down)"


def drawn(cfg, seed: int = 0):
    """The model and NumPy's parameters (nothing to compile); adapters come last."""
    net, rng = model.build(cfg.model), np.random.default_rng(seed)
    declared = parameters.declared(net)
    flat = {
        tuple(name.split("/")): 0.1 * rng.normal(size=declared[name].get_value().shape)
        for name in sorted(declared, key=lambda name: (name.startswith("lora/"), name))
    }
    return net, parameters.nested({k: x.astype(np.float32) for k, x in flat.items()})


def test_a_weight_gets_alpha_over_r_times_ab():
    """By hand, for every kind of weight: heads in, heads out, plain, stacked or not."""
    for shared in (False, True):
        cfg = tiny.tiny_config(
            model=dict(
                structure="decoder",
                lora_rank=3,
                lora_alpha=6.0,
                lora_targets=ALL,
                share_layers=shared,
            )
        )
        net, params = drawn(cfg)
        merged = lora.plain(params, net)
        block = ("stack", "blocks")
        for path in (("attention", "query"), ("attention", "out"), ("mlp", "down")):
            weight: Any = params
            new: Any = merged
            pair: Any = params["lora"]
            for key in (*block, *path):
                weight, new, pair = weight[key], new[key], pair[key]
            a, b = np.asarray(pair["a"], np.float64), np.asarray(pair["b"], np.float64)
            assert np.abs(b).max() > 0.01
            expected = np.asarray(weight) + 2.0 * (a @ b).reshape(weight.shape)
            np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)
        untouched = merged["embedding"], params["embedding"]
        np.testing.assert_array_equal(*untouched)


@pytest.mark.parametrize(
    "structure",
    [
        pytest.param(s, marks=[] if s == "encoder_decoder" else [pytest.mark.slow])
        for s in STRUCTURES
    ],
)
def test_merged_is_unmerged(structure):
    """The same loss; a new adapter is the very function that it was put on."""
    shape = dict(structure=structure, lora_rank=2, lora_targets=ALL)
    cfg, plain = (tiny.tiny_config(model=shape | dict(lora_rank=r)) for r in (2, 0))
    net, params = drawn(cfg)
    _, base = drawn(plain)  # the same but for the adapters
    fresh = base | {"lora": parameters.init_params(net, jax.random.key(0))["lora"]}
    batch = tiny.random_batch()
    batch.pop("fingerprint")
    if structure != "encoder_decoder":
        batch = {"main": batch["decoder"]}

    @jax.jit
    def losses(params, fresh, base):
        without = model.build(plain.model)
        return [
            step.batch_sums(net, params, batch, cfg, 100)[0],
            step.batch_sums(without, lora.plain(params, net), batch, plain, 100)[0],
            step.batch_sums(net, fresh, batch, cfg, 100)[0],
            step.batch_sums(without, base, batch, plain, 100)[0],
        ]

    adapted, merged, new, before = losses(params, fresh, base)
    np.testing.assert_allclose(adapted, merged, rtol=1e-6)
    np.testing.assert_allclose(new, before, rtol=1e-6)
    assert abs(adapted - before) > 1e-4


def test_only_adapters_and_heads_move_or_have_a_state():
    cfg = tiny.tiny_config(
        model=dict(structure="encoder", head="class", classes=2, lora_rank=2),
        optim=dict(
            name="adamw", learning_rate=0.1, schedule="constant", warmup_steps=0
        ),
    )
    net = model.build(cfg.model)
    tx = optim.make(cfg, net)
    before = state.init(net, tx, jax.random.key(0))
    moments = {
        parameters.name_of(path).removeprefix("trained/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(before["opt"])
        if leaf.ndim
    }
    assert all(name.startswith(("lora/", "head/")) for name in moments)
    batch = tiny.random_batch()
    stream = batch["decoder"] | dict(
        pooled=np.full(8, 6, np.int32), labels=np.arange(8, dtype=np.int32) % 2
    )
    batch = {"main": stream, "fingerprint": batch["fingerprint"]}
    after, _ = jax.jit(step.make_train_step(net, tx, cfg, 100))(before, batch)
    moved = set()
    for (path, a), (_, b) in zip(
        *map(jax.tree_util.tree_leaves_with_path, (before["params"], after["params"])),
        strict=True,
    ):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            moved.add(parameters.name_of(path))
    # A has no gradient while B is zero (the paper's start).
    assert {n for n in moved if n.startswith("lora/")} == {
        n for n in moments if n.endswith("/b")
    }
    assert moved <= moments and "head/kernel" in moved


def test_adapters_of_a_sharded_model_have_their_axes():
    from t5x_lite import sharding

    cfg = tiny.tiny_config(
        model=dict(lora_rank=2, lora_targets=ALL), sharding=dict(fsdp=2, tensor=2)
    )
    net = model.build(cfg.model)
    mesh = sharding.make_mesh(cfg.sharding)
    abstract = state.abstract(net, optim.make(cfg, net), mesh, cfg.sharding.rules)
    query = abstract["params"]["lora"]["decoder"]["blocks"]["attention"]["query"]
    assert tuple(query["a"].sharding.spec) == (None, "fsdp", None)
    assert tuple(query["b"].sharding.spec) == (None, None, "tensor")


@pytest.mark.parametrize(
    "targets, named",
    [
        ("nothing", "matches all of no"),
        ("embedding|.*scale", "no matrix"),
        ("(", "no regex"),
    ],
)
def test_bad_targets_are_refused(targets, named):
    cfg = tiny.tiny_config(model=dict(lora_rank=2)).model
    with pytest.raises(ValueError, match=named):
        model.build(dataclasses.replace(cfg, lora_targets=targets))

"""Steps that are not finite are skipped, spikes rewound; a kill changes neither."""

import json
import math
import pathlib
import types
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from t5x_lite import config, guard, model, optim, parameters, sharding, state, step
from tests.tiny import random_batch, tiny_config

# ---- the step on the device


def made(**sections):
    """-> (config, jitted step, fresh state)."""
    cfg = tiny_config(**sections)
    net = model.build(cfg.model)
    tx = optim.make(cfg, net)
    mesh = sharding.make_mesh(cfg.sharding, jax.devices()[:1])
    abstract = state.abstract(net, tx, mesh, cfg.sharding.rules)
    train_step = jax.jit(step.make_train_step(net, tx, cfg, 100), donate_argnums=0)
    return cfg, train_step, state.create(net, tx, abstract, 0)


def leaves(tree) -> list[np.ndarray]:
    return [np.array(x) for x in jax.tree.leaves(tree)]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "name, microbatches",
    [("adamw", 2), pytest.param("adafactor", 1, marks=pytest.mark.slow)],
)
def test_a_step_that_is_not_finite_changes_only_its_number(
    name, microbatches, monkeypatch, tmp_path
):
    real = step.accumulate

    def accumulate(grads_of, params, batch, *rest):
        """A weight of 7 makes one number of one gradient infinite, not the loss."""
        sums, grads = real(grads_of, params, batch, *rest)
        given = jnp.any(batch["decoder"]["weights"] == 7.0)
        norm = grads["decoder"]["norm"]
        norm["scale"] = norm["scale"].at[3].add(jnp.where(given, jnp.inf, 0.0))
        return sums, grads

    monkeypatch.setattr(step, "accumulate", accumulate)
    more: Any = dict(name=name, microbatches=microbatches, weight_decay=0.1)
    more |= dict(schedule="linear", warmup_steps=4, learning_rate=0.1)
    more["lr_rules"] = ((r"encoder/norm/scale", 0.0), (r".*", 1.0))
    cfg, train_step, now = made(optim=more, steps=50)
    rate: Any = optim.schedule(cfg)
    poisoned, steep = random_batch(1), random_batch(1)
    poisoned["decoder"]["weights"][3, 2] = np.nan
    steep["decoder"]["weights"][3, 2] = 7.0
    for i in range(2):
        now, found = train_step(now, random_batch(2))
        assert bool(found["finite"])
        assert float(found["learning_rate"]) == pytest.approx(float(rate(i)))
    before = leaves((now["params"], now["opt"]))
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(now["params"])
    ]
    assert watched(tmp_path, **more)._parameters() == names
    moving = [name for name in names if name != "encoder/norm/scale"]  # is frozen
    for batch, bad in ((poisoned, moving), (steep, ["decoder/norm/scale"])):
        now, found = train_step(now, batch)
        assert not bool(found["finite"])
        assert np.isfinite(found["sums"]["tokens"].nll) == (batch is steep)
        norms = dict(zip(names, found["grad_norms"], strict=True))
        assert [name for name in names if not np.isfinite(norms[name])] == bad
        assert_same(leaves((now["params"], now["opt"])), before)
    assert int(now["step"]) == 4
    # The rate is that of the third update, and the update the one without the poison.
    now, found = train_step(now, random_batch(3))
    assert float(found["learning_rate"]) == pytest.approx(float(rate(2)))
    _, _, other = made(optim=more, steps=50)
    for seed in (2, 2, 3):
        other, _ = train_step(other, random_batch(seed))
    assert_same(
        leaves((now["params"], now["opt"])), leaves((other["params"], other["opt"]))
    )


@pytest.mark.slow
def test_the_guard_keeps_no_second_copy_of_the_state(monkeypatch):
    """XLA's own count: all of the state is updated in place, one array at a time."""

    def bytes_of():
        cfg = tiny_config(
            optim=dict(name="adamw", clip_norm=1.0), model=dict(d_ff=4096)
        )
        net = model.build(cfg.model)
        tx = optim.make(cfg, net)
        mesh = sharding.make_mesh(cfg.sharding, jax.devices()[:1])
        abstract = state.abstract(net, tx, mesh, cfg.sharding.rules)
        one = jax.jit(
            step.make_train_step(net, tx, cfg, 100),
            donate_argnums=0,
            out_shardings=(state.shardings(abstract), None),
        )
        found: Any = one.lower(abstract, random_batch()).compile().memory_analysis()
        return found, state.size_bytes(abstract)

    guarded, size = bytes_of()
    real = jnp.where
    monkeypatch.setattr(
        jnp, "where", lambda c, x, y: x if jnp.shape(c) == () else real(c, x, y)
    )
    plain, _ = bytes_of()
    assert guarded.alias_size_in_bytes >= size
    assert guarded.temp_size_in_bytes - plain.temp_size_in_bytes < size / 4


# ---- the guard on the host


def watched(workdir, **knobs) -> guard.Guard:
    cfg = tiny_config(optim=knobs)
    setup: Any = types.SimpleNamespace(
        cfg=cfg, lead=False, model=model.build(cfg.model)
    )
    params = parameters.declared(setup.model)
    nested = parameters.nested({tuple(name.split("/")): 0 for name in params})
    setup.abstract_state = {"params": nested}
    return guard.Guard(setup, workdir, {})


@hypothesis.given(
    st.lists(st.booleans(), max_size=30), st.integers(0, 4), st.integers(0, 30)
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_so_many_in_a_row_are_skipped_and_no_more(steps, limit, kill):
    """Against the runs of a string; a restart in between counts on."""
    workdir = pathlib.Path("/nowhere")
    text = "".join(".x"[bad] for bad in steps)
    found = text.find("x" * (limit + 1))
    stops = found + limit if found >= 0 else None
    watch = watched(workdir, skip_nonfinite=limit)
    norms = np.ones(2)
    for i, bad in enumerate(steps):
        if i == kill:
            again = json.loads(json.dumps({"guard": watch.meta()}))
            watch = guard.Guard(watch.setup, workdir, again)
        if i == stops:
            with pytest.raises(FloatingPointError, match=f"step {i + 1} is not finite"):
                watch.see(i + 1, math.nan, False, norms)
            return
        noted = watch.see(i + 1, math.nan if bad else 1.0, not bad, norms)
        assert noted == ({"skipped": text[: i + 1].count("x")} if bad else {})
    assert stops is None


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=6)
)
@hypothesis.settings(deadline=None)
def test_what_is_left_out_is_a_function_of_the_step(rewinds):
    """Against lists: every rewind cuts the sequence and goes on behind the spike."""
    left_out, sequence = guard.LeftOut(), list(range(60))
    for back, more in rewinds:
        spike = 50
        last = sequence[spike - 1] + more
        sequence = sequence[:back] + list(range(last + 1, last + 61 - back))
        old, left_out = left_out, left_out.rewound(back, last + 1)
        assert [left_out.index(s) for s in range(60)] == sequence
        # Checkpoints until the one gone back to are of both branches, later ones not.
        for s in range(60):
            assert (old.until(s) == left_out.until(s)) == (s <= back)
    assert guard.LeftOut.of(json.loads(json.dumps(left_out.ranges))) == left_out


def test_a_spike_is_far_above_the_median(tmp_path):
    watch = watched(tmp_path, spike_factor=1.5, spike_window=5)
    losses = [9.0, 2.0, 2.2, 1.8, 2.1, 2.9, 3.2, 2.0]
    noted = [watch.see(i + 1, loss, True, np.ones(2)) for i, loss in enumerate(losses)]
    # Five losses first; then 1.5 times 2.1 and, of 2.0 2.2 1.8 2.1 2.9, again 2.1.
    assert noted[:6] == [{}] * 6
    assert noted[6] == {"spike": pytest.approx(3.2 / 2.1)}
    watch = watched(tmp_path, spike_factor=1.5, spike_window=5, spike_rewinds=1)
    with pytest.raises(guard.Spike, match="step 7: loss 3.2000, usual 2.1"):
        for i, loss in enumerate(losses):
            watch.see(i + 1, loss, True, np.ones(2))


def test_rewinds_need_a_factor():
    with pytest.raises(config.ConfigError, match="needs config.optim.spike_factor"):
        tiny_config(optim=dict(spike_rewinds=1))

"""The sharding table: errors that name the array, and 1 device = 8 devices."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from t5x_lite import model, optim, sharding, state, step
from tests.tiny import random_batch, tiny_config

RULES = dict(tiny_config().sharding.rules)


def mesh(**sizes):
    return sharding.make_mesh(tiny_config(sharding=sizes).sharding)


def test_minus_one_takes_the_rest():
    shape = dict(mesh(data=-1, fsdp=2, tensor=2).shape)
    assert shape == dict(data=2, fsdp=2, tensor=2, sequence=1)
    assert mesh(data=2, sequence=-1).shape["sequence"] == 4


def devices_of(slices: int, each: int, processes: int = 1, platform="tpu"):
    """Stand-ins for the devices of a machine of several slices."""
    return [
        types.SimpleNamespace(
            id=i, slice_index=i // each, process_index=i * processes // (slices * each),
            platform=platform, device_kind="made up", coords=(i % each, 0, 0),
            core_on_chip=0,
        )
        for i in range(slices * each)
    ]  # fmt: skip


@pytest.mark.parametrize("dcn", [(-1, 1), (2, 1), (1, 2)])
def test_slices_are_outermost_along_their_axis(dcn):
    grid = sharding.device_grid([2, 4, 1, 1], dcn[0], dcn[1], devices_of(2, 4))
    slices = np.vectorize(lambda d: d.slice_index)(grid)[:, :, 0, 0]
    axis = 0 if dcn[1] == 1 else 1
    assert (slices == np.indices((2, 4))[axis] // (1 if axis == 0 else 2)).all()


@pytest.mark.parametrize("dcn", [(4, 1), (1, 4), (1, 1), (-1, 8)])
def test_a_split_over_slices_that_are_not_there_is_refused(dcn):
    with pytest.raises(ValueError, match="number of slices, here 2"):
        sharding.device_grid([2, 4, 1, 1], dcn[0], dcn[1], devices_of(2, 4))


def test_hosts_of_gpus_are_one_machine_unless_asked():
    """Each host has a slice_index of its own there."""
    hosts = devices_of(2, 4, platform="cuda")
    assert sharding.device_grid([1, 8, 1, 1], -1, 1, hosts).shape == (1, 8, 1, 1)
    grid = sharding.device_grid([2, 4, 1, 1], 2, 1, hosts)
    assert [d.slice_index for d in grid[:, 0, 0, 0]] == [0, 1]


def test_without_slices_processes_are_the_granules():
    alone = devices_of(1, 8, processes=2, platform="cpu")
    grid = sharding.device_grid([4, 2, 1, 1], 2, 1, alone)
    near = np.vectorize(lambda d: d.process_index)(grid)[:, :, 0, 0]
    assert (near == np.indices((4, 2))[0] // 2).all()


def test_local_rows_of_a_block_of_the_grid():
    """Four devices of eight, not neighbours in the mesh: their rows, in order."""
    where = sharding.batch_sharding(mesh(data=8), RULES, 16)
    assert list(sharding.local_rows(where, 16)) == list(range(16))
    batch = {"main": {"tokens": np.arange(32).reshape(16, 2)}}
    put = sharding.to_device(batch, where, 16)["main"]["tokens"]
    np.testing.assert_array_equal(np.asarray(put), batch["main"]["tokens"])


def test_a_length_need_not_divide_over_the_sequence_axis():
    m = mesh(data=2, sequence=4)
    with sharding.use(m, RULES):
        x = jax.jit(lambda x: sharding.constrain(x, "batch", "length", "residual") + 1)(
            np.ones((2, 6, 3), np.float32)
        )
    np.testing.assert_array_equal(np.asarray(x), 2.0)


@pytest.mark.parametrize("sizes", [dict(data=3), dict(data=-1, fsdp=3)])
def test_a_mesh_that_does_not_divide_is_refused(sizes):
    with pytest.raises(ValueError, match=r"does not fit 8 device"):
        mesh(**sizes)


def test_spec_follows_the_table():
    m = mesh(data=2, fsdp=2, tensor=2)
    got = sharding.spec("q", ("layers", "embed", "heads"), (3, 4, 2), RULES, m)
    assert got == P(None, "fsdp", "tensor")
    assert sharding.spec("b", ("batch",), (8,), RULES, m) == P(("data", "fsdp"))


@pytest.mark.parametrize(
    "axes, shape, rules, error, words",
    [
        (("embd",), (4,), RULES, KeyError, "did you mean 'embed'"),
        (("vocab", "mlp"), (4, 4), RULES, ValueError, "'tensor' twice"),
        (("heads",), (3,), RULES, ValueError, "size 3 does not divide"),
        (("embed",), (4,), {"embed": ("model",)}, ValueError, "mesh has"),
    ],
)
def test_errors_name_the_array_and_the_rule(axes, shape, rules, error, words):
    m = mesh(data=2, fsdp=2, tensor=2)
    with pytest.raises(error, match=words):
        sharding.spec("some/parameter", axes, shape, rules, m)


def train(cfg, devices, steps=3, params=None):
    """Losses, state and its declared shardings after some steps on some devices.

    Args:
      params: path -> array to start from instead of fresh ones.
    """
    net = model.build(cfg.model)
    tx = optim.make(cfg, net)
    m = sharding.make_mesh(cfg.sharding, jax.devices()[:devices])
    abstract = state.abstract(net, tx, m, cfg.sharding.rules)
    rows = sharding.batch_sharding(m, cfg.sharding.rules, cfg.data.batch_size)
    losses = []
    with sharding.use(m, cfg.sharding.rules):
        now = state.create(net, tx, abstract, seed=0)
        if params is not None:
            given = jax.tree.map_with_path(
                lambda path, leaf: jax.device_put(
                    params[jax.tree_util.keystr(path)], leaf.sharding
                ),
                now["params"],
            )
            now |= {"params": given}
        train_step = jax.jit(
            step.make_train_step(net, tx, cfg, used_ids=100),
            donate_argnums=0,
            out_shardings=(state.shardings(abstract), None),
        )
        for i in range(steps):
            batch = sharding.to_device(random_batch(i), rows, cfg.data.batch_size)
            now, metrics = train_step(now, batch)
            losses.append(
                float(metrics["sums"]["tokens"].nll / metrics["sums"]["tokens"].weight)
            )
    return losses, now, abstract


@pytest.fixture(scope="module")
def one_device():
    return {
        name: train(_config(name, (1, 1, 1, 1)), 1) for name in ("adamw", "adafactor")
    }


def _config(name, sizes):
    return tiny_config(
        # Wide enough for Adafactor to factor: both matrix dimensions reach 128.
        model=dict(d_model=128, heads=8, dropout=0.1),
        optim=dict(
            name=name,
            # Adam's first updates are sign(g): the tiniest difference would show.
            eps=1e-3,
            learning_rate=0.01,
            schedule="constant",
            warmup_steps=0,
            clip_norm=1.0,
            weight_decay=0.01,
        ),
        sharding=dict(zip(sharding.AXES, sizes, strict=True)),
    )


GRID = {  # sizes -> the optimizer in `make test`; the other is slow
    (8, 1, 1, 1): "adamw",
    (2, 4, 1, 1): "adafactor",
    (2, 2, 2, 1): "adafactor",
    (1, 2, 2, 2): "adamw",
}


@pytest.mark.parametrize(
    "name, sizes",
    [
        pytest.param(name, sizes, marks=() if name == fast else pytest.mark.slow)
        for sizes, fast in GRID.items()
        for name in ("adamw", "adafactor")
    ],
)
def test_eight_devices_train_like_one(name, sizes, one_device):
    losses, state_8, abstract = train(_config(name, sizes), 8)
    losses_1, state_1, _ = one_device[name]
    np.testing.assert_allclose(losses, losses_1, rtol=2e-6)
    flat_8, flat_1 = jax.tree.leaves(state_8), jax.tree.leaves(state_1)
    for a, b in zip(flat_8, flat_1, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=2e-6)
    for leaf, planned in zip(flat_8, jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(planned.sharding, leaf.ndim)


def test_factored_optimizer_state_is_sharded_like_its_parameter():
    cfg = _config("adafactor", (2, 2, 2, 1))
    net = model.build(cfg.model)
    m = sharding.make_mesh(cfg.sharding)
    abstract = state.abstract(net, optim.make(cfg, net), m, cfg.sharding.rules)
    specs = {
        jax.tree_util.keystr(path): (leaf.shape, leaf.sharding.spec)
        for path, leaf in jax.tree.leaves_with_path(abstract["opt"])
    }
    rows = [
        (shape, spec) for k, (shape, spec) in specs.items()
        if "'encoder']['blocks']['attention']['query']" in k and "v_" in k
    ]  # fmt: skip
    # query is [L, embed 128, heads*kv 128]; one factor keeps each of the two.
    assert sorted(map(str, rows)) == sorted(
        map(str, [((2, 128), P(None, "fsdp")), ((2, 128), P(None, "tensor"))])
    )


def test_no_array_of_the_state_is_left_whole_by_accident():
    """With fsdp 8 every matrix of the state is split 8 ways."""
    cfg = _config("adamw", (1, 8, 1, 1))
    net = model.build(cfg.model)
    m = sharding.make_mesh(cfg.sharding)
    abstract = state.abstract(net, optim.make(cfg, net), m, cfg.sharding.rules)
    for path, leaf in jax.tree.leaves_with_path(abstract):
        split = leaf.sharding.num_devices // _copies(leaf)
        if leaf.ndim >= 2 and "scale" not in str(path) and "relative" not in str(path):
            assert split == 8, path


def _copies(leaf):
    shard = leaf.sharding.shard_shape(leaf.shape)
    return leaf.sharding.num_devices * int(np.prod(shard)) // int(np.prod(leaf.shape))


def test_microbatches_equal_one_batch():
    one, state_1, _ = train(_dry(1), 1)
    four, state_4, _ = train(_dry(4), 1)
    np.testing.assert_allclose(four, one, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(state_4), jax.tree.leaves(state_1), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_microbatches_add_up_in_bfloat16_too():
    """Half the memory for gradients; losses stay within bfloat16's 8 bits of them."""
    one, state_1, _ = train(_dry(1), 1)
    four, state_4, _ = train(_dry(4, accumulate_dtype="bfloat16"), 1)
    np.testing.assert_allclose(four, one, rtol=2e-3)
    before = jax.tree.leaves(state_1["params"])
    for a, b in zip(jax.tree.leaves(state_4["params"]), before, strict=True):
        assert a.dtype == b.dtype == np.float32


def test_padding_the_vocabulary_changes_no_loss():
    """100 ids in use: in 100 rows, and in 128 over a tensor axis of 4."""
    plain = _dry(1, model=dict(vocab_size=100))
    padded = _dry(1, model=dict(vocab_size=128), sharding=dict(data=2, tensor=4))
    net = model.build(padded.model)
    start = state.init(net, optim.make(padded, net), jax.random.key(0))
    shorter = {
        jax.tree_util.keystr(path): leaf[:100] if leaf.shape[0] == 128 else leaf
        for path, leaf in jax.tree.leaves_with_path(start["params"])
    }
    losses, _, _ = train(plain, 1, params=shorter)
    padded_losses, _, _ = train(padded, 8)
    np.testing.assert_allclose(padded_losses, losses, rtol=2e-6)


def test_norms_split_over_the_tensor_axis_change_nothing(one_device):
    """Sequence parallelism of Korthikanti et al. 2022: one row of the table."""
    cfg = _config("adamw", (2, 1, 4, 1))
    rules = dict(cfg.sharding.rules, length=("sequence", "tensor"))
    split = dataclasses.replace(
        cfg, sharding=dataclasses.replace(cfg.sharding, rules=rules)
    )
    losses, _, _ = train(split, 8)
    np.testing.assert_allclose(losses, one_device["adamw"][0], rtol=2e-6)


def test_offload_is_refused_where_it_cannot_be():
    cfg = _dry(1, offload=True)
    net = model.build(cfg.model)
    m = sharding.make_mesh(cfg.sharding, jax.devices()[:1])
    with pytest.raises(ValueError, match="config.optim.offload=True"):
        state.abstract(net, optim.make(cfg, net), m, RULES, cfg.optim.offload)


def _dry(microbatches, model=None, sharding=None, **optim):
    return tiny_config(
        model=model or {},
        optim=dict(
            name="adamw",
            eps=1e-3,
            learning_rate=0.01,
            schedule="constant",
            warmup_steps=0,
            microbatches=microbatches,
            **optim,
        ),
        sharding=sharding or dict(data=1),
    )

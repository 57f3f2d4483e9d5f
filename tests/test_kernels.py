"""Every attention kernel against the reference, gradients included."""

import collections
import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import model as model_lib
from t5x_lite import optim, parameters, sharding, state, step, visibility
from t5x_lite.kernels import attention
from tests import tiny

B, T, S, N, H = 3, 6, 8, 2, 8

# cuDNN needs its GPU: here XLA computes the same call.
cudnn = functools.partial(attention.cudnn, implementation="xla")
KERNELS = {"rows": attention.rows, "cudnn": cudnn}


def inputs(seed=0, T=T, S=S, bias=True, dropout=True):
    """q, k, v, the output's gradient, bias (1, N, T, S) and dropout mask, or None."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    keep = jnp.asarray(rng.choice([0.0, 2.0], (B, N, 1, S)), jnp.float32)
    streams = (normal(B, T, N, H), normal(B, S, N, H), normal(B, S, N, H))
    table = normal(1, N, T, S) if bias else None
    return streams, normal(B, T, N, H), table, keep if dropout else None


def value_and_grads(kernel, streams, do, visible, table, keep):
    def loss(q, k, v, table):
        return jnp.sum(kernel(q, k, v, visible, table, keep) * do)

    which = (0, 1, 2) if table is None else (0, 1, 2, 3)
    return jax.jit(jax.value_and_grad(loss, which))(*streams, table)


def assert_same(kernel, streams, do, visible, table, keep):
    got, grads = value_and_grads(kernel, streams, do, visible, table, keep)
    reference = value_and_grads(attention.einsum, streams, do, visible, table, keep)
    np.testing.assert_allclose(got, reference[0], rtol=1e-5)
    for a, b in zip(grads, reference[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(KERNELS))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_kernel_equals_the_reference(name, bias, dropout, strict_dtypes):
    streams, do, table, keep = inputs(bias=bias, dropout=dropout)
    rng = np.random.default_rng(1)
    visible = jnp.asarray(rng.random((B, T, S)) < 0.7).at[:, :, 0].set(True)
    assert_same(KERNELS[name], streams, do, visible, table, keep)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pattern", ["all", "causal"])
def test_a_promised_pattern_needs_no_mask(pattern, bias, strict_dtypes):
    streams, do, table, keep = inputs(T=S, bias=bias)
    whole = np.ones((S, S), bool)
    visible = np.tril(whole) if pattern == "causal" else whole
    kernel = functools.partial(cudnn, pattern=pattern)
    nothing = jnp.zeros((B, S, S), bool)  # the promise is what counts

    def with_promise(q, k, v, _, table, keep):
        return kernel(q, k, v, nothing, table, keep)

    assert_same(with_promise, streams, do, jnp.tile(visible, (B, 1, 1)), table, keep)


def configured(**model):
    cfg = tiny.tiny_config(model=dict(dtype="bfloat16", dropout=0.1) | model)
    batch = tiny.random_batch(T=8)
    if cfg.model.structure == "decoder":
        batch = {"main": batch["decoder"], "fingerprint": batch["fingerprint"]}
    return cfg, batch


T5 = dict(unpadded=True)
GPT = dict(structure="decoder", positions="learned", unpadded=True)


@pytest.mark.parametrize("model", [T5, T5 | dict(unpadded=False)])
def test_a_model_with_cudnn_equals_the_reference(model, monkeypatch):
    """Loss and gradients of a whole model, its bias and dropout included."""
    monkeypatch.setitem(attention.KERNELS, "cudnn", cudnn)
    found = []
    for kernel in ("einsum", "cudnn"):
        cfg, batch = configured(**model, attention=kernel, dtype="float32")
        net = model_lib.build(cfg.model)
        params = parameters.init_params(net, jax.random.key(0))
        batch.pop("fingerprint")

        def loss(params, cfg=cfg, net=net, batch=batch):
            key = jax.random.key(1)
            return step.batch_sums(net, params, batch, cfg, 128, None, key)[0]

        found.append(jax.jit(jax.value_and_grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), *found)


@pytest.mark.parametrize(
    "model, calls",
    [
        (T5 | dict(unpadded=False), {"fmhaScaleBiasSoftmax": 3}),
        (T5, {"fmhaScaleBiasSoftmax": 2, "fmhaSoftmax": 1}),  # cross: no bias, no mask
        (GPT | dict(unpadded=False), {"fmhaScaleBiasSoftmax": 1}),
        (GPT, {"fmhaSoftmax": 1}),
    ],
)
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_a_train_step_lowers_to_cudnn(model, remat, calls):
    """What reaches the compiler for CUDA; needs neither GPU nor cuDNN.

    Each attention of the scanned layer is called once forward and once backward.
    """
    cfg, batch = configured(**model, attention="cudnn", remat=remat)
    net = model_lib.build(cfg.model)
    tx = optim.make(cfg, net)
    mesh = sharding.make_mesh(cfg.sharding, jax.devices()[:1])
    version = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    with mock.patch(version, return_value=91000):
        abstract = state.abstract(net, tx, mesh, cfg.sharding.rules)
        train = jax.jit(step.make_train_step(net, tx, cfg, cfg.model.vocab_size))
        lowered = train.trace(abstract, batch).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    found = collections.Counter(re.findall(r"custom_call @__cudnn\$(\w+)", text))
    assert found == calls | {name + "Backward": n for name, n in calls.items()}
    causal = "mask_type\\22: \\22CAUSAL" in text
    assert causal == cfg.model.unpadded


def device(platform):
    return mock.Mock(platform=platform, device_kind=f"a {platform}")


def mesh_of(platform, **sizes):
    devices = np.full(tuple(sizes.values()), device(platform), object)
    return mock.Mock(devices=devices, shape=sizes, size=devices.size)


@pytest.mark.parametrize(
    "model, mesh, words",
    [
        (dict(attention="rows"), mesh_of("cpu", data=2), "runs on one device"),
        (dict(attention="cudnn"), mesh_of("cpu", data=1), "needs NVIDIA GPUs"),
        (dict(attention="cudnn"), mesh_of("gpu", data=1), "must be 'bfloat16'"),
        (
            dict(attention="cudnn", dtype="bfloat16"),
            mesh_of("gpu", sequence=2),
            "config.sharding.sequence must be 1",
        ),
        # On a CPU the trial itself fails: there is no cuDNN.
        (
            dict(attention="cudnn", dtype="bfloat16"),
            mesh_of("gpu", data=1),
            "with 128 cells, 4 heads of 16: cuDNN",
        ),
    ],
)
def test_a_kernel_that_cannot_be_had_names_the_way_out(model, mesh, words):
    cfg = dataclasses.replace(tiny.tiny_config().model, **model)
    with pytest.raises(ValueError, match=r"(?s)config.model.attention=.*einsum") as e:
        attention.check(cfg, mesh)
    assert words in str(e.value)


def test_the_reference_can_always_be_had():
    attention.check(tiny.tiny_config().model, mesh_of("cpu", data=2), (5,))


@pytest.mark.parametrize("positions", ["functional", "transformer_xl"])
@pytest.mark.parametrize("kernel", ["rows", "cudnn"])
def test_positions_with_scores_of_their_own_are_refused(kernel, positions):
    with pytest.raises(ValueError, match=f"{kernel}.*cannot compute.*einsum"):
        tiny.tiny_config(
            model=dict(attention=kernel, positions=positions, structure="encoder")
        )


@pytest.mark.parametrize(
    "stream, field, value",
    [("encoder", "segments", 0), ("decoder", "segments", 2), ("decoder", "ranks", 0)],
)
def test_a_batch_that_breaks_the_promise_is_refused(stream, field, value):
    cfg = dataclasses.replace(tiny.tiny_config().model, unpadded=True)
    batch = tiny.random_batch()
    visibility.check_unpadded(cfg, batch)
    batch[stream][field][-1, -1] = value
    with pytest.raises(ValueError, match=rf"unpadded=True.*{stream!r}.*Set it to F"):
        visibility.check_unpadded(cfg, batch)

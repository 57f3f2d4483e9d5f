"""Distillation: the papers' losses against NumPy on two models' own outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from t5x_lite import distill, model, step, vocab
from t5x_lite.config import ConfigError
from tests import tiny
from tests.test_lora import drawn

T = 3.0


def kl(teacher, student):
    """Hinton et al. 2015, section 2: soft targets at T, times T^2."""
    log_p = special.log_softmax(np.asarray(teacher, np.float64) / T, axis=-1)
    log_q = special.log_softmax(np.asarray(student, np.float64) / T, axis=-1)
    return T**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


def test_divergence_is_zero_of_equals_and_kl_otherwise():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, 7)).astype(np.float32)
    np.testing.assert_allclose(distill.divergence(a, b, T), kl(a, b), rtol=1e-5)
    np.testing.assert_allclose(distill.divergence(a, a, T), 0.0, atol=1e-6)


def taught(head: dict, knobs: dict, wide: int = 32):
    """(loss sums by name, gradients, the two models' outputs) of one batch."""
    shape = dict(structure="encoder") | head
    big = tiny.tiny_config(model=shape | dict(d_model=wide, encoder_layers=4))
    width = wide if wide != 32 and knobs.get("hidden") else 0
    cfg = tiny.tiny_config(
        model=shape | dict(distill_width=width),
        distill=dict(teacher="somewhere", temperature=T) | knobs,
    )
    knobs = distill.knobs(cfg) | dict(workdir="somewhere")
    knobs.pop("teacher")
    large, known = drawn(big, 1)
    small, params = drawn(cfg, 2)
    teacher = distill.Teacher(cfg=big, net=large, **knobs)
    rng = np.random.default_rng(0)
    batch = tiny.random_batch()
    stream = batch["decoder"]
    stream |= dict(
        ranks=np.zeros_like(stream["ranks"]),
        pooled=np.full(8, 6, np.int32),
        labels=np.array([0, 1, 2, 1, 0, 2, -1, -1], np.int32),
    )
    stream["segments"] = stream["segments"] * (rng.uniform(size=(8, 7)) < 0.8)
    batch = {"main": stream}

    @jax.jit
    def run(params, known):
        def objective(params, known):
            def lessons(student, out):
                return teacher.lessons(known, batch, 100, student, out)

            return step.batch_sums(small, params, batch, cfg, 100, None, None, lessons)

        grads, sums = jax.grad(objective, (0, 1), has_aux=True)(params, known)
        total = objective(params, known)[0]
        outs = [
            model.bind(net, p).outputs(batch, keep=True)
            for net, p in ((small, params), (large, known))
        ]
        texts = [
            model.bind(net, p).logits(out.cells_BKE)[..., :100]
            for (net, p), out in zip(
                ((small, params), (large, known)), outs, strict=True
            )
        ]
        return total, sums, grads, outs, texts

    return stream, params, run(params, known)


@pytest.mark.slow
def test_text_is_taught_by_the_teachers_logits():
    stream, _, (objective, sums, grads, _, (own, shown)) = taught({}, dict(alpha=0.3))
    total = (kl(shown, own) * stream["weights"]).sum()
    np.testing.assert_allclose(sums["taught"].nll, total, rtol=1e-4)
    weight = stream["weights"].sum()
    wanted = 0.7 * sums["tokens"].objective / weight + 0.3 * total / weight
    np.testing.assert_allclose(objective, wanted, rtol=1e-5)
    assert not any(np.any(g) for g in jax.tree.leaves(grads[1]))  # the teacher's


def test_a_head_is_taught_and_layers_are_projected():
    """Of 2 layers beside 4, states 0, 1, 2 see 0, 2, 4 (Jiao et al. 2020)."""
    head = dict(head="class", classes=3)
    found = taught(head, dict(alpha=0.5, hidden=2.0), wide=48)
    stream, params, (objective, sums, _, (out, shown), _) = found
    rows = stream["labels"] >= 0
    total = kl(shown.head, out.head)[rows].sum()
    np.testing.assert_allclose(sums["taught"].nll, total, rtol=1e-4)
    text = stream["segments"] > 0
    ours = np.asarray(out.layers_LBTD) @ params["distill"]
    pairs = ((0, 0), (1, 2), (2, 4))
    errors = [(ours[i] - shown.layers_LBTD[j]) ** 2 for i, j in pairs]
    hidden = np.mean([e[text].mean() for e in errors])
    np.testing.assert_allclose(sums["hidden"].nll / text.sum(), hidden, rtol=1e-4)
    wanted = 0.5 * sums["head"].nll / 6 + 0.5 * total / 6 + 2.0 * hidden
    np.testing.assert_allclose(objective, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "knobs, named",
    [
        (dict(alpha=0.5), "names no teacher"),
        (dict(teacher="t", alpha=2.0), "alpha=2.0"),
        (dict(teacher="t", temprature=2.0), "did you mean 'temperature'"),
    ],
)
def test_bad_knobs_are_refused(knobs, named):
    with pytest.raises(ConfigError, match=named):
        tiny.tiny_config(distill=knobs)


def test_a_teacher_that_is_not_there(tmp_path):
    cfg = tiny.tiny_config(distill=dict(teacher=str(tmp_path)))
    named = f"^config.distill.teacher={tmp_path} has no checkpoint"
    with pytest.raises(FileNotFoundError, match=named):
        distill.Teacher.of(cfg, vocab.load("bytes"))


def test_chunks_change_nothing():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(2, 7, 8)), jnp.float32) for _ in "ab")
    table = jnp.asarray(rng.normal(size=(11, 8)), jnp.float32)
    weights = jnp.asarray(rng.uniform(size=(2, 7)), jnp.float32)

    class Model:
        def logits(self, cells_BKE):
            return cells_BKE @ table.T

    totals = [
        distill.over_vocabulary(Model(), x, Model(), y, weights, T, 9, chunk).nll
        for chunk in (7, 3)
    ]
    wanted = kl((y @ table.T)[..., :9], (x @ table.T)[..., :9])
    np.testing.assert_allclose(totals, (wanted * weights).sum(), rtol=1e-5)

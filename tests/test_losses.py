"""The chunked loss against optax's, and padded vocabulary rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite import losses

B, T, D, V, USED = 3, 7, 16, 40, 33


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    kernel = rng.normal(size=(V, D)).astype(np.float32)
    targets = rng.integers(0, USED, (B, T)).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0], (B, T)).astype(np.float32)
    return x, kernel, targets, weights


def plain(x, kernel, targets, weights, z_loss):
    logits = jnp.einsum("BTD,VD->BTV", x, kernel[:USED])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    z = z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum((nll + z) * weights), jnp.sum(nll * weights), logits


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_value_and_gradient_equal_the_plain_loss(problem, chunk, z_loss, strict_dtypes):
    x, kernel, targets, weights = problem

    def chunked(x, kernel):
        # Times 3: the cotangent of the loss is not 1 in general.
        return (
            3.0
            * losses.cross_entropy(
                x, kernel, targets, weights, z_loss, USED, chunk
            ).objective
        )

    def reference(x, kernel):
        return 3.0 * plain(x, kernel, targets, weights, z_loss)[0]

    got, got_grads = jax.jit(jax.value_and_grad(chunked, (0, 1)))(x, kernel)
    want, want_grads = jax.value_and_grad(reference, (0, 1))(x, kernel)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [2, 7])
def test_sums(problem, chunk):
    x, kernel, targets, weights = problem
    sums = losses.cross_entropy(x, kernel, targets, weights, 0.01, USED, chunk)
    objective, nll, logits = plain(x, kernel, targets, weights, 0.01)
    np.testing.assert_allclose(sums.objective, objective, rtol=1e-5)
    np.testing.assert_allclose(sums.nll, nll, rtol=1e-5)
    np.testing.assert_allclose(sums.nll + sums.z, sums.objective, rtol=1e-6)
    hits = (np.asarray(logits).argmax(-1) == targets) * weights
    np.testing.assert_allclose(sums.correct, hits.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.weight, weights.sum(), rtol=1e-6)


def test_padded_vocabulary_rows_change_no_loss_and_get_no_gradient(problem):
    x, kernel, targets, weights = problem

    def loss(kernel):
        return losses.cross_entropy(x, kernel, targets, weights, 1e-4, USED, 3)

    other = kernel.copy()
    other[USED:] = 1e3
    np.testing.assert_array_equal(loss(kernel), loss(other))
    grad = jax.grad(lambda k: loss(k).objective)(other)
    assert not np.asarray(grad[USED:]).any()


def test_chunks_hold_few_logits_and_cover_the_length():
    assert losses.chunk_length(0, 8, 114, 32_128) * 8 * 32_128 <= 2**24
    assert losses.chunk_length(0, 8, 114, 512) == 114
    assert losses.chunk_length(5, 8, 114, 512) == 5
    assert losses.chunk_length(0, 4096, 114, 250_112) == 1

"""Every attention kernel against the reference, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.kernels import attention

B, T, S, N, H = 3, 5, 7, 2, 4


@pytest.mark.parametrize("name", sorted(set(attention.KERNELS) - {"einsum"}))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_kernel_equals_the_reference(name, bias, dropout, strict_dtypes):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k, v = normal(B, T, N, H), normal(B, S, N, H), normal(B, S, N, H)
    do = normal(B, T, N, H)
    table = normal(1, N, T, S) if bias else None
    keep = jnp.asarray(rng.choice([0.0, 2.0], (B, N, 1, S)), jnp.float32)
    keep = keep if dropout else None
    visible = jnp.asarray(rng.random((B, T, S)) < 0.7).at[:, :, 0].set(True)

    def run(kernel):
        def loss(q, k, v, table):
            return jnp.sum(kernel(q, k, v, visible, table, keep) * do)

        which = (0, 1, 2, 3) if bias else (0, 1, 2)
        return jax.jit(jax.value_and_grad(loss, which))(q, k, v, table)

    value, grads = run(attention.KERNELS[name])
    want, want_grads = run(attention.einsum)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

"""Eight virtual CPU devices, no implicit rank promotion, no files outside tmp_path."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_dtypes():
    """Our own arithmetic promotes no dtype silently (optax's does)."""
    with jax.numpy_dtype_promotion("strict"):
        yield

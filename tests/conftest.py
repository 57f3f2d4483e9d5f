"""Eight virtual CPU devices, no implicit rank promotion, no files outside tmp_path."""

import os

# Compile tests quickly rather than well: a third less time, the same results.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

# The small fits of studies lose more to threads than they gain, two workers' the more.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def tiny_workdir(tmp_path_factory):
    """A workdir with checkpoints of an untrained model at steps 3 and 5; read only."""
    from tests import tiny_run

    path = tmp_path_factory.mktemp("run")
    tiny_run.save(path, steps=(3, 5))
    return path


@pytest.fixture
def strict_dtypes():
    """Our own arithmetic promotes no dtype silently (optax's does)."""
    with jax.numpy_dtype_promotion("strict"):
        yield

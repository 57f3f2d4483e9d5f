"""Many saves: neither memory nor open files grow."""

import gc
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import checkpoint, retention
from tests.tiny import tiny_config

SAVES = 2000


def resident() -> int:
    """MiB of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_two_thousand_saves_leave_memory_and_files_flat(tmp_path):
    """A state of 1 MiB in 20 arrays; from save 500 on, when the caches are full."""
    made = checkpoint.Checkpoints(tmp_path, tiny_config().checkpoint)
    rng, seen = np.random.default_rng(0), {}
    for step in range(1, SAVES + 1):
        values = rng.normal(size=(20, 13_000)).astype(np.float32)
        state = {f"array {i}": jnp.asarray(row) for i, row in enumerate(values)}
        made.save(step, state, {"step": step}, {"heldout_loss": 1 / step})
        if step % 100 == 0:
            made.wait()
            gc.collect()
            seen[step] = (resident(), open_files())
            print(f"{step} saves: {seen[step][0]} MiB, {seen[step][1]} files open")
    made.close()
    assert retention.steps(tmp_path / "checkpoints") == [SAVES - 1, SAVES]
    first, last = seen[500], seen[SAVES]
    assert last[1] <= first[1] + 2
    # TensorStore's Python bindings lose what they make of JSON, some 30 KiB a save
    # here; bare Orbax grows alike. Nothing else may grow.
    assert (last[0] - first[0]) * 2**10 <= 50 * (SAVES - 500)

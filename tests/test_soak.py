"""Many saves: neither memory nor open files grow, but for what TensorStore loses."""

import gc
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from orbax.checkpoint._src.serialization import tensorstore_utils

from t5x_lite import checkpoint, retention
from tests.tiny import tiny_config

SAVES = 2000


class Spec:
    """As tensorstore.KvStore.Spec, for what Orbax asks it."""

    def __init__(self, spec: dict):
        self._spec = spec

    def to_json(self) -> dict:
        return dict(self._spec)


class KvStore:
    Spec, open = Spec, tensorstore.KvStore.open


class Whole:
    """TensorStore with the Spec above."""

    KvStore = KvStore

    def __getattr__(self, name):
        return getattr(tensorstore, name)


@pytest.fixture
def nothing_lost(monkeypatch):
    """Two calls of Orbax go without TensorStore, whose bindings lose references there.

    `Spec.to_json` (0.1.69 to 0.1.86), once an array, and
    `experimental_collect_matching_metrics`, twice a save, for a line of its log:
    together some 30 KiB a save of 20 arrays, of bare Orbax too.
    """
    monkeypatch.setattr(tensorstore_utils, "ts", Whole())
    monkeypatch.setattr(
        tensorstore_utils, "get_tensorstore_raw_bytes", lambda *args, **more: 0
    )


def resident() -> float:
    """MiB of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_two_thousand_saves_leave_memory_and_files_flat(tmp_path, nothing_lost):
    """A state of 1 MiB in 20 arrays; from save 1,000 on, when the caches are full."""
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
            print(f"{step} saves: {seen[step][0]:.1f} MiB, {seen[step][1]} files open")
    made.close()
    assert retention.steps(tmp_path / "checkpoints") == [SAVES - 1, SAVES]
    first, last = seen[1000], seen[SAVES]
    assert last[1] <= first[1] + 2
    assert last[0] <= 1.02 * first[0]

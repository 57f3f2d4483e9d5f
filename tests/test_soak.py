"""Many saves: open files do not grow, memory no more than with Orbax alone."""

import gc
import itertools
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from t5x_lite import checkpoint, retention
from tests.tiny import tiny_config

SAVES, SKIP = 2000, 500  # by then caches are full


def resident() -> float:
    """MiB of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def states():
    """1 MiB in 20 arrays, other values each time."""
    rng = np.random.default_rng(0)
    while True:
        values = rng.normal(size=(20, 13_000)).astype(np.float32)
        yield {f"array {i}": jnp.asarray(row) for i, row in enumerate(values)}


def growth(save, wait) -> tuple[float, int]:
    """(KiB of each, files of all) that are left behind, from save SKIP on."""
    seen = {}
    for step, state in itertools.islice(enumerate(states(), 1), SAVES):
        save(step, state)
        if step % 100 == 0:
            wait()
            gc.collect()
            seen[step] = (resident(), open_files())
            print(f"{step} saves: {seen[step][0]:.1f} MiB, {seen[step][1]} files open")
    grown = seen[SAVES][0] - seen[SKIP][0]
    return grown * 2**10 / (SAVES - SKIP), seen[SAVES][1] - seen[SKIP][1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_two_thousand_saves_leave_no_more_than_orbax_alone(tmp_path):
    """Open files stay; memory grows by what TensorStore loses, which is not ours.

    Its Python bindings lose references in `Spec.to_json` and
    `experimental_collect_matching_metrics`; Orbax calls them once an array and twice a
    save. The same saves by Orbax alone, in the same process, show how much that is.
    """
    made = checkpoint.Checkpoints(tmp_path / "ours", tiny_config().checkpoint)

    def save(step: int, state):
        made.save(step, state, {"step": step}, {"heldout_loss": 1 / step})

    ours, files = growth(save, made.wait)
    made.close()
    assert retention.steps(tmp_path / "ours/checkpoints") == [SAVES - 1, SAVES]
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(tmp_path / "bare", options=options) as bare:

        def save_bare(step: int, state):
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                meta=ocp.args.JsonSave({"step": step}),
            )
            bare.save(step, args=items)

        alone, _ = growth(save_bare, bare.wait_until_finished)
    print(f"KiB a save: {ours:.1f}, Orbax alone {alone:.1f}; {files:+} files")
    assert files <= 2
    assert ours <= 1.1 * alone

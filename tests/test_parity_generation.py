"""Generation beside transformers', live, with new weights each time: `make parity`."""

import os
import secrets

import numpy as np
import pytest

from tests import generation

pytestmark = pytest.mark.parity

SEED = int(os.environ.get("PARITY_SEED") or secrets.randbelow(2**31))


@pytest.mark.parametrize("name", ["t5", "t5_1_1", "bart", "gpt2"])
def test_greedy_and_beams_write_what_transformers_writes(name, tmp_path):
    from tests.goldens import make_families, make_generation, make_t5

    print(f"PARITY_SEED={SEED}")
    rng = np.random.default_rng(SEED)
    if name in ("t5", "t5_1_1"):
        cfg = {"t5": make_t5.V1_0, "t5_1_1": make_t5.V1_1}[name]
        model = make_t5.build(cfg, rng)
    else:
        model = make_families.build(make_families.CASES[name], rng)
    model.float().save_pretrained(tmp_path / "in")
    generation.compare(tmp_path / "in", make_generation.make(model, SEED))

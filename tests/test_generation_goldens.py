"""What transformers' `generate` wrote, from the same weights: no torch needed."""

import numpy as np
import pytest

from tests import generation, hf_dirs, parity

# `make parity` compares every setting with every model.
CASES = {
    "t5": ["beams_first"],
    "t5_1_1": ["beams"],
    "bart": ["beams_prefix"],
    "gpt2": ["greedy_blocked", "beams_long"],
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_greedy_and_beams_write_what_transformers_writes(name, tmp_path):
    with np.load(parity.GOLDENS / "generation.npz", allow_pickle=False) as file:
        arrays = {
            key.removeprefix(f"{name}/"): file[key]
            for key in file
            if key.startswith(f"{name}/")
        }
    theirs, weights, _ = hf_dirs.load(name)
    path = hf_dirs.write(tmp_path / "in", theirs, weights)
    generation.compare(path, arrays, CASES[name])

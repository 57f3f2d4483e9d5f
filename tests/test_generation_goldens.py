"""What transformers' `generate` wrote, from the same weights: no torch needed."""

import numpy as np
import pytest

from tests import generation, hf_dirs, parity

MODELS = ("t5", "t5_1_1", "bart", "gpt2")


@pytest.mark.parametrize("name", MODELS)
def test_greedy_and_beams_write_what_transformers_writes(name, tmp_path):
    with np.load(parity.GOLDENS / "generation.npz", allow_pickle=False) as file:
        arrays = {
            key.removeprefix(f"{name}/"): file[key]
            for key in file
            if key.startswith(f"{name}/")
        }
    theirs, weights, _ = hf_dirs.load(name)
    path = hf_dirs.write(tmp_path / "in", theirs, weights)
    generation.compare(path, arrays)

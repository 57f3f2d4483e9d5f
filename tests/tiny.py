"""Tiny configs and batches that the tests share."""

from typing import Any

import numpy as np

from t5x_lite import config


def tiny_config(**sections) -> config.Config:
    """A config of depth 2, width 32; `optim=dict(name="adamw")`, say, changes it."""
    raw: Any = config.defaults()
    raw.model.update(
        dict(
            vocab_size=128,
            d_model=32,
            d_ff=64,
            heads=4,
            head_dim=16,
            encoder_layers=2,
            decoder_layers=2,
            relative_buckets=8,
            relative_max_distance=16,
        )
    )
    raw.data.batch_size = 8
    for name, values in sections.items():
        if isinstance(values, dict):
            raw[name].update(values)
        else:
            raw[name] = values
    return config.freeze(raw)


def stream(rng, batch: int, length: int, *, causal: bool, ids: int = 100) -> dict:
    """A stream of random tokens without padding."""
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    return {
        "tokens": rng.integers(3, ids, (batch, length)).astype(np.int32),
        "positions": positions,
        "segments": np.ones((batch, length), np.int32),
        "ranks": positions if causal else np.zeros_like(positions),
    }


def random_batch(seed: int = 0, batch: int = 8, S: int = 12, T: int = 7) -> dict:
    """An encoder-decoder batch with random tokens, targets and weights."""
    rng = np.random.default_rng(seed)
    decoder = stream(rng, batch, T, causal=True)
    decoder["targets"] = rng.integers(3, 100, (batch, T)).astype(np.int32)
    decoder["weights"] = rng.uniform(0.1, 1.0, (batch, T)).astype(np.float32)
    return {
        "encoder": stream(rng, batch, S, causal=False),
        "decoder": decoder,
        "fingerprint": rng.integers(0, 2**32, batch, dtype=np.uint32),
    }

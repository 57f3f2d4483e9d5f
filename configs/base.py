"""The start of every config file: all keys with their defaults.

The keys, their defaults, allowed values and meanings are the frozen dataclasses of
`t5x_lite/config.py`; `python -m t5x_lite.train --help` prints them as a list.
"""

import ml_collections

from configs import models
from t5x_lite import config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    c = config.defaults()
    return smoke(c) if arg == "smoke" else c


def set_model(c: ml_collections.ConfigDict, preset: str):
    """Takes a published shape from `configs/models.py`."""
    c.model.update(models.PRESETS[preset])


def smoke(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same experiment in two tiny steps: depth 2, width 32, bytes, demo text."""
    c.steps, c.eval_every, c.eval_batches, c.log_every = 2, 2, 1, 1
    c.checkpoint.every = 2
    c.data.update(
        dict(
            train="data/train.jsonl",
            heldout="data/heldout.jsonl",
            vocab="bytes",
            inputs_length=64,
            batch_size=8,
        )
    )
    c.model.update(
        dict(
            vocab_size=0,
            d_model=32,
            d_ff=64,
            heads=2,
            head_dim=16,
            encoder_layers=2,
            decoder_layers=2,
        )
    )
    c.optim.update(dict(warmup_steps=1, decay_steps=0))
    return c

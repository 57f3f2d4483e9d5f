"""The start of every config file: all keys with their defaults.

The keys, their defaults, allowed values and meanings are the frozen dataclasses of
`t5x_lite/config.py`; `python -m t5x_lite.train --help` prints them as a list.
"""

import ml_collections

from configs import models
from t5x_lite import config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    return scaled(config.defaults(), arg)


def set_model(c: ml_collections.ConfigDict, preset: str):
    """Takes a published shape from `configs/models.py`."""
    c.model.update(models.PRESETS[preset])


def set_objective(c: ml_collections.ConfigDict, name: str, **knobs):
    """Replaces the objective and all its knobs."""
    with c.unlocked():
        c.objective = ml_collections.ConfigDict(dict(name=name) | knobs)


def set_mixture(c: ml_collections.ConfigDict, sources: dict, **data):
    """Replaces the sources of the mixture; other keys of config.data beside them."""
    with c.unlocked():
        c.data.mixture = ml_collections.ConfigDict(sources)
        c.data.update(data)


def adamw(c: ml_collections.ConfigDict, learning_rate: float, warmup: int, **more):
    """Adam as BERT's descendants use it: linear decay, weight decay 0.01, no z-loss."""
    c.loss.z_loss = 0.0
    c.optim.update(
        dict(
            name="adamw",
            learning_rate=learning_rate,
            warmup_steps=warmup,
            schedule="linear",
            weight_decay=0.01,
            eps=1e-6,
            clip_norm=1.0,
        )
        | more
    )


def scaled(c: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
    """The experiment itself, or for "smoke" and "study" a small one of its kind."""
    if arg not in ("", "smoke", "study"):
        raise ValueError(
            f"--config=FILE:{arg}: allowed are FILE, FILE:smoke, FILE:study."
        )
    return dict(smoke=smoke, study=study).get(arg, lambda c: c)(c)


def smoke(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same experiment in two tiny steps: depth 2, width 32, bytes, demo text."""
    c.steps, c.eval_every, c.eval_batches, c.log_every = 2, 2, 1, 1
    c.checkpoint.every = 2
    _shrink(c, layers=2, d_model=32, heads=4, length=64)
    c.data.batch_size = 8
    # The ids in these files are of the 4k pieces.
    if not {"spans", "similar", "entities"} & set(c.objective):
        c.data.vocab = "bytes"
    c.optim.update(dict(warmup_steps=1, decay_steps=0))
    return c


def study(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same experiment in a minute or two on a CPU, on the demo text.

    One shape, batch, optimizer and schedule for all, and one learning rate for each
    place of the norms: what else differs is the system.
    """
    c.steps, c.eval_every, c.eval_batches, c.log_every = 800, 800, 0, 10
    c.checkpoint.every = 800
    _shrink(c, layers=2, d_model=128, heads=4, length=128)
    c.data.batch_size = 16
    c.model.dropout = 0.0
    c.optim.update(
        dict(
            name="adamw",
            schedule="cosine",
            learning_rate=2e-3 if c.model.norm_order == "pre" else 1e-3,
            warmup_steps=80,
            final_fraction=0.1,
            clip_norm=1.0,
            decay_steps=0,
        )
    )
    return c


def _shrink(c, *, layers: int, d_model: int, heads: int, length: int):
    c.data.update(
        dict(
            train="data/train.jsonl",
            heldout="data/heldout.jsonl",
            inputs_length=length,
        )
    )
    if c.data.vocab != "bytes":
        c.data.vocab = "data/vocab_4k.model"
    m = c.model
    m.update(
        dict(
            vocab_size=0,
            d_model=d_model,
            d_ff=2 * d_model,
            heads=heads,
            head_dim=d_model // heads,
            encoder_layers=layers,
            decoder_layers=layers,
            dtype="float32",
        )
    )
    m.max_positions = max(m.max_positions, 4 * length)
    m.entity_layers = layers
    if m.d_embed:
        m.d_embed = d_model // 2
    if m.memory_length:
        m.memory_length = length // 2
    if m.window:
        m.window = length // 4
    if m.generator_width:
        m.generator_width = 0.5

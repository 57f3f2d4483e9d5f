"""A workdir with a checkpoint of an untrained tiny model."""

import pathlib

import jax

from t5x_lite import checkpoint, config, model, optim, sharding, state, vocab
from tests import tiny


def save(workdir: pathlib.Path, spec: str = "bytes", steps=(3,)) -> config.Config:
    """Saves fresh states (seed = step) as a training run would; -> its config."""
    words = vocab.load(spec, 100)
    cfg = tiny.tiny_config(
        model=dict(vocab_size=-(-words.size // 128) * 128), data=dict(vocab=spec)
    )
    net = model.build(cfg.model)
    tx = optim.make(cfg, net)
    mesh = sharding.make_mesh(cfg.sharding, jax.devices()[:1])
    abstract = state.abstract(net, tx, mesh, cfg.sharding.rules)
    checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint)
    for step in steps:
        meta = checkpoint.make_meta(cfg, step, {"vocab": words.fingerprint})
        checkpoints.save(step, state.create(net, tx, abstract, step), meta)
    checkpoints.wait()
    checkpoints.close()
    return cfg

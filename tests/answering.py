"""Untrained models of every structure that tasks are given to."""

import functools

import jax

from t5x_lite import model, optim, sharding, state, vocab
from tests.tiny import tiny_config

WORDS = vocab.load("bytes")
OBJECTIVES = {
    "encoder": dict(name="masked_lm"),
    "decoder": dict(name="causal_lm"),
    "prefix_lm": dict(name="prefix_lm"),
    "encoder_decoder": dict(name="span_corruption"),
}


@functools.cache
def untrained(structure: str):
    """(config, model, params) over bytes."""
    cfg = tiny_config(
        model=dict(structure=structure, vocab_size=384)
        | dict(encoder_layers=1, decoder_layers=1),
        objective=OBJECTIVES[structure],
    )
    net = model.build(cfg.model)
    mesh = sharding.make_mesh(cfg.sharding, jax.devices()[:1])
    abstract = state.abstract(net, optim.make(cfg, net), mesh, cfg.sharding.rules)
    params = state.create(net, optim.make(cfg, net), abstract, 0)["params"]
    # Far from uniform, so that a wrong place or order shows.
    return cfg, net, jax.tree.map(lambda p: 3.0 * p, params)

"""FLOPs against XLA's cost analysis and published formulas; parameters by kind.

About 35 s on a slow core: models are compiled unrolled, since XLA counts the body of a
scan once.
"""

import dataclasses
import functools
from typing import Any

import jax
import pytest

from configs import models
from t5x_lite import cli, config, metrics, model, parameters, run, step

# (config, its changes): every structure, and each kind of block, position and stream.
KINDS = {
    "encoder": ("bert", {}),
    "factorised embedding": ("albert", {}),
    "generator + discriminator": ("electra", {}),
    "entities": ("ernie_thu", {}),
    "distances in keys and values": ("nezha", {}),
    "decoder": ("gpt2", {}),
    "banded decoder": ("gpt3", {}),
    "encoder-decoder": ("t5_1_1_small", {}),
    "shared stacks": ("t5_table2", {"share_stacks": True}),
    "future streams": ("prophetnet", {}),
    "prefix-LM": ("t5_table2", {"structure": "prefix_lm"}),
    "span in place": ("t5_table2", {"structure": "encoder"}),
    "query stream": ("t5_table2", {"structure": "permuted", "query_streams": 1}),
    "query stream + memory": ("xlnet", {}),
    "pseudo-masks": ("unilm_v2", {}),
    "two flows": ("ernie_gen", {}),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@functools.cache
def setup_of(name: str, changes: tuple, cache) -> run.Setup:
    """Matrix products dominate at this size, and it compiles in seconds."""
    raw: Any = cli.load_config(f"configs/{name}.py:smoke")
    raw.data.cache_dir, raw.compile_cache = str(cache), ""
    raw.data.update(dict(batch_size=2, inputs_length=128))
    raw.model.update(dict(d_model=256, d_ff=512, heads=4, head_dim=64))
    raw.model.update(dict(max_positions=1024, scan=False, remat="none", dropout=0.0))
    # Unrolled, XLA leaves out the last layer of the memory's own pass: one more.
    layers = 3 if name == "xlnet" else 1
    raw.model.update(dict(encoder_layers=layers, decoder_layers=2, entity_layers=1))
    if raw.model.d_embed:
        raw.model.d_embed = 128
    raw.model.update(dict(changes))
    if raw.model.share_stacks:
        raw.model.encoder_layers = 2
    return run.Setup.of(config.freeze(raw), jax.devices()[:1])


# The five structures, and those of which not everything has a gradient.
TRAINED = ("encoder", "decoder", "encoder-decoder", "prefix-LM", "query stream") + (
    "generator + discriminator",
    "distances in keys and values",
    "future streams",
    "query stream + memory",
)


@pytest.mark.parametrize(
    ("kind", "training"), [(k, False) for k in KINDS] + [(k, True) for k in TRAINED]
)
def test_flops_are_those_of_the_compiled_program(kind, training, cache):
    name, changes = KINDS[kind]
    setup = setup_of(name, tuple(changes.items()), cache)
    cfg = setup.cfg
    shapes = jax.eval_shape(
        lambda key: parameters.init_params(setup.model, key), jax.random.key(0)
    )
    batch = {k: v for k, v in setup.train_batches[0].items() if k != "fingerprint"}
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
    key = jax.random.key(0) if cfg.model.generator_width else None

    def objective(params, batch):
        words = setup.vocab.size
        return step.batch_sums(setup.model, params, batch, cfg, words, None, key)

    f = jax.value_and_grad(objective, has_aux=True) if training else objective
    compiled = jax.jit(f).lower(shapes, batch).compile()
    count = metrics.training_flops if training else metrics.forward_flops
    ours = count(cfg.model, setup.train_batches.shapes) * cfg.data.batch_size
    counted: Any = compiled.cost_analysis()
    assert ours == pytest.approx(counted["flops"], rel=0.05)


@pytest.mark.parametrize("name", ["gpt2", "gpt2_xl", "gpt3_175b"])
def test_a_decoders_flops_are_the_published_formula(name):
    """6 N + 12 L N H T a token (Chowdhery et al. 2022, appendix B), N without what is
    only looked up; GPT-3 175B: 3.14e23 for 300e9 tokens (Brown et al. 2020, table D.1,
    which leaves attention out)."""
    m = model.ModelConfig(**models.PRESETS[name])
    L, D, T = m.decoder_layers, m.d_model, 128
    matrices = 12 * L * D * D + m.vocab_size * D
    published = 6 * matrices + 12 * L * m.heads * m.head_dim * T
    ours = metrics.training_flops(m, {"main": (T, T, 0)}) / T
    assert ours == pytest.approx(published, rel=1e-9)
    if name == "gpt3_175b":
        assert ours * 300e9 == pytest.approx(3.14e23, rel=0.02)


def test_only_what_has_a_gradient_is_trained():
    """XLNet's memory costs a forward pass and no backward pass."""
    m = dataclasses.replace(
        model.ModelConfig(**models.PRESETS["xlnet_base"]), vocab_size=128
    )
    alone, after = {"main": (64, 10, 1)}, {"main": (64, 10, 1), "memory": (384, 0, 0)}
    forward = metrics.forward_flops(m, after)
    assert metrics.training_flops(m, alone) == 3 * metrics.forward_flops(m, alone)
    assert forward < metrics.training_flops(m, after) < 3 * forward


def test_tokens_are_what_the_stacks_read():
    shapes = {"encoder": (512, 0, 0), "decoder": (114, 114, 2)}
    assert metrics.tokens_per_example(shapes) == 626
    assert metrics.tokens_per_example({"main": (9, 2, 1), "memory": (5, 0, 0)}) == 9


# Rows times widths of the published tables: tokens, positions, types, untied output.
EMBEDDINGS = {
    "gpt2": (50_257 + 1024) * 768,
    "bert_base": (30_522 + 512 + 2) * 768,
    "albert_base": (30_000 + 512 + 2) * 128,
    "t5_base": 32_128 * 768,
    "t5_1_1_base": 2 * 32_128 * 768,
    "xlnet_base": 32_000 * 768 + 768,  # and the query stream's one vector
    "bart_base": (50_265 + 2 * 1026) * 768,
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_parameters_are_split_by_kind(name):
    net = model.build(model.ModelConfig(**models.PRESETS[name]))
    found = metrics.split_parameters(net)
    total = model.parameter_count(net)
    output_bias = net.output.bias.get_value().size if net.cfg.output_bias else 0
    assert found["embedding"] == EMBEDDINGS[name] + output_bias
    assert found["embedding"] + found["non_embedding"] == found["total"] == total


def test_gpt2_has_85_million_parameters_beside_embeddings():
    """12 L D^2 and the biases and norms: 13 D a layer, 2 D at the end."""
    net = model.build(model.ModelConfig(**models.PRESETS["gpt2"]))
    want = 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert metrics.split_parameters(net)["non_embedding"] == want

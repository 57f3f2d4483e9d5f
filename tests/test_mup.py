"""muP: the published table, the standard model at the base, and a coordinate check."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import config, model, mup, optim, parameters, step
from t5x_lite.model_config import generator_config
from t5x_lite.studies import coordcheck
from tests.tiny import random_batch, tiny_config

KEY = jax.random.key(0)
BERT = dict(
    structure="encoder",
    norm="layer",
    bias=True,
    gated=False,
    embed_norm=True,
    transform_output=True,
    tie_embeddings=True,
    rescale_logits=False,
    scale_attention=True,
    positions="learned",
    classes=2,
)


def single(batch: dict) -> dict:
    """The same batch for a single stack."""
    stream = batch["decoder"] | {"labels": np.arange(len(batch["fingerprint"])) % 2}
    return {"main": stream, "fingerprint": batch["fingerprint"]}


# Four times the base's width; std's by hand from table 8 of Yang et al. 2022 and the
# base's own T5 rules (D = 16, N * H = 16, F = 32), rates as (Adam, Adafactor).
WIDE = dict(d_model=64, d_ff=128, heads=4, head_dim=16, base_d_model=16)
HIDDEN = (1 / 4, 1 / 2)
TABLE = {
    "embedding": (1.0, 1.0, 1.0),
    "output/kernel": (1 / 4, 1.0, 1.0),
    "decoder/relative/embedding": (1 / 4, 1.0, 1.0),
    "decoder/blocks/attention/query": (1 / 32, *HIDDEN),
    "decoder/blocks/attention/key": (1 / 8, *HIDDEN),
    "decoder/blocks/cross/out": (1 / 8, *HIDDEN),
    "encoder/blocks/mlp/gate": (1 / 8, *HIDDEN),
    "encoder/blocks/mlp/down": (128**-0.5, *HIDDEN),
}
# ALBERT's embeddings stay 8 wide: what reads the stack is an output, what it reads an
# input; the classes are one too.
NARROW = {
    "embedding": (1.0, 1.0, 1.0),
    "inputs/project": (8**-0.5, 1.0, 1.0),
    "output/transform": (1 / 16, 1 / 4, 1.0),
    "classes/pooler": (1 / 8, *HIDDEN),
    "classes/kernel": (1 / 16, 1 / 4, 1.0),
}


@pytest.mark.parametrize(
    "more, want",
    [({}, TABLE), (BERT | dict(d_embed=8, share_layers=True), NARROW)],
)
def test_the_published_table(more, want):
    cfg = tiny_config(model=WIDE | dict(parametrisation="mup") | more).model
    declared = parameters.declared(model.build(cfg))
    adam, adafactor = (mup.rates(declared, o) for o in ("adamw", "adafactor"))
    for name, (std, *rates) in want.items():
        p = declared[name]
        drawn = p.get_metadata()["init"](KEY, (2**14,), jnp.float32)
        assert np.std(drawn) == pytest.approx(std, rel=0.03), name
        assert [adam[name], adafactor[name]] == pytest.approx(rates), name
    for name in set(declared) - set(want):
        if name.endswith(("scale", "bias")):
            assert adam[name] == adafactor[name] == 1.0


def test_forward_multipliers():
    def of(**changes):
        return tiny_config(model=WIDE | dict(parametrisation="mup") | changes).model

    assert mup.logits_scale(of()) == 1 / 4
    tied = of(tie_embeddings=True)
    assert mup.logits_scale(tied) == 16**-0.5 / 4
    assert mup.logits_scale(of(tie_embeddings=True, rescale_logits=False)) == 1 / 4
    assert mup.logits_scale(of(d_embed=8, transform_output=True)) == 1.0
    assert mup.attention_scale(of()) == 1.0
    # Heads of 4 at the base, 16 here: 1/H in place of H^-1/2.
    larger = of(base_head_dim=4, heads=4)
    assert mup.attention_scale(larger) == 1 / 4
    assert mup.attention_scale(dataclasses.replace(larger, scale_attention=True)) == (
        4**-0.5 / 4
    )
    assert mup.gradient_scale(of()) == 1 / 4


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(init_residual=True),
        dict(tie_embeddings=True, share_stacks=True),
        dict(structure="decoder", scale_attention=True, window=3),
        dict(structure="prefix_lm", positions="learned", init_std=0.02),
        dict(structure="permuted", positions="transformer_xl"),
        BERT | dict(d_embed=8, share_layers=True),
    ],
    ids=lambda c: c.get("structure", "encoder_decoder"),
)
def test_at_the_base_it_is_the_standard_model_bit_for_bit(changes, optimizer):
    batch = random_batch(batch=4)
    if changes.get("structure"):
        batch = single(batch)
    programs = []
    deep = changes.get("norm") != "layer"
    base = dict(base_d_model=32, base_layers=2 if deep else 0)
    if changes.get("d_embed"):
        base["base_d_embed"] = 8
    for way in ("standard", "mup"):
        cfg = tiny_config(
            model=changes | base | dict(parametrisation=way),
            optim=dict(name=optimizer, weight_decay=0.1, clip_norm=1.0),
        )
        programs.append(train_program(cfg, batch))
    assert programs[0] == programs[1]


def train_program(cfg: config.Config, batch: dict) -> str:
    """Init and a train step, as the program that XLA compiles."""
    net = model.build(cfg.model)
    tx = optim.make(cfg, net)
    train = step.make_train_step(net, tx, cfg, 100)

    def program(key, batch):
        params = parameters.init_params(net, key)
        state = {"params": params, "opt": tx.init(params), "step": jnp.int32(0)}
        return train(state, batch)

    return jax.jit(program).lower(KEY, batch).as_text()


def test_the_generator_of_electra_is_measured_by_the_bases_generator():
    changes = BERT | dict(classes=0, generator_width=0.5)
    cfg = tiny_config(model=WIDE | changes | dict(heads=8, head_dim=8)).model
    cfg = dataclasses.replace(cfg, parametrisation="mup", base_heads=2)
    small = generator_config(cfg)
    assert (small.d_model, small.base_d_model) == (32, 8)
    assert (small.d_embed, small.base_d_embed) == (64, 16)
    assert mup.logits_scale(small) == 1 / 4
    declared = parameters.declared(model.build(cfg))
    rates = mup.rates(declared, "adamw")
    assert rates["generator/stack/blocks/mlp/up"] == 1 / 4
    assert rates["generator/project"] == 1 / 4 and rates["score"] == 1 / 4


def test_deep_branches_and_their_rates_shrink_with_the_root_of_depth():
    """A model 4 times as deep is the standard one whose sublayers end in half."""
    shape = dict(encoder_layers=4, decoder_layers=4, base_layers=1, base_d_model=32)
    cfg = tiny_config(model=shape).model
    plain = model.build(cfg)
    deep = model.build(dataclasses.replace(cfg, parametrisation="mup"))
    params = parameters.init_params(deep, KEY)

    def halved(path, p):
        last = path[-2].key in ("attention", "cross", "mlp") if len(path) > 1 else False
        return 0.5 * p if last and path[-1].key in ("out", "down") else p

    batch = {k: v for k, v in random_batch(batch=2).items() if k != "fingerprint"}

    @jax.jit
    def cells(params, other):
        a, b = model.bind(deep, params), model.bind(plain, other)
        return a.outputs(batch).cells_BKE, b.outputs(batch).cells_BKE

    got, want = cells(params, jax.tree.map_with_path(halved, params))
    np.testing.assert_allclose(got, want, atol=2e-5)
    declared = parameters.declared(deep)
    for optimizer in ("adamw", "adafactor"):
        for name, rate in mup.rates(declared, optimizer).items():
            inside = "/blocks/" in name or name.endswith("relative/embedding")
            assert rate == (0.5 if inside else 1.0), name


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(base_d_model=0), "needs base_d_model"),
        (dict(base_d_model=12, d_ff=65), "base_d_ff=0 means d_ff=65"),
        (dict(base_d_model=4), "base_heads=0 means heads=4"),
        (dict(base_d_embed=8), "base_d_embed=8 needs d_embed > 0"),
        (dict(base_layers=2, norm_order="post"), "norm_order='pre' only"),
        (dict(base_layers=2, share_layers=True), "layers of their own"),
    ],
)
def test_what_is_not_covered_is_an_error_that_says_so(changes, words):
    shape = dict(parametrisation="mup", base_d_model=16, heads=4, head_dim=1)
    with pytest.raises(config.ConfigError, match=words):
        tiny_config(model=shape | changes)


def test_lamb_is_refused():
    base = dict(parametrisation="mup", base_d_model=16)
    with pytest.raises(config.ConfigError, match="'lamb' does not go with .*'adamw'"):
        tiny_config(model=base, optim=dict(name="lamb"))
    tiny_config(optim=dict(name="lamb"))


STRUCTURES = {
    "decoder": dict(structure="decoder", scale_attention=True),
    "encoder": BERT | dict(init_std=0.02),
    "encoder_decoder": dict(share_stacks=True),
    "prefix_lm": dict(structure="prefix_lm", positions="learned", gated=True),
    "permuted": dict(structure="permuted", positions="transformer_xl"),
}
# A rate of small steps; widths; and how the first updates of a hidden layer change what
# it makes, as width^power, where updates don't shrink with width. Adam's entries are as
# large as the rate, and the terms of a row's sum have one sign: width * rate.
# Adafactor's are relative to weights of width^-1/2: width^1/2 * rate. Its moments are
# factored from 128 rows and columns on, so all widths here are.
OPTIMIZERS = {
    "adamw": (1e-4, (32, 64, 128, 256), 1.0),
    "adafactor": (1e-3, (128, 192, 256, 384), 0.5),
}


def powers(structure: str, optimizer: str, grow: str = "heads") -> dict:
    """(parametrisation, activation) -> power of width with which training changes it.

    Few tokens, so that what they have in common outweighs the noise already at small
    widths.
    """
    rate, sizes, _ = OPTIMIZERS[optimizer]
    cfg = tiny_config(
        model=dict(heads=2, encoder_layers=1, decoder_layers=1) | STRUCTURES[structure],
        optim=dict(
            name=optimizer, learning_rate=rate, schedule="constant", warmup_steps=0
        ),
        loss=dict(z_loss=0.0),
    )
    flags = coordcheck.Flags(grow, sizes, steps=2, seeds=4)
    batch = random_batch(batch=2, S=4, T=4)
    batch = batch if structure == "encoder_decoder" else single(batch)
    with jax.default_prng_impl("rbg"):  # compiles in a third of threefry's time
        found = coordcheck.check(cfg, [batch] * 2, flags, 100)
    return {
        (way, name): coordcheck.exponent(sizes, of[name].change)
        for way, of in found.items()
        for name in of
    }


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_changes_are_flat_under_mup_and_grow_under_the_standard(structure, optimizer):
    """Bounds are from theory: flat is 0, growth at least half of what it should be.

    Logits and scores may shrink, by width^-1/2 at the start (appendix D.1 of Yang et
    al. 2022, and the README of microsoft/mup).
    """
    theory = OPTIMIZERS[optimizer][2]
    found = powers(structure, optimizer)
    names = [name for way, name in found if way == "mup"]
    kinds = {name.split()[0] for name in names}
    assert kinds >= {"input", "scores", "attention", "feed-forward", "block", "logits"}
    for name in names:
        assert found["mup", name] < 0.15, name
        if not name.startswith(("logits", "scores")):
            assert found["mup", name] > -0.15, name
        # Embeddings' rates are right in both; BERT's blocks end with a norm, whose
        # output is of one size, so that its change is bounded at any width.
        bounded = ("input", "block") if structure == "encoder" else ("input",)
        if not name.startswith(bounded):
            assert found["standard", name] > theory / 2, name

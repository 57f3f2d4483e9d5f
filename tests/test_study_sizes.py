"""Ladders and sizes of studies; the studies of this repository can be planned."""

import pathlib
from typing import Any

import pytest

from t5x_lite.studies import costs, grid, ladders, launchers, plan

ROOT = pathlib.Path(__file__).parents[1]
STUDIES = sorted(p.parent.name for p in (ROOT / "configs/studies").glob("*/config.py"))
STRUCTURES = {
    "encoder": "bert",
    "decoder": "gpt2",
    "encoder_decoder": "t5_small",
    "prefix_lm": "prefix_lm",
    "permuted": "xlnet",
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_takes_the_knobs_one_by_one(structure):
    base = ladders.base(f"configs/{STRUCTURES[structure]}.py:smoke")
    assert base.model.structure == structure
    before = base.model
    cases: tuple[tuple[dict[str, Any], dict[str, int]], ...] = (
        (dict(depth=3), dict(encoder_layers=3, decoder_layers=3, heads=4)),
        (dict(encoder_depth=3), dict(encoder_layers=3, decoder_layers=2)),
        (dict(width=64), dict(d_model=64, d_ff=128, heads=8, head_dim=8)),
        (dict(width=64, heads=2), dict(d_model=64, heads=2, head_dim=32)),
        (dict(heads=3, head_dim=5), dict(heads=3, head_dim=5, d_model=32)),
        (dict(head_dim=16), dict(head_dim=16, heads=2)),
        (dict(ffn_ratio=3.5), dict(d_ff=112, d_model=32)),
        (dict(aspect=16, depth=3), dict(d_model=48, heads=6)),
        (dict(aspect=16, width=64), dict(encoder_layers=4, decoder_layers=4)),
        (dict(vocab_size=512), dict(vocab_size=512)),
    )
    for knobs, want in cases:
        found = costs.resolved(base, ladders.shaped(base, **knobs)).model
        for name, value in want.items():
            assert getattr(found, name) == value, (knobs, name)
        untouched = ("structure", "norm", "positions", "gated", "tie_embeddings")
        for name in untouched:
            assert getattr(found, name) == getattr(before, name)
        assert costs.of(costs.resolved(base, ladders.shaped(base, **knobs))).tokens
    longer = costs.resolved(base, ladders.shaped(base, length=96))
    ratio = costs.of(longer).tokens_per_step / costs.of(base).tokens_per_step
    assert ratio == pytest.approx(1.5, rel=0.1)


def test_knobs_that_contradict_each_other_are_refused():
    base = ladders.base("configs/gpt2.py:smoke")
    for knobs, text in (
        (dict(width=50), "width=50 is no multiple of head_dim=8"),
        (dict(width=50, heads=4), "no multiple of heads=4"),
        (dict(depth=2, width=32, aspect=8), "two of them"),
        (dict(depth=2, encoder_depth=3), "not both"),
    ):
        with pytest.raises(ValueError, match=text):
            ladders.shaped(base, **knobs)
    with pytest.raises(ValueError, match="give one of them"):
        ladders.by_parameters(base, [1e5])


def test_one_dial_ladders_reach_what_they_are_asked_for():
    base = ladders.base("configs/gpt2.py:smoke")
    by_depth = ladders.by_depth(base, (1, 2, 4), aspect=16)
    assert [o["model.d_model"] for o in by_depth.values()] == [16, 32, 64]
    sizes = (5e4, 5e5, 5e6)
    found = ladders.by_parameters(base, sizes, depth=4)
    assert list(found) == ["50k", "500k", "5M"]
    for size, overrides in zip(sizes, found.values(), strict=True):
        have = costs.parameters(costs.resolved(base, overrides))["non_embedding"]
        assert have == pytest.approx(size, rel=0.15)  # a head is 8 of the width
        assert overrides["model.decoder_layers"] == 4
    budgets = (1e11, 1e13)
    for budget, overrides in zip(
        budgets, ladders.by_flops(base, budgets, aspect=16).values(), strict=True
    ):
        cost = costs.of(costs.resolved(base, overrides))
        assert cost.training_flops == pytest.approx(budget, abs=cost.flops_per_step / 2)
        ratio = cost.tokens / cost.parameters["non_embedding"]
        assert 5 < ratio < 80  # 20, but for whole layers
    with pytest.raises(ValueError, match="less than one step"):
        ladders.at_flops(base, 1e3, {})


# Exact: Raffel et al.'s models, which the sizes are named after, and a count of the
# released tiny-nl32 checkpoint.
EXACT = {
    "small": 60_506_624,
    "base": 222_903_552,
    "large": 737_668_096,
    "xxl": 11_307_321_344,
    "tiny-nl32": 66_986_752,
}


# In millions, as the model cards print them.
CARDS = {
    "tiny": 15.58,
    "mini": 31.23,
    "small": 60.52,
    "base": 222.93,
    "large": 737.72,
    "tiny-nl8": 22.93,
    "tiny-nl32": 67.06,
    "small-nl22": 178.04,
    "xl-nl8": 972.47,
}


@pytest.mark.parametrize("name", EXACT)
def test_t5_efficient_names_have_the_published_parameters(name):
    overrides = ladders.t5_efficient(f"google/t5-efficient-{name}")
    assert ladders.model_parameters(overrides) == EXACT[name]


@pytest.mark.parametrize("name", CARDS)
def test_t5_efficient_cards_agree_to_a_thousandth(name):
    """They print kv=32 for the small sizes, which would miss by up to a fifth."""
    found = ladders.model_parameters(ladders.t5_efficient(name)) / 1e6
    assert found == pytest.approx(CARDS[name], rel=1.2e-3)


# (num_layers, num_decoder_layers, d_ff, d_model, d_kv, num_heads) of the config.json
# that Google released under each name.
RELEASED = {
    "tiny": (4, 4, 1024, 256, 64, 4),
    "tiny-nl2": (2, 2, 1024, 256, 64, 4),
    "mini-nl12": (12, 12, 1536, 384, 64, 8),
    "small-kv32": (6, 6, 2048, 512, 32, 8),
    "small-kv128": (6, 6, 2048, 512, 128, 8),
    "small-el32": (32, 6, 2048, 512, 64, 8),
    "small-dm768": (6, 6, 2048, 768, 64, 8),
    "small-dm1000": (6, 6, 2048, 1024, 64, 8),
    "small-ff6000": (6, 6, 6144, 512, 64, 8),
    "base-ff1000": (12, 12, 1024, 768, 64, 12),
    "base-ff2000": (12, 12, 2048, 768, 64, 12),
    "base-kv16": (12, 12, 3072, 768, 16, 12),
    "base-nh24": (12, 12, 3072, 768, 64, 24),
    "base-nl40": (40, 40, 3072, 768, 64, 12),
    "large-nl8": (8, 8, 4096, 1024, 64, 16),
}


@pytest.mark.parametrize("name", RELEASED)
def test_t5_efficient_names_are_the_released_shapes(name):
    keys = "encoder_layers decoder_layers d_ff d_model head_dim heads".split()
    found = ladders.t5_efficient(f"google/t5-efficient-{name}")
    assert tuple(found[f"model.{key}"] for key in keys) == RELEASED[name]


def test_t5_efficient_knobs_each_set_one_number():
    found = ladders.t5_efficient("t5-efficient-small-el16-dl4-dm256-ff512-kv32-nh4")
    shape = {k.removeprefix("model."): v for k, v in found.items()}
    wanted = dict(encoder_layers=16, decoder_layers=4, d_model=256, d_ff=512)
    wanted |= dict(head_dim=32, heads=4, structure="encoder_decoder", gated=False)
    assert {k: shape[k] for k in wanted} == wanted
    for name, text in (
        ("t5-efficient-huge", "no size 'huge'"),
        ("small-xy3", "'xy3' is no knob"),
        ("small-nl4-el8", "sets model.encoder_layers again"),
        ("small-sh", "not covered"),
        ("small-nl0", "above 0"),
    ):
        with pytest.raises(ValueError, match=text):
            ladders.t5_efficient(name)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_here_can_be_planned(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = grid.load(f"configs/studies/{name}/config.py")
    cells = grid.cells(made)
    assert len(made.seeds) >= 3 and made.name == name
    found = plan.make(made, cells, "nowhere", None)
    assert found["training_flops"] < 1e14  # minutes on a CPU


def test_array_ranges():
    assert launchers.ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"

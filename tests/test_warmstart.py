"""Parameters of another workdir: by values, and by logits where they must agree."""

import re
from typing import Any

import jax
import numpy as np
import pytest

from t5x_lite import (
    checkpoint,
    config,
    model,
    optim,
    parameters,
    positions,
    rows,
    sharding,
    state,
    train,
    vocab,
    warmstart,
)
from tests import tiny, vocab_kinds

LEARNED: dict[str, Any] = dict(positions="learned", max_positions=24)


def config_of(structure: str, sentinels: int = 100, init: dict | None = None, **model):
    words = vocab.load("bytes", sentinels)
    size = dict(vocab_size=-(-words.size // 128) * 128, structure=structure)
    data = dict(vocab="bytes", sentinels=sentinels)
    return tiny.tiny_config(
        model=size | model, data=data, optim=dict(name="adamw"), **(init or {})
    )


def drawn(cfg, seed: int) -> dict:
    """Other values in every place; the initializers' ones would hide a mistake."""
    rng = np.random.default_rng(seed)
    return parameters.nested(
        {
            tuple(name.split("/")): rng.normal(0.3, 0.4, p.get_value().shape).astype(
                np.float32
            )
            for name, p in parameters.declared(model.build(cfg.model)).items()
        }
    )


def save(workdir, cfg, seed: int = 1) -> dict:
    """A workdir with a checkpoint of drawn parameters; -> these."""
    params = drawn(cfg, seed)
    words = vocab.load(cfg.data.vocab, cfg.data.sentinels)
    checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint)
    meta = checkpoint.make_meta(cfg, 3, {"vocab": words.fingerprint})
    checkpoints.save(3, {"params": params}, meta)
    checkpoints.close()
    return params


def start(cfg, mesh=None) -> dict:
    """The parameters with which a run of this config begins."""
    net = model.build(cfg.model)
    mesh = mesh or sharding.make_mesh(cfg.sharding, jax.devices()[:1])
    abstract = state.abstract(net, optim.make(cfg, net), mesh, cfg.sharding.rules)
    warmstart.check(cfg, net)
    fresh = jax.device_put(drawn(cfg, 2), state.shardings(abstract)["params"])
    result = warmstart.params(cfg, abstract["params"], fresh)
    assert jax.tree.structure(result) == jax.tree.structure(abstract["params"])
    for leaf, wanted in zip(
        jax.tree.leaves(result), jax.tree.leaves(abstract["params"]), strict=True
    ):
        assert leaf.shape == wanted.shape
        assert leaf.sharding == wanted.sharding
    return result


def flat(params: dict) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    name = jax.tree_util.keystr
    return {name(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def stream(length: int = 12, causal: bool = False) -> dict:
    return tiny.stream(np.random.default_rng(0), 2, length, causal=causal)


def logits(cfg, params, batch: dict) -> np.ndarray:
    net = model.build(cfg.model)

    @jax.jit
    def run(params):
        bound = model.bind(net, params)
        return bound.logits(bound.outputs(batch).cells_BKE)

    return np.asarray(run(params))


def encoded(cfg, params, cells: dict) -> np.ndarray:
    """What an encoder writes, alone or before a decoder."""
    net = model.build(cfg.model)

    @jax.jit
    def run(params):
        bound = model.bind(net, params)
        if cfg.model.structure == "encoder_decoder":
            return bound.encode(cells)
        return bound.states({"main": cells})[0]

    return np.asarray(run(params))


def init(path, preset: str = "same", **more) -> dict:
    return dict(init_from=str(path), init_preset=preset) | more


@pytest.mark.parametrize("kind", [dict(positions="bias"), LEARNED])
def test_the_encoder_of_a_t5_becomes_an_encoder(kind, tmp_path, capsys):
    there = config_of("encoder_decoder", **kind)
    theirs = save(tmp_path, there)
    here = config_of("encoder", init=init(tmp_path, "from_encoder"), **kind)
    ours = start(here)
    np.testing.assert_array_equal(
        encoded(here, ours, stream()), encoded(there, theirs, stream())
    )
    fresh = flat(drawn(here, 2))["output/kernel"]
    np.testing.assert_array_equal(flat(ours)["output/kernel"], fresh)
    said = capsys.readouterr().out
    assert "FRESH  output/kernel (by from_encoder)" in said
    assert f"{len(flat(ours)) - 1} of {len(flat(ours))} parameters from" in said
    assert "not used: decoder/blocks/attention/key" in said


def test_the_decoder_of_a_t5_becomes_a_decoder(tmp_path):
    theirs = flat(save(tmp_path, config_of("encoder_decoder")))
    ours = flat(start(config_of("decoder", init=init(tmp_path, "from_decoder"))))
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name.replace("stack/", "decoder/")])


def test_bert_becomes_an_encoders_side(tmp_path, capsys):
    there = config_of("encoder", norm_order="post", embed_norm=True, **LEARNED)
    theirs = save(tmp_path, there)
    init_to = init(tmp_path, "to_encoder")
    shape: dict[str, Any] = dict(norm_order="post", embed_norm=True, **LEARNED)
    here = config_of("encoder_decoder", init=init_to, **shape)
    ours, fresh = start(here), flat(drawn(here, 2))
    np.testing.assert_array_equal(
        encoded(here, ours, stream()), encoded(there, theirs, stream())
    )
    said = capsys.readouterr().out
    for name, value in flat(ours).items():
        if name.startswith(("decoder", "output")):
            np.testing.assert_array_equal(value, fresh[name])
            assert f"FRESH  {name} (by to_encoder)" in said


def test_bert_becomes_both_sides_and_they_share_no_memory(tmp_path, capsys):
    theirs = flat(save(tmp_path, config_of("encoder", **LEARNED)))
    here = config_of("encoder_decoder", init=init(tmp_path, "to_both"), **LEARNED)
    ours = start(here)
    for name, value in flat(ours).items():
        source = re.sub("^(en|de)coder/", "stack/", name)
        source = re.sub("^(en|de)coder_inputs/", "inputs/", source)
        if "/cross" in source:
            assert source not in theirs
        else:
            np.testing.assert_array_equal(value, theirs[source], name)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(ours)]
    assert len({*pointers}) == len(pointers)
    fresh = [s.split()[1] for s in capsys.readouterr().out.splitlines() if "FRESH" in s]
    assert fresh and all("/cross" in name for name in fresh)
    assert {*fresh} == {name for name in flat(ours) if "/cross" in name}


@pytest.mark.parametrize("kind", [LEARNED, dict(positions="bias")])
def test_a_decoder_becomes_a_prefix_lm_and_again_a_decoder(kind, tmp_path):
    """With an empty prefix both compute the same; T5's distances need two tables."""
    both, maps = kind, {}
    if kind["positions"] == "bias":
        both, maps = kind | dict(relative_buckets=16), dict(init_positions="repeat")
    decoder = config_of("decoder", **kind)
    theirs = save(tmp_path / "a", decoder)
    prefix = config_of("prefix_lm", init=init(tmp_path / "a", **maps), **both)
    batch = {"main": stream(24, causal=True)}
    np.testing.assert_allclose(
        logits(prefix, start(prefix), batch),
        logits(decoder, theirs, batch),
        rtol=1e-5,
        atol=1e-5,
    )
    adapted = flat(save(tmp_path / "b", prefix, seed=5))
    again = config_of("decoder", init=init(tmp_path / "b", **maps), **kind)
    for name, value in flat(start(again)).items():
        expected = adapted[name]
        if name.endswith("relative/embedding"):  # the half of the keys before
            expected = expected[:8]
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("ways", [(True, False), (False, True), (False, False)])
def test_buckets_keep_the_bias_of_every_distance(ways):
    """By brute force over distances: n one way are 2n both ways; finer is exact."""
    ours_one_way, theirs_one_way = ways
    sizes = {(True, False): (32, 64), (False, True): (64, 32), (False, False): (32, 32)}
    n_ours, n_theirs = sizes[ways]

    def shape(n):
        return config_of("decoder", relative_buckets=n, relative_max_distance=128).model

    ours, theirs = shape(n_ours), shape(n_theirs)
    found = rows.of_buckets(ours, theirs, ours_one_way, theirs_one_way)
    table = np.arange(n_theirs)
    for distance in range(-300, 301):
        if distance > 0 and (ours_one_way or theirs_one_way):
            continue
        at = np.array([distance])
        mine = positions.relative_bucket(at, ours, not ours_one_way)[0]
        other = positions.relative_bucket(at, theirs, not theirs_one_way)[0]
        assert table[found.low_T[mine]] == other, distance


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("mean", dict(tie_embeddings=True, output_bias=True)),
        ("fresh", dict(tie_embeddings=False)),
    ],
)
def test_more_sentinels_leave_the_logits_of_old_ids(how, kind, tmp_path, capsys):
    there = config_of("decoder", sentinels=40, **LEARNED, **kind)
    theirs = save(tmp_path, there)
    grows = init(tmp_path, init_vocab=how)
    here = config_of("decoder", sentinels=150, init=grows, **LEARNED, **kind)
    ours = start(here)
    # By hand: pad, EOS, unknown, 256 bytes and the marks behind them keep their ids;
    # <extra_id_0> to <extra_id_39> count down from the end.
    kept = np.arange(259 + len(vocab.MARKS))
    moved = np.arange(259, 259 + 40)
    old_ids = np.concatenate([kept, moved])
    new_ids = np.concatenate([kept, moved + 110])
    batch = {"main": stream(16, causal=True)}
    expected, found = logits(there, theirs, batch), logits(here, ours, batch)
    np.testing.assert_array_equal(found[..., new_ids], expected[..., old_ids])
    table, before = flat(ours)["embedding"], flat(theirs)["embedding"]
    others = np.setdiff1d(np.arange(259 + 150), new_ids)
    assert f"{len(others)} NEW by config.init_vocab={how!r}" in capsys.readouterr().out
    fresh = flat(drawn(here, 2))["embedding"]
    if how == "fresh":
        np.testing.assert_array_equal(table[others], fresh[others])
    else:
        mean, std = before[: 259 + 40].mean(0), before[: 259 + 40].std(0)
        z = (table[others] - mean) / (0.1 * std)
        assert abs(z.mean()) < 4 / np.sqrt(z.size)
        assert abs(z.std() - 1) < 4 / np.sqrt(2 * z.size)
    np.testing.assert_array_equal(table[259 + 150 :], fresh[259 + 150 :])


@pytest.mark.parametrize("how", ["repeat", "interpolate"])
@pytest.mark.parametrize("offsets", [(0, 0), (2, 2), (2, 0), (0, 2)])
def test_more_positions(how, offsets, tmp_path):
    there = config_of("decoder", positions="learned", max_positions=16,
                      position_offset=offsets[0])  # fmt: skip
    theirs = flat(save(tmp_path, there))["inputs/positions"]
    grows = init(tmp_path, init_positions=how)
    here = config_of("decoder", positions="learned", max_positions=40,
                     position_offset=offsets[1], init=grows)  # fmt: skip
    params = start(here)
    ours = flat(params)["inputs/positions"][offsets[1] :]
    old = theirs[offsets[0] :]
    if how == "repeat":
        expected = np.concatenate([old, old, old[:8]])
        np.testing.assert_array_equal(ours, expected)
        if offsets != (2, 0):
            return
        batch = {"main": stream(16, causal=True)}
        np.testing.assert_array_equal(
            logits(here, params, batch), logits(there, drawn(there, 1), batch)
        )
    else:
        at = np.linspace(0, 15, 40)
        each = [np.interp(at, np.arange(16), column) for column in old.T]
        np.testing.assert_allclose(ours, np.stack(each, 1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours[[0, -1]], old[[0, -1]], rtol=1e-6)


def test_fewer_positions_are_the_first(tmp_path):
    theirs = save(tmp_path, config_of("decoder", **LEARNED))
    shape: dict[str, Any] = dict(positions="learned", max_positions=10)
    ours = start(config_of("decoder", init=init(tmp_path), **shape))
    first = flat(theirs)["inputs/positions"][:10]
    np.testing.assert_array_equal(flat(ours)["inputs/positions"], first)


def test_sharded_parameters_are_the_same(tmp_path):
    save(tmp_path, config_of("encoder", sentinels=40, **LEARNED))
    grows = init(tmp_path, "to_both", init_vocab="mean", init_positions="repeat")
    shape: dict[str, Any] = dict(positions="learned", max_positions=40)
    here = config_of("encoder_decoder", init=grows, **shape)
    alone = flat(start(here))
    split: dict[str, Any] = dict(data=1, fsdp=4, tensor=2)
    mesh = sharding.make_mesh(config.ShardingConfig(**split))
    for name, value in flat(start(here, mesh)).items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-6, atol=1e-6)


def test_rules_come_before_the_preset(tmp_path, capsys):
    theirs = flat(save(tmp_path, config_of("encoder_decoder", tie_embeddings=True)))
    own = (("output/kernel", "embedding"), (r"stack/blocks/mlp/.*", None))
    here = config_of("encoder", init=init(tmp_path, "from_encoder", init_rules=own))
    ours, fresh = flat(start(here)), flat(drawn(here, 2))
    np.testing.assert_array_equal(ours["output/kernel"], theirs["embedding"])
    hidden = [name for name in ours if "/mlp/" in name]
    assert hidden
    said = capsys.readouterr().out
    for name in hidden:
        np.testing.assert_array_equal(ours[name], fresh[name])
        assert f"FRESH  {name} (by config.init_rules)" in said
    assert "OTHER  config.model.tie_embeddings: True there, False here" in said


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    save(path, config_of("decoder", **LEARNED))
    return path


@pytest.mark.parametrize(
    ("structure", "keys", "shape", "message"),
    [
        ("decoder", {}, dict(d_ff=96), r"mlp/down: \(2, 96, 32\) here.*\(2, 64, 32\)"),
        ("decoder", {}, dict(decoder_layers=3), r"\(3, .* here, .* has \(2, "),
        ("decoder", {}, dict(max_positions=64), "64 positions here, 24 there"),
        ("decoder", {"sentinels": 90}, {}, "ids of another vocabulary, 'bytes' with"),
        ("decoder", {"rules": (("stack/blocks/mpl/up", None),)}, {}, "did you mean"),
        ("decoder", {"rules": (("stack/(.*)", r"stck/\1"),)}, {}, "gives 'stck/"),
        ("decoder", {"rules": (("stack/(", None),)}, {}, "is no .regex of our name"),
        ("decoder", {"rules": (("stack/.*", r"\1"),)}, {}, "invalid group reference"),
        ("decoder", {"rules": (("stack/.*",),)}, {}, "is no .regex of our name"),
        ("decoder", {"rules": ((".*", None),)}, {}, "no parameter is restored"),
    ],
)
def test_what_does_not_fit_is_refused(structure, keys, shape, message, saved):
    given = init(saved, init_rules=keys.get("rules", ()))
    here = config_of(
        structure, keys.get("sentinels", 100), init=given, **(LEARNED | shape)
    )
    with pytest.raises(ValueError, match=message):
        warmstart.check(here, model.build(here.model))


def test_distances_one_way_are_not_taken_for_both_ways(tmp_path):
    save(tmp_path, config_of("decoder"))
    here = config_of("prefix_lm", init=init(tmp_path))
    with pytest.raises(ValueError, match="8 buckets of distances both ways.*one way"):
        warmstart.check(here, model.build(here.model))


def test_no_such_workdir(tmp_path):
    here = config_of("decoder", init=init(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="config.init_from=.*is no workdir"):
        warmstart.check(here, model.build(here.model))
    assert not (tmp_path / "none").exists()


def test_a_run_starts_from_another_and_then_goes_on_alone(tmp_path, capsys):
    there = config_of("decoder", **LEARNED)
    theirs = flat(save(tmp_path / "a", there))
    heldout = str(vocab_kinds.ROOT / "data/heldout.jsonl")
    cfg: Any = config.defaults()
    cfg.update(config.to_json(there, tuples=True))
    cfg.data.update(dict(train=heldout, heldout=heldout, inputs_length=24))
    cfg.data.cache_dir = str(tmp_path / "stores")
    cfg.update(dict(steps=1, eval_every=1, eval_batches=1, compile_cache=""))
    cfg.update(init(tmp_path / "a"))
    with cfg.unlocked():
        cfg.objective = dict(name="causal_lm")
    cfg.optim.update(dict(learning_rate=0.0, warmup_steps=1, schedule="constant"))
    train.train(config.freeze(cfg), tmp_path / "b")
    assert "parameters from" in capsys.readouterr().out
    _, _, params, step, _ = checkpoint.load_run(tmp_path / "b")
    assert step == 1
    for name, value in flat(params).items():
        np.testing.assert_array_equal(value, theirs[name])
    # Once it has a checkpoint, the other workdir is not needed.
    (tmp_path / "a").rename(tmp_path / "gone")
    train.train(config.freeze(cfg), tmp_path / "b")
    assert "finished: step 1 of 1 is done" in capsys.readouterr().out

"""Fine-tuning recipes against optax and NumPy on the papers' own definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite import (
    losses,
    model,
    optim,
    parameters,
    recipes,
    sharding,
    state,
    step,
    stopping,
)
from t5x_lite.config import CheckpointConfig, ConfigError
from tests import tiny


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_label_smoothing_is_optaxs(z_loss):
    """Value and every gradient; the padded ids get no share."""
    rng, V, used = np.random.default_rng(0), 16, 13
    x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(V, 8)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=V), jnp.float32)
    targets = rng.integers(0, used, (2, 5)).astype(np.int32)
    weights = jnp.asarray(rng.uniform(size=(2, 5)), jnp.float32)

    def ours(x, kernel, bias):
        sums = losses.cross_entropy(
            x, kernel, targets, weights, z_loss, used, 2, bias, 0.1
        )
        return sums.objective, sums.nll

    def reference(x, kernel, bias):
        logits = (x @ kernel.T + bias[None, None])[..., :used]
        labels = optax.smooth_labels(jax.nn.one_hot(targets, used), 0.1)
        each = optax.softmax_cross_entropy(logits, labels)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        whole = jnp.sum((each + z_loss * log_z**2) * weights)
        return whole, jnp.sum(nll * weights)

    found, wanted = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(x, kernel, bias)
        for f in (ours, reference)
    )
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_smoothed_classes_are_optaxs():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    labels, ones = jnp.asarray([0, 2, 1, 1]), jnp.ones(4)
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, 3), 0.2)
    wanted = optax.softmax_cross_entropy(logits, smooth).sum()
    found = losses.classification(logits, labels, ones, 0.2)
    np.testing.assert_allclose(found.objective, wanted, rtol=1e-6)
    plain = losses.classification(logits, labels, ones)
    assert found.nll == plain.nll == plain.objective


def updates_of(cfg, steps: int = 1, grads=None, **extra):
    """Params after each update with the same gradients, from the first state on."""
    net = model.build(cfg.model)
    tx = optim.make(cfg, net)
    params = parameters.init_params(net, jax.random.key(0))
    if grads is None:
        grads = jax.tree.map(
            lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape),
            params,
        )

    @jax.jit
    def one(params, opt):
        updates, opt = tx.update(grads, opt, params, **extra)
        return optax.apply_updates(params, updates), opt

    opt, seen = tx.init(params), [params]
    for _ in range(steps):
        params, opt = one(params, opt)
        seen.append(params)
    return seen, opt


def flat(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {parameters.name_of(path): np.asarray(x) for path, x in leaves}


ADAMW = dict(name="adamw", schedule="constant", learning_rate=0.1, warmup_steps=0)


def test_layer_decay_scales_each_layer_of_a_stacked_array():
    """By hand for 2 + 2 layers: 1 above, then 1/2, 1/4, ... down to the embeddings."""
    cfg = tiny.tiny_config(optim=ADAMW | dict(layer_decay=0.5))
    (first, scaled), _ = updates_of(cfg)
    first, scaled = map(flat, (first, scaled))
    of_stack = {
        "decoder/blocks/mlp/up": [0.25, 0.5],
        "encoder/blocks/mlp/up": [0.0625, 0.125],
        "encoder/blocks/attention_norm/scale": [0.0625, 0.125],
    }
    of_whole = {
        "output/kernel": 1.0,
        "decoder/norm/scale": 0.5,
        "encoder/norm/scale": 0.125,
        "decoder/relative/embedding": 0.125,
        "embedding": 0.03125,
        "encoder/relative/embedding": 0.03125,
    }
    for name, factor in (of_stack | of_whole).items():
        moved = np.abs(scaled[name] - first[name])  # Adam's first step is one rate
        factor = np.reshape(factor, (-1,) + (1,) * (moved.ndim - 1))
        whole = np.broadcast_to(0.1 * factor, moved.shape)
        np.testing.assert_allclose(moved, whole, rtol=2e-3, err_msg=name)


UNFREEZE = ((r"decoder/.*|output/.*", 0), (r"encoder/.*", 2))
ENCODER = dict(structure="encoder")


@pytest.mark.parametrize(
    "name", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)]
)
def test_unfreezing_begins_as_new_at_its_step(name):
    """Before it bit-identical; then what the optimizer does from its first step."""
    optim = ADAMW | dict(name=name, weight_decay=0.1)
    rules = ((r"embedding", 0), (r"stack/.*", 2))
    cfg = tiny.tiny_config(model=ENCODER, optim=optim | dict(unfreeze=rules))
    plain = tiny.tiny_config(model=ENCODER, optim=optim)
    gradual, _ = updates_of(cfg, 4)
    usual, _ = updates_of(plain, 4)
    for at, each in enumerate(map(flat, gradual)):
        for key, array in each.items():
            late = 2 if key.startswith("stack/") else 0
            wanted = flat(usual[max(0, at - late)])[key]
            np.testing.assert_array_equal(array, wanted, err_msg=f"{key} after {at}")


def test_a_frozen_part_has_no_share_in_the_clipped_norm():
    cfg = tiny.tiny_config(
        optim=dict(name="adamw", clip_norm=1.0, unfreeze=((r"(?!embedding).*", 5),))
    )
    net = model.build(cfg.model)
    tx = recipes.gate(recipes.starts(cfg, parameters.declared(net)))
    params = parameters.init_params(net, jax.random.key(0))
    ones = jax.tree.map(jnp.ones_like, params)
    through, _ = tx.update(ones, tx.init(params))
    there = {name for name, g in flat(through).items() if g.any()}
    assert there == {"embedding"}


def test_unfreezing_has_its_axes_in_the_sharding_table():
    cfg = tiny.tiny_config(
        optim=dict(
            name="adamw", unfreeze=UNFREEZE, lr_rules=(("embedding", 0), (".*", 1))
        ),
        sharding=dict(fsdp=4),
    )
    net = model.build(cfg.model)
    mesh = sharding.make_mesh(cfg.sharding)
    abstract = state.abstract(net, optim.make(cfg, net), mesh, cfg.sharding.rules)
    specs = {
        jax.tree_util.keystr(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract["opt"])
        if leaf.ndim == 3 and "'up'" in jax.tree_util.keystr(path)
    }
    assert len(specs) == 4  # two moments of two stacks
    assert all(spec[1] == "fsdp" for spec in specs.values()), specs


def test_l2_start_is_a_decoupled_pull():
    cfg = tiny.tiny_config(optim=ADAMW | dict(l2_start=0.5), init_from="somewhere")
    plain = tiny.tiny_config(optim=ADAMW)
    net = model.build(cfg.model)
    start = flat(parameters.init_params(net, jax.random.key(1)))
    fresh = start.pop("output/kernel")  # nothing there that it could be pulled to
    (first, pulled), _ = updates_of(cfg, start=start)
    (_, usual), _ = updates_of(plain)
    first, pulled, usual = map(flat, (first, pulled, usual))
    assert fresh is not None
    for name in first:
        pull = 0.1 * 0.5 * (first[name] - start[name]) if name in start else 0.0
        np.testing.assert_allclose(
            pulled[name], usual[name] - pull, rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_frozen_parameters_are_bit_identical_and_have_no_state():
    """Gradients are summed over microbatches without the frozen ones."""
    cfg = tiny.tiny_config(
        optim=ADAMW
        | dict(
            weight_decay=0.1,
            microbatches=2,
            lr_rules=((r"encoder/.*|embedding", 0.0), (".*", 1.0)),
        )
    )
    net = model.build(cfg.model)
    tx = optim.make(cfg, net)
    before = state.init(net, tx, jax.random.key(0))
    named = {
        parameters.name_of(p)
        for p, _ in jax.tree_util.tree_leaves_with_path(before["opt"])
    }
    assert not any(
        name.endswith("embedding") and "relative" not in name for name in named
    )
    table = before["params"]["embedding"]
    before["params"]["embedding"] = table.at[0].set(-0.0)  # + 0.0 would change it
    after, metrics = jax.jit(step.make_train_step(net, tx, cfg, 100))(
        before, tiny.random_batch()
    )
    for name, p in flat(after["params"]).items():
        same = p.tobytes() == flat(before["params"])[name].tobytes()
        assert same == (name.startswith("encoder/") or name == "embedding"), name
    assert metrics["finite"]


def test_a_head_alone_leaves_the_language_models_output():
    """Else weight decay would shrink it."""
    shape = dict(structure="encoder", head="class", classes=2)
    for weight, moves in ((0.0, False), (0.5, True)):
        cfg = tiny.tiny_config(model=shape, loss=dict(lm_weight=weight))
        trained = optim.trainable(cfg, model.build(cfg.model))
        assert ("output/kernel" in trained) == moves and "head/kernel" in trained


@pytest.mark.parametrize(
    "rules, named",
    [
        ((("nothing", 3),), "first match of no"),
        ((("(", 3),), "no .regex, step"),
        ((("embedding", 0.5),), "whole number"),
    ],
)
def test_bad_unfreezing_is_refused(rules, named):
    cfg = tiny.tiny_config(optim=dict(unfreeze=rules))
    with pytest.raises(ValueError, match=named):
        optim.make(cfg, model.build(cfg.model))


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="share_layers"):
        tiny.tiny_config(model=dict(share_layers=True), optim=dict(layer_decay=0.9))
    with pytest.raises(ConfigError, match="init_from"):
        tiny.tiny_config(optim=dict(l2_start=0.1))
    with pytest.raises(ConfigError, match="lm_weight"):
        tiny.tiny_config(loss=dict(lm_weight=0.5))


def write_scores(workdir, scores, name="heldout_loss"):
    rows = [f'{{"step": {10 * i}, "loss": 1.0}}' for i in range(1, 9)]
    rows += [
        f'{{"step": {10 * (i + 1)}, "heldout_loss": 1.0, "{name}": {score}}}'
        for i, score in enumerate(scores)
    ]
    (workdir / "metrics.jsonl").write_text("\n".join(rows) + "\n")


def test_a_metric_that_no_evaluation_writes_is_refused_at_once():
    def of(metric: str, **sections):
        checkpoint = dict(metric=metric)
        return tiny.tiny_config(checkpoint=checkpoint, **sections)

    stopping.check(of("heldout_perplexity"))
    with pytest.raises(ValueError, match="did you mean 'heldout_accuracy'.*Allowed: "):
        stopping.check(of("heldout_acuracy"))
    head = dict(
        model=dict(structure="encoder", head="class", classes=2),
        data=dict(tasks=("mrpc",), task_format="head"),
    )
    stopping.check(of("heldout_f1", **head))
    with pytest.raises(ValueError, match="'heldout_f1'.* config.eval_batches=0"):
        stopping.check(of("heldout_f1", eval_batches=2, **head))
    with pytest.raises(ValueError, match="Allowed: heldout_loss"):
        stopping.check(of("heldout_perplexity", **head))


def test_patience_counts_evaluations_since_the_best(tmp_path):
    scores = [0.5, 0.7, 0.6, 0.7, 0.65]  # the best is that of step 20
    write_scores(tmp_path, scores, "heldout_accuracy")
    cfg = CheckpointConfig(metric="heldout_accuracy", metric_mode="max", patience=3)
    assert stopping.best(cfg, stopping.scores(cfg, tmp_path, 100)) == 20
    over = [at for at in range(10, 60, 10) if stopping.is_over(cfg, tmp_path, at)]
    assert over == [50]
    never = CheckpointConfig(metric="heldout_accuracy", metric_mode="max")
    assert not stopping.is_over(never, tmp_path, 50)
    with pytest.raises(ValueError, match="heldout_f1.*heldout_accuracy"):
        stopping.is_over(
            CheckpointConfig(metric="heldout_f1", patience=1), tmp_path, 50
        )

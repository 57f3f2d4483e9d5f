"""Every experiment config: two steps of its small version, and what it promises."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models
from t5x_lite import (
    cli,
    config,
    example,
    metrics,
    model,
    parameters,
    run,
    sharding,
    step,
    stopping,
    train,
)

ROOT = pathlib.Path(__file__).parents[1]
NOT_EXPERIMENTS = ("__init__", "base", "models")
NAMES = sorted(
    p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in NOT_EXPERIMENTS
)
# One of each kind of block, positions, stream and loss.
KINDS = [
    *("albert", "bart", "bert", "byt5_small", "electra", "ernie_gen"),
    *("ernie_thu", "gpt", "gpt3"),
    *("nezha", "prophetnet", "unilm_v2", "xlnet"),
]
# The others differ from one of these in shape or objective, not in the step.
TRAINED = ["demo", "mixture", "prefix_lm", "albert", "bart", "electra", "ernie_thu"]
TRAINED += ["prophetnet", "xlnet"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def small(cache):
    """name -> (frozen :smoke config, Setup), made once."""

    @functools.lru_cache
    def make(name: str, **changes) -> run.Setup:
        raw = cli.load_config(f"configs/{name}.py:smoke")
        raw.data.cache_dir, raw.compile_cache = str(cache), ""
        return run.Setup.of(config.freeze(raw), jax.devices()[:1])

    return make


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in TRAINED else pytest.mark.slow) for n in NAMES],
)
def test_two_steps_of_every_config(name, cache, tmp_path):
    raw = cli.load_config(f"configs/{name}.py:smoke")
    raw.data.cache_dir, raw.compile_cache = str(cache), ""
    last = train.train(config.freeze(raw), tmp_path)
    assert 0 < last["heldout_loss"] < 9 and last["unigram_loss"] > 0
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    numbers = [v for line in lines for v in line.values() if isinstance(v, float)]
    assert np.isfinite(numbers).all()
    kinds = {key: key.split("/")[0] for key in last if key.startswith("heldout_")}
    scores = {k for k, v in kinds.items() if not v.endswith(("_tokens", "_examples"))}
    assert scores == set(stopping.names(config.freeze(raw)))


@pytest.mark.parametrize("name", NAMES)
def test_the_published_size_freezes(name):
    """The whole experiment is a valid config, not only its small version."""
    cfg = config.freeze(cli.load_config(f"configs/{name}.py"))
    assert cfg.steps > 2
    smaller = dataclasses.replace(cfg.model, vocab_size=128)
    assert model.parameter_count(model.build(smaller)) > 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_batches_keep_the_contract_and_depend_on_seed_and_step(name, small):
    setup = small(name)
    batch, again = setup.train_batches[3], setup.train_batches[3]
    example.check(batch, setup.vocab.size)
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    other = setup.train_batches[4]
    assert set(batch["fingerprint"].tolist()).isdisjoint(other["fingerprint"].tolist())


def sums_and_grads(setup: run.Setup, batch: dict, place=lambda tree: tree, **changes):
    """Objective, sums and gradients of one batch, as in the train step."""
    shape = dataclasses.replace(setup.cfg.model, dropout=0.0, **changes)
    cfg = dataclasses.replace(setup.cfg, model=shape)
    net = model.build(cfg.model)
    params = parameters.init_params(model.build(setup.cfg.model), jax.random.key(1))
    # Biases start at zero: with others, every path counts.
    params = jax.tree.map(
        lambda p: p + 0.02 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    key = jax.random.key(0) if cfg.model.generator_width else None

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def of(params):
        def objective(params):
            return step.batch_sums(net, params, batch, cfg, setup.vocab.size, None, key)

        return jax.value_and_grad(objective, has_aux=True)(params)

    with jax.default_matmul_precision("highest"):
        (value, sums), grads = of(place(params))
    return value, sums, grads


@pytest.mark.parametrize("name", KINDS)
def test_scan_and_remat_change_nothing(name, small):
    setup = small(name)
    batch = jax.tree.map(jnp.asarray, setup.train_batches[0])
    del batch["fingerprint"]
    want, _, want_grads = sums_and_grads(setup, batch, scan=False, remat="none")
    remat = ("dots", "full")[KINDS.index(name) % 2]
    got, _, grads = sums_and_grads(setup, batch, scan=True, remat=remat)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.abs(b).max() + 1e-6))


@pytest.mark.parametrize("name", [n for n in KINDS if n != "electra"])
def test_no_cell_depends_on_what_it_may_not_see(name, small):
    """By gradient: a predicted cell reaches exactly the tokens that the masks allow.

    Several layers: what is seen is closed over paths of visible cells.
    """
    setup = small(name)
    batch = {
        k: {f: v[:1] for f, v in s.items()}
        for k, s in setup.train_batches[0].items()
        if k != "fingerprint"
    }
    cfg = dataclasses.replace(setup.cfg.model, dropout=0.0, remat="none")
    trained = model.trained_stream(cfg)
    params = parameters.init_params(model.build(cfg), jax.random.key(2))
    bound = model.bind(model.build(cfg), params)
    stream = batch[trained]
    T = stream["tokens"].shape[1]
    embed = type(bound).embed

    def cells(shift_1TE):
        def shifted(tokens_BT):
            x_BTE = embed(bound, tokens_BT)
            return x_BTE + shift_1TE if tokens_BT is stream["tokens"] else x_BTE

        object.__setattr__(bound, "embed", shifted)
        out = bound.outputs({**batch, trained: stream}).cells_BKE
        # One random number per cell is enough to see who reaches it.
        return out[0] @ jax.random.normal(jax.random.key(3), out.shape[-1:])

    zero = jnp.zeros((1, T, cfg.d_embed or cfg.d_model))

    # One cell at a time: vmapped over cells, XLA's CPU once put 1e-4 where 0 belongs.
    @jax.jit
    def gradients(shift_1TE):
        y_K, pull = jax.vjp(cells, shift_1TE)
        return jax.lax.map(lambda one_K: pull(one_K)[0][0], jnp.eye(len(y_K)))

    reached_KT = np.abs(np.asarray(gradients(zero))).sum(-1) > 0

    ctx = model.context(cfg, stream, batch.get("memory"))
    assert ctx.grid is not None
    own = slice(ctx.grid.memory, None)
    queries = ctx.visible_BTS.shape[1]
    reach = np.zeros((queries, queries), bool)  # after no layer: only oneself
    np.fill_diagonal(reach, True)
    for layer in range(cfg.depth if trained == "main" else cfg.decoder_layers):
        banded = ctx.banded_BTS is not None and (layer + 1) % cfg.window_every == 0
        masks = ctx.banded_BTS if banded else ctx.visible_BTS
        seen = np.asarray(masks)[0, :, own]
        if seen.shape[1] < queries:  # query streams are no keys
            blind = np.zeros((queries, queries - seen.shape[1]), bool)
            seen = np.concatenate([seen, blind], axis=1)
        reach = reach | (seen @ reach)
    streams = T if "query_ranks" in stream else 0
    places = stream.get("places")
    rows = np.arange(queries - streams) if places is None else np.asarray(places[0])
    want_KT = reach[streams:][rows][:, :T]
    trained_K = np.asarray(stream["weights"][0]) > 0
    np.testing.assert_array_equal(reached_KT[trained_K], want_KT[trained_K])


def published(name: str) -> int:
    """Parameters as published: see `models.PARAMETERS`."""
    cfg = config.ModelConfig(**models.PRESETS[name])
    if name in models.POOLED:
        cfg = dataclasses.replace(cfg, classes=2)
    heads = ("output/transform", "output/norm", "output/bias")
    heads += ("classes/kernel", "classes/bias")
    counted = parameters.declared(model.build(cfg))
    return sum(
        p.get_value().size for n, p in counted.items() if not n.startswith(heads)
    )


@pytest.mark.parametrize("name", sorted(models.PARAMETERS))
def test_parameter_counts_are_the_published_ones(name):
    assert published(name) == models.PARAMETERS[name]


@pytest.mark.parametrize("name", ["bert", "electra", "gpt3", "prophetnet", "xlnet"])
def test_eight_devices_compute_what_one_does(name, small):
    """Parameters split over fsdp and tensor, rows over data and fsdp."""
    setup = small(name)
    batch = jax.tree.map(jnp.asarray, setup.train_batches[0])
    del batch["fingerprint"]
    want, _, want_grads = sums_and_grads(setup, batch)
    rules = setup.cfg.sharding.rules
    sizes = dataclasses.replace(setup.cfg.sharding, data=2, fsdp=2, tensor=2)
    mesh = sharding.make_mesh(sizes)
    declared = parameters.declared(setup.model)

    def place(path, p):
        key = "/".join(k.key for k in path)
        axes = declared[key].get_metadata()["axes"]
        spec = sharding.spec(key, axes, p.shape, rules, mesh)
        return jax.device_put(p, jax.sharding.NamedSharding(mesh, spec))

    with sharding.use(mesh, rules):
        rows = sharding.batch_sharding(mesh, rules, setup.cfg.data.batch_size)
        split = sharding.to_device(batch, rows, setup.cfg.data.batch_size)
        got, _, grads = sums_and_grads(
            setup, split, place=lambda tree: jax.tree.map_with_path(place, tree)
        )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.abs(b).max() + 1e-6))

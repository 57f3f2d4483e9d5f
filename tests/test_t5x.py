"""T5X checkpoints: a real one, its layouts written by others, Adafactor's state."""

import dataclasses
import functools
import importlib
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import serialization, traverse_util

from t5x_lite import checkpoint, convert, optim, stored
from t5x_lite import model as model_lib
from t5x_lite.config import ModelConfig
from t5x_lite.interop import t5x, t5x_adafactor, t5x_files
from t5x_lite.positions import relative_bucket
from tests import parity, tiny
from tests.t5x_reference import (
    HUGGING_FACE,
    UMT5,
    as_tensorstore,
    assert_equal,
    batch,
    flat,
    in_their_names,
    random_params,
    scanned,
    their_bucket,
    their_forward,
    their_state,
)

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared/data/weights/t5x/test_t5_tiny.checkpoint_0"


@pytest.fixture(scope="module")
def real() -> dict[str, np.ndarray]:
    """The real checkpoint's arrays, through flax alone."""
    if not REAL.exists():
        pytest.skip("T5X's test checkpoint is not in ../shared/data")
    tree = serialization.msgpack_restore(REAL.read_bytes())["optimizer"]
    return flat(tree)


def test_the_real_checkpoint_gives_its_own_logits(real):
    cfg, params, extras = t5x.read(REAL)
    sizes = dict(vocab_size=32128, d_model=8, heads=4, head_dim=3, d_ff=16)
    sizes |= dict(encoder_layers=2, decoder_layers=2, gated=True, activation="gelu")
    sizes |= dict(tie_embeddings=False, positions="bias", relative_buckets=32)
    assert {key: getattr(cfg, key) for key in sizes} == sizes
    assert extras["step"] == int(real["state/step"]) and not extras["notes"]
    weights = {n.removeprefix("target/"): a for n, a in real.items()}
    example = batch(np.random.default_rng(0), cfg.vocab_size)
    theirs = their_forward(weights, example["inputs"][0], example["decoder_inputs"][0])
    nested = traverse_util.unflatten_dict(dict(params), sep="/")
    parity.close("logits", parity.logits(cfg, nested, example)[0], theirs)


@pytest.mark.parity
def test_the_real_checkpoint_is_transformers_t5(real):
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    sizes = dict(vocab_size=32128, d_model=8, d_kv=3, d_ff=16, num_layers=2)
    sizes |= dict(num_heads=4, feed_forward_proj="gated-gelu")
    config = transformers.T5Config(**sizes, tie_word_embeddings=False)
    config._attn_implementation = "eager"
    net = transformers.T5ForConditionalGeneration(config).eval()
    net.lm_head.weight = torch.nn.Parameter(torch.zeros(32128, 8))
    state = net.state_dict()
    for name, array in real.items():
        if not name.startswith("target/"):
            continue
        theirs = name.removeprefix("target/")
        last = "1" if theirs.startswith("encoder") else "2"
        for pattern, replacement in HUGGING_FACE:
            replacement = replacement.format(bias="relative_attention_bias", last=last)
            theirs = re.sub(pattern, replacement, theirs)
        tensor = torch.tensor(array)
        turned = tensor.ndim == 2 and theirs != "shared"
        state[f"{theirs}.weight"].copy_(tensor.T if turned else tensor)
    net.encoder.embed_tokens.weight = net.decoder.embed_tokens.weight = (
        net.shared.weight
    )
    example = batch(np.random.default_rng(1), 32128)
    ids = {
        "input_ids": torch.tensor(example["inputs"]).long(),
        "decoder_input_ids": torch.tensor(example["decoder_inputs"]).long(),
    }
    with torch.no_grad():
        wanted = net(**ids).logits.numpy()
    cfg, params, _ = t5x.read(REAL)
    nested = traverse_util.unflatten_dict(dict(params), sep="/")
    parity.close("logits", parity.logits(cfg, nested, example), wanted)


@pytest.mark.parametrize("legacy", [True, False])
def test_the_real_checkpoint_comes_back_bit_by_bit(real, tmp_path, legacy):
    cfg, params, extras = t5x.read(REAL)
    again = tmp_path / "checkpoint_0"
    step, opt = extras["step"], extras["opt"]
    t5x.write(again, cfg, params, step=step, opt=opt, legacy=legacy)
    assert again.is_file() == legacy
    assert_equal(t5x_files.load(again), real)
    assert_equal(t5x.read(tmp_path).params, dict(params))  # the latest of a directory


@pytest.mark.parametrize("style", ["unrolled", "scalable_t5", "flaxformer"])
def test_all_layouts_of_layers_are_the_same_model(tmp_path, style):
    params = random_params(UMT5)
    weights = in_their_names(params, UMT5)
    if style != "unrolled":
        weights = scanned(weights, UMT5, style)
    found = t5x.read(as_tensorstore(tmp_path / "checkpoint_7", weights))
    assert found.cfg == UMT5
    assert found.extras["step"] == 7 and found.extras["opt"] is None
    assert "no optimizer state" in found.extras["notes"][0]
    assert_equal(found.params, params)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("buckets, most", [(32, 128), (64, 256), (8, 20)])
def test_distances_fall_into_t5xs_buckets(both, buckets, most):
    distance = np.arange(-2 * most, 2 * most + 1)
    cfg = ModelConfig(relative_buckets=buckets, relative_max_distance=most)
    theirs = their_bucket(distance, both, buckets, most)
    np.testing.assert_array_equal(relative_bucket(distance, cfg, both), theirs)


def test_scanned_layers_are_written_as_they_are_read(tmp_path):
    params = random_params(UMT5)
    t5x.write(tmp_path / "checkpoint_3", UMT5, params, step=3, scanned=True)
    theirs = scanned(in_their_names(params, UMT5), UMT5, "scalable_t5")
    found = t5x_files.load(tmp_path / "checkpoint_3")
    assert int(found.pop("state/step")) == 3
    assert_equal(found, {f"target/{name}": a for name, a in theirs.items()})
    assert_equal(t5x.read(tmp_path).params, params)


def test_the_first_t5_has_one_layer_in_and_no_output_of_its_own(tmp_path):
    old = dict(gated=False, activation="relu", tie_embeddings=True, positions="bias")
    cfg = dataclasses.replace(UMT5, **old)
    params = random_params(cfg)
    t5x.write(tmp_path / "file", cfg, params, legacy=True)
    names = set(t5x_files.load(tmp_path / "file"))
    assert "target/decoder/layers_2/mlp/wi/kernel" in names
    assert "target/decoder/relpos_bias/rel_embedding" in names
    assert not any("wi_0" in name or "logits_dense" in name for name in names)
    found = t5x.read(tmp_path / "file")
    assert found.cfg == cfg
    assert_equal(found.params, params)
    assert t5x.read(tmp_path / "file", activation="gelu").cfg.activation == "gelu"


@pytest.mark.parametrize("old", [True, False])
def test_bfloat16_files_are_read_exactly(tmp_path, old):
    weights = in_their_names(random_params(UMT5), UMT5)
    path = as_tensorstore(tmp_path / "c", weights, dtype=ml_dtypes.bfloat16, old=old)
    _, params, _ = t5x.read(path)
    rounded = weights["token_embedder/embedding"].astype(ml_dtypes.bfloat16)
    assert params["embedding"].dtype == np.float32
    np.testing.assert_array_equal(params["embedding"], rounded.astype(np.float32))


@pytest.mark.parametrize("ocdbt", [True, False])
def test_what_orbax_wrote_is_read(tmp_path, ocdbt):
    params = random_params(UMT5)
    weights = in_their_names(params, UMT5)
    tree = {"target": traverse_util.unflatten_dict(weights, sep="/")}
    tree |= {"state": {"step": np.int32(9), "param_states": {}}}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "checkpoint_9/state", tree)
    found = t5x.read(tmp_path / "checkpoint_9")
    assert found.extras["step"] == 9
    assert_equal(found.params, params)


def test_what_the_first_orbax_wrote_is_read(tmp_path):
    params = random_params(UMT5)
    path = as_tensorstore(tmp_path / "1", in_their_names(params, UMT5))
    target = {
        name: f"PLACEHOLDER://target.{name.replace('/', '.')}"
        for name in in_their_names(params, UMT5)
    }
    tree = {"target": traverse_util.unflatten_dict(target, sep="/")}
    tree |= {"flax_mutables": None, "state": {}, "params_axes": {"names": "embed"}}
    content = serialization.msgpack_serialize({"_optimizer": tree})
    (path / "checkpoint").write_bytes(content)
    assert_equal(t5x.read(path).params, params)


# Square matrices wherever rows and columns could be mistaken for each other.
WIDE = dataclasses.replace(
    UMT5, vocab_size=128, d_model=128, d_ff=160, heads=8, head_dim=16
)


@functools.cache
def one_step() -> tuple:
    """Our optimizer's state after one gradient: (config, gradients, the state)."""
    cfg, grads = WIDE, random_params(WIDE, 2)
    run = tiny.tiny_config(model=dataclasses.asdict(cfg), optim=dict(clip_norm=0.0))
    net = model_lib.build(cfg)
    tx = optim.make(run, net)
    params = traverse_util.unflatten_dict(random_params(cfg, 1), sep="/")
    nested = traverse_util.unflatten_dict(grads, sep="/")
    step = jax.jit(lambda params, grads: tx.update(grads, tx.init(params), params)[1])
    return run, grads, step(params, nested)


@pytest.mark.parametrize("style", ["unrolled", "scalable_t5"])
def test_their_adafactor_state_is_ours(tmp_path, style):
    run, grads, ours = one_step()
    weights, theirs = (in_their_names(p, WIDE) for p in (random_params(WIDE), grads))
    if style != "unrolled":
        weights, theirs = (scanned(w, WIDE, style) for w in (weights, theirs))
    states = {
        f"state/param_states/{name}/{field}": array
        for name, grad in theirs.items()
        for field, array in their_state(name, grad, style != "unrolled").items()
    }
    everything = {f"target/{name}": a for name, a in weights.items()} | states
    everything["state/step"] = np.asarray(1, np.int32)
    t5x_files.save(tmp_path / "checkpoint_1", everything)
    cfg, params, extras = t5x.read(tmp_path / "checkpoint_1")
    assert cfg == run.model
    found = t5x.optax_state(run, extras["opt"], extras["step"])
    assert jax.tree.structure(found) == jax.tree.structure(ours)
    factored = 0
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(ours), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        np.testing.assert_allclose(a, b, rtol=2e-6, err_msg=name)
        factored += "v_row" in name and b.shape[-1] > 1
    assert factored == 7 + 11 + 2  # kernels of a layer, embedding and output
    assert_equal(flat(t5x.opt_of(found)), flat(extras["opt"]))
    if style == "unrolled":
        t5x.write(tmp_path / "again", cfg, params, step=1, opt=t5x.opt_of(found))
        assert_equal(t5x_files.load(tmp_path / "again"), everything)


def test_a_workdir_keeps_parameters_and_optimizer(tmp_path):
    rng = np.random.default_rng(3)
    run = tiny.tiny_config(model=dataclasses.asdict(UMT5))
    drawn = jax.tree.map(
        lambda leaf: rng.uniform(size=leaf.shape).astype(leaf.dtype),
        t5x_adafactor._shapes(run),
    )
    there, workdir = tmp_path / "checkpoint_5", tmp_path / "workdir"
    t5x.write(there, UMT5, random_params(UMT5), step=5, opt=t5x.opt_of(drawn))
    convert.main([f"--from=t5x:{there}", f"--to={workdir}"])
    cfg, step, _ = checkpoint.read_run(workdir)
    assert (cfg.model, step) == (UMT5, 5)
    params, opt = stored.open_params(workdir, step), t5x.opt_in(workdir)
    t5x.write(tmp_path / "again", UMT5, params, step=5, opt=opt)
    assert_equal(t5x_files.load(tmp_path / "again"), t5x_files.load(there))
    convert.main([f"--from={workdir}", f"--to=t5x:{tmp_path / 'third'}"])
    assert_equal(t5x_files.load(tmp_path / "third"), t5x_files.load(there))


def test_another_adafactor_is_left_out_with_the_reason(real, tmp_path):
    cfg, params, extras = t5x.read(REAL)
    changed = dict(real)
    name = "state/param_states/encoder/layers_0/mlp/wo/kernel/m"
    changed[name] = np.ones((16, 8), np.float32)
    t5x_files.save(tmp_path / "a", changed, legacy=True)
    found = t5x.read(tmp_path / "a")
    assert found.extras["opt"] is None
    assert "layers_0/mlp/wo/kernel has momentum" in found.extras["notes"][0]
    with pytest.raises(ValueError, match="is not Adafactor's"):
        t5x.opt_of({"mu": np.zeros(3)})
    sgd = tiny.tiny_config(optim=dict(name="adamw"))
    with pytest.raises(ValueError, match="config.optim.name='adamw'"):
        t5x.optax_state(sgd, extras["opt"], 1)
    other = tiny.tiny_config(model=dataclasses.asdict(cfg) | dict(d_ff=17))
    with pytest.raises(ValueError, match="config.model has"):
        t5x.optax_state(other, extras["opt"], 1)


@pytest.mark.parametrize("escape", ["../secret", "/etc", "..", "a/b"])
@pytest.mark.parametrize("kind", ["spec", "placeholder"])
def test_no_array_outside_of_the_checkpoint_is_opened(tmp_path, escape, kind):
    secret = {"driver": "file", "path": str(tmp_path / "secret")}
    spec = dict(driver="zarr", kvstore=secret, metadata=dict(shape=[2]), dtype="int32")
    ts.open(spec, create=True).result().write([1, 2]).result()
    leaf = dict(driver="zarr", kvstore=dict(driver="file", path=escape))
    leaf = leaf if kind == "spec" else f"PLACEHOLDER://{escape}"
    folder = tmp_path / "checkpoint_0"
    folder.mkdir()
    content = {"version": 3, "optimizer": {"target": {"x": leaf}}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    with pytest.raises(ValueError, match="outside of"):
        t5x_files.load(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        t5x.read(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="neither a file 'checkpoint'"):
        t5x.read(tmp_path)
    file = tmp_path / "file"
    whole = {"version": 3, "optimizer": {"target": {"a": np.ones(9)}}}
    for content in (
        b"",
        b"model_checkpoint_path: x",
        b"\x81\xa1",
        serialization.msgpack_serialize(whole)[:-5],
        serialization.msgpack_serialize({"optimizer": {"state": {}}}),
        serialization.msgpack_serialize({"optimizer": {"target": {"a": "text"}}}),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="not a T5X checkpoint, or is damaged"):
            t5x.read(file)
    file.write_bytes(serialization.msgpack_serialize(whole))
    with pytest.raises(ValueError, match="it is no encoder-decoder of T5X's T5"):
        t5x.read(file)
    weights = in_their_names(random_params(UMT5), UMT5)
    del weights["decoder/layers_1/mlp/wo/kernel"]
    with pytest.raises(ValueError, match="missing: decoder/layers_1/mlp/wo/kernel"):
        t5x.read(as_tensorstore(tmp_path / "c", weights))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(structure="decoder"), "structure='decoder'"),
        (dict(positions="learned"), "positions='learned'"),
        (dict(norm="layer"), "norm='layer'"),
        (dict(activation="gelu_exact"), "activation='gelu_exact'"),
        (dict(tie_embeddings=True, rescale_logits=False), "rescale_logits=False"),
        (dict(share_layers=True), "share_layers=True"),
        (dict(relative_max_distance=64), "relative_max_distance=64.* read as 128"),
        (dict(norm_eps=1e-5), "norm_eps=1e-05.* read as 1e-06"),
        (dict(window=8), "window=8.* read as 0"),
        (dict(activation="relu"), "activation='relu'.* read as 'gelu'"),
        (dict(gated=False), "activation='gelu'.* read as 'relu'"),
        (dict(embed_norm=True), "encoder_inputs/norm/scale"),
    ],
)
def test_models_that_t5x_has_not_are_refused(tmp_path, changes, message):
    cfg = dataclasses.replace(UMT5, **changes)
    with pytest.raises(ValueError, match=message):
        t5x.write(tmp_path / "checkpoint_0", cfg, random_params(cfg))
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path, monkeypatch):
    params = random_params(UMT5)
    path = tmp_path / "checkpoint_0"
    t5x.write(path, UMT5, params)
    with pytest.raises(FileExistsError, match="exists. Give a new name"):
        t5x.write(path, UMT5, params)
    with pytest.raises(ValueError, match="bias_per_layer"):
        shared = dataclasses.replace(UMT5, positions="bias")
        t5x.write(tmp_path / "s", shared, random_params(shared), scanned=True)
    with pytest.raises(ValueError, match="factors the matrices of scanned layers"):
        t5x.write(tmp_path / "s", UMT5, params, scanned=True, opt={})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(t5x_files, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        t5x.write(tmp_path / "checkpoint_1", UMT5, params)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_0"]


def test_sizes_are_factored_as_optax_does():
    from optax._src import factorized

    for shape in [(128, 128), (127, 300), (300, 128), (128, 300), (500,), (4, 4)]:
        theirs = factorized._factored_dims(shape, True, 128)
        assert t5x_adafactor._factored(shape) == theirs

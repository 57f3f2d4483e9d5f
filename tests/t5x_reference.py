"""T5X's names and files spelled out, and its T5 in NumPy, without our tables."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from flax import serialization, traverse_util

from t5x_lite import model as model_lib
from t5x_lite import parameters
from t5x_lite.config import ModelConfig

UMT5 = ModelConfig(
    vocab_size=20,
    d_model=12,
    d_ff=10,
    heads=2,
    head_dim=3,
    encoder_layers=2,
    decoder_layers=3,
    positions="bias_per_layer",
    relative_buckets=8,
)

HUGGING_FACE = (  # T5X's name -> theirs, as their conversion script has it
    (r"token_embedder/embedding", "shared"),
    (r"decoder/logits_dense/kernel", "lm_head"),
    (r"/(?:en|de)coder_norm/scale", ".final_layer_norm"),
    (r"/relpos_bias/rel_embedding", ".block.0.layer.0.SelfAttention.{bias}"),
    (r"/layers_(\d+)/", r".block.\1.layer."),
    (r"pre_cross_attention_layer_norm/scale", "1.layer_norm"),
    (r"pre_(self_)?attention_layer_norm/scale", "0.layer_norm"),
    (r"pre_mlp_layer_norm/scale", "{last}.layer_norm"),
    (r"mlp/(\w+)/kernel", r"{last}.DenseReluDense.\1"),
    (r"encoder_decoder_attention/(\w)\w+/kernel", r"1.EncDecAttention.\1"),
    (r"(self_)?attention/(\w)\w+/kernel", r"0.SelfAttention.\2"),
)


def flat(tree) -> dict:
    return traverse_util.flatten_dict(tree, sep="/")


def random_params(cfg: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(1.0, 0.5, p.get_value().shape).astype(np.float32)
        for name, p in parameters.declared(model_lib.build(cfg)).items()
    }


def in_their_names(params: dict, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Unrolled T5X weights, spelled out from t5x/examples/t5/network.py."""
    D = cfg.d_model
    theirs = {"token_embedder/embedding": params["embedding"]}
    if not cfg.tie_embeddings:
        theirs["decoder/logits_dense/kernel"] = params["output/kernel"].T
    depths = {"encoder": cfg.encoder_layers, "decoder": cfg.decoder_layers}
    for stack, depth in depths.items():
        own = "attention" if stack == "encoder" else "self_attention"
        pairs = [("attention", own, f"pre_{own}_layer_norm")]
        if stack == "decoder":
            pre = "pre_cross_attention_layer_norm"
            pairs.append(("cross", "encoder_decoder_attention", pre))
        theirs[f"{stack}/{stack}_norm/scale"] = params[f"{stack}/norm/scale"]
        for i in range(depth):
            at = f"{stack}/layers_{i}"
            ours = {
                n.split("/blocks/")[1]: a[i]
                for n, a in params.items()
                if n.startswith(f"{stack}/blocks/")
            }
            theirs[f"{at}/relpos_bias/rel_embedding"] = ours["relative/embedding"].T
            for mine, name, pre in pairs:
                theirs[f"{at}/{pre}/scale"] = ours[f"{mine}_norm/scale"]
                for part in ("query", "key", "value"):
                    kernel = ours[f"{mine}/{part}"].reshape(D, -1)
                    theirs[f"{at}/{name}/{part}/kernel"] = kernel
                kernel = ours[f"{mine}/out"].reshape(-1, D)
                theirs[f"{at}/{name}/out/kernel"] = kernel
            theirs[f"{at}/pre_mlp_layer_norm/scale"] = ours["mlp_norm/scale"]
            for name, mine in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
                theirs[f"{at}/mlp/{name}/kernel"] = ours[f"mlp/{mine}"]
    return theirs


def scanned(weights: dict, cfg: ModelConfig, style: str) -> dict[str, np.ndarray]:
    """The same weights as `scan_layers` stores them: layers are axis 1, heads apart."""
    N, H, found, layers = cfg.heads, cfg.head_dim, {}, {}
    for name, array in weights.items():
        parts = name.split("/")
        if not parts[1].startswith("layers_"):
            found[name] = array
            continue
        if parts[-2] in ("query", "key", "value"):
            array = array.reshape(-1, N, H)
        if parts[-2] == "out":
            array = array.reshape(N, H, -1)
        parts[1] = "layers" if style == "scalable_t5" else parts[0]
        if style == "scalable_t5" and parts[2] == "relpos_bias":
            parts[2] = "relative_posemb"
        layers.setdefault("/".join(parts), []).append(array)
    return found | {name: np.stack(each, axis=1) for name, each in layers.items()}


def as_tensorstore(folder: Path, weights: dict, *, dtype: Any = "float32", old=False):
    """T5X's directory as `t5x/checkpoints.py` describes it, through tensorstore."""
    folder.mkdir()
    tree = {}
    for name, array in weights.items():
        file = f"target.{name.replace('/', '.')}"
        stored = array.astype(dtype)
        if old:  # version 2: bfloat16's bits as uint16
            stored = stored.view(np.uint16)
        metadata = {
            "compressor": {"id": "gzip"},
            "shape": array.shape,
            "chunks": [-(-n // 2) for n in array.shape],
        }
        kvstore = {"driver": "file", "path": str(folder / file)}
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
        spec["dtype"] = stored.dtype.name
        ts.open(spec, create=True).result().write(stored).result()
        reference = dict(driver="zarr", dtype=stored.dtype.name, metadata={})
        if old:
            reference |= dict(kvstore=dict(driver="gfile"), path=file)
        else:
            dummy = dict(driver="gcs", bucket="t5x-dummy-bucket", path=f"{file}/")
            reference |= dict(kvstore=dummy)
        tree[name] = reference
    tree = traverse_util.unflatten_dict(tree, sep="/")
    tree = {"target": tree, "state": {"step": np.int32(7)}}
    content = {"version": 2 if old else 3, "optimizer": tree}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    return folder


def assert_equal(found, wanted: dict):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        got = np.asarray(found[name])
        assert got.dtype == array.dtype, name
        np.testing.assert_array_equal(got, array, err_msg=name)


def their_bucket(distance, both: bool, buckets: int = 32, most: int = 128):
    """Bucket of key - query as t5x/examples/t5/layers.py and Mesh TensorFlow have it.

    Hugging Face's, from which ours is tested elsewhere, lacks the epsilon.
    """
    away = -np.asarray(distance)
    first = 0
    if both:
        buckets //= 2
        first = (away < 0) * buckets
    away = np.abs(away) if both else np.maximum(away, 0)
    exact = buckets // 2
    with np.errstate(divide="ignore"):
        ratio = away.astype(np.float32) / exact + np.finfo(np.float32).eps
        log = np.log(ratio) / np.log(most / exact) * (buckets - exact)
    far = np.minimum(exact + log.astype(np.int32), buckets - 1)
    return first + np.where(away < exact, away, far)


def their_forward(weights: dict, inputs_S, decoder_T) -> np.ndarray:
    """T5.1.1 in NumPy by T5X's own names: logits [T, V] of one example."""

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights[name]

    def attend(x, y, at, N, bias):
        q, k, v = (
            (z @ weights[f"{at}/{n}/kernel"]).reshape(len(z), N, -1)
            for z, n in ((x, "query"), (y, "key"), (y, "value"))
        )
        scores = np.einsum("tnh,snh->nts", q, k) + bias
        p = np.exp(scores - scores.max(-1, keepdims=True))
        o = np.einsum("nts,snh->tnh", p / p.sum(-1, keepdims=True), v)
        return o.reshape(len(x), -1) @ weights[f"{at}/out/kernel"]

    def mlp(x, at):
        a, b = (x @ weights[f"{at}/wi_{i}/kernel"] for i in (0, 1))
        gelu = a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) / 2
        return (gelu * b) @ weights[f"{at}/wo/kernel"]

    def bias(stack, T, both):
        table_NK = weights[f"{stack}/relpos_bias/rel_embedding"]
        distance = np.arange(T)[None] - np.arange(T)[:, None]
        of_NTS = table_NK[:, their_bucket(distance, both)]
        return of_NTS if both else np.where(distance > 0, -1e10, of_NTS)

    weights = {name: np.float64(a) for name, a in weights.items()}
    N = len(weights["encoder/relpos_bias/rel_embedding"])
    memory = weights["token_embedder/embedding"][inputs_S]
    x = weights["token_embedder/embedding"][decoder_T]
    for i in range(2):
        at = f"encoder/layers_{i}"
        y, b = norm(memory, f"{at}/pre_attention_layer_norm/scale"), None
        b = bias("encoder", len(memory), True)
        memory = memory + attend(y, y, f"{at}/attention", N, b)
        y = norm(memory, f"{at}/pre_mlp_layer_norm/scale")
        memory = memory + mlp(y, f"{at}/mlp")
    memory = norm(memory, "encoder/encoder_norm/scale")
    for i in range(2):
        at = f"decoder/layers_{i}"
        y = norm(x, f"{at}/pre_self_attention_layer_norm/scale")
        x = x + attend(y, y, f"{at}/self_attention", N, bias("decoder", len(x), False))
        y = norm(x, f"{at}/pre_cross_attention_layer_norm/scale")
        x = x + attend(y, memory, f"{at}/encoder_decoder_attention", N, 0.0)
        x = x + mlp(norm(x, f"{at}/pre_mlp_layer_norm/scale"), f"{at}/mlp")
    x = norm(x, "decoder/decoder_norm/scale")
    return x @ weights["decoder/logits_dense/kernel"]


def batch(rng, vocab_size: int, S: int = 30, T: int = 11) -> dict[str, np.ndarray]:
    """One example without padding, in the form of `tests/parity.py`."""
    inputs, labels = rng.integers(2, vocab_size, (1, S)), rng.integers(2, 99, (1, T))
    shifted = np.pad(labels, ((0, 0), (1, 0)))[:, :-1]
    found = dict(inputs=inputs, decoder_inputs=shifted, labels=labels)
    found |= dict(inputs_mask=np.ones((1, S)), decoder_mask=np.ones((1, T)))
    return {name: a.astype(np.int32) for name, a in found.items()}


def their_state(name: str, grad, rules: bool) -> dict[str, np.ndarray]:
    """T5X's Adafactor after its first step, from t5x/adafactor.py."""
    squares, none = grad.astype(np.float64) ** 2 + 1e-30, np.zeros(1, np.float32)
    found = dict(v_row=none, v_col=none, v=none, m=none)
    part = name.split("/")[-2]
    stacked = "/layers/" in name
    if rules and part in ("query", "key", "value", "out", "wi_0", "wi_1", "wo"):
        rows = [grad.ndim - 1 if part in ("out", "wo") else 0]
        columns = [a for a in range(grad.ndim) if a not in rows]
        columns = [a for a in columns if not (stacked and a == 1)]
    elif not stacked and grad.ndim == 2 and min(grad.shape) >= 128:
        order = np.argsort(grad.shape)
        rows, columns = [int(order[-2])], [int(order[-1])]
    else:
        return found | dict(v=squares.astype(np.float32))
    found["v_row"] = squares.mean(tuple(columns)).astype(np.float32)
    found["v_col"] = squares.mean(tuple(rows)).astype(np.float32)
    return found

"""The model of an export in plain NumPy: what the arrays of the files mean.

It is written to be read, and to be copied: it imports neither jax nor flax. For T5 (all
versions), BERT, RoBERTa, ALBERT, GPT, GPT-2, BART and prefix-LMs.

    from t5x_lite.arrays import open_arrays
    about = json.load(open("out/config.json"))
    found = forward(open_arrays("out"), about["config"]["model"], batch)
    found["logits"]   # float32 [B, T, V]

Axis letters: B batch, T query length, S key length, D model, F feed-forward, N heads,
H head dim, V vocabulary, E embeddings (D, but in ALBERT).
"""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

POSITIONS = ("none", "learned", "sinusoidal", "bias", "bias_per_layer")


def unsupported(model: Mapping[str, Any]) -> str:
    """Which key of config.model asks for more than is here; "" if none does."""
    if model["positions"] not in POSITIONS:
        return f"positions={model['positions']!r}"
    if (way := model.get("parametrisation", "standard")) != "standard":
        return f"parametrisation={way!r}"
    more = ("query_streams", "memory_length", "window", "generator_width", "d_entity")
    more += ("head", "mix_layers")
    return next((f"{k}={model[k]!r}" for k in more if model.get(k)), "")


def forward(arrays: Mapping[str, Any], model: Mapping[str, Any], batch: dict) -> dict:
    """float32 logits [B, T, V], and "classes" [B, C] if the model has these.

    Args:
      arrays: of an export, unrolled or stacked, of any dtype.
      model: config["model"] of its config.json.
      batch: {"encoder": stream, "decoder": stream}, or {"main": stream} for a single
        stack. A stream is a dict of int arrays [B, T]: "tokens"; "positions" (0, 1,
        ...); "segments" (1, padding 0; packed rows have more); "ranks" (a token sees
        another of its segment whose rank is not higher: 0 in encoders, the position in
        decoders); "types" if the model has them; "places" to pick tokens [B, K].
    """
    if reason := unsupported(model):
        raise ValueError(f"config.model.{reason} is not in this forward pass.")
    newer = {"scale_embedding": False}  # than some exports
    net = Model(arrays, SimpleNamespace(**(newer | dict(model))))
    if model["structure"] != "encoder_decoder":
        stream = batch["main"]
        causal = model["structure"] == "decoder"
        x_BTD = net.inputs("inputs", stream)
        return net.outputs(net.stack("stack", x_BTD, stream, causal), stream)
    source, target = batch["encoder"], batch["decoder"]
    encoder = "decoder" if model["share_stacks"] else "encoder"
    x_BSD = net.inputs("encoder_inputs", source)
    memory_BSD = net.stack(encoder, x_BSD, source, False)
    x_BTD = net.inputs("decoder_inputs", target)
    y_BTD = net.stack("decoder", x_BTD, target, True, (memory_BSD, source))
    return net.outputs(y_BTD, target)


class Model:
    """`arrays` by name, and the config's model as attributes `m`."""

    def __init__(self, arrays: Mapping[str, Any], m: SimpleNamespace):
        self.arrays, self.m = arrays, m

    def weight(self, name: str, layer: int = 0) -> np.ndarray:
        """float32; of one layer if the name is of a block."""
        one = name.replace("/blocks/", f"/blocks/{layer:02d}/")
        if one in self.arrays:
            return np.asarray(self.arrays[one], np.float32)
        stacked = "/blocks/" in name and not self.m.share_layers
        array = self.arrays[name][layer] if stacked else self.arrays[name]
        return np.asarray(array, np.float32)

    def product(self, spec: str, x, name: str, layer: int = 0, bias: bool = False):
        """x times a weight, by einsum's `spec`, plus its bias."""
        y = np.einsum(spec, x, self.weight(name, layer), optimize=True)
        return y + self.weight(f"{name}_bias", layer) if bias else y

    def norm(self, x_BTD, name: str, layer: int = 0):
        """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019)."""
        if self.m.norm == "layer":
            x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
        x_BTD = x_BTD / np.sqrt((x_BTD**2).mean(-1, keepdims=True) + self.m.norm_eps)
        x_BTD = x_BTD * self.weight(f"{name}/scale", layer)
        has_bias = self.m.norm == "layer" and self.m.bias
        return x_BTD + self.weight(f"{name}/bias", layer) if has_bias else x_BTD

    def inputs(self, name: str, stream: dict):
        """Embeddings of tokens, positions and types -> [B, T, D]."""
        x_BTE = self.weight("embedding")[stream["tokens"]]
        x_BTE = x_BTE * (x_BTE.shape[-1] ** 0.5 if self.m.scale_embedding else 1.0)
        if self.m.positions == "learned":
            rows = stream["positions"] + self.m.position_offset
            x_BTE = x_BTE + self.weight(f"{name}/positions")[rows]
        elif self.m.positions == "sinusoidal":
            x_BTE = x_BTE + sinusoids(stream["positions"], x_BTE.shape[-1])
        if self.m.types and "types" in stream:
            x_BTE = x_BTE + self.weight(f"{name}/types")[stream["types"]]
        if self.m.embed_norm:
            x_BTE = self.norm(x_BTE, f"{name}/norm")
        if self.m.d_embed:
            return self.product("BTE,ED->BTD", x_BTE, f"{name}/project", bias=True)
        return x_BTE

    def stack(self, name: str, x_BTD, own: dict, causal: bool, memory=None):
        """All blocks. `memory`: an encoder's output and its stream."""
        m, T = self.m, x_BTD.shape[1]
        ranks_BT = own["ranks"]
        seen_BTS = same(own, own) & (ranks_BT[:, None] <= ranks_BT[..., None])
        encodes = name == "encoder" or m.structure in ("encoder", "permuted")
        for layer in range(m.encoder_layers if encodes else m.decoder_layers):
            bias_NTT = 0.0
            if m.positions.startswith("bias"):
                of = f"{name}/blocks" if m.positions == "bias_per_layer" else name
                table_KN = self.weight(f"{of}/relative/embedding", layer)
                bias_NTT = relative_bias(table_KN, T, causal, m)
            block = f"{name}/blocks"
            x_BTD = self.block(block, layer, x_BTD, own, seen_BTS, bias_NTT, memory)
        return self.norm(x_BTD, f"{name}/norm") if m.norm_order == "pre" else x_BTD

    def block(self, name: str, layer: int, x_BTD, own, seen_BTS, bias_NTT, memory):
        """Attention, cross-attention to `memory` if there is one, feed-forward."""

        def add(x_BTD, part: str, f):
            norm = f"{name}/{part}_norm"
            if self.m.norm_order == "pre":
                return x_BTD + f(f"{name}/{part}", self.norm(x_BTD, norm, layer))
            return self.norm(x_BTD + f(f"{name}/{part}", x_BTD), norm, layer)

        def attend(part, h_BTD):
            return self.attention(part, layer, h_BTD, h_BTD, seen_BTS, bias_NTT)

        def cross(part, h_BTD):
            memory_BSD, source = memory
            return self.attention(part, layer, h_BTD, memory_BSD, same(own, source))

        x_BTD = add(x_BTD, "attention", attend)
        x_BTD = x_BTD if memory is None else add(x_BTD, "cross", cross)
        return add(x_BTD, "mlp", lambda part, h_BTD: self.mlp(part, layer, h_BTD))

    def attention(self, name: str, layer: int, x_BTD, y_BSD, seen_BTS, bias_NTS=0.0):
        """Queries from x, keys and values from y; T5 does not scale the scores."""
        into, bias = "BTD,DNH->BTNH", self.m.bias
        q_BTNH = self.product(into, x_BTD, f"{name}/query", layer, bias)
        k_BSNH = self.product(into, y_BSD, f"{name}/key", layer, bias)
        v_BSNH = self.product(into, y_BSD, f"{name}/value", layer, bias)
        scores_BNTS = np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, optimize=True)
        scale = self.m.head_dim**-0.5 if self.m.scale_attention else 1.0
        scores_BNTS = scores_BNTS * scale + bias_NTS
        scores_BNTS = np.where(seen_BTS[:, None], scores_BNTS, -1e10)
        weights_BNTS = np.exp(scores_BNTS - scores_BNTS.max(-1, keepdims=True))
        weights_BNTS /= weights_BNTS.sum(-1, keepdims=True)
        o_BTNH = np.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH, optimize=True)
        return self.product("BTNH,NHD->BTD", o_BTNH, f"{name}/out", layer, bias)

    def mlp(self, name: str, layer: int, x_BTD):
        """act(x W) W', or act(x W_gate) * (x W_up) W' (Shazeer 2020)."""
        act, into, bias = ACTIVATIONS[self.m.activation], "BTD,DF->BTF", self.m.bias
        h_BTF = self.product(into, x_BTD, f"{name}/up", layer, bias)
        if self.m.gated:
            h_BTF = act(self.product(into, x_BTD, f"{name}/gate", layer)) * h_BTF
        else:
            h_BTF = act(h_BTF)
        return self.product("BTF,FD->BTD", h_BTF, f"{name}/down", layer, bias)

    def outputs(self, y_BTD, stream: dict) -> dict:
        """Logits over the vocabulary and, from the first token, over classes."""
        m, found = self.m, {}
        if m.classes:
            x_BD = self.product("BD,DE->BE", y_BTD[:, 0], "classes/pooler", bias=True)
            logits_BC = np.tanh(x_BD) @ self.weight("classes/kernel")
            found["classes"] = logits_BC + self.weight("classes/bias")
        if "places" in stream:
            y_BTD = np.take_along_axis(y_BTD, stream["places"][..., None], axis=1)
        if m.transform_output:
            y_BTD = self.product("BTD,DE->BTE", y_BTD, "output/transform", bias=True)
            y_BTD = self.norm(ACTIVATIONS[m.activation](y_BTD), "output/norm")
        if m.tie_embeddings and m.rescale_logits:
            y_BTD = y_BTD * m.d_model**-0.5
        table = "embedding" if m.tie_embeddings else "output/kernel"
        logits_BTV = y_BTD @ self.weight(table).T
        if m.output_bias:
            logits_BTV = logits_BTV + self.weight("output/bias")
        return {"logits": logits_BTV, **found}


def same(query: dict, key: dict):
    """bool [B, T, S]: are they of the same segment, and is that no padding?"""
    segment_B1S = key["segments"][:, None, :]
    return (query["segments"][:, :, None] == segment_B1S) & (segment_B1S > 0)


def relative_bias(table_KN, T: int, causal: bool, m: SimpleNamespace):
    """T5's bias [N, T, T]: by the bucket of key - query position (section 2.1).

    Half of the buckets are one distance each, the others grow with its logarithm up to
    `relative_max_distance`; encoders have one such half for each direction.
    """
    distance_TT = np.arange(T)[None] - np.arange(T)[:, None]
    buckets, first = m.relative_buckets, np.zeros_like(distance_TT)
    if causal:
        back_TT = np.maximum(-distance_TT, 0)
    else:
        buckets //= 2
        first, back_TT = np.where(distance_TT > 0, buckets, 0), np.abs(distance_TT)
    exact = buckets // 2
    # float32 as in T5's own code: float64 puts some distances into other buckets.
    log_TT = np.log(np.maximum(back_TT, 1).astype(np.float32) / exact)
    log_TT /= math.log(m.relative_max_distance / exact)
    far_TT = exact + (log_TT * (buckets - exact)).astype(int)
    within_TT = np.where(back_TT < exact, back_TT, np.minimum(far_TT, buckets - 1))
    return np.moveaxis(table_KN[first + within_TT], -1, 0)


def sinusoids(positions_BT, width: int):
    """float32 [B, T, width]: sines, then cosines (Vaswani et al. 2017)."""
    rates = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = positions_BT[..., None] * rates
    both = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    return both[..., :width].astype(np.float32)


def gelu(x):
    """The tanh form (Hendrycks & Gimpel 2016), of GPT-2, ALBERT and T5 v1.1."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + np.tanh(inner))


def gelu_exact(x):
    """The exact form, of BERT."""
    return (0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))).astype(x.dtype)


def relu(x):
    """Of T5 v1.0."""
    return np.maximum(x, 0)


ACTIVATIONS = {"relu": relu, "gelu": gelu, "gelu_exact": gelu_exact}

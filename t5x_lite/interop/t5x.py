"""T5X checkpoints of T5, T5.1.1, mT5 and umT5: names, layouts, Adafactor's state.

    cfg, params, extras = t5x.read("checkpoint_1000000")
    t5x.write("checkpoint_0", cfg, params)

Four layouts are read. Layers are unrolled ('encoder/layers_3/...') or scanned
('encoder/layers/...' of t5x's scalable_t5, 'encoder/encoder/...' of flaxformer; the
layers are axis 1), and heads are joined in kernels ([D, N*H]) or not ([D, N, H]).
Unrolled with joined heads, and scanned with heads apart are written.
"""

import dataclasses
import functools
import operator
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from t5x_lite.arrays import Lazy, Slot
from t5x_lite.config import ModelConfig
from t5x_lite.interop import t5x_adafactor, t5x_files, tables
from t5x_lite.interop.t5x_adafactor import opt_in, opt_of, optax_state
from t5x_lite.interop.tables import Imported, Row, Rows, Table

__all__ = ["opt_in", "opt_of", "optax_state", "read", "write"]

RELATIVE = "relpos_bias/rel_embedding"


def table(cfg: ModelConfig, *, joined: bool = True) -> Table:
    """The names of a model of this shape, unrolled.

    Args:
      joined: are heads and head dim one axis there?
    """
    into, out = ("INH->I(NH)", "NHO->(NH)O") if joined else ("", "")
    rows: Rows = {
        "embedding": Row("token_embedder/embedding"),
        "output/kernel": Row("decoder/logits_dense/kernel", "VE->EV"),
    }
    for stack, own in (("encoder", ""), ("decoder", "self_")):
        layer = f"{stack}/layers_{{i}}"
        block: Rows = {"relative/embedding": Row(f"{layer}/{RELATIVE}", "KN->NK")}
        for ours, theirs in (
            ("attention", f"{own}attention"),
            ("cross", "encoder_decoder_attention"),
        ):
            for name in ("query", "key", "value"):
                block[f"{ours}/{name}"] = Row(f"{layer}/{theirs}/{name}/kernel", into)
            block[f"{ours}/out"] = Row(f"{layer}/{theirs}/out/kernel", out)
        up = "wi_1" if cfg.gated else "wi"
        for ours, theirs in (("gate", "wi_0"), ("up", up), ("down", "wo")):
            block[f"mlp/{ours}"] = Row(f"{layer}/mlp/{theirs}/kernel")
        for ours, theirs in (
            ("attention", f"{own}attention"),
            ("cross", "cross_attention"),
            ("mlp", "mlp"),
        ):
            name = f"{layer}/pre_{theirs}_layer_norm/scale"
            block[f"{ours}_norm/scale"] = Row(name)
        rows |= {f"{stack}/blocks/{ours}": row for ours, row in block.items()}
        rows[f"{stack}/norm/scale"] = Row(f"{stack}/{stack}_norm/scale")
        rows[f"{stack}/relative/embedding"] = Row(f"{stack}/{RELATIVE}", "KN->NK")
    return Table(rows)


def read(path: str | pathlib.Path, **changes) -> Imported:
    """A T5X checkpoint: (config, float32 parameters by our flat names, extras).

    The shapes say everything about the model but the activation: gelu if gated, else
    relu, as in all published models.

    Args:
      path: see `t5x_files.load`.
      changes: our `ModelConfig` fields instead.

    Returns:
      extras: {"step": int, "opt": None or {our flat name: {"v_row", "v_col", "v"}},
      "notes": why there is no "opt"}; see `optax_state`.

    Raises:
      FileNotFoundError, ValueError: if it cannot be read or is no T5.
    """
    found = t5x_files.load(path)
    target, states = {}, {}
    for name, value in found.items():
        name = name.replace("/relative_posemb/", "/relpos_bias/")  # scalable_t5's
        if name.startswith("target/"):
            target[name.removeprefix("target/")] = value
        elif name.startswith("state/param_states/"):
            param, _, field = name.removeprefix("state/param_states/").rpartition("/")
            states.setdefault(param, {})[field] = value
    weights = _unrolled(target)
    cfg = dataclasses.replace(model_config(weights), **changes)
    joined = len(np.shape(weights["encoder/layers_0/attention/query/kernel"])) == 2
    check(cfg)
    names = table(cfg, joined=joined)
    places = tables.places(names, cfg)
    tables.check(names, places, weights, cfg)
    params = Lazy({ours: _slot(ours, place, weights) for ours, place in places.items()})
    opt, why = None, "it holds no optimizer state"
    if states:
        try:
            opt = t5x_adafactor.from_theirs(states, target, names, cfg)
        except ValueError as e:
            why = f"its optimizer state is not read: {e}"
    step = int(np.ravel(np.asarray(found.get("state/step", 0)))[0])
    notes = [] if opt else [why]
    return Imported(cfg, params, {"step": step, "opt": opt, "notes": notes})


def write(
    path: str | pathlib.Path,
    cfg: ModelConfig,
    params: Mapping,
    *,
    step: int = 0,
    opt: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    scanned: bool = False,
    legacy: bool = False,
):
    """Writes parameters (flat or nested, by our names) as T5X does.

    Args:
      opt: Adafactor's state, as `read` gives it.
      scanned: for scalable_t5's `scan_layers`; needs one relative bias per layer.
      legacy: one msgpack file instead of a directory.

    Raises:
      ValueError: if T5X has no such model, or no such state in this layout.
    """
    check(cfg)
    check_assumed(cfg)
    if scanned and cfg.positions != "bias_per_layer":
        raise ValueError(
            f"config.model.positions={cfg.positions!r}: T5X's scanned layers have one "
            "relative bias each ('bias_per_layer', umT5). Write it unrolled."
        )
    if scanned and opt is not None:
        raise ValueError(
            "T5X factors the matrices of scanned layers by other rules than ours. "
            "Write them without the optimizer's state, or unrolled."
        )
    names = table(cfg, joined=not scanned)
    ours = functools.lru_cache(1)(_reader(params))
    weights = {
        name: Slot(shape, np.dtype(np.float32), functools.partial(make, ours))
        for name, (shape, make) in tables.recipes(names, cfg).items()
    }
    if scanned:
        weights = _scanned(weights)
    flat = {f"target/{name}": slot for name, slot in weights.items()}
    flat |= Lazy.of({"state/step": np.asarray(step, np.int32)}).slots
    if opt is not None:
        states = t5x_adafactor.to_theirs(opt, names, cfg)
        states = {f"state/param_states/{name}": a for name, a in states.items()}
        flat |= Lazy.of(states).slots
    t5x_files.save(path, Lazy(flat), legacy=legacy)


def _slot(ours: str, place: tables.Place, weights: Mapping[str, Any]) -> Slot:
    layers = (len(place.theirs),) if "/blocks/" in ours else ()
    return Slot(
        (*layers, *place.shape),
        np.dtype(np.float32),
        lambda: tables.gather(place, weights).astype(np.float32),
    )


def _reader(params: Mapping) -> Callable[[str], np.ndarray]:
    """Our flat name -> array, of nested or flat parameters."""

    def read(name: str) -> np.ndarray:
        if name in params:
            return np.asarray(params[name])
        return np.asarray(functools.reduce(operator.getitem, name.split("/"), params))

    return read


def check(cfg: ModelConfig):
    """Refuses what has T5X's names here but is computed in another way there."""
    wanted: dict[str, tuple] = dict(
        structure=("encoder_decoder",),
        norm=("rms",),
        norm_order=("pre",),
        positions=("bias", "bias_per_layer"),
        activation=("relu", "gelu"),
        bias=(False,),
        scale_attention=(False,),
        scale_embedding=(False,),
        share_layers=(False,),
        share_stacks=(False,),
    )
    if cfg.tie_embeddings:
        wanted["rescale_logits"] = (True,)
    for key, allowed in wanted.items():
        value = getattr(cfg, key, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"config.model.{key}={value!r}: T5X's T5 has only "
                f"{' or '.join(map(repr, allowed))}. Export to another format."
            )


def check_assumed(cfg: ModelConfig):
    """Refuses what no array says and T5X's published models have otherwise."""
    plain = ModelConfig()
    names = ("relative_max_distance", "norm_eps", "window")
    wanted: dict[str, Any] = {name: getattr(plain, name) for name in names}
    wanted["activation"] = _activation(cfg.gated)
    for key, value in wanted.items():
        if (found := getattr(cfg, key)) != value:
            raise ValueError(
                f"config.model.{key}={found!r}: a checkpoint of T5X does not say it "
                f"and is read as {value!r}. Export to another format."
            )


def _activation(gated: bool) -> str:
    return "gelu" if gated else "relu"


def model_config(weights: Mapping[str, Any]) -> ModelConfig:
    """The config that the shapes of unrolled weights imply.

    Raises:
      ValueError: if weights of a T5 are missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            raise ValueError(
                f"the checkpoint has no {name!r}, so it is no encoder-decoder of "
                f"T5X's T5. It has {', '.join(sorted(weights)[:4])} ..."
            )
        return tuple(np.shape(weights[name]))

    def depth(stack: str) -> int:
        indices = [re.match(rf"{stack}/layers_(\d+)/", name) for name in weights]
        return 1 + max((int(m[1]) for m in indices if m), default=-1)

    per_layer = f"encoder/layers_0/{RELATIVE}" in weights
    relative = f"encoder/layers_0/{RELATIVE}" if per_layer else f"encoder/{RELATIVE}"
    heads, buckets = shape(relative)
    _, *kernel = shape("encoder/layers_0/attention/query/kernel")
    vocab_size, d_model = shape("token_embedder/embedding")
    gated = "encoder/layers_0/mlp/wi_0/kernel" in weights
    return ModelConfig(
        structure="encoder_decoder",
        vocab_size=vocab_size,
        d_model=d_model,
        d_ff=shape(f"encoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel")[1],
        heads=heads,
        head_dim=int(np.prod(kernel)) // heads,
        encoder_layers=depth("encoder"),
        decoder_layers=depth("decoder"),
        activation=_activation(gated),
        gated=gated,
        tie_embeddings="decoder/logits_dense/kernel" not in weights,
        positions="bias_per_layer" if per_layer else "bias",
        relative_buckets=buckets,
    )


def _unrolled(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Names and arrays of each layer, also of scanned ones."""
    found = {}
    for name, array in weights.items():
        scanned = t5x_adafactor.SCANNED.fullmatch(name)
        if not scanned:
            found[name] = array
            continue
        stack, _, rest = scanned.groups()
        for i in range(np.shape(array)[1]):
            found[f"{stack}/layers_{i}/{rest}"] = array[:, i]
    return found


def _scanned(weights: Mapping[str, Slot]) -> dict[str, Slot]:
    """Slots of each layer -> of all (axis 1 of the array), by scalable_t5's names."""
    found: dict[str, Slot] = {}
    layers: dict[str, dict[int, Slot]] = {}
    for name, slot in weights.items():
        one = re.fullmatch(r"(encoder|decoder)/layers_(\d+)/(.+)", name)
        if one:
            rest = one[3].replace("relpos_bias", "relative_posemb")
            layers.setdefault(f"{one[1]}/layers/{rest}", {})[int(one[2])] = slot
        else:
            found[name] = slot
    for name, by in layers.items():
        each = [by[i] for i in range(len(by))]
        first, *rest = each[0].shape

        def read(each=each) -> np.ndarray:
            return np.stack([slot.read() for slot in each], axis=1)

        found[name] = Slot((first, len(each), *rest), each[0].dtype, read)
    return found

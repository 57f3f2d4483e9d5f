"""A new run that starts from the parameters of another workdir, or of parts of it.

Every parameter of ours has a name there, which `config.init_rules` (first match wins),
then a row of `PRESETS`, then the name itself give. What has no counterpart is drawn
afresh, and the log lists it. Rows of ids, positions and relative distances may differ
if config.init_vocab and config.init_positions say how; any other shape may not.

    --config.init_from=runs/t5 --config.init_preset=from_encoder
    --config.init_rules='(("classes/.*", None), ("output/kernel", "embedding"))'
"""

import dataclasses
import pathlib
import re
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5x_lite import checkpoint, lora, model, moments, parameters
from t5x_lite import config as config_lib
from t5x_lite.config import Config, ModelConfig
from t5x_lite.rows import Differences, Rows, Source

_ENCODER = (r"encoder/(.*)", r"stack/\1"), (r"encoder_inputs/(.*)", r"inputs/\1")
_DECODER = (r"decoder/(.*)", r"stack/\1"), (r"decoder_inputs/(.*)", r"inputs/\1")

# (regex of our name, name there or None = fresh), for config.init_preset.
PRESETS = {
    # Decoder to prefix-LM (LM adaptation, Lester et al. 2021) and back; more ids.
    "same": (),
    # An encoder-decoder's half becomes a single stack. The head was the decoder's.
    "from_encoder": (
        (r"stack/(.*)", r"encoder/\1"),
        (r"inputs/(.*)", r"encoder_inputs/\1"),
        (r"output/.*", None),
    ),
    "from_decoder": (
        (r"stack/(.*)", r"decoder/\1"),
        (r"inputs/(.*)", r"decoder_inputs/\1"),
    ),
    # A single stack becomes a half, or both (Rothe et al. 2020): BERT2RND, BERT2BERT.
    "to_encoder": (*_ENCODER, (r"(decoder|decoder_inputs|output)/.*", None)),
    "to_decoder": (*_DECODER, (r"(encoder|encoder_inputs)/.*", None)),
    "to_both": (*_ENCODER, *_DECODER),
}
# Keys of config.model that change no function of the parameters, or whose change is
# seen in shapes and rows.
_FREE = {
    *("structure", "vocab_size", "encoder_layers", "decoder_layers", "init_std"),
    *("init_residual", "max_positions", "position_offset", "relative_buckets"),
    *("relative_max_distance", "classes", "query_streams", "memory_length", "dropout"),
    *("attention", "unpadded", "dtype", "remat", "scan", "entities", "generator_width"),
    *("head", "head_pooler", "choices", "mix_layers", "distill_width", "lora_rank"),
    *("lora_targets", "lora_trained"),
}
# Where a parameter may come from that has no namesake: BERT's pooler.
_ELSE = (r"head/(pooler|pooler_bias)", r"classes/\1")


class Move(NamedTuple):
    """Where a parameter comes from.

    source: its name there; None = drawn afresh, `why` says the reason.
    axis, rows: the axis whose rows differ, and how; None = the same shape.
    """

    source: str | None
    why: str = ""
    axis: int = 0
    rows: Rows | None = None


def check(cfg: Config, net) -> None:
    """Refuses a config.init_from that does not exist or does not fit.

    Raises:
        FileNotFoundError, ValueError: naming each parameter that does not.
    """
    if not cfg.init_from:
        return
    source = Source.of(cfg.init_from, cfg.init_step)
    moves = plan(cfg, net, source)
    if cfg.init_optimizer == "restore":
        changed = [
            f"{name} ({move.why or move.source})"
            for name, move in moves.items()
            if move.source != name or move.rows is not None
        ]
        moments.check(cfg, net, source, changed)


def plan(cfg: Config, net, source: Source) -> dict[str, Move]:
    """Name of every parameter -> where it comes from.

    Raises:
        ValueError: shapes differ, a rule fits nothing, or nothing is restored.
    """
    ours = parameters.declared(net)
    differences = Differences(cfg, source)
    moves, wrong = {}, []
    for name, (there, why) in _names(cfg, list(ours), source).items():
        if there is None:
            moves[name] = Move(None, why)
            continue
        want, have = (
            parameter.get_value().shape
            for parameter in (ours[name], source.declared[there])
        )
        axes = ours[name].get_metadata()["axes"]
        try:
            axis, rows = differences.rows(name, axes, there)
        except ValueError as e:
            wrong.append(f"{name}: {e}")
            continue
        rest_want, rest_have = (
            [size for k, size in enumerate(shape) if rows is None or k != axis]
            for shape in (want, have)
        )
        if rest_want != rest_have:
            wrong.append(
                f"{name}: {want} here, {there} has {have}. Give it its own shape back, "
                f"or draw it afresh: config.init_rules=(({re.escape(name)!r}, None),)."
            )
        moves[name] = Move(there, "", axis, rows)
    if not wrong and all(move.source is None for move in moves.values()):
        wrong = [f"no parameter is restored; it has {_some(source.declared)}"]
    if wrong:
        raise ValueError(
            f"config.init_from={source.path!r} (step {source.step}) does not fit "
            f"config.model with config.init_preset={cfg.init_preset!r}:\n  - "
            + "\n  - ".join(wrong)
        )
    return moves


def _names(cfg: Config, ours: list[str], source: Source):
    """Our name -> (name there or None, why not)."""
    used, found = set(), {}
    own = [_checked(rule) for rule in cfg.init_rules]
    rules = [*own, *PRESETS[cfg.init_preset]]
    for name in ours:
        there, why = name, "not in it"
        if name not in source.declared and (match := re.fullmatch(_ELSE[0], name)):
            there = match.expand(_ELSE[1])
        for number, (pattern, replacement) in enumerate(rules):
            match = re.fullmatch(pattern, name)
            if not match:
                continue
            used.add(number)
            by = "config.init_rules" if number < len(own) else cfg.init_preset
            there, why = None, f"by {by}"
            if replacement is not None:
                try:
                    there = match.expand(replacement)
                except (re.error, IndexError) as e:
                    raise ValueError(
                        f"config.init_rules: {(pattern, replacement)}: {e}."
                    ) from e
                why = f"no {there} in it"
            if number < len(own) and there and there not in source.declared:
                near = config_lib.nearest(there, source.declared)
                raise ValueError(
                    f"config.init_rules: {(pattern, replacement)} gives {there!r} for "
                    f"{name!r}, which {source.path!r} has not{near}"
                )
            break
        found[name] = (there, "") if there in source.declared else (None, why)
    for number, (pattern, _) in enumerate(cfg.init_rules):
        if number not in used:
            near = config_lib.nearest(pattern, ours)
            raise ValueError(
                f"config.init_rules: {pattern!r} is the first match of no parameter"
                f"{near} There are {_some(ours)}."
            )
    return found


def _checked(rule) -> tuple[str, str | None]:
    try:
        pattern, replacement = rule
        re.compile(pattern)
        if not isinstance(replacement, str | None):
            raise TypeError(f"{replacement!r} is no text")
    except (TypeError, ValueError, re.error) as e:
        raise ValueError(
            f"config.init_rules: {rule!r} is no (regex of our name, name in init_from "
            f"or None): {e}"
        ) from e
    return pattern, replacement


def params(
    cfg: Config,
    abstract_params: dict,
    fresh: dict,
    source: str | pathlib.Path = "",
    step: int = -1,
    quiet: bool = False,
) -> dict:
    """The parameters of a new run, nested and sharded as `abstract_params`.

    Args:
        abstract_params: ShapeDtypeStructs with shardings.
        fresh: drawn ones; those that are not restored are taken from here.
        source: a workdir with the very same parameters; "" = config.init_from.
        step: of its checkpoint; -1 = the latest.
        quiet: no word about what was restored.
    """
    if source:
        _, chosen, _ = checkpoint.read_run(source, step)
        return checkpoint.load_params(source, chosen, abstract_params)
    given = Source.of(cfg.init_from, cfg.init_step if step == -1 else step)
    moves = plan(cfg, model.build(cfg.model), given)
    if jax.process_index() == 0 and not quiet:
        print("\n".join(report(cfg, moves, given)), flush=True)
    wanted, drawn = _flat(abstract_params), _flat(fresh)
    loads, result = {}, dict(drawn)
    for name, move in moves.items():
        if move.source is not None and move.source not in loads:
            shape = given.declared[move.source].get_value().shape
            loads[move.source] = _placed(shape, wanted[name], move)
    adapters = _left_adapters(moves, given, loads)
    tree = parameters.nested({tuple(n.split("/")): x for n, x in loads.items()})
    loaded = _flat(checkpoint.load_params(given.path, given.step, tree))
    for name in adapters:
        a, b = (loaded[f"lora/{name}/{k}"] for k in "ab")
        scale, where = lora.scale_of(given.cfg.model), loaded[name].sharding
        add = jax.jit(lora.added, static_argnums=3, out_shardings=where)
        loaded[name] = add(loaded[name], a, b, scale)
    taken = set()
    for name, move in moves.items():
        if move.source is None:
            continue
        array, where = loaded[move.source], wanted[name].sharding
        if move.rows is not None:
            key = jax.random.fold_in(
                jax.random.key(cfg.seed), zlib.crc32(f"init_from/{name}".encode())
            )
            real = min(_used_rows(given, move, array), array.shape[move.axis])
            mix = jax.jit(_mix, static_argnums=(4, 5, 6), out_shardings=where)
            mean = cfg.init_vocab == "mean"
            result[name] = mix(
                array, drawn[name], tuple(move.rows), key, move.axis, real, mean
            )
        elif move.source in taken:  # two parameters must not share their memory
            result[name] = jax.jit(jnp.copy, out_shardings=where)(array)
        else:
            taken.add(move.source)
            result[name] = array
    return parameters.nested({tuple(n.split("/")): x for n, x in result.items()})


def start(cfg: Config, abstract_params: dict) -> dict[str, jax.Array]:
    """What config.optim.l2_start pulls to: the parameters that init_from gave, by name.

    Those of config.init_step, which a run has written down, so also after a resume.
    """
    net = model.build(cfg.model)
    draw = jax.jit(
        lambda bits: parameters.init_params(net, jax.random.key(bits)),
        out_shardings=jax.tree.map(lambda x: x.sharding, abstract_params),
    )
    fresh = draw(np.uint32(cfg.seed % 2**32))
    return kept(cfg, net, params(cfg, abstract_params, fresh, quiet=True))


def kept(cfg: Config, net, params: dict) -> dict:
    """Those of a model's parameters that init_from gives, by name."""
    moves = plan(cfg, net, Source.of(cfg.init_from, cfg.init_step))
    return {
        name: x for name, x in _flat(params).items() if moves[name].source is not None
    }


def _left_adapters(moves: dict[str, Move], given: Source, loads: dict) -> list[str]:
    """Weights of the source whose adapters we have not; adds these to `loads`."""
    taken, found = {move.source for move in moves.values()}, []
    for name, p in given.declared.items():
        weight = name.removeprefix(lora.PREFIX).rpartition("/")[0]
        if not name.startswith(lora.PREFIX) or name in taken or weight not in loads:
            continue
        mesh = loads[weight].sharding.mesh
        everywhere = NamedSharding(mesh, PartitionSpec())
        shape = p.get_value().shape
        loads[name] = jax.ShapeDtypeStruct(shape, np.float32, sharding=everywhere)
        found.append(weight)
    return sorted(set(found))


def _used_rows(given: Source, move: Move, array) -> int:
    """Rows there that are read: not the padding of a vocabulary."""
    assert move.source is not None
    axes = given.declared[move.source].get_metadata()["axes"]
    rows = array.shape[move.axis]
    if "vocab" not in axes or move.rows is None or not move.rows.new_T.any():
        return rows
    return given.vocab.size


def _placed(shape, like, move: Move) -> jax.ShapeDtypeStruct:
    """An array of the source, sharded as ours but for the axis that changes."""
    where = like.sharding
    if move.rows is not None:
        spec = [*where.spec, *[None] * (len(shape) - len(where.spec))]
        spec[move.axis] = None
        where = NamedSharding(where.mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=where)


def _mix(source, fresh, rows, key, axis: int, real: int, mean: bool):
    """Rows of `source`, and for new ones `fresh`'s or what is like the others.

    With `mean`: the mean of the other rows, and noise with a tenth of their standard
    deviation (after Hewitt 2021, who draws from the normal distribution of the rows).
    """
    low_T, high_T, weight_T, blank_T = rows
    source, fresh = (jnp.moveaxis(x, axis, 0) for x in (source, fresh))
    across = (-1, *[1] * (source.ndim - 1))
    weight = jnp.reshape(weight_T, across)
    low, high = (source[jnp.maximum(at_T, 0)] for at_T in (low_T, high_T))
    found = jnp.where(weight > 0, low * (1 - weight) + high * weight, low)
    new = fresh
    if mean:
        used = source[:real]
        noise = jax.random.normal(key, fresh.shape, fresh.dtype)
        center, spread = used.mean(axis=0, keepdims=True), used.std(0, keepdims=True)
        new = jnp.where(
            jnp.reshape(blank_T, across), fresh, center + 0.1 * spread * noise
        )
    known = jnp.reshape(jnp.asarray(low_T) >= 0, across)
    return jnp.moveaxis(jnp.where(known, found, new), 0, axis)


def report(cfg: Config, moves: dict[str, Move], source: Source) -> list[str]:
    """Lines: how many are restored, which are not, and what is read otherwise."""
    restored = {n: m for n, m in moves.items() if m.source is not None}
    lines = [
        f"config.init_from: {len(restored)} of {len(moves)} parameters from "
        f"{source.path}, step {source.step}, preset {cfg.init_preset!r}"
    ]
    for name, move in restored.items():
        if move.rows is None:
            continue
        new_T = move.rows.new_T
        line = f"  ROWS   {name}: {len(new_T)} of {move.source}'s"
        if new_T.any():
            some = np.flatnonzero(new_T)
            shown = ", ".join(map(str, some[:8])) + (" ..." if len(some) > 8 else "")
            line += (
                f"; {len(some)} NEW by config.init_vocab={cfg.init_vocab!r}: {shown}"
            )
        lines.append(line)
    for name, move in moves.items():
        if move.source is None:
            lines.append(f"  FRESH  {name} ({move.why})")
    used = {move.source for move in restored.values()}
    if left := [name for name in source.declared if name not in used]:
        lines.append(f"  not used: {_some(left)}")
    for field in dataclasses.fields(ModelConfig):
        a, b = (getattr(c, field.name) for c in (source.cfg.model, cfg.model))
        if field.name not in _FREE and a != b:
            lines.append(f"  OTHER  config.model.{field.name}: {a!r} there, {b!r} here")
    return lines


def _some(names) -> str:
    names = list(names)
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def _flat(tree: dict) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }

"""The configuration: checked once, frozen; its keys stand in `config_keys.py`.

`configs/*.py` build an `ml_collections.ConfigDict` from these defaults and
`--config.a.b=value` overrides it. On start `freeze` turns it into frozen dataclasses
and reports every problem at once, each with the key, the value, what is allowed and
the way out. `to_json` writes the resolved values beside the metrics and into every
checkpoint.
"""

import collections.abc
import dataclasses
import difflib
import types
import typing
from typing import Any

import ml_collections

from t5x_lite import model_config
from t5x_lite.config_keys import (
    CheckpointConfig,
    Config,
    DataConfig,
    LossConfig,
    OptimConfig,
    ShardingConfig,
)
from t5x_lite.data import rates
from t5x_lite.model_config import ModelConfig

# Those who read a config find its parts here, too.
SECTIONS = (
    *(CheckpointConfig, DataConfig, LossConfig, ModelConfig),
    *(OptimConfig, ShardingConfig),
)


class ConfigError(ValueError):
    """Every problem found in a config, one a line."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        head = f"{len(problems)} problem(s) in the config:"
        super().__init__("\n  - ".join([head, *problems]))


def defaults() -> ml_collections.ConfigDict:
    """The default config as the editable dict that config files start from."""
    return ml_collections.ConfigDict(to_json(Config(), tuples=True))


def to_json(config, tuples: bool = False) -> dict[str, Any]:
    """A (frozen) config as plain dicts, numbers, strings and lists."""

    def plain(x) -> Any:
        if dataclasses.is_dataclass(x):
            return {f.name: plain(getattr(x, f.name)) for f in dataclasses.fields(x)}
        if isinstance(x, collections.abc.Mapping):
            return {k: plain(v) for k, v in x.items()}
        if isinstance(x, tuple | list):
            items = [plain(v) for v in x]
            return tuple(items) if tuples else items
        return x

    return plain(config)


def freeze(raw) -> Config:
    """Checks a `ConfigDict` (or dict) and returns it frozen.

    Raises:
      ConfigError: with one line per problem: unknown keys (and the nearest known
        one), wrong types, values out of range, and fields that do not fit together.
    """
    if isinstance(raw, ml_collections.ConfigDict):
        raw = raw.to_dict()
    problems: list[str] = []
    config = _build(Config, raw, "config", problems)
    if not problems:
        problems.extend(_cross_checks(config))
    if problems:
        raise ConfigError(problems)
    return config


def nearest(name: str, known) -> str:
    """The end of a sentence: '; did you mean ...?' of the closest, '.' if none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _build(cls, raw, path: str, problems: list[str]):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(raw, collections.abc.Mapping):
        problems.append(f"{path}={raw!r} must be a dict with keys {sorted(fields)}.")
        return cls()
    for name in raw:
        if name not in fields:
            problems.append(
                f"{path}.{name} is no config key{nearest(name, fields)} "
                f"Keys here: {', '.join(fields)}."
            )
    types_of = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name not in raw:
            continue
        at, kind = f"{path}.{name}", types_of[name]
        if dataclasses.is_dataclass(kind):
            values[name] = _build(kind, raw[name], at, problems)
        else:
            values[name] = _value(raw[name], kind, field.metadata, at, problems)
    return cls(**values)


def _value(value: Any, kind, meta, at: str, problems: list[str]):
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    if kind is dict and isinstance(value, collections.abc.Mapping):
        return types.MappingProxyType(
            {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        )
    if type(value) is not kind:
        problems.append(f"{at}={value!r} must be of type {kind.__name__}.")
        return value
    if meta["among"] and value not in meta["among"]:
        hint = nearest(str(value), map(str, meta["among"]))
        problems.append(f"{at}={value!r} is not one of {list(meta['among'])}{hint}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if meta["low"] is not None and not value >= meta["low"]:
            problems.append(f"{at}={value!r} must be at least {meta['low']}.")
        if meta["high"] is not None and not value <= meta["high"]:
            problems.append(f"{at}={value!r} must be at most {meta['high']}.")
    return value


# What the layers that read entities are made for.
_WITH_ENTITIES = dict(
    structure=("encoder",),
    norm_order=("post",),
    positions=("learned", "sinusoidal", "none"),
    gated=(False,),
    share_layers=(False,),
    query_streams=(0,),
    memory_length=(0,),
    window=(0,),
    generator_width=(0.0,),
)


def _cross_checks(c: Config):
    if c.data.batch_size % c.optim.microbatches:
        yield (
            f"config.data.batch_size={c.data.batch_size} must be a multiple of "
            f"config.optim.microbatches={c.optim.microbatches}."
        )
    if c.optim.spike_rewinds and c.optim.spike_factor <= 1:
        yield (
            f"config.optim.spike_rewinds={c.optim.spike_rewinds} needs "
            f"config.optim.spike_factor above 1, here {c.optim.spike_factor}. Set it "
            "to 1.5, say, or spike_rewinds to 0."
        )
    if c.optim.schedule == "wsd" and c.optim.decay_steps > c.steps:
        yield (
            f"config.optim.decay_steps={c.optim.decay_steps} is more than "
            f"config.steps={c.steps}; set at most that."
        )
    if c.optim.schedule in ("linear", "cosine", "wsd"):
        if c.optim.warmup_steps >= c.steps:
            yield (
                f"config.optim.warmup_steps={c.optim.warmup_steps} must be below "
                f"config.steps={c.steps} with schedule {c.optim.schedule!r}."
            )
    bucketed = c.model.positions in ("bias", "bias_per_layer", "prophetnet")
    if bucketed and c.model.relative_max_distance <= c.model.relative_buckets // 2:
        yield (
            f"config.model.relative_max_distance={c.model.relative_max_distance} must "
            f"exceed half of relative_buckets={c.model.relative_buckets}."
        )
    if c.model.d_entity % c.model.entity_heads:
        yield (
            f"config.model.d_entity={c.model.d_entity} must be a multiple of "
            f"config.model.entity_heads={c.model.entity_heads}."
        )
    if c.model.d_entity:
        for name, allowed in _WITH_ENTITIES.items():
            if (value := getattr(c.model, name)) not in allowed:
                yield (
                    f"config.model.{name}={value!r} does not go with d_entity="
                    f"{c.model.d_entity}: allowed is {' or '.join(map(repr, allowed))}."
                )
    yield from model_config.problems(c.model)
    yield from _recipe_problems(c)
    yield from rates.problems(c.data)
    if c.model.parametrisation == "mup" and c.optim.name == "lamb":
        yield (
            "config.optim.name='lamb' does not go with config.model.parametrisation="
            "'mup': its rates are known for 'adamw' and 'adafactor'. Use one of these, "
            "or parametrisation='standard'."
        )
    s = c.sharding
    sizes = (s.data, s.fsdp, s.tensor, s.sequence)
    if 0 in sizes or sizes.count(-1) > 1:
        yield (
            f"config.sharding data, fsdp, tensor, sequence = {sizes}: each must be >= "
            "1, and at most one -1 (inferred)."
        )
    if s.dcn_data == 0:
        yield "config.sharding.dcn_data=0: give the number of slices, or -1."


def _recipe_problems(c: Config):
    """Yields what of fine-tuning does not fit together."""
    o, m = c.optim, c.model
    shared = m.share_layers or m.share_stacks or m.generator_width or m.d_entity
    if o.layer_decay != 1.0 and (shared or not o.layer_decay):
        yield (
            f"config.optim.layer_decay={o.layer_decay} must be above 0 and needs "
            "layers of their own in one or two stacks: share_layers, share_stacks, "
            "generator_width, d_entity off. Set it to 1."
        )
    if (o.l2_start or c.init_optimizer == "restore") and not c.init_from:
        yield (
            f"config.optim.l2_start={o.l2_start}, config.init_optimizer="
            f"{c.init_optimizer!r} need config.init_from, a workdir to start from."
        )
    if o.l2_start and m.lora_rank:
        yield (
            f"config.optim.l2_start={o.l2_start} does not go with lora_rank="
            f"{m.lora_rank}: adapters start at no pretrained values. Set one to 0."
        )
    n = dict(choice=m.choices, similarity=2).get(m.head, 1) * o.microbatches
    if n > 1 and c.data.batch_size % n:
        yield (
            f"config.data.batch_size={c.data.batch_size} must be a multiple of {n}: "
            f"the rows of an example of head={m.head!r} times microbatches="
            f"{o.microbatches}."
        )
    yield from _distill_problems(c)
    if c.loss.lm_weight and not m.head:
        yield (
            f"config.loss.lm_weight={c.loss.lm_weight} is beside a head's loss, here "
            "is config.model.head=''. Set it to 0."
        )


# Knobs of config.distill: type, lowest, highest.
_DISTILL: dict[str, tuple[type, Any, Any]] = dict(
    teacher=(str, None, None),
    step=(int, -1, None),
    alpha=(float, 0.0, 1.0),
    temperature=(float, 1e-3, None),
    hidden=(float, 0.0, None),
)


def _distill_problems(c: Config):
    for name, value in c.distill.items():
        if name not in _DISTILL:
            yield (
                f"config.distill.{name} is no knob{nearest(name, _DISTILL)} Knobs: "
                f"{', '.join(_DISTILL)}."
            )
            continue
        kind, low, high = _DISTILL[name]
        right = isinstance(value, (int, float) if kind is float else kind)
        if right and kind is not str:
            right = (low is None or low <= value) and (high is None or value <= high)
        if not right:
            yield (
                f"config.distill.{name}={value!r} must be of type {kind.__name__}, "
                f"from {low} to {high}."
            )
    if c.distill and not c.distill.get("teacher"):
        yield (
            f"config.distill={dict(c.distill)} names no teacher. Give "
            "teacher=WORKDIR of a finished run, or {}."
        )
    if c.distill and (c.model.generator_width or c.model.d_entity):
        yield (
            "config.distill does not go with config.model.generator_width (ELECTRA) or "
            "d_entity (ERNIE). Set it to {}."
        )


def describe() -> str:
    """Every key with its default, allowed values and meaning, one a line."""
    lines = []

    def walk(cls, path):
        types_of = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            kind = types_of[f.name]
            if dataclasses.is_dataclass(kind):
                walk(kind, f"{path}.{f.name}")
            else:
                default = getattr(cls(), f.name)
                among = f.metadata["among"]
                allowed = f" One of: {', '.join(among)}." if among else ""
                lines.append(f"  --{path}.{f.name}={default}")
                lines.append(f"      {f.metadata['doc']}.{allowed}")

    walk(Config, "config")
    return "\n".join(lines)

"""The configuration: every key, its default, range and meaning, checked once.

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
from t5x_lite.model_config import DTYPES, ModelConfig, key

OPTIMIZERS = ("adafactor", "adamw", "lamb")
INIT_PRESETS = (
    *("same", "from_encoder", "from_decoder", "to_encoder", "to_decoder", "to_both"),
)
SCHEDULES = ("constant", "rsqrt", "linear", "cosine", "wsd")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    train: str = key("data/train.jsonl", "path or glob of the training text")
    heldout: str = key("data/heldout.jsonl", "path or glob of the held-out text")
    vocab: str = key("bytes", "'bytes', a file or its directory; see vocab.py")
    sentinels: int = key(100, "sentinel ids on top of the vocabulary", low=0)
    cache_dir: str = key("runs/stores", "where token stores are built")
    inputs_length: int = key(512, "encoder tokens per example, EOS included", low=4)
    train_inputs: bool = key(False, "decoder: train on the inputs of a pair too")
    static_noise: bool = key(False, "a window's noise is the same in every epoch")
    batch_size: int = key(128, "examples per step, over all devices", low=1)
    prefetch: int = key(2, "batches prepared ahead", low=0)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: str = key("adafactor", "optimizer", among=OPTIMIZERS)
    learning_rate: float = key(1.0, "peak; rsqrt: lr/sqrt(max(step, warmup))", low=0.0)
    schedule: str = key("rsqrt", "learning-rate schedule", among=SCHEDULES)
    warmup_steps: int = key(10_000, "steps of linear warm-up (rsqrt: flat)", low=0)
    decay_steps: int = key(0, "last steps that decay in wsd; 0 = a fifth", low=0)
    final_fraction: float = key(0.0, "end / peak learning rate", low=0.0, high=1.0)
    clip_norm: float = key(0.0, "global gradient norm; 0 = no clipping", low=0.0)
    beta1: float = key(0.9, "AdamW, LAMB: first moment", low=0.0, high=1.0)
    beta2: float = key(0.999, "AdamW, LAMB: second moment", low=0.0, high=1.0)
    eps: float = key(1e-8, "AdamW, LAMB: epsilon", low=0.0)
    decay_rate: float = key(0.8, "Adafactor second-moment exponent", low=0.0, high=1.0)
    update_clip: float = key(1.0, "Adafactor update RMS threshold", low=0.0)
    weight_decay: float = key(0.0, "decoupled weight decay", low=0.0)
    decay_rules: tuple = key(
        (
            (r".*(norm/scale|norm/bias|_bias|/bias|relative/embedding)$", 0.0),
            (r".*", 1.0),
        ),
        "(regex, multiplier) of weight decay; first match wins, all must match",
    )
    lr_rules: tuple = key(
        ((r".*", 1.0),), "(regex, multiplier) of the learning rate, 0 = frozen"
    )
    microbatches: int = key(1, "gradient accumulation steps", low=1)
    accumulate_dtype: str = key(
        "float32", "of gradients summed over microbatches", among=DTYPES
    )
    offload: bool = key(False, "keep the optimizer's state in host memory")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    z_loss: float = key(1e-4, "weight of log(Z)^2", low=0.0)
    replaced_weight: float = key(50.0, "of ELECTRA's discriminator loss", low=0.0)
    chunk: int = key(0, "target positions per logits chunk; 0 = by size", low=0)


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    data: int = key(-1, "mesh size of data parallelism; -1 = the rest", low=-1)
    fsdp: int = key(1, "mesh size of sharded parameters", low=-1)
    tensor: int = key(1, "mesh size of tensor parallelism", low=-1)
    sequence: int = key(1, "mesh size of sequence parallelism", low=-1)
    dcn_data: int = key(-1, "slices that `data` spans; -1 = those there are", low=-1)
    dcn_fsdp: int = key(1, "slices that `fsdp` spans", low=1)
    rules: dict = key(
        dict(
            batch=("data", "fsdp"),
            length=("sequence",),
            predicted=("sequence",),
            residual=(),
            vocab=("tensor",),
            embed=("fsdp",),
            mlp=("tensor",),
            heads=("tensor",),
            kv=(),
            layers=(),
            buckets=(),
            norm=(),
        ),
        "logical axis name -> mesh axes it is split over",
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(1000, "steps between checkpoints", low=1)
    keep_last: int = key(2, "newest checkpoints kept", low=1)
    keep_every: int = key(0, "also keep every k-th step for ever; 0 = none", low=0)
    keep_best: int = key(1, "also keep the n best by held-out loss", low=0)
    accept_changes: bool = key(False, "resume though the data or its order changed")
    restore_step: int = key(-1, "step to resume from; -1 = the latest", low=-1)


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = key(0, "of parameters, dropout and data order", low=0)
    steps: int = key(1000, "train until this step", low=1)
    log_every: int = key(1, "steps between lines of metrics.jsonl", low=1)
    eval_every: int = key(1000, "steps between held-out evaluations", low=1)
    eval_batches: int = key(0, "held-out batches; 0 = the whole split", low=0)
    platform: str = key("", "jax platform ('cpu', 'tpu', 'cuda'); empty = best")
    compile_cache: str = key("runs/compile_cache", "compiled programs; empty = off")
    profile: int = key(0, "steps to trace into WORKDIR/profile; 0 = none", low=0)
    profile_first: int = key(10, "steps after the start before the trace", low=0)
    peers_timeout: int = key(300, "seconds to wait for all processes", low=1)
    slow_step: float = key(
        10.0, "dump stacks when a step takes k times the median; 0 = never", low=0.0
    )
    init_from: str = key(
        "", "workdir whose parameters a new run starts from; empty = drawn"
    )
    init_preset: str = key(
        "same",
        "how names of init_from map to ours; see t5x_lite/warmstart.py",
        among=INIT_PRESETS,
    )
    init_rules: tuple = key(
        (),
        "(regex of our name, name in init_from or None = fresh); first match wins, "
        "before the preset",
    )
    init_vocab: str = key(
        "",
        "rows of ids that init_from's vocabulary has not; empty = must be the same",
        among=("", "mean", "fresh"),
    )
    init_positions: str = key(
        "",
        "more learned positions or relative buckets than init_from; empty = an error",
        among=("", "repeat", "interpolate"),
    )
    objective: dict = key(
        dict(name="span_corruption", density=0.15, mean_span=3.0),
        "objective name (t5x_lite/objectives) and its knobs",
    )
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    sharding: ShardingConfig = dataclasses.field(default_factory=ShardingConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)


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
    """'; did you mean ...?' for the known name closest to `name`, or ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


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

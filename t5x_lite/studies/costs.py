"""What a run costs, from its config alone: parameters, FLOPs, tokens. No tracing."""

import collections.abc
import dataclasses
import functools
import json
from typing import Any

from t5x_lite import config as config_lib
from t5x_lite import dry, metrics, vocab
from t5x_lite import model as model_lib
from t5x_lite import run as run_lib
from t5x_lite.config import Config
from t5x_lite.data import pipeline, text_lengths


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run.

    Attributes:
      parameters: {"total", "embedding", "non_embedding"}.
      flops_per_step: of training, all examples of a batch (`metrics.training_flops`).
      tokens_per_step: that the stacks read (`metrics.tokens_per_example`).
      steps: of the run.
    """

    parameters: dict[str, int]
    flops_per_step: int
    tokens_per_step: int
    steps: int

    @property
    def training_flops(self) -> int:
        return self.flops_per_step * self.steps

    @property
    def tokens(self) -> int:
        return self.tokens_per_step * self.steps


def of(cfg: Config) -> Cost:
    """The cost of a run; needs its vocabulary's file, but no corpus (the tasks' files
    where config.data.targets_length=0 leaves that length to them).

    Raises:
      ValueError, FileNotFoundError: the config does not fit together.
    """
    words = load_vocab(cfg.data.vocab, cfg.data.sentinels)
    cfg = run_lib.resolve_entities(run_lib.resolve_vocab_size(cfg, words), words)
    cfg = text_lengths.resolve(cfg, words)
    shapes = stream_shapes(cfg, words)
    B = cfg.data.batch_size
    return Cost(
        parameters=parameters(cfg),
        flops_per_step=B * metrics.training_flops(cfg.model, shapes),
        tokens_per_step=B * metrics.tokens_per_example(shapes),
        steps=cfg.steps,
    )


load_vocab = functools.lru_cache(maxsize=8)(vocab.load)


def parameters(cfg: Config) -> dict[str, int]:
    """`metrics.split_parameters` of the config's model, whose vocab_size may be 0."""
    words = load_vocab(cfg.data.vocab, cfg.data.sentinels)
    return dict(_split(run_lib.resolve_vocab_size(cfg, words).model))


@functools.lru_cache(maxsize=4096)
def _split(shape: model_lib.ModelConfig) -> dict[str, int]:
    return metrics.split_parameters(model_lib.build(shape))


def stream_shapes(cfg: Config, words: vocab.Vocab) -> dict[str, tuple[int, int, int]]:
    """Stream name -> (T cells, K predicted cells, G query streams) of a batch."""
    if cfg.data.tasks:
        return _task_shapes(cfg)
    objective = json.dumps(config_lib.to_json(cfg.objective), sort_keys=True)
    return _stream_shapes(
        words,
        objective,
        cfg.model.structure,
        cfg.data.inputs_length,
        cfg.model.memory_length,
        cfg.data.train_inputs,
    )


def _task_shapes(cfg: Config) -> dict[str, tuple[int, int, int]]:
    """Of rows that are full: as much as labelled examples can cost."""
    T, K = cfg.data.inputs_length, cfg.data.targets_length
    if cfg.data.task_format == "head":
        T, K = (T, T) if cfg.loss.lm_weight else (T, 1)
        main = (T, K, 0)
        both = {"encoder": (T, 0, 0), "decoder": main}
    else:
        main = (T + K - 1, T + K - 1, 0)
        both = {"encoder": (T, 0, 0), "decoder": (K, K, 0)}
    return both if cfg.model.structure == "encoder_decoder" else {"main": main}


@functools.lru_cache(maxsize=1024)
def _stream_shapes(words, objective, structure, inputs_length, memory, train_inputs):
    knobs = json.loads(objective)
    blank: Any = dry.StandInStore(int(words.ordinary[0]))
    return pipeline.Batches(
        blank,
        words,
        objective=knobs.pop("name"),
        knobs=knobs,
        structure=structure,
        inputs_length=inputs_length,
        batch_size=1,
        seed=0,
        memory_length=memory,
        train_inputs=train_inputs,
    ).shapes


def resolved(base: Config, overrides: dict[str, Any]) -> Config:
    """The base with overrides, checked anew.

    Args:
      overrides: dotted config key -> value; a dict replaces the whole section, as
        {"objective": {"name": "prefix_lm"}} does.

    Raises:
      ConfigError: naming unknown keys and values that are not allowed.
    """
    raw = config_lib.to_json(base, tuples=True)
    for key, value in overrides.items():
        *sections, name = key.split(".")
        node = raw
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, collections.abc.MutableMapping):
                raise config_lib.ConfigError(
                    [f"config.{key}: {section!r} is no section of the config."]
                )
        node[name] = value
    return config_lib.freeze(raw)

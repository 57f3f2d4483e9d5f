"""The train step of a config without its data, vocabulary and devices."""

import dataclasses
import math
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from t5x_lite import config as config_lib
from t5x_lite import distill, heads, optim, run, sharding, state, step, vocab, warmstart
from t5x_lite import model as model_lib
from t5x_lite.data import pipeline, task_batches, text_lengths
from t5x_lite.kernels import attention

STAND_IN_VOCAB = 32_100  # T5's: 32,000 pieces and 100 sentinels


class StandInVocab(vocab.Vocab):
    """Ids without pieces, in place of a vocabulary file that is not here."""

    def __init__(self, size: int, sentinels: int):
        self.spec, self.size, self.sentinels = "stand-in", size, sentinels
        self.fingerprint = "stand-in"

    def starts_word(self, tokens_BT: np.ndarray) -> np.ndarray:
        return np.ones(tokens_BT.shape, bool)


class StandInStore:
    """An endless text of one word, in documents of 4,096 tokens."""

    n_tokens = 2**24
    fingerprint = "stand-in"

    def __init__(self, word: int):
        self._word = word

    def windows(self, starts_B: np.ndarray, length: int) -> np.ndarray:
        return np.full((len(starts_B), length), self._word, np.int32)

    def places_of(self, token: int) -> np.ndarray:
        del token
        return np.arange(4095, self.n_tokens, 4096)


class Step(NamedTuple):
    """A train step that can be lowered but not run.

    Attributes:
      beside: what it reads and no checkpoint holds, as `run.Setup.beside`.
    """

    cfg: config_lib.Config
    notes: list[str]
    mesh: Mesh
    model: nnx.Module
    shapes: dict[str, tuple[int, int, int]]
    state: dict
    batch: dict
    beside: dict
    used_ids: int
    tx: Any
    teacher: distill.Teacher | None

    @classmethod
    def of(cls, cfg: config_lib.Config, devices) -> "Step":
        """Resolves a config as `run.Setup.of` does, with stand-ins for what is read.

        Raises:
          ValueError, KeyError: as there, for all that does not depend on data.
        """
        mesh = sharding.make_mesh(cfg.sharding, devices)
        rules = cfg.sharding.rules
        words, notes = vocabulary(cfg)
        ways = sharding.ways("vocab", rules, mesh.shape)
        cfg = run.resolve_vocab_size(cfg, words, ways)
        cfg = run.resolve_entities(cfg, words)
        cfg = resolve_lengths(cfg, words)
        cfg = dataclasses.replace(
            cfg, sharding=dataclasses.replace(cfg.sharding, **mesh.shape)
        )
        if cfg.model.attention != "cudnn":  # that one is tried out on a GPU
            attention.check(cfg.model, mesh)
        net = model_lib.build(cfg.model)
        tx = optim.make(cfg, net)
        abstract = state.abstract(net, tx, mesh, rules, cfg.optim.offload)
        teacher = None
        if cfg.distill:
            teacher = distill.Teacher.of(cfg, readable(cfg, words))
        beside: dict[str, Any] = {}
        if cfg.optim.l2_start:
            beside["start"] = warmstart.kept(cfg, net, abstract["params"])
        if teacher is not None:
            beside["teacher"] = teacher.abstract(mesh, rules)
        size = cfg.data.batch_size // cfg.optim.microbatches
        where = sharding.batch_sharding(mesh, rules, size)
        one, shapes = example(cfg, words)

        def place(x: np.ndarray):
            shape = (cfg.data.batch_size, *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=where)

        batch = jax.tree.map(place, one)
        return cls(
            *(cfg, notes, mesh, net, shapes, abstract, batch, beside),
            *(words.size, tx, teacher),
        )

    def lower(self, platform: str):
        """The jitted step of `train`, lowered; needs no device."""
        jitted = jax.jit(
            step.make_train_step(
                *(self.model, self.tx, self.cfg, self.used_ids, self.state),
                self.teacher,
            ),
            donate_argnums=0,
            out_shardings=(state.shardings(self.state), None),
        )
        with sharding.use(self.mesh, self.cfg.sharding.rules):
            traced = jitted.trace(self.state, self.batch, self.beside)
            return traced.lower(lowering_platforms=(platform,))


def vocabulary(cfg: config_lib.Config) -> tuple[vocab.Vocab, list[str]]:
    """The vocabulary of a config or, if its file is not here, a stand-in; remarks."""
    spec, sentinels = cfg.data.vocab, cfg.data.sentinels
    parts = [spec] if os.path.exists(spec) else spec.split(",")
    if spec == "bytes" or all(map(os.path.exists, parts)):
        return vocab.load(spec, sentinels), []
    size = cfg.model.vocab_size or STAND_IN_VOCAB
    note = f"no file {spec!r}: {size:,} ids stand in for it"
    if cfg.model.vocab_size:
        note += " (config.model.vocab_size)"
    return StandInVocab(size, sentinels), [note]


def readable(cfg: config_lib.Config, words: vocab.Vocab) -> vocab.Vocab:
    """Refuses a stand-in for a vocabulary that texts or a teacher need.

    Raises:
      ValueError: naming them.
    """
    if isinstance(words, StandInVocab):
        needs = {"config.data.tasks": ", ".join(cfg.data.tasks)}
        needs["config.objective.entities"] = cfg.objective.get("entities", "")
        needs["config.distill.teacher"] = cfg.distill.get("teacher", "")
        key = next(key for key, value in needs.items() if value)
        raise ValueError(
            f"{key}={needs[key]!r} needs the vocabulary itself, and there is no file "
            f"config.data.vocab={cfg.data.vocab!r}. Bring it here."
        )
    return words


def resolve_lengths(cfg: config_lib.Config, words: vocab.Vocab) -> config_lib.Config:
    """Fills in config.data.targets_length=0 of tasks, as a run does."""
    if not cfg.data.tasks:
        return cfg
    return text_lengths.resolve(cfg, readable(cfg, words))


def example(cfg: config_lib.Config, words: vocab.Vocab):
    """-> (a batch of one example, shapes of its streams).

    Of a task's files, or blank text, as no text changes a shape.
    """
    if cfg.data.tasks:
        data = dataclasses.replace(cfg.data, batch_size=heads.rows(cfg.model))
        labelled = task_batches.train(
            dataclasses.replace(cfg, data=data), readable(cfg, words)
        )
        run.check_fit(cfg, labelled)
        return labelled[0], labelled.shapes
    knobs = dict(cfg.objective)
    if isinstance(words, StandInVocab):
        # These files hold ids of the vocabulary that is not here; they change no shape.
        if knobs.pop("spans", ""):
            knobs["units"] = "word"
        knobs.pop("similar", None)
        if "entities" in knobs:
            readable(cfg, words)
    batches = pipeline.Batches(
        StandInStore(int(words.ordinary[0])),  # type: ignore[arg-type]
        words,
        objective=knobs.pop("name"),
        knobs=knobs,
        structure=cfg.model.structure,
        inputs_length=cfg.data.inputs_length,
        batch_size=1,
        seed=cfg.seed,
        memory_length=cfg.model.memory_length,
        train_inputs=cfg.data.train_inputs,
        static_noise=cfg.data.static_noise,
    )
    run.check_fit(cfg, batches)
    return batches[0], batches.shapes


def state_bytes(cfg: config_lib.Config, words: vocab.Vocab):
    """(bytes of the state on one device of config.sharding, config with vocab_size).

    Raises:
      ValueError: a dimension does not divide.
    """
    rules, s = cfg.sharding.rules, cfg.sharding
    sizes = {axis: getattr(s, axis) for axis in sharding.AXES}
    ways = sharding.ways("vocab", rules, sizes)
    cfg = run.resolve_vocab_size(cfg, words, ways)
    net = model_lib.build(cfg.model)
    mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    return held(state.abstract(net, optim.make(cfg, net), mesh, rules)), cfg


def held(tree) -> int:
    """Bytes of a tree of abstract arrays in one device's own memory."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding.memory_kind != state.HOST
    )

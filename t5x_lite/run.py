"""Everything a config resolves to: vocabulary, data, mesh, model, optimizer, state."""

import dataclasses
import functools
import hashlib
import math
import pathlib
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from t5x_lite import config as config_lib
from t5x_lite import (
    distill,
    entities,
    heads,
    metrics,
    moments,
    optim,
    sharding,
    state,
    step,
    visibility,
    vocab,
    warmstart,
)
from t5x_lite import model as model_lib
from t5x_lite.data import mixture, text_lengths
from t5x_lite.data.batches import AnyBatches
from t5x_lite.kernels import attention
from t5x_lite.objectives.entities import load_entities
from t5x_lite.vocab import Vocab

MOST_PADDED_IDS = 1024
HEAD_BATCHES = 64  # of training examples whose answers the baseline counts


@dataclasses.dataclass(frozen=True)
class Setup:
    """What `train` and `evaluate` need; building it allocates nothing on a device."""

    cfg: config_lib.Config
    vocab: Vocab
    train_batches: AnyBatches
    heldouts: dict[str, AnyBatches]
    mesh: Mesh
    model: nnx.Module
    tx: optax.GradientTransformation
    abstract_state: dict
    batch_sharding: NamedSharding

    @classmethod
    def of(cls, cfg: config_lib.Config, devices=None) -> "Setup":
        """Resolves a config; every error of user input comes before any compile.

        Args:
          devices: of the mesh; None = all.
        """
        prepare_jax(cfg)
        words = vocab.load(cfg.data.vocab, cfg.data.sentinels)
        mesh = sharding.make_mesh(cfg.sharding, devices)
        rules = cfg.sharding.rules
        ways = sharding.ways("vocab", rules, mesh.shape)
        cfg = resolve_entities(resolve_vocab_size(cfg, words, ways), words)
        cfg = text_lengths.resolve(cfg, words)
        sizes = dataclasses.replace(cfg.sharding, **mesh.shape)
        cfg = dataclasses.replace(cfg, sharding=sizes)
        size = cfg.data.batch_size // cfg.optim.microbatches
        rows = sharding.batch_sharding(mesh, rules, size)
        net = model_lib.build(cfg.model)
        tx = optim.make(cfg, net)
        abstract = state.abstract(net, tx, mesh, rules, cfg.optim.offload)

        of_host = sharding.local_rows(rows, cfg.data.batch_size)
        train = mixture.train(cfg, words, of_host)
        check_fit(cfg, train)
        lengths = {T * (1 + G) for T, _, G in train.shapes.values()}
        attention.check(cfg.model, mesh, sorted(lengths))
        heldouts = mixture.heldouts(cfg, words, of_host)
        return cls(cfg, words, train, heldouts, mesh, net, tx, abstract, rows)

    @property
    def heldout_batches(self) -> AnyBatches:
        """The first held-out set, for what needs a few examples."""
        return next(iter(self.heldouts.values()))

    @property
    def heldout_shares(self) -> dict[str, float]:
        """Weight of each held-out set: the part of the run that its source is."""
        if not isinstance(self.train_batches, mixture.MixedBatches):
            return dict.fromkeys(self.heldouts, 1 / len(self.heldouts))
        shares = self.train_batches.shares(self.cfg.steps * self.cfg.data.batch_size)
        total = sum(shares[name] for name in self.heldouts)
        if not total:  # only sources that the run never reads
            return dict.fromkeys(self.heldouts, 1 / len(self.heldouts))
        return {name: shares[name] / total for name in self.heldouts}

    @property
    def lead(self) -> bool:
        """Is this the process that prints and writes?"""
        return jax.process_index() == 0

    @property
    def tokens_per_step(self) -> int:
        cells = sum(T for T, _, _ in self.train_batches.shapes.values())
        return self.cfg.data.batch_size * cells

    def say(self, text: str):
        if self.lead:
            print(text, flush=True)

    def headline(self) -> str:
        counts = f"{model_lib.parameter_count(self.model):,} parameters"
        examples = self.cfg.steps * self.cfg.data.batch_size
        epochs = self.train_batches.epochs(examples)
        times = ", ".join(
            f"{n:.2f} epochs" + f" of {of}" * bool(of) for of, n in epochs.items()
        )
        devices = ", ".join(sorted({d.device_kind for d in jax.devices()}))
        return (
            f"{self.cfg.model.structure}, {counts}; "
            f"{self.train_batches.describe()}, {times}; "
            f"{jax.device_count()} x {devices}"
        )

    def epoch(self, step: int) -> int:
        """Epoch of the first example of the step after `step` steps."""
        return step * self.cfg.data.batch_size // self.train_batches.examples_per_epoch

    def epochs(self, step: int) -> dict[str, float]:
        """Of each source of a mixture, after `step` steps; {} for a single one."""
        found = self.train_batches.epochs(step * self.cfg.data.batch_size)
        return {f"epochs/{name}": n for name, n in found.items() if name}

    def data_identity(self) -> dict:
        """What the content of the batches depends on beside the config."""
        found: dict[str, Any] = {"vocab": self.vocab.fingerprint}
        if isinstance(self.train_batches, mixture.MixedBatches):
            for name, member in self.train_batches.members.items():
                found[f"train/{name}"] = member.fingerprint
            found["rates"] = self.train_batches.mix.phase_rates()
        else:
            found["train"] = self.train_batches.fingerprint
        for knob in ("spans", "similar", "entities"):
            path = self.cfg.objective.get(knob)
            if path:
                content = pathlib.Path(path).read_bytes()
                found[knob] = hashlib.sha256(content).hexdigest()[:16]
        return found

    def to_device(self, batch: dict) -> dict:
        if self.cfg.model.unpadded:
            visibility.check_unpadded(self.cfg.model, batch)
        size = self.cfg.data.batch_size
        return sharding.to_device(batch, self.batch_sharding, size)

    def create_state(self, source: str | pathlib.Path = "", step: int = -1) -> dict:
        """A fresh state; its parameters are those of a workdir if there is one.

        Args:
          source: a workdir; "" = config.init_from.
          step: of its checkpoint; -1 = the latest.
        """
        if not source:
            warmstart.check(self.cfg, self.model)
        fresh = state.create(self.model, self.tx, self.abstract_state, self.cfg.seed)
        if self.cfg.model.d_entity:
            given = load_entities(self.cfg.objective["entities"], self.vocab)
            if given.embeddings_EC is not None:
                params = entities.with_embeddings(fresh["params"], given.embeddings_EC)
                fresh |= {"params": params}
        if source or self.cfg.init_from:
            given = self.abstract_state["params"], fresh["params"]
            fresh |= {"params": warmstart.params(self.cfg, *given, source, step)}
        if not source and self.cfg.init_optimizer == "restore":
            fresh |= {"opt": moments.restore(self.cfg, self.abstract_state["opt"])}
        return fresh

    @functools.cached_property
    def predict_step(self):
        """What a model with a head says of a batch, jitted."""
        return jax.jit(step.make_predict_step(self.model, self.cfg))

    @functools.cached_property
    def teacher(self) -> distill.Teacher | None:
        """Of config.distill."""
        return distill.Teacher.of(self.cfg, self.vocab)

    def beside(self) -> dict:
        """Arrays that a step reads and no checkpoint holds; made again at a resume."""
        found = {}
        if self.cfg.optim.l2_start:
            found["start"] = warmstart.start(self.cfg, self.abstract_state["params"])
        if self.teacher is not None:
            found["teacher"] = self.teacher.params(self.mesh, self.cfg.sharding.rules)
        return found

    def heldout_identity(self) -> dict[str, str]:
        """Fingerprint of each held-out set."""
        sets = self.heldouts.items()
        return {f"heldout/{name}".rstrip("/"): b.fingerprint for name, b in sets}

    def heldout_steps(self, batches: AnyBatches) -> range:
        """Indices of the batches of a held-out set to evaluate on."""
        have = len(batches)
        return range(min(have, self.cfg.eval_batches or have))

    def unigram_loss(self, tokens: int = 1_000_000) -> float:
        """Loss of the context-free guess on the held-out targets, in nats per token."""
        stream = model_lib.trained_stream(self.cfg.model)
        if self.cfg.model.head:
            return heads.baseline(
                self.cfg.model,
                (self.train_batches.whole(i)[stream] for i in range(HEAD_BATCHES)),
                (
                    batches.whole(i)[stream]
                    for batches in self.heldouts.values()
                    for i in self.heldout_steps(batches)
                ),
            )
        _, predicted, _ = self.train_batches.shapes[stream]
        per_batch = self.cfg.data.batch_size * predicted
        enough = math.ceil(tokens / per_batch)
        epoch = self.train_batches.examples_per_epoch // self.cfg.data.batch_size

        def pairs(batches, steps):
            for i in steps:
                trained = batches.whole(i)[stream]
                yield trained["targets"], trained["weights"]

        seen = list(pairs(self.train_batches, range(max(1, min(enough, epoch)))))
        return sum(
            share
            * metrics.unigram_loss(
                seen,
                pairs(self.heldouts[name], self.heldout_steps(self.heldouts[name])),
                self.vocab.size,
            )
            for name, share in self.heldout_shares.items()
        )


def alone(cfg: config_lib.Config) -> config_lib.Config:
    """The config on one device, whatever mesh the run was on."""
    one = dict(data=-1, fsdp=1, tensor=1, sequence=1, dcn_data=-1, dcn_fsdp=1)
    mesh = dataclasses.replace(cfg.sharding, **one)
    return dataclasses.replace(cfg, sharding=mesh)


def check_fit(cfg: config_lib.Config, batches: AnyBatches):
    """Refuses an objective whose batches the model cannot read."""
    name, model = cfg.objective["name"], cfg.model
    T, _, streams = batches.shapes[model_lib.trained_stream(model)]
    if streams != model.query_streams and not model.head:
        raise ValueError(
            f"config.objective.name={name!r} fills {streams} query stream(s), but "
            f"config.model.query_streams={model.query_streams}. Set it to {streams}."
        )
    if model.positions in ("learned", "sinusoidal", "prophetnet"):
        longest = max(T for T, _, _ in batches.shapes.values())
        longest += model.positions == "prophetnet"
        if longest > model.max_positions:
            raise ValueError(
                f"config.model.max_positions={model.max_positions} is less than the "
                f"{longest} tokens of a stream. Set it to {longest} or more, or lower "
                "config.data.inputs_length (and, of tasks as text, "
                f"config.data.targets_length={cfg.data.targets_length})."
            )
    stream = batches[0][model_lib.trained_stream(model)]
    if ("entities" in stream) != (model.d_entity > 0):
        raise ValueError(
            f"config.objective.name={name!r} "
            f"{'aligns' if 'entities' in stream else 'does not align'} entities, but "
            f"config.model.d_entity={model.d_entity}. Set it to "
            f"{'100, say' if 'entities' in stream else 0}."
        )
    if model.generator_width and "places" not in stream:
        raise ValueError(
            f"config.model.generator_width={model.generator_width} (ELECTRA) needs an "
            f"objective that predicts masked places, masked_lm; here is {name!r}."
        )
    if model.head:
        heads.check_batch(model, stream)
    sentence = cfg.objective.get("sentence", "none")
    wanted = {"none": 0, "three_way": 3}.get(sentence, 2) if "labels" in stream else 0
    if wanted != model.classes and not model.head:
        raise ValueError(
            f"config.model.classes={model.classes}, but config.objective "
            f"{dict(cfg.objective)} labels whole examples in {wanted} classes. Set it "
            f"to {wanted}."
        )
    types = int(stream["types"].max()) + 1 if "types" in stream else 0
    if model.types and types > model.types:
        raise ValueError(
            f"config.model.types={model.types}, but "
            f"{', '.join(cfg.data.tasks) or name} makes {types} sentence types. "
            f"Set config.model.types to {types}, or to 0 to ignore them."
        )
    if cfg.data.train_inputs and model.structure != "decoder":
        raise ValueError(
            "config.data.train_inputs=True is for config.model.structure='decoder', "
            f"here {model.structure!r}. Set it to False."
        )


def prepare_jax(cfg: config_lib.Config):
    """Platform and compilation cache, before the first use of a device."""
    if cfg.platform:
        jax.config.update("jax_platforms", cfg.platform)
    try:
        jax.devices()
    except RuntimeError as e:
        raise ValueError(
            f"config.platform={cfg.platform!r} cannot be used here: {e}. Leave it "
            "empty for the best platform there is, or install jax for it."
        ) from e
    if cfg.compile_cache:
        pathlib.Path(cfg.compile_cache).mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", cfg.compile_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def resolve_entities(cfg: config_lib.Config, words: Vocab) -> config_lib.Config:
    """Fills in config.model.entities=0; refuses fewer than the file has."""
    size, path = cfg.model.entities, cfg.objective.get("entities")
    if not cfg.model.d_entity or not path:
        return cfg
    count = load_entities(path, words).count
    size = size or -(-count // 128) * 128
    if size < count:
        raise ValueError(
            f"config.model.entities={size}, but config.objective.entities={path!r} "
            f"holds {count}. Set {count} or more, or 0 for the next multiple of 128."
        )
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, entities=size))


def padded(ids: int, ways: int = 1) -> int:
    """Rows for so many ids: the next multiple of 128 that also divides by `ways`."""
    unit = math.lcm(128, ways)
    return -(-ids // unit) * unit


def resolve_vocab_size(
    cfg: config_lib.Config, words: Vocab, ways: int = 1
) -> config_lib.Config:
    """Fills in config.model.vocab_size=0; refuses a size the vocabulary cannot have.

    Args:
      ways: that the vocabulary is split, which a size filled in divides by.
    """
    size = cfg.model.vocab_size
    if size == 0:
        size = padded(words.size, ways)
    if not words.size <= size < words.size + MOST_PADDED_IDS:
        raise ValueError(
            f"config.model.vocab_size={size} does not match the vocabulary "
            f"config.data.vocab={cfg.data.vocab!r} of {words.size} ids "
            f"({cfg.data.sentinels} sentinels included): allowed are {words.size} to "
            f"{words.size + MOST_PADDED_IDS - 1}. Set 0 to take the next multiple of "
            "128, or give the vocabulary the model was made for."
        )
    return dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, vocab_size=size)
    )

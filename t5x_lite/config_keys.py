"""Every key of the configuration: its default, range and meaning."""

import dataclasses

from t5x_lite.model_config import DTYPES, ModelConfig, key

OPTIMIZERS = ("adafactor", "adamw", "lamb")
INIT_PRESETS = (
    *("same", "from_encoder", "from_decoder", "to_encoder", "to_decoder", "to_both"),
)
INIT_OPTIMIZERS = ("reset", "restore")
SCHEDULES = ("constant", "rsqrt", "linear", "cosine", "wsd")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    train: str = key("data/train.jsonl", "training text; see data/sources.py")
    heldout: str = key("data/heldout.jsonl", "held-out text; see data/sources.py")
    field: str = key("text", "of JSONL, Parquet, TFDS, hf: where the text is")
    documents: str = key(
        "blank_lines",
        "of plain text: what a document is",
        among=("blank_lines", "lines", "files"),
    )
    bad_utf8: str = key(
        "error", "bytes that are no UTF-8", among=("error", "replace", "skip")
    )
    vocab: str = key("bytes", "'bytes', a file or its directory; see vocab.py")
    sentinels: int = key(100, "sentinel ids on top of the vocabulary", low=0)
    cache_dir: str = key("runs/stores", "where token stores are built")
    build_processes: int = key(
        0, "that build a store; 0 = by its size, at most one per core", low=0
    )
    deduplicate: bool = key(
        False, "leave out documents whose text came before in the same source"
    )
    mixture: dict = key(
        {},
        "several texts instead of train and heldout: name -> dict(train=, heldout=, "
        "rate=1.0, field=, documents=, bad_utf8=); see data/mixture.py",
    )
    mixing: str = key(
        "rates", "rates as given, or by size (T5)", among=("rates", "proportional")
    )
    temperature: float = key(
        1.0, "proportional: rate = size^(1/T); 1 = size, large = equal", low=0.1
    )
    cap: int = key(0, "proportional: most examples of a source that count", low=0)
    rate_changes: tuple = key(
        (), "(step, source, rate) from which step on a source has another rate"
    )
    inputs_length: int = key(512, "encoder tokens per example, EOS included", low=4)
    train_inputs: bool = key(False, "decoder: train on the inputs of a pair too")
    static_noise: bool = key(False, "a window's noise is the same in every epoch")
    tasks: tuple = key((), "labelled tasks to train on; see data/tasks.py; () = none")
    task_dir: str = key("data/tasks", "folder of the tasks' files")
    task_format: str = key(
        "text", "text to text, or a head on top (model.head)", among=("text", "head")
    )
    custom_tasks: dict = key(
        dict(),
        "tasks of your own: name -> dict(train=, dev=, test=, inputs=, label=, "
        "classes=, head=, metrics=, prefix=, prompt=)",
    )
    targets_length: int = key(
        128, "tasks as text: target tokens, with EOS; 0 = what packs best", low=0
    )
    stride: int = key(128, "span tasks: tokens from window to window", low=1)
    batch_size: int = key(128, "examples per step, over all devices", low=1)
    prefetch: int = key(2, "batches prepared ahead", low=0)
    workers: int = key(0, "processes that prepare batches; 0 = a thread", low=0)


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
    layer_decay: float = key(
        1.0, "rate of a layer / of the one above it (ULMFiT, ELECTRA)", low=0.0
    )
    unfreeze: tuple = key(
        (), "(regex, step): frozen before that step; first match wins; others train"
    )
    l2_start: float = key(
        0.0, "decoupled pull to the parameters of init_from (L2-SP)", low=0.0
    )
    skip_nonfinite: int = key(
        10, "steps in a row that are skipped when not finite; 0 = stop at once", low=0
    )
    spike_factor: float = key(
        0.0, "a loss above k times the usual one is a spike; 0 = none is", low=0.0
    )
    spike_window: int = key(50, "steps whose median is the usual loss", low=1)
    spike_rewinds: int = key(0, "most rewinds of a run; 0 = note spikes only", low=0)
    spike_back: int = key(
        100, "a rewind's checkpoint is so many steps before the spike", low=1
    )
    spike_skip: int = key(
        200, "batches after the spike that a rewind leaves out", low=0
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
    label_smoothing: float = key(
        0.0, "share of the target spread over all ids", low=0.0, high=0.99
    )
    lm_weight: float = key(
        0.0, "with a head: of the language model's loss (GPT-1: 0.5)", low=0.0
    )


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
    metric: str = key(
        "heldout_loss", "of the held-out evaluations: what the best is by"
    )
    metric_mode: str = key("min", "which is better", among=("min", "max"))
    patience: int = key(
        0, "stop after that many evaluations without a better metric; 0 = never", low=0
    )
    read_back: bool = key(
        True, "read every checkpoint once it is written, before an older one goes"
    )
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
    init_step: int = key(
        -1, "its checkpoint; -1 = the latest when the run starts", low=-1
    )
    init_forgetting: bool = key(
        True, "at the end, evaluate the stages before; see t5x_lite/stages.py"
    )
    init_optimizer: str = key(
        "reset", "restore: go on with its optimizer's moments", among=INIT_OPTIMIZERS
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
    distill: dict = key(
        {}, "teacher=WORKDIR and weights of its lessons; see distill.py; {} = none"
    )
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    sharding: ShardingConfig = dataclasses.field(default_factory=ShardingConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

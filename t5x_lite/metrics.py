"""Numbers of a run: writers, FLOPs, and the loss of the unigram baseline."""

import dataclasses
import json
import os
import pathlib
import re

import numpy as np
import tensorboardX
from flax import nnx

from t5x_lite import parameters
from t5x_lite.model_config import ModelConfig, generator_config


class Writer:
    """metrics.jsonl (the source of truth) and TensorBoard events of one workdir.

    On resume, lines of steps after the restored one are dropped first: they are about
    to be computed again. Of several processes only the one with `active` writes.
    """

    def __init__(self, workdir, after_step: int, *, active: bool = True):
        self.active = active
        if not active:
            return
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        kept = [m for m in read(self.path, "step") if m["step"] <= after_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(m) + "\n" for m in kept))
        os.replace(temporary, self.path)
        self._file = self.path.open("a", buffering=1)
        self._board = tensorboardX.SummaryWriter(
            str(pathlib.Path(workdir) / "tensorboard"), purge_step=after_step + 1
        )

    def write(self, step: int, **values):
        """Appends {"step": step, **values}."""
        if not self.active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def flush(self):
        """Everything written so far survives a crash of the machine."""
        if not self.active:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self):
        if not self.active:
            return
        self.flush()
        self._file.close()
        self._board.close()


def read(path, *numbers: str) -> list[dict]:
    """The lines of a metrics.jsonl; a last line torn by a kill is left out.

    Args:
      numbers: that each line must hold.

    Raises:
      ValueError: naming the file and the line that is damaged.
    """
    path, found = pathlib.Path(path), []
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(whole, 1):
        try:
            row = json.loads(line)
            ours = isinstance(row, dict)
            if not ours or not all(isinstance(row[n], int | float) for n in numbers):
                raise ValueError("no line of ours")
        except (ValueError, KeyError, RecursionError) as e:
            raise ValueError(
                f"{path}, line {number}, is damaged ({type(e).__name__}: {e}). Remove "
                "that line."
            ) from e
        found.append(row)
    return found


def forward_flops(cfg: ModelConfig, shapes: dict[str, tuple[int, int, int]]) -> int:
    """Floating-point operations of one example's forward pass, matrix products only.

    2 * m * n * k per product: projections, attention scores and values in full (causal
    attention is not halved), positions that are products, feed-forward, output layers.
    What is done once a batch is left out, norms and softmax too. Within 5 % of what XLA
    counts for the compiled step (`tests/test_accounting.py`).

    Args:
      shapes: stream name -> (T cells, K predicted cells, G query streams).
    """
    parts = _flops(cfg, shapes)
    return parts["trained"] + parts["fixed"]


def training_flops(cfg: ModelConfig, shapes: dict[str, tuple[int, int, int]]) -> int:
    """Of one example's forward and backward pass; the optimizer's are left out.

    Three times the forward pass, but once what has no gradient: XLNet's memory and
    ELECTRA's sampling. Recomputation (config.model.remat) is not counted.

    Args:
      shapes: as in `forward_flops`.
    """
    parts = _flops(cfg, shapes)
    return 3 * parts["trained"] + parts["fixed"]


def tokens_per_example(shapes: dict[str, tuple[int, int, int]]) -> int:
    """Cells that an example's stacks read: encoder and decoder, no query streams, no
    memory (it was read in the example before)."""
    return sum(T for name, (T, _, _) in shapes.items() if name != "memory")


def _flops(cfg: ModelConfig, shapes) -> dict[str, int]:
    """`trained`: with a gradient of twice the cost; `fixed`: without."""
    D, V, E = cfg.d_model, cfg.vocab_size, cfg.d_embed or cfg.d_model
    project = 2 * E * D if cfg.d_embed else 0
    head = 2 * (E * V + (D * E if cfg.transform_output else 0))

    if cfg.structure == "encoder_decoder":
        S, _, _ = shapes["encoder"]
        T, K, G = shapes["decoder"]
        cells, NH = (1 + G) * T, cfg.heads * cfg.head_dim
        halves = cfg.decoder_layers * _half_trained(cfg, cells, cells, 1 + G)
        cross = 4 * D * NH * (cells + S) + 4 * cells * S * NH
        decoder = _layer(cfg, cells, cells, 1 + G) + cross
        if cfg.positions == "prophetnet":  # its encoder has learned positions
            decoder += 2 * cells * D * cfg.relative_buckets * cfg.heads
        else:
            halves += cfg.encoder_layers * _half_trained(cfg, S, S, 1)
        trained = cfg.encoder_layers * _layer(cfg, S, S, 1)
        trained += cfg.decoder_layers * decoder
        trained += project * (S + cells) + K * head
        return dict(trained=trained + halves // 2, fixed=halves // 2)

    T, K, G = shapes["main"]
    M, _, _ = shapes.get("memory", (0, 0, 0))
    cells = (1 + G) * T
    # In a permuted-LM the query streams are no keys; elsewhere they see their own kind.
    keys = M + T if cfg.structure == "permuted" else cells
    halves = cfg.depth * _half_trained(cfg, cells, keys, 1 + G)
    trained = cfg.depth * _layer(cfg, cells, keys, 1 + G) + halves // 2
    fixed = cfg.depth * _layer(cfg, M, M, 1) + project * M + halves // 2
    if cfg.generator_width:
        small = generator_config(cfg)
        d, narrow = small.d_model, 2 * E * V
        generator = _flops(dataclasses.replace(small, d_embed=0), {"main": (T, 0, 0)})
        trained += generator["trained"] + K * (2 * d * E + narrow)
        # Both stacks read the shared embeddings, through a projection if wider.
        trained += sum(2 * T * E * width for width in (d, D) if width != E)
        trained += T * 2 * (D * D + D)
        # The samples need the logits once more.
        return dict(trained=trained, fixed=fixed + generator["fixed"] + K * narrow)
    trained += project * cells + K * head
    if cfg.classes:
        trained += 2 * D * (D + cfg.classes)
    if cfg.d_entity:
        trained += _entity_flops(cfg, T)
    return dict(trained=trained, fixed=fixed)


def _layer(cfg: ModelConfig, cells: int, keys: int, streams: int) -> int:
    """Self-attention and feed-forward of one layer.

    Args:
      cells: that are computed, in all `streams`, the stack's own and query streams.
      keys: that each of them attends to.
    """
    D, NH = cfg.d_model, cfg.heads * cfg.head_dim
    flops = 4 * D * NH * (cells + keys) + 4 * cells * keys * NH
    flops += (3 if cfg.gated else 2) * 2 * cells * D * cfg.d_ff
    if cfg.positions == "transformer_xl":  # distances and types
        flops += 2 * cells * (cells // streams + keys - 1 + cfg.types) * NH
    return flops


def _half_trained(cfg: ModelConfig, cells: int, keys: int, streams: int) -> int:
    """One layer's products with fixed tables, whose gradient costs as much again."""
    if cfg.positions == "functional":  # NEZHA's distances, in keys and values
        return 4 * cells * (2 * (cells // streams) - 1) * cfg.heads * cfg.head_dim
    if cfg.positions == "prophetnet":  # buckets picked by a product, in the decoder
        return 2 * cells * cfg.relative_buckets * cfg.heads * keys
    return 0


def _entity_flops(cfg: ModelConfig, T: int) -> int:
    """Of ERNIE's upper layers and the prediction of entities, with the most mentions
    that a text of T tokens can have."""
    D, F, C, M = cfg.d_model, cfg.d_ff, cfg.d_entity, T // 2
    text = _layer(dataclasses.replace(cfg, gated=False), T, T, 1) + 2 * T * C * F
    own = 2 * M * (4 * C * C + F * C) + 4 * M * M * C
    return cfg.entity_layers * (text + own) + 2 * M * C * (D + M)


# Tables with a row for each id, position or type, and the output layer: parameters
# that are looked up, or grow with the vocabulary.
_EMBEDDING = re.compile(
    r"embedding|entity_embedding|output/kernel|output/bias|"
    r"(encoder_|decoder_)?inputs/(positions|types|queries)"
)


def split_parameters(model: nnx.Module) -> dict[str, int]:
    """{"total", "embedding", "non_embedding"} numbers of parameters, from shapes alone.

    As in Kaplan et al. 2020 (section 2.1) embeddings are those of tokens and positions;
    types, entities and an output layer of its own count with them.
    """
    total = embedding = 0
    for name, p in parameters.declared(model).items():
        size = p.get_value().size
        total += size
        embedding += size if _EMBEDDING.fullmatch(name) else 0
    return dict(total=total, embedding=embedding, non_embedding=total - embedding)


def unigram_loss(train, heldout, used_ids: int) -> float:
    """Held-out nats per token of the best guess that ignores all context.

    Args:
      train: pairs (targets_BT, weights_BT) whose frequencies, plus one, are the guess.
      heldout: pairs to score.
      used_ids: vocabulary size.
    """
    counts = np.ones(used_ids)
    for targets_BT, weights_BT in train:
        counts += np.bincount(targets_BT.ravel(), weights_BT.ravel(), used_ids)
    log_p = np.log(counts / counts.sum())
    total = weight = 0.0
    for targets_BT, weights_BT in heldout:
        total -= float(np.sum(log_p[targets_BT] * weights_BT))
        weight += float(np.sum(weights_BT))
    return total / weight

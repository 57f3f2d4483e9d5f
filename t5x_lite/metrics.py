"""Numbers of a run: writers, FLOPs, and the loss of the unigram baseline."""

import json
import os
import pathlib

import numpy as np
import tensorboardX

from t5x_lite.config import ModelConfig


class Writer:
    """metrics.jsonl (the source of truth) and TensorBoard events of one workdir.

    On resume, lines of steps after the restored one are dropped first: they are about
    to be computed again.
    """

    def __init__(self, workdir, after_step: int):
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        kept = [m for m in read(self.path) if m["step"] <= after_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(m) + "\n" for m in kept))
        os.replace(temporary, self.path)
        self._file = self.path.open("a", buffering=1)
        self._board = tensorboardX.SummaryWriter(
            str(pathlib.Path(workdir) / "tensorboard"), purge_step=after_step + 1
        )

    def write(self, step: int, **values):
        """Appends {"step": step, **values}."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def flush(self):
        """Everything written so far survives a crash of the machine."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self):
        self.flush()
        self._file.close()
        self._board.close()


def read(path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line torn by a kill is left out."""
    path = pathlib.Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def forward_flops(cfg: ModelConfig, inputs_length: int, targets_length: int) -> int:
    """Floating-point operations of one example's forward pass, matrix products only.

    2 * m * n * k per product: projections, attention scores and values in full (causal
    attention is not halved), feed-forward, logits. Training takes three times as many.

    Args:
      inputs_length: encoder tokens S.
      targets_length: decoder tokens T.
    """
    S, T, D, F, V = inputs_length, targets_length, cfg.d_model, cfg.d_ff, cfg.vocab_size
    NH = cfg.heads * cfg.head_dim
    mlp = (3 if cfg.gated else 2) * 2 * D * F
    encoder = S * (4 * 2 * D * NH + mlp) + 4 * S * S * NH
    decoder = T * (4 * 2 * D * NH + mlp) + 4 * T * T * NH
    cross = (T + S) * 2 * 2 * D * NH + 4 * T * S * NH
    layers = cfg.encoder_layers * encoder + cfg.decoder_layers * (decoder + cross)
    return layers + 2 * T * D * V


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

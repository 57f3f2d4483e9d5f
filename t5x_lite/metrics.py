"""Numbers of a run: writers, FLOPs, and the loss of the unigram baseline."""

import json
import os
import pathlib

import numpy as np
import tensorboardX

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


def read(path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line torn by a kill is left out."""
    path = pathlib.Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def forward_flops(cfg: ModelConfig, shapes: dict[str, tuple[int, int, int]]) -> int:
    """Floating-point operations of one example's forward pass, matrix products only.

    2 * m * n * k per product: projections, attention scores and values in full (causal
    attention is not halved), feed-forward, logits. Training takes three times as many.
    XLNet's pass over its memory counts as a forward pass too.

    Args:
      shapes: stream name -> (T cells, K predicted cells, G query streams).
    """
    D, F, V, E = cfg.d_model, cfg.d_ff, cfg.vocab_size, cfg.d_embed or cfg.d_model
    NH = cfg.heads * cfg.head_dim
    mlp = (3 if cfg.gated else 2) * 2 * D * F
    # XLNet: queries times distances, and their projection; NEZHA: keys and values.
    relative = dict(transformer_xl=1, functional=2).get(cfg.positions, 0)

    def layer(queries: int, keys: int) -> int:
        own = queries * (2 * 2 * D * NH + mlp) + keys * 2 * 2 * D * NH
        own += relative * 2 * queries * (queries + keys) * NH
        if cfg.positions == "transformer_xl":
            own += 2 * (queries + keys) * D * NH
        return own + 4 * queries * keys * NH

    def head(cells: int) -> int:
        return cells * 2 * (E * V + (D * E if cfg.transform_output else 0))

    if cfg.structure == "encoder_decoder":
        S, _, _ = shapes["encoder"]
        T, K, G = shapes["decoder"]
        queries = (1 + G) * T
        cross = queries * 2 * 2 * D * NH + S * 2 * 2 * D * NH + 4 * queries * S * NH
        decoder = cfg.decoder_layers * (layer(queries, queries) + cross)
        return cfg.encoder_layers * layer(S, S) + decoder + head(K)
    T, K, G = shapes["main"]
    M = cfg.memory_length
    whole = cfg.depth * (layer((1 + G) * T, M + T) + (layer(M, M) if M else 0)) + head(
        K
    )
    if cfg.d_entity:
        C, mentions = cfg.d_entity, T // 2
        own = mentions * 2 * (4 * C * C + F * C) + 4 * mentions**2 * C + T * 2 * C * F
        predict = mentions * 2 * C * (D + mentions)
        return whole + cfg.entity_layers * (layer(T, T) + own) + predict
    if not cfg.generator_width:
        return whole
    generator = generator_config(cfg)
    score = T * 2 * (D * D + D) - head(K)  # the discriminator has no vocabulary
    return whole + score + forward_flops(generator, shapes)


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

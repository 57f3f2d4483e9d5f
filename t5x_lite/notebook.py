"""A trained model in a few words, for notebooks.

    from t5x_lite import load

    m = load("runs/demo")
    m.fill("It is a truth ___ acknowledged, that a ___ man")
    m.generate("It was a dark and")
    m.score("It is a truth universally acknowledged")
    m.encode(["a text", "another"])

Every method takes one text or a list of texts, and answers with one or a list.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import (
    checkpoint,
    compatible,
    generate,
    model,
    prompts,
    run,
    scoring,
    sharding,
    vocab,
)
from t5x_lite.settings import Settings

BATCH = 16  # texts at a time


def load(workdir: str | os.PathLike, step: int = -1) -> "Model":
    """The model of a run's checkpoint.

    Args:
        workdir: of a training run, or a converted one.
        step: of the checkpoint; -1 = the latest.

    Raises:
        FileNotFoundError, ValueError: naming what is missing, damaged or has changed.
    """
    cfg, net, params, at, meta = checkpoint.load_run(workdir, step)
    run.prepare_jax(cfg)
    words = vocab.load(cfg.data.vocab, cfg.data.sentinels)
    compatible.check_vocab(meta, words)
    return Model(cfg, net, params, words, at)


class Model:
    """A trained model and its vocabulary.

    Attributes:
        config: of the run.
        params: nested dict of arrays.
        vocab: its vocabulary.
        step: of the checkpoint.
    """

    def __init__(self, config, net, params: dict, words: vocab.Vocab, step: int):
        self.config, self.params, self.vocab, self.step = config, params, words, step
        self._net = net

    def __repr__(self) -> str:
        count = model.parameter_count(self._net)
        structure = self.config.model.structure
        return f"<{structure}, {count:,} parameters, step {self.step}>"

    def fill(self, texts, *, max_length: int = 64, gap_tokens: int = 1):
        """Fills every ___ of a text; what was written stands in [brackets].

        Raises:
            ValueError: the model was not trained to fill gaps, or there is none.
        """
        task = prompts.task_of(self.config)
        if task.kind == "continue":
            raise ValueError(
                f"{self!r} was trained to go on with a text, not to fill gaps. Use "
                "generate(text)."
            )

        def fills(several: list[str]) -> list[str]:
            return generate.fill(
                *(self._net, self.params, self.vocab, several),
                task=task,
                max_length=max_length,
                gap_tokens=gap_tokens,
            )

        return _each(texts, fills)

    def generate(self, texts, *, seed: int = 0, **settings):
        """What the model writes after a text (or, if that is its task, in its gap).

        Args:
            settings: of `settings.Settings`: max_length, temperature, top_p, beams ...
        """
        how = Settings(**settings)
        task = prompts.task_of(self.config)

        def go_on(several: list[str]) -> list[str]:
            found = generate.fill_all(
                *(self._net, self.params, self.vocab, several),
                task=task,
                settings=how,
                seed=seed,
            )
            return [one.joined("") for one in found]

        return _each(texts, go_on)

    def score(self, texts, given: str = ""):
        """log P(text | given) in nats, as a float; higher is more likely.

        Of an encoder the pseudo-log-likelihood (Salazar et al. 2020): each token with
        the others in sight.
        """

        def scores(several: list[str]) -> list[float]:
            return scoring.texts(
                self._net, self.params, self.vocab, self.config, several, given
            )

        return _each(texts, scores)

    def encode(self, texts):
        """The mean of the last layer's vectors over a text's tokens.

        Returns:
            float32 [D] of one text, [n, D] of n.
        """
        several = [texts] if isinstance(texts, str) else list(texts)
        rows = [self._read(text) for text in several]
        found = []
        for at in range(0, len(rows), BATCH):
            part = rows[at : at + BATCH]
            stream = prompts.pad_rows(part, BATCH, self.vocab.pad_id)
            if self.config.model.structure == "decoder":
                stream["ranks"] = stream["positions"]
            with sharding.unconstrained():
                means_BD = _means(self.params, stream, self.config.model)
            found.append(np.asarray(means_BD)[: len(part)])
        if not found:
            return np.zeros((0, self.config.model.d_model), np.float32)
        means = np.concatenate(found)
        return means[0] if isinstance(texts, str) else means

    def _read(self, text: str) -> np.ndarray:
        """Ids as in training: with the marks around them."""
        ids_T, words = self.vocab.encode(text), self.vocab
        if self.config.model.structure == "encoder":
            ids_T = [words.special("cls"), *ids_T, words.special("sep")]
        elif self.config.model.structure != "decoder":
            ids_T = [*ids_T, words.eos_id]
        elif not len(ids_T):
            ids_T = [words.eos_id]
        return np.asarray(ids_T, np.int32)


def _each(texts: str | Sequence[str], of: Callable[[list[str]], list]) -> Any:
    return of([texts])[0] if isinstance(texts, str) else of(list(texts))


def _means(params: dict, stream: dict, cfg) -> jax.Array:
    """float32 [B, D]: mean of the last hidden states over the tokens that are there."""

    def of(params, stream):
        cast = jax.tree.map(lambda p: p.astype(cfg.dtype), params)
        bound: Any = model.bind(model.build(cfg), cast)
        whole = cfg.structure == "encoder_decoder"
        if whole:
            y_BTD = bound.encode(stream)
        else:
            y_BTD, _ = bound.states({"main": stream})
        there_BT1 = (stream["segments"] > 0).astype(jnp.float32)[..., None]
        total_BD = jnp.sum(y_BTD.astype(jnp.float32) * there_BT1, axis=1)
        return total_BD / jnp.maximum(jnp.sum(there_BT1, axis=1), 1.0)

    return jax.jit(of)(params, stream)

"""The batch that a run stumbled over, in a file that `inspect --dump=FILE` shows.

WORKDIR/KIND-STEP.npz holds the arrays of the whole batch ("encoder/tokens", ...), the
number of each example and its fingerprint; WORKDIR/KIND-STEP.json the step, the loss,
the norm of each parameter's gradient, and the config of the run.
"""

import io
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from t5x_lite import arrays, cli, config, vocab
from t5x_lite.workdir import replace

WIDTH = 300  # characters of a text


def write(path: pathlib.Path, batch: dict[str, Any], about: dict[str, Any]):
    """Writes PATH and, beside it, its .json.

    Args:
      batch: of the whole step, as `Batches.whole` gives it.
      about: {"step", "loss", "examples": (first, last), "vocab": fingerprint, "config":
        `config.to_json`, "gradient_norms": parameter -> number}; numbers may be NaN.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(_flat(batch)), allow_pickle=False)
    # What is not finite is no number of JSON.
    norms = {name: str(float(norm)) for name, norm in about["gradient_norms"].items()}
    about = about | {"loss": str(float(about["loss"])), "gradient_norms": norms}
    replace(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")
    replace(path, buffer.getvalue())


def _flat(batch: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in batch.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, np.asarray(value)


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write` was given: (batch, about).

    Raises:
      ValueError: a file is missing, torn or not ours; nothing in it is executed.
    """
    batch: dict[str, Any] = {}
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        norms = {str(k): float(v) for k, v in about["gradient_norms"].items()}
        about = about | {"loss": float(about["loss"]), "gradient_norms": norms}
        about["step"] = int(about["step"])
        first, last = map(int, about["examples"])
        for name, array in arrays.open_arrays(path).items():
            stream, _, field = name.rpartition("/")
            (batch.setdefault(stream, {}) if stream else batch)[field] = array
        _check(batch, last - first + 1)
        about["config"], about["vocab"] = dict(about["config"]), str(about["vocab"])
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError),
        *(RecursionError, OverflowError),  # of brackets in brackets; int(inf)
    ) as e:
        if isinstance(e, FileNotFoundError):
            raise ValueError(
                f"--dump={path}: {e.filename} is not there. Give the .npz that the "
                "error of a run names; its .json belongs beside it."
            ) from e
        raise ValueError(
            f"--dump={path} is damaged or no dump of a run ({type(e).__name__}: "
            f"{cli.message_of(e)[:200]}). Give WORKDIR/nonfinite-STEP.npz as it was."
        ) from e
    return batch, about


def _check(batch: dict[str, Any], B: int):
    streams = [stream for stream in batch.values() if isinstance(stream, dict)]
    wanted = [(batch["fingerprint"], "iu", (B,))]
    for stream in streams:
        wanted.append((stream["tokens"], "iu", (B, *stream["tokens"].shape[-1:])))
        if "targets" in stream:
            shape = (B, *stream["targets"].shape[-1:])
            wanted += [
                (stream["targets"], "iu", shape),
                (stream["weights"], "f", shape),
            ]
    for array, kinds, shape in wanted:
        if array.dtype.kind not in kinds or array.shape != shape:
            raise ValueError(f"an array of {array.dtype} {array.shape}, not {shape}")


def show(path: pathlib.Path) -> Iterator[str]:
    """Lines for people: the gradients, the worst first, then every example as text.

    Raises:
      ValueError: as `read`; or the vocabulary is not that of the run.
    """
    batch, about = read(path)
    cfg = config.freeze(about["config"])
    words = vocab.load(cfg.data.vocab, cfg.data.sentinels)
    if words.fingerprint != about["vocab"]:
        raise ValueError(
            f"--dump={path}: config.data.vocab={cfg.data.vocab!r} is not the "
            "vocabulary of the run any more. Put the original file back."
        )
    first, last = about["examples"]
    yield f"step {about['step']}: loss {about['loss']:g}, examples {first} to {last}"
    norms = about["gradient_norms"]
    bad = {k: v for k, v in norms.items() if not math.isfinite(v)}
    yield f"\ngradients that are not finite: {len(bad)} of {len(norms)} parameters"
    finite = sorted((k for k in norms if k not in bad), key=lambda k: -norms[k])
    for name in (*bad, *finite):
        yield f"  {norms[name]:>12.4g}  {name}"
    for b, fingerprint in enumerate(batch["fingerprint"]):
        yield f"\nexample {first + b}, fingerprint {int(fingerprint):08x}"
        for name, stream in batch.items():
            if isinstance(stream, dict):
                yield from _example(name, stream, b, words)


def _example(name: str, stream: dict[str, np.ndarray], b: int, words: vocab.Vocab):
    def text(ids_T: np.ndarray) -> str:
        known = (ids_T >= 0) & (ids_T < words.size) & (ids_T != words.pad_id)
        found = words.decode(ids_T[known])
        return found[:WIDTH] + " …" * (len(found) > WIDTH)

    yield f"  {name} reads    {text(stream['tokens'][b])!r}"
    if "targets" in stream:
        counted = stream["weights"][b] != 0
        yield f"  {name} predicts {text(stream['targets'][b][counted])!r}"

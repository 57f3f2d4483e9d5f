"""A workdir made of another tool's weights: config, vocabulary, checkpoint."""

import dataclasses
import functools
import importlib
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
import tqdm

from t5x_lite import checkpoint, parameters, vocab
from t5x_lite import config as config_lib
from t5x_lite import run as run_lib
from t5x_lite.arrays import Lazy, Slot, narrowed
from t5x_lite.config import Config
from t5x_lite.data import custom_tasks
from t5x_lite.interop import t5x, task_heads
from t5x_lite.interop.tables import Imported

# Where a workdir keeps what came with the weights.
FOLDER = "huggingface"
# Family -> the file of configs/ that says how to go on training.
CONFIGS = dict(
    t5="t5_1_1_small",
    mt5="mt5_small",
    umt5="umt5_small",
    bert="bert",
    ernie="bert",
    nezha="nezha",
    roberta="roberta",
    albert="albert",
    electra="roberta",
    electra_discriminator="electra",
    xlnet="xlnet",
    gpt="gpt",
    gpt2="gpt2",
    bart="bart",
    mbart="bart",
    prophetnet="prophetnet",
)
# Tokenizer files in the order in which they are asked for ids. The ids of
# sentencepiece.bpe.model are not the model's, which tokenizer.json has.
VOCABULARIES = ("spiece.model", "tokenizer.json", "vocab.txt", "vocab.json")
# Parameters with a row for each id.
BY_ID = ("embedding", "output/kernel", "output/bias")
SENTINELS = 100


@dataclasses.dataclass(frozen=True)
class Run:
    """What a converted workdir holds.

    Attributes:
        opt: the optimizer's state at `step`, or None for a fresh one.
        fingerprint: of the vocabulary; "" = there is none that we can read.
    """

    cfg: Config
    params: Lazy
    family: str
    fingerprint: str
    step: int
    opt: Any
    theirs: dict
    files: dict[str, pathlib.Path]
    notes: list[str]


def config_of(
    found: Imported,
    raw: ml_collections.ConfigDict | None,
    to: pathlib.Path,
    *,
    spec: str = "",
    sentinels: int = -1,
) -> Run:
    """The run that goes on from these weights.

    Args:
      raw: the config, but for its model; None = the file of configs/ for the family.
      to: the workdir, which the config names.
      spec: as config.data.vocab; "" = of the tokenizer files beside the weights.
      sentinels: as config.data.sentinels; -1 = 100 for T5, else 0.

    Raises:
      ValueError: the vocabulary that was given does not fit.
    """
    family = found.extras.get("family", "t5")
    # Another vocabulary's files would go out again as if they were this one's.
    files = {} if spec else dict(found.extras.get("files", {}))
    notes: list[str] = []
    unnamed = raw is None
    if raw is None:
        raw = importlib.import_module(f"configs.{CONFIGS[family]}").get_config()
    assert raw is not None
    plain: dict[str, Any] = raw.to_dict()
    if unnamed:
        _fit(plain, found)
    spec, words = _vocabulary(found, to, spec, sentinels, notes)
    params, model = Lazy.of(found.params), found.cfg
    if words is not None and words.size > model.vocab_size:
        rows = run_lib.padded(words.size)
        notes.append(
            f"{words.size} ids are more than the {model.vocab_size} rows of the "
            f"embedding: rows of zeros up to {rows} were added"
        )
        params = with_rows(params, rows)
        model = dataclasses.replace(model, vocab_size=rows)
    plain["model"] = dataclasses.asdict(model)
    if words is not None:
        plain["data"] |= dict(vocab=spec, sentinels=words.sentinels)
    elif unnamed:
        plain["data"]["vocab"] = ""
    cfg = config_lib.freeze(plain)
    opt = found.extras.get("opt")
    if opt is not None and model.vocab_size != found.cfg.vocab_size:
        notes.append("optimizer state left out: it has no rows for the added ids")
        opt = None
    if opt is not None and cfg.optim.name != "adafactor":
        notes.append(f"optimizer state left out: config.optim.name={cfg.optim.name!r}")
        opt = None
    return Run(
        cfg,
        params,
        family,
        words.fingerprint if words else "",
        found.extras.get("step", 0) if opt is not None else 0,
        opt,
        found.extras.get("theirs", {}),
        files,
        notes,
    )


def _fit(plain: dict[str, Any], found: Imported):
    """A config's objective and lengths for this model."""
    model, objective, data = found.cfg, plain["objective"], plain["data"]
    if "sentence" in objective and (model.head or not model.classes):
        objective["sentence"] = "none"
    if model.head:
        data["task_format"] = "head"
    if "streams" in objective:
        objective["streams"] = model.query_streams
    if model.positions in ("learned", "sinusoidal", "prophetnet"):
        most = model.max_positions - (model.positions == "prophetnet")
        data["inputs_length"] = min(data["inputs_length"], most)


def _vocabulary(found: Imported, to, given: str, sentinels: int, notes: list[str]):
    """(config.data.vocab, the vocabulary or None)."""
    files, theirs = found.extras.get("files", {}), found.extras.get("theirs", {})
    named = theirs.get("tokenizer_class", "")
    if "tokenizer_config.json" in files:
        text = files["tokenizer_config.json"].read_text()
        named = json.loads(text).get("tokenizer_class", named)
    like_t5 = found.extras.get("family", "t5") in ("t5", "mt5", "umt5")
    if sentinels < 0:
        sentinels = SENTINELS if like_t5 else 0
    if given:
        words = vocab.load(given, sentinels)
        return given, words
    if named == "ByT5Tokenizer":
        return "bytes", vocab.load("bytes", sentinels)
    for name in VOCABULARIES:
        if name not in files:
            continue
        try:
            words = vocab.load(str(files[name]), sentinels)
        except ValueError as e:
            notes.append(f"{name} is not read: {e}")
            continue
        return str(to.absolute() / FOLDER / name), words
    notes.append(
        "no vocabulary: `train` and `generate` need one. Convert again with "
        "--vocab=FILE, or set config.data.vocab"
    )
    return "", None


def with_rows(params: Mapping[str, np.ndarray], rows: int) -> Lazy:
    """The tables by id with that many rows: cut, or filled up with zeros."""

    def resized(slot: Slot) -> np.ndarray:
        array = slot.read()[:rows]
        more = ((0, rows - len(array)), *((0, 0),) * (array.ndim - 1))
        return np.pad(array, more)

    slots = dict(Lazy.of(params).slots)
    for name in BY_ID:
        if name in slots:
            slot = slots[name]
            shape = (rows, *slot.shape[1:])
            slots[name] = Slot(shape, slot.dtype, functools.partial(resized, slot))
    return Lazy(slots)


def zeros_from(params: Mapping[str, np.ndarray], rows: int) -> bool:
    """Are all rows by id zero from this one on, as `with_rows` adds them?"""
    return not any(params[name][rows:].any() for name in BY_ID if name in params)


def write(made: pathlib.Path, run: Run) -> list[str]:
    """Writes checkpoint, config.json and the files that came along; -> notes."""
    kept = made / FOLDER
    if run.files or run.theirs:
        kept.mkdir()
    for name, file in run.files.items():
        shutil.copyfile(file, kept / name)
    if run.theirs:
        (kept / "config.json").write_text(json.dumps(run.theirs, indent=2) + "\n")
    meta = checkpoint.make_meta(run.cfg, run.step, {"vocab": run.fingerprint})
    meta["family"] = run.family
    flat, notes = {}, []
    names = tqdm.tqdm(run.params, unit="array", disable=None, leave=False)
    for name in names:
        path = tuple(name.split("/"))
        flat[path] = narrowed(name, run.params[name], np.dtype(np.float32))
        if not np.isfinite(flat[path]).all():
            notes.append(f"{name} has values that are not finite, as the files have")
    state: dict[str, Any] = {"params": parameters.nested(flat)}
    state["step"] = np.asarray(run.step, np.int32)
    if run.opt is None:
        meta["params_only"] = True
    else:
        state["opt"] = t5x.optax_state(run.cfg, run.opt, run.step)
    checkpoints = checkpoint.Checkpoints(made, run.cfg.checkpoint)
    try:
        checkpoints.save(run.step, state, meta)
        checkpoints.wait()
    finally:
        checkpoints.close()
    about = {"config": config_lib.to_json(run.cfg), "data": meta["data"]}
    (made / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    return notes


def kept(workdir: pathlib.Path) -> tuple[dict[str, Any], dict[str, pathlib.Path]]:
    """(their config.json, the files beside it) that came with the weights."""
    folder = workdir / FOLDER
    files = {p.name: p for p in sorted(folder.glob("*")) if p.is_file()}
    config = files.pop("config.json", None)
    return json.loads(config.read_text()) if config else {}, files


def labels_of(cfg: Config, theirs: Mapping[str, Any]) -> list[str]:
    """The names of the classes of a head: of the run's task, or as they came along."""
    if len(cfg.data.tasks) == 1:
        named = custom_tasks.find(cfg.data.tasks[0], cfg.data.custom_tasks).classes
        if named:
            return list(named)
    return task_heads.labels(theirs)


def pad_of(cfg: Config) -> dict[str, int]:
    """pad_token_id by the vocabulary of the run, if it can be read."""
    try:
        return dict(pad_token_id=vocab.load(cfg.data.vocab, cfg.data.sentinels).pad_id)
    except (FileNotFoundError, ValueError):
        return {}


def tokenizer_of(
    cfg: Config, made: pathlib.Path
) -> tuple[dict[str, Any], dict[str, pathlib.Path], list[str]]:
    """Of a run of ours: (ids for config.json, files to copy, notes).

    Writes tokenizer_config.json where theirs gives the same ids as our vocabulary.
    """
    try:
        words = vocab.load(cfg.data.vocab, cfg.data.sentinels)
    except (FileNotFoundError, ValueError) as e:
        return {}, {}, [f"no tokenizer: {e}"]
    ids: dict[str, Any] = dict(pad_token_id=words.pad_id, eos_token_id=words.eos_id)
    ids["bos_token_id"] = None
    if cfg.model.structure == "encoder_decoder":
        ids["decoder_start_token_id"] = words.pad_id
    files = {}
    about: dict[str, Any] = dict(extra_ids=cfg.data.sentinels, pad_token="<pad>")
    about |= dict(eos_token="</s>", unk_token="<unk>")
    if cfg.data.vocab == "bytes":
        about["tokenizer_class"] = "ByT5Tokenizer"
    elif cfg.data.vocab.endswith(".model"):
        about["tokenizer_class"] = "T5Tokenizer"
        files["spiece.model"] = pathlib.Path(cfg.data.vocab)
    else:
        path = pathlib.Path(cfg.data.vocab)
        if path.is_file():
            files[path.name] = path
        return ids, files, [f"no tokenizer_config.json for {cfg.data.vocab!r}"]
    text = json.dumps(about, indent=2) + "\n"
    (made / "tokenizer_config.json").write_text(text)
    return ids, files, []

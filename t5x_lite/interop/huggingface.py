"""Directories of Hugging Face: config.json, weights in one or many files, tokenizer.

    found = huggingface.read("DIR")         # found.cfg, found.params by our names
    huggingface.write("NEW_DIR", found.cfg, found.params, family="bert")

Weights are read and written parameter by parameter. ELECTRA is a directory with
`generator/` and `discriminator/`.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from t5x_lite import arrays, parameters
from t5x_lite import model as model_lib
from t5x_lite.arrays import Lazy, Slot
from t5x_lite.config import ModelConfig
from t5x_lite.interop import families, hf_config, tables, task_heads, torch_files
from t5x_lite.interop.tables import Imported, Table
from t5x_lite.model_config import generator_config

TOKENIZER = (
    *("spiece.model", "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt"),
    *("sentencepiece.bpe.model", "prophetnet.tokenizer", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "generation_config.json"),
)
HALVES = dict(generator="electra_generator", discriminator="electra_discriminator")
SHARD_BYTES = 5 * 10**9


def read(path, *, family: str = "", fresh: bool = False) -> Imported:
    """A directory as our config and parameters, which are read when they are asked for.

    Args:
      family: a row of `families.FAMILIES`; "" = by config.json.
      fresh: draw the parameters that the files do not have, from seed 0.

    Returns:
      extras: family; fresh, the names that are drawn; theirs, their config; files, name
      -> path of what belongs to the tokenizer.

    Raises:
      FileNotFoundError, ValueError, KeyError: naming what is missing or does not fit.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is no directory. Give one that holds config.json and "
            "model.safetensors, as save_pretrained writes it."
        )
    if all((path / half).is_dir() for half in HALVES):
        _same_type(family, _config(path / "discriminator"))
        return _read_electra(path)
    theirs = _config(path)
    _same_type(family, theirs)
    weights = open_weights(path)
    if not family:
        family = hf_config.family_of(theirs, _renamed(weights, "", ""))
    row = hf_config.THEIRS[family]
    any_config = dataclasses.replace(
        families.model_config(family, theirs), head=task_heads.head_of(family, theirs)
    )
    known = {row.theirs for row in families.table(family, any_config).rows.values()}
    weights = _renamed(weights, row.prefix, known)
    family, cfg = hf_config.read(theirs, weights, family)
    params, drawn = _ours(families.table(family, cfg), weights, cfg, fresh)
    extras = dict(family=family, fresh=drawn, theirs=theirs, files=_files(path))
    return Imported(cfg, params, extras)


def _same_type(family: str, theirs: Mapping[str, Any]):
    wanted = hf_config.THEIRS[family].type if family else ""
    if wanted and (kind := theirs.get("model_type", wanted)) != wanted:
        raise ValueError(
            f"--family={family} is model_type={wanted!r}, config.json has {kind!r}. "
            "Leave --family out, or set model_type in config.json."
        )


def _config(path: pathlib.Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no config.json. Copy the model's there.")
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} is no JSON: {e}. Copy the model's there.") from e
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no JSON object. Copy the model's there.")
    return found


def _files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    return {name: path / name for name in TOKENIZER if (path / name).is_file()}


def open_weights(path: pathlib.Path) -> Lazy:
    """The tensors of a directory, safetensors before PyTorch's own files."""
    index, one = path / "model.safetensors.index.json", path / "model.safetensors"
    for file in (index, one):
        if file.is_file():
            return arrays.open_arrays(file)
    if any(path.glob("*.safetensors")):
        return arrays.open_arrays(path)
    index, one = path / "pytorch_model.bin.index.json", path / "pytorch_model.bin"
    if index.is_file():
        try:
            files = set(json.loads(index.read_text())["weight_map"].values())
        except (
            *(ValueError, KeyError, AttributeError, TypeError, RecursionError),
        ) as e:
            raise ValueError(f"{index} is damaged: {e!r}. Copy it again.") from e
        return torch_files.open_tensors([_inside(path, name) for name in sorted(files)])
    if one.is_file():
        return torch_files.open_tensors([one])
    raise FileNotFoundError(
        f"{path} holds no weights: no model.safetensors, no pytorch_model.bin, nor an "
        "index of several of them. Copy the model's there."
    )


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    if not isinstance(name, str) or name != pathlib.PurePath(name).name or "\\" in name:
        raise ValueError(
            f"the index in {folder} names the file {name!r}, which is not in its "
            "folder. Only bare file names are read."
        )
    return folder / name


def _renamed(weights: Lazy, prefix: str, known) -> Lazy:
    """The names of today: norms' gamma and beta, and models saved without a head."""
    old = dict(gamma="weight", beta="bias")

    def today(name: str) -> str:
        name = re.sub(r"(?<=Norm\.)(gamma|beta)$", lambda m: old[m[1]], name)
        return f"{prefix}.{name}" if f"{prefix}.{name}" in known else name

    bare = prefix and not any(name.startswith(f"{prefix}.") for name in weights)
    slots = {}
    for name, slot in weights.slots.items():
        new = today(name)
        if bare and new == name and name not in known:
            new = _layered(f"{prefix}.{name}", known) or name
        slots[new] = slot
    return Lazy(slots)


def _layered(name: str, known) -> str:
    """The name, if a row has it with {i} for its layer."""
    for found in re.finditer(r"(?<=\.)\d+(?=\.)", name):
        if f"{name[: found.start()]}{{i}}{name[found.end() :]}" in known:
            return name
    return ""


def _ours(
    table: Table, weights: Lazy, cfg: ModelConfig, fresh: bool, part: bool = False
) -> tuple[Lazy, list[str]]:
    """Our parameters, and the names of those that are drawn; `part`: of a half."""
    slots = dict(weights.slots)
    for copy, name in table.copies.items():  # the file may have any one of them
        if name not in slots and copy in slots:
            slots[name] = slots[copy]
    weights = Lazy(slots)
    places = tables.places(table, cfg)
    net = model_lib.build(cfg)
    declared = parameters.declared(net)
    absent = [
        ours
        for ours in declared
        if not any(n in weights for n in getattr(places.get(ours), "theirs", ()))
    ]
    drawn = [ours for ours in absent if re.fullmatch(table.left, ours)]
    lost = [ours for ours in absent if ours not in (*drawn, *table.zero)]
    if lost and not fresh and not part:
        both = ", or give the directory of generator/ and discriminator/"
        raise ValueError(
            f"{len(lost)} of the model's {len(declared)} parameters are not in the "
            f"files at all: {', '.join(lost[:6])} ... Draw them with --fresh"
            f"{both if cfg.generator_width else ''}."
        )
    places = {ours: place for ours, place in places.items() if ours not in absent}
    tables.check(table, places, weights, cfg)
    found = {}
    for ours, p in declared.items():
        if ours in places:
            place = places[ours]
            dtype = weights.slots[place.theirs[0]].dtype
            value = functools.partial(tables.gather, place, weights)
        elif fresh or ours not in lost:  # a bias that they have not is drawn as zero
            dtype = np.dtype(np.float32)
            value = functools.partial(_draw, net, ours)
        else:
            continue
        found[ours] = Slot(p.get_value().shape, dtype, value)
    return Lazy(found), drawn + lost


def _draw(net, ours: str) -> np.ndarray:
    """As a fresh run of seed 0 would."""
    drawn = parameters.init_params(net, jax.random.key(0), only=ours)
    for key in ours.split("/"):
        drawn = drawn[key]
    return np.asarray(drawn)


def _read_electra(path: pathlib.Path) -> Imported:
    """Both of its models, which must share their embeddings."""
    small, whole = (_config(path / half) for half in HALVES)
    weights = {
        half: _renamed(open_weights(path / half), "electra", set()) for half in HALVES
    }
    _, cfg = hf_config.read(whole, weights["discriminator"], HALVES["discriminator"])
    cfg = dataclasses.replace(cfg, generator_width=_share(path, small, whole, cfg))
    unequal = [
        name
        for name, array in weights["discriminator"].items()
        if name.startswith("electra.embeddings.")
        and not np.array_equal(weights["generator"].get(name, array), array)
    ]
    if unequal:
        raise ValueError(
            f"{path}: generator and discriminator differ in {unequal}: they were not "
            f"trained together. {ALONE}"
        )
    slots: dict[str, Slot] = {}
    for half, family in HALVES.items():
        table = families.FAMILIES[family].names(cfg)
        found, _ = _ours(table, weights[half], cfg, fresh=False, part=True)
        slots |= found.slots
    files = _files(path / "discriminator")
    extras = dict(family=HALVES["discriminator"], fresh=[], theirs=whole, files=files)
    return Imported(cfg, Lazy(dict(sorted(slots.items()))), extras)


ALONE = "Read one of them alone: --from=hf:DIR/discriminator --fresh."


def _share(path, small: dict, whole: dict, cfg: ModelConfig) -> float:
    """The generator's share of the widths, which must be the same for all."""
    keys = ("num_attention_heads", "intermediate_size", "hidden_size")
    compared = (*keys, "embedding_size", "num_hidden_layers", "hidden_act")
    families.model_config(HALVES["generator"], small)
    for key in keys:
        share = small[key] / whole[key]
        if share >= 1:
            continue
        one = dataclasses.replace(cfg, generator_width=share)
        want = hf_config.write("electra", generator_config(one))
        if all(small.get(key) == want[key] for key in compared):
            return share
    raise ValueError(
        f"{path}: our generator has the same share of all the discriminator's widths "
        f"and as many layers; here are { {k: small.get(k) for k in compared} } and "
        f"{ {k: whole.get(k) for k in compared} }. {ALONE}"
    )


def write(
    path,
    cfg: ModelConfig,
    params: Mapping[str, np.ndarray],
    *,
    family: str = "",
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    theirs: Mapping[str, Any] | None = None,
    files: Mapping[str, pathlib.Path] | None = None,
    labels: Sequence[str] = (),
) -> list[str]:
    """Writes a directory that `from_pretrained` reads; tied weights are stored once.

    Args:
      path: a directory that exists; give a temporary one and rename it.
      params: by our flat names, `Lazy` or not.
      family: a row of `families.FAMILIES`; "" = the usual one that computes this model.
      dtype: of the file, a key of `arrays.DTYPES`.
      shard_bytes: the most that one file holds, if a tensor is not larger.
      theirs: keys of config.json beside those of the model, such as ids of tokens.
      files: name -> path of files that are copied there.
      labels: names of the classes of the head.

    Returns:
      What the user should know, a line each.

    Raises:
      ValueError: if no model of theirs computes this one, or a value is too large for
        the dtype.
    """
    path = pathlib.Path(path)
    rest = (cfg, params, dtype, shard_bytes, theirs, files)
    if cfg.generator_width:
        return _write_electra(path, *rest)
    notes = []
    if not family and cfg.position_offset:
        folded = _without_offset(cfg, params)
        if hf_config.fits(folded[0]) and not hf_config.fits(cfg):
            notes.append(
                f"the first {cfg.position_offset} rows of positions, which nothing "
                "reads, were left out: theirs starts at row 0"
            )
            rest = (*folded, *rest[2:])
            cfg, _ = folded
    family = family or hf_config.fitting(cfg)[0]
    config = hf_config.write(family, cfg, labels)
    table = families.table(family, cfg)
    if table.zero:
        rest = (cfg, task_heads.without_bias(cfg, rest[1]), *rest[2:])
    _write_files(path, config, table, *rest)
    return [*notes, *hf_config.notes(family, cfg)]


def _without_offset(cfg: ModelConfig, params: Mapping):
    """The same model without the rows of positions that are never read."""
    offset, slots = cfg.position_offset, dict(Lazy.of(params).slots)

    def rest(slot: Slot) -> np.ndarray:
        return slot.read()[offset:]

    for name, slot in slots.items():
        if name.endswith("inputs/positions"):
            shape = (slot.shape[0] - offset, *slot.shape[1:])
            slots[name] = Slot(shape, slot.dtype, functools.partial(rest, slot))
    return dataclasses.replace(cfg, position_offset=0), Lazy(slots)


def _write_electra(path: pathlib.Path, cfg: ModelConfig, *rest) -> list[str]:
    notes = []
    for half, family in HALVES.items():
        config = hf_config.write(HALVES["discriminator"], cfg)
        if half == "generator":
            if cfg.activation != "gelu_exact":
                notes.append(
                    "the generator was left out: theirs computes erf's gelu in its "
                    f"head, ours has config.model.activation={cfg.activation!r}"
                )
                continue
            config = hf_config.write("electra", generator_config(cfg))
        (path / half).mkdir()
        table = families.FAMILIES[family].names(cfg)
        _write_files(path / half, config, table, cfg, *rest)
    return notes


def _write_files(
    path: pathlib.Path,
    config: dict,
    table: Table,
    cfg: ModelConfig,
    params: Mapping[str, np.ndarray],
    dtype: str,
    shard_bytes: int,
    theirs: Mapping | None,
    files: Mapping[str, pathlib.Path] | None,
):
    whole = dict(theirs or {}) | config | dict(torch_dtype=dtype)
    whole.pop("dtype", None)
    (path / "config.json").write_text(json.dumps(whole, indent=2) + "\n")
    for name, file in (files or {}).items():
        shutil.copyfile(file, path / name)
    arrays.write_safetensors(
        path,
        _theirs(table, cfg, params),
        dtype,
        shard_bytes=shard_bytes,
        stem="model",
        metadata={"format": "pt"},  # transformers refuses files without it
    )


def _theirs(table: Table, cfg: ModelConfig, params: Mapping) -> Lazy:
    """Their tensors, each made of ours when it is asked for."""
    ours = Lazy.of(params)
    kept: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()

    def get(name: str) -> np.ndarray:
        if name not in kept:
            kept[name] = ours[name]
        kept.move_to_end(name)
        while len(kept) > 3:  # GPT-2's query, key and value are one array there
            kept.popitem(last=False)
        return kept[name]

    slots = {}
    for name, (shape, make) in tables.recipes(table, cfg).items():
        slots[name] = Slot(shape, np.dtype(np.float32), functools.partial(make, get))
    for name in table.zeros:
        if name not in slots:
            shape = (1, cfg.vocab_size)  # BART's
            zero = functools.partial(np.zeros, shape, np.float32)
            slots[name] = Slot(shape, np.dtype(np.float32), zero)
    return Lazy(slots)

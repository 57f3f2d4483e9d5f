"""LoRA's adapters as the library `peft` keeps them, beside a model of transformers.

    base = AutoModelForMaskedLM.from_pretrained("BASE")
    PeftModel.from_pretrained(base, "DIR")      # DIR was written here

DIR has adapter_config.json and adapter_model.safetensors. Theirs adds alpha / r * B A x
to what a layer makes of x, where ours adds alpha / r * a b to its weight: A, B are a, b
transposed. GPT's c_attn is query, key and value side by side: m adapters of it are one
of rank m * r there, whose B has zeros beside each block, with m * alpha. A head was
trained as a whole and stands among `modules_to_save`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_lite import arrays, lora
from t5x_lite.arrays import Lazy
from t5x_lite.config import ModelConfig
from t5x_lite.interop import families, hf_config, tables, task_heads
from t5x_lite.interop.tables import HEADS_IN, HEADS_OUT, LINEAR, Place, Table

PREFIX = "base_model.model."
CONV = ("gpt", "gpt2")  # their layers are Conv1D: weights as [inputs, outputs]
Part = tuple[int, int, np.ndarray, np.ndarray]  # k, n of `Row.part`, a, b


def write(
    path,
    cfg: ModelConfig,
    params: Mapping[str, np.ndarray],
    *,
    family: str = "",
    dtype: str = "float32",
) -> list[str]:
    """Writes adapter_config.json and adapter_model.safetensors; -> notes for the user.

    Args:
      path: a directory that exists.
      cfg: with adapters.
      params: by our flat names, adapters beside their weights.
      family, dtype: as in `huggingface.write`.

    Raises:
      ValueError: no adapters, no model of theirs, or something was trained that is
        neither a linear layer's adapter nor a head.
    """
    if not cfg.lora_rank:
        raise ValueError(
            "config.model.lora_rank=0: the run has no adapters. --to=hf:DIR takes the "
            "whole model."
        )
    plain = lora.without(cfg)
    if not hf_config.fits(plain):  # as in huggingface.write, positions are no matter
        plain = dataclasses.replace(plain, position_offset=0)
    family = family or hf_config.fitting(plain)[0]
    hf_config.write(family, plain)  # refuses what is none of theirs
    table = families.table(family, plain)
    kept = {k: s for k, s in Lazy.of(params).slots.items() if not lora.frozen(cfg, k)}
    places = tables.places(table, plain)
    modules = _modules(family, places, Lazy(kept))
    saved = _saved(table, plain, Lazy.of(params), [*kept])
    tensors: dict[str, np.ndarray] = {}
    for name, parts in modules.items():
        a, b = _joined(parts)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    tensors |= {f"{PREFIX}{name}": array for name, array in saved.items()}
    about = _config(cfg, family, modules, saved)
    path = pathlib.Path(path)
    (path / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")
    arrays.write_safetensors(
        *(path, Lazy.of(tensors), dtype, 2**62, "adapter_model"), {"format": "pt"}
    )
    row = task_heads.find(family, cfg.head)
    name = row.name if row else hf_config.THEIRS[family].architecture(plain)
    return [
        f"adapters of {len(modules)} layers of {name}; the base is the model that the "
        "run started from (--from=hf:DIR, or its own --to=hf:DIR)",
        *hf_config.notes(family, plain),
    ]


def _config(cfg: ModelConfig, family: str, modules: dict, saved: dict) -> dict:
    """adapter_config.json."""
    wide = {name: len(parts) for name, parts in modules.items() if len(parts) > 1}
    return dict(
        peft_type="LORA",
        task_type=None,
        base_model_name_or_path=None,
        inference_mode=True,
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        rank_pattern={name: m * cfg.lora_rank for name, m in wide.items()},
        alpha_pattern={name: m * cfg.lora_alpha for name, m in wide.items()},
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=family in CONV,
        target_modules=[*modules],
        modules_to_save=sorted({name.rpartition(".")[0] for name in saved}) or None,
    )


def _modules(
    family: str, places: dict[str, Place], kept: Lazy
) -> dict[str, list[Part]]:
    """Their linear layer -> the adapters of it."""
    found: dict[str, list[Part]] = {}
    for key in kept:
        if not key.startswith(lora.PREFIX) or not key.endswith("/a"):
            continue
        ours = key.removeprefix(lora.PREFIX).removesuffix("/a")
        if ours in kept:
            raise ValueError(
                f"config.model.lora_targets: {ours} has an adapter and is trained as a "
                "whole by lora_trained, too; peft has one or the other. Merge the "
                "adapters: --to=hf:DIR."
            )
        place = places.get(ours)
        if place is None or not _is_linear(family, ours, place):
            raise ValueError(
                f"config.model.lora_targets: {ours} is no linear layer of {family!r} "
                "in transformers, so that peft has no adapter of it. Merge the "
                "adapters (--to=hf:DIR), or train without it."
            )
        a, b = kept[key], kept[f"{lora.PREFIX}{ours}/b"]
        layers = zip(a, b, strict=True) if a.ndim == 3 else [(a, b)]
        for theirs, (one_a, one_b) in zip(place.theirs, layers, strict=True):
            module = theirs.removesuffix(".weight")
            found.setdefault(module, []).append((*place.row.part, one_a, one_b))
    return found


def _is_linear(family: str, ours: str, place: Place) -> bool:
    if not place.row.theirs.endswith(".weight"):
        return False
    if family in CONV and "/blocks/" in ours:
        return True
    return place.row.axes in (LINEAR, HEADS_IN, HEADS_OUT)


def _joined(parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
    """(A [m r, inputs], B [outputs, m r]) of m adapters of parts of a layer."""
    width, r = parts[0][3].shape[1], parts[0][2].shape[1]
    whole_b = np.zeros((parts[0][1] * width, len(parts) * r), np.float32)
    for j, (k, _, _, b) in enumerate(parts):
        whole_b[k * width : (k + 1) * width, j * r : (j + 1) * r] = b.T
    return np.concatenate([a.T for _, _, a, _ in parts]), whole_b


def _saved(
    table: Table, cfg: ModelConfig, params: Lazy, trained: list[str]
) -> dict[str, np.ndarray]:
    """What else was trained, by their names: the head, of GPT the norm before it.

    Raises:
      ValueError: anything else was trained.
    """
    others = [name for name in trained if not name.startswith(lora.PREFIX)]
    strange = [name for name in others if not name.startswith("head/")]
    if strange:
        raise ValueError(
            f"config.model.lora_trained={cfg.lora_trained!r} trained {strange} too, "
            "which is no head. Merge the adapters (--to=hf:DIR): peft's folder holds "
            "adapters and a head alone."
        )
    if not others:
        bias = params["head/bias"] if table.zero else np.zeros(1)
        if f"{lora.PREFIX}head/kernel/a" in trained and bias.any():
            raise ValueError(
                f"config.model.lora_targets={cfg.lora_targets!r} has an adapter of "
                "head/kernel, whose bias theirs has not: it lies in the norm before it "
                "as the kernel without the adapter needs it. Merge the adapters "
                "(--to=hf:DIR)."
            )
        return {}
    rows = {table.rows[name].theirs for name in others if name in table.rows}
    if table.zero:
        params = task_heads.without_bias(cfg, params)
        rows |= task_heads.last_norm(table, cfg)
    recipes: dict[str, Any] = tables.recipes(table, cfg)
    return {name: recipes[name][1](params.__getitem__) for name in sorted(rows)}

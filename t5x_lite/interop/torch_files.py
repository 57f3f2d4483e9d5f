"""Tensors of PyTorch's own files, read without running what a pickle asks for."""

import pathlib
import pickle

import ml_dtypes

from t5x_lite.arrays import Lazy, Slot

_WAY_OUT = (
    "AutoModelForPreTraining.from_pretrained(DIR).save_pretrained(NEW_DIR) writes "
    "model.safetensors"
)
# It runs what the pickle asks for. transformers 5 refuses such a file too.
TENSORS_ALONE = (
    "sd = torch.load(FILE, weights_only=False); torch.save({k: v for k, v in "
    "sd.items() if isinstance(v, torch.Tensor)}, FILE)"
)


def open_tensors(files: list[pathlib.Path]) -> Lazy:
    """The state dicts of some files together, bfloat16 as ml_dtypes.bfloat16.

    Raises:
      ImportError: torch is not installed.
      ValueError: a file is damaged or holds anything but tensors; nothing is run.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise ImportError(
            f"{files[0]}: PyTorch's own files are read by torch: pip install torch. Or "
            f"where torch is: {_WAY_OUT}."
        ) from e
    slots = {}
    for file in files:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as e:
            lines = f"{e}".strip().splitlines() or [type(e).__name__]
            raise ValueError(
                f"{file} holds more than tensors, or is damaged. A pickle can run any "
                "code when it is read, so this one was not. If you trust who made it, "
                f"run in a throw-away environment: {TENSORS_ALONE} ({lines[0][:200]})"
            ) from e
        if not isinstance(found, dict):
            raise ValueError(f"{file} holds a {type(found).__name__}, no state dict.")
        for name, tensor in found.items():
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(
                    f"{file} holds {name!r}, a {type(tensor).__name__}: no state dict. "
                    "Save model.state_dict() alone."
                )
            slots[name] = _slot(torch, tensor.detach())
    return Lazy(slots)


def _slot(torch, tensor) -> Slot:
    if tensor.dtype == torch.bfloat16:
        array = tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    else:
        array = tensor.numpy()
    return Slot(array.shape, array.dtype, lambda: array)

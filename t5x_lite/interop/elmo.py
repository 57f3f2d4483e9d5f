"""ELMo weights of bilm-tf: its options.json and HDF5 file -> our config and parameters.

import json
from t5x_lite.interop import elmo

cfg = elmo.config(json.load(open("options.json")))
params = elmo.from_bilm(elmo.read("lm_weights.hdf5"), cfg)
"""

from collections.abc import Mapping
from typing import IO

import numpy as np

from t5x_lite.bilm import Bilm, ElmoConfig
from t5x_lite.parameters import declared, nested

# Ours -> theirs. {i} is the filter, the highway layer or the LSTM layer.
CELL = "RNN_{direction}/RNN/MultiRNNCell/Cell{i}/LSTMCell"
WORDS = {
    "words/embedding": "char_embed",
    "words/highway/carry": "CNN_high_{i}/W_carry",
    "words/highway/carry_bias": "CNN_high_{i}/b_carry",
    "words/highway/transform": "CNN_high_{i}/W_transform",
    "words/highway/transform_bias": "CNN_high_{i}/b_transform",
    "words/project": "CNN_proj/W_proj",
    "words/project_bias": "CNN_proj/b_proj",
}


def config(options: Mapping) -> ElmoConfig:
    """The config of an options.json.

    Raises:
      ValueError: an option that we do not have.
    """
    cnn, lstm = options["char_cnn"], options["lstm"]
    if cnn["activation"] != "relu":
        raise ValueError(
            f"options.char_cnn.activation={cnn['activation']!r}: only 'relu' is here, "
            "as in all published models."
        )
    return ElmoConfig(
        char_dim=cnn["embedding"]["dim"],
        filters=tuple((width, count) for width, count in cnn["filters"]),
        max_characters=cnn["max_characters_per_token"],
        highway=cnn["n_highway"],
        projection=lstm["projection_dim"],
        units=lstm["dim"],
        layers=lstm["n_layers"],
        cell_clip=float(lstm["cell_clip"]),
        projection_clip=float(lstm["proj_clip"]),
        skip=lstm["use_skip_connections"],
    )


def read(path: str | IO[bytes]) -> dict[str, np.ndarray]:
    """All arrays of an HDF5 file, by their path in it. Needs h5py."""
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise ImportError(
            f"{path}: reading HDF5 needs h5py: pip install 't5x-lite[elmo]'."
        ) from e
    found = {}

    def keep(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = np.asarray(item[()])

    with h5py.File(path, "r") as file:
        file.visititems(keep)
    return found


def from_bilm(weights: Mapping[str, np.ndarray], cfg: ElmoConfig) -> dict:
    """Their arrays -> our nested parameters of `Bilm(cfg)`, float32.

    Raises:
      ValueError: naming all arrays that are missing, not of this model, or of another
        shape.
    """
    params, used, problems = {}, set(), []

    def take(name: str, shape) -> np.ndarray:
        used.add(name)
        if name not in weights:
            problems.append(f"missing: {name}")
        elif weights[name].shape != tuple(shape):
            got = weights[name].shape
            problems.append(f"shape {got} instead of {tuple(shape)}: {name}")
        else:
            return np.asarray(weights[name], np.float32)
        return np.zeros(shape, np.float32)

    H, P = cfg.units, cfg.projection
    for ours, p in declared(Bilm(cfg)).items():
        shape = p.get_value().shape
        part, kind = ours.split("/")[0], ours.split("/")[-1]
        if ours in WORDS and "{i}" in WORDS[ours]:
            each = [take(WORDS[ours].format(i=i), shape[1:]) for i in range(shape[0])]
            value = np.stack(each)
        elif ours in WORDS:
            value = take(WORDS[ours], shape)
        elif part == "words":  # filter_3, filter_bias_3
            i = kind.rpartition("_")[2]
            if kind.startswith("filter_bias"):
                value = take(f"CNN/b_cnn_{i}", shape)
            else:
                value = take(f"CNN/W_cnn_{i}", (1, *shape))[0]
        else:
            each = []
            for i in range(cfg.layers):
                cell = CELL.format(direction=int(part == "backward"), i=i)
                if kind == "project":
                    each.append(take(f"{cell}/W_P_0", shape[1:]))
                elif kind == "bias":
                    each.append(take(f"{cell}/B", (4 * H,)).reshape(4, H))
                else:
                    both = take(f"{cell}/W_0", (2 * P, 4 * H)).reshape(2, P, 4, H)
                    each.append(both[int(kind == "hidden")])
            value = np.stack(each)
        params[tuple(ours.split("/"))] = value
    problems += [f"unexpected: {name}" for name in sorted(set(weights) - used)]
    if problems:
        raise ValueError(
            f"{len(set(problems))} array(s) do not fit {cfg}; read the config from the "
            "options.json beside them:\n  - " + "\n  - ".join(dict.fromkeys(problems))
        )
    return nested(params)

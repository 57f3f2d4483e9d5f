"""Makes elmo.npz: the ELMo test model of AllenNLP 0.9.0 and its published outputs.

    pip download --no-deps allennlp==0.9.0 && pip install h5py
    python -m tests.goldens.make_elmo allennlp-0.9.0-py3-none-any.whl

The weights, sentences and outputs are unchanged from the wheel, whose author is the
Allen Institute for Artificial Intelligence and whose licence is Apache-2.0.
"""

import io
import json
import pathlib
import sys
import zipfile

import h5py
import numpy as np

from t5x_lite.interop import elmo

FOLDER = "allennlp/tests/fixtures/elmo"


def main(wheel: str):
    with zipfile.ZipFile(wheel) as archive:

        def content(name: str) -> bytes:
            return archive.read(f"{FOLDER}/{name}")

        arrays = elmo.read(io.BytesIO(content("lm_weights.hdf5")))
        arrays = {f"weights/{name}": array for name, array in arrays.items()}
        sentences = json.loads(content("sentences.json"))
        for k in range(len(sentences)):
            with h5py.File(io.BytesIO(content(f"lm_embeddings_{k}.hdf5"))) as file:
                for i in range(len(sentences[k])):
                    arrays[f"top/{k}/{i}"] = np.asarray(file[str(i)])
        arrays["sentences"] = np.array(json.dumps(sentences))
        arrays["options"] = np.array(json.dumps(json.loads(content("options.json"))))
    path = pathlib.Path(__file__).with_name("elmo.npz")
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"wrote {path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])

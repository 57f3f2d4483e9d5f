"""Documents of TFDS and of Hugging Face's data sets."""

import itertools
import json
import pathlib
import sys
from typing import Any

import pytest

from t5x_lite.data import catalogue, sources
from t5x_lite.data.texts import Counts
from tests.source_files import TEXTS, read, write

# TFDS and Hugging Face


def make_tfds(folder, documents, file_format="array_record", shards=3):
    import numpy as np
    import tensorflow_datasets as tfds

    class LocalText(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            number = tfds.features.Tensor(shape=(), dtype=np.int32)
            features = {"text": tfds.features.Text(), "number": number}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            some, every = range(5), range(len(documents))
            return {
                k: self._generate_examples(r)
                for k, r in [("train", every), ("few", some)]
            }

        def _generate_examples(self, rows):
            yield from ((i, {"text": documents[i], "number": i}) for i in rows)

    # The builder would draw a bar for each shard.
    tfds.disable_progress_bar()
    builder = LocalText(data_dir=str(folder), file_format=file_format)
    config = tfds.download.DownloadConfig(num_shards=shards)
    builder.download_and_prepare(download_config=config)
    return builder


TFDS_TEXTS = [f"{t} {i}" for i, t in enumerate(TEXTS * 40)]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    return str(make_tfds(folder, [*TFDS_TEXTS, " ", b"caf\xe9"]).data_path)


def test_tfds_without_tensorflow(tfds_folder):
    import tensorflow_datasets as tfds

    spec = f"tfds:{tfds_folder}:train"
    files = sources.files(spec)
    assert len(files) == 3 and "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match=r"shard .*, row \d+: not UTF-8"):
        read(spec)
    found, counts = read(spec, bad_utf8="replace")
    assert counts == Counts(documents=len(TFDS_TEXTS) + 1, empty=1, repaired=1)
    assert sorted(found) == sorted([*TFDS_TEXTS, "caf\ufffd"])
    # The order is that of the data set, and a slice is the slice.
    builder: Any = tfds.builder_from_directory(tfds_folder)
    rows = builder.as_data_source(split="train")
    order = [r["text"].decode(errors="replace") for r in rows]
    assert found == [t for t in order if t.strip()]
    for slice in ["[10%:20%]", "[50:120]", "[:-30]"]:
        start, stop = {"[10%:20%]": (20, 40), "[50:120]": (50, 120)}.get(
            slice, (0, -30)
        )
        part = [t for t in order[start:stop] if t.strip()]
        assert read(spec + slice, bad_utf8="replace")[0] == part
    assert len(sources.files(f"{spec}[10%:20%]")) == 1


def test_tfds_by_name(tmp_path):
    import tensorflow_datasets as tfds

    builder = make_tfds(tmp_path, TEXTS, shards=1)
    tfds.core.add_data_dir(str(tmp_path))
    found, _ = read(f"tfds:{builder.name}:train[:3]")
    assert len(found) == 3 and set(found) < set(TEXTS)
    assert set(read(f"tfds:{builder.name}:few")[0]) == set(TEXTS)


def test_a_damaged_tfds_shard(tmp_path):
    builder = make_tfds(tmp_path, TFDS_TEXTS, shards=1)
    spec = f"tfds:{builder.data_path}:train"
    whole, _ = read(spec)
    (path,) = pathlib.Path(builder.data_path).glob("*-train*")
    content = path.read_bytes()
    for cut in [0, 1000, len(content) - 70_000, len(content) - 1]:
        write(path, content[:cut])
        with pytest.raises(ValueError, match="or after: the data set is broken"):
            read(spec)
    damaged = 0
    for at in range(0, len(content), 9973):  # riegeli hashes its chunks
        write(path, content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        try:
            assert read(spec)[0] == whole
        except ValueError as error:
            assert "the data set is broken" in str(error)
            damaged += 1
    assert damaged


def test_tfds_errors(tfds_folder, tmp_path, monkeypatch):
    def fails(spec, message, **options):
        with pytest.raises(ValueError, match=message):
            read(spec, **options)

    fails(f"tfds:{tfds_folder}:dev", r"Unknown split 'dev'.*\['few', 'train'\]")
    fails(f"tfds:{tfds_folder}:train[x]", "Splits: ")
    fails(f"tfds:{tfds_folder}", "is not of the form tfds:NAME")
    fails("tfds:no_such_set:train", "finds no data set 'no_such_set'.*TFDS_DATA_DIR")
    fails(f"tfds:{tfds_folder}:few", "Did you mean data.field='text'", field="texts")
    fails(f"tfds:{tfds_folder}:few", "holds int, not text", field="number")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    fails("tfds:wikipedia/20230601.en:train", r"t5x-lite\[tfds\]")
    monkeypatch.undo()
    # Parquet of TFDS counts its rows wrong, TFRecords need TensorFlow.
    info = pathlib.Path(tfds_folder, "dataset_info.json")
    for format, message in [
        ("parquet", "'parquet' are not read"),
        ("tfrecord", "TFRecords, which only TensorFlow reads.*file_format='array_reco"),
    ]:
        described = json.loads(info.read_text()) | {"fileFormat": format}
        write(tmp_path / "dataset_info.json", json.dumps(described).encode())
        write(tmp_path / "features.json", info.with_name("features.json").read_bytes())
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "tensorflow", None)
            fails(f"tfds:{tmp_path}:few", message)


def test_tfds_through_tensorflow(tmp_path):
    pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    for format in ["array_record", "tfrecord"]:
        builder = make_tfds(tmp_path / format, TFDS_TEXTS, format)
        spec = f"tfds:{builder.data_path}:train"
        assert sorted(read(spec)[0]) == sorted(TFDS_TEXTS)
        whole, _ = read(spec)
        assert read(f"{spec}[30:170]")[0] == whole[30:170]


def test_a_hugging_face_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(catalogue, "ROWS", 32)
    values = [*TFDS_TEXTS, " ", None]
    table = datasets.Dataset.from_dict({"text": values, "n": range(len(values))})
    table.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "splits")
    for spec in [f"hf:{tmp_path}/one", f"hf:{tmp_path}/splits:train"]:
        files = sources.files(spec)
        assert [f.rows for f in files] == list(
            itertools.pairwise([*range(0, 202, 32), 202])
        )
        found, counts = read(spec)
        assert found == TFDS_TEXTS and counts.empty == 2
        assert files == sources.files(spec)
        with pytest.raises(ValueError, match="no field .txt.*Did you mean .*'text'"):
            read(spec, field="txt")
        with pytest.raises(ValueError, match="holds int64, not text"):
            read(spec, field="n")
    for spec in [f"hf:{tmp_path}/splits:dev", f"hf:{tmp_path}/splits"]:
        with pytest.raises(ValueError, match=r"no split .*\['train'\]"):
            sources.files(spec)


def test_hugging_face_errors(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"t5x-lite\[datasets\]"):
        sources.files("hf:allenai/c4/en:train")
    with pytest.raises(ValueError, match="is not of the form hf:ORG"):
        sources.files("hf:allenai/c4")

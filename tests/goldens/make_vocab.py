"""Makes vocab.json: ids that transformers' tokenizers give `tests.vocab_kinds.TEXTS`.

    pip install -e '.[parity]' && python -m tests.goldens.make_vocab
    pip install transformers==4.49.0 && python -m tests.goldens.make_vocab albert

Version 4 for ALBERT: its AlbertTokenizer cuts text as ALBERT's authors do; that of
version 5 adds spaces behind quotes and takes "3," for one piece. vocab_bytebpe.json and
vocab_cased.txt are made first if they are not there, by `t5x_lite.vocab train`.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import transformers

from t5x_lite import vocab
from tests.vocab_kinds import FILES, GOLDENS, ROOT, TEXTS

PATH = GOLDENS / "vocab.json"
TRAINED = dict(bytebpe="bytebpe", cased="wordpiece")


def reference(name: str, folder: Path):
    """transformers' tokenizer of one of `FILES`, from a copy in `folder`."""
    path, kind = FILES[name]
    files = vocab.files(str(path))
    copies = {".txt": ["vocab.txt"], ".model": ["spiece.model"]}
    names = copies.get(path.suffix, ["vocab.json", "merges.txt"])
    for source, copy in zip(files, names, strict=True):
        shutil.copy(source, folder / copy)
    lower = {} if name != "cased" else dict(do_lower_case=False)
    return getattr(transformers, kind).from_pretrained(folder, **lower)


def ids(tokenizer) -> list[list[int]]:
    return [tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS]


def main(names: list[str]):
    for name, kind in TRAINED.items():
        if not FILES[name][0].exists():
            source = str(ROOT / "data/heldout.jsonl")
            vocab.train(source, 600, str(FILES[name][0]), kind=kind)
    found = json.loads(PATH.read_text()) if PATH.exists() else {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = reference(name, Path(folder))
            made_with = f"transformers {transformers.__version__}"
            found[name] = dict(made_with=made_with, ids=ids(tokenizer))
    rows = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in found.items()]
    PATH.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:] or [name for name in FILES if name != "albert"])

"""Our token ids against those of the installed transformers: `make parity`."""

import pytest

from t5x_lite import vocab
from tests import vocab_kinds

pytestmark = pytest.mark.parity


def texts() -> list[str]:
    lines = [line for text in vocab_kinds.heldout() for line in text.splitlines()]
    return [*vocab_kinds.TEXTS, *lines[:2000]]


@pytest.mark.parametrize("name", sorted(vocab_kinds.FILES))
def test_ids_equal_those_of_transformers(name, tmp_path):
    from tests.goldens import make_vocab  # imports transformers

    path = vocab_kinds.file(name)
    theirs = make_vocab.reference(name, tmp_path)
    (tmp_path / "saved").mkdir()
    theirs.save_pretrained(tmp_path / "saved")
    saved = vocab.load(str(tmp_path / "saved"), 100 if name == "t5" else 0)
    files = vocab.load(str(path))
    for text in texts():
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert saved.encode(text).tolist() == expected, text
        # Version 5 cuts ALBERT's text in its own way: see make_vocab.
        if name != "albert":
            assert files.encode(text).tolist() == expected, text

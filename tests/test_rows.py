"""Which rows of another table are ours."""

from t5x_lite import rows, vocab
from tests import vocab_kinds


def test_rows_of_pieces_are_found_by_their_text(tmp_path):
    lines = (vocab_kinds.GOLDENS / "vocab_cased.txt").read_text().splitlines()
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    mixed = ["new1", *lines[300:], "new2", *lines[:300]]
    (tmp_path / "b.txt").write_text("\n".join(mixed) + "\n")
    theirs = vocab.load(str(tmp_path / "a.txt"), 10)
    ours = vocab.load(str(tmp_path / "b.txt"), 20)
    found = rows.of_ids(ours, 640, theirs)
    for i, piece in enumerate(mixed):
        expected = -1 if piece.startswith("new") else lines.index(piece)
        assert found.low_T[i] == expected, piece
    for k in range(20):
        expected = theirs.sentinel(k) if k < 10 else -1
        # Four of these are marks, which the file has not: they are found as such.
        if ours.sentinel(k) >= ours.pieces + 4:
            assert found.low_T[ours.sentinel(k)] == expected
    for mark in vocab.MARKS:
        assert found.low_T[ours.special(mark)] == theirs.special(mark)
    assert found.blank_T.tolist() == [i >= ours.size for i in range(640)]

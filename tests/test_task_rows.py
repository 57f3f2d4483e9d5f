"""Labelled tasks: pieces and characters, rows with marks, batches."""

import json

import numpy as np
import pytest

from t5x_lite import example, vocab
from t5x_lite.data import custom_tasks, head_rows, task_batches, task_readers, tasks
from t5x_lite.data.alignment import Aligner, cells_of
from tests import task_files, vocab_kinds
from tests.toy_task import opened

# ---- pieces and characters ----------------------------------------------------------

SENTENCES = (
    task_files.CONTEXT,
    "A naïve café costs 3,50 € (about $4); isn't that  \n fine?",
    "supercalifragilistic 東京は日本 x",
)


@pytest.mark.parametrize("kind", vocab_kinds.KINDS)
@pytest.mark.parametrize("text", SENTENCES)
def test_every_character_range_is_found_again(kind, text, tmp_path):
    """The pieces of a range cover it, and no fewer do; the ids are the whole text's."""
    words = vocab_kinds.load(kind, tmp_path)
    ids, places_T2 = Aligner(words).text(text)
    np.testing.assert_array_equal(ids, words.encode(" ".join(text.split())))
    assert (np.diff(places_T2[:, 0]) >= 0).all()
    rng = np.random.default_rng(0)
    for _ in range(50):
        start, end = sorted(rng.choice(len(text) + 1, 2, replace=False).tolist())
        found = cells_of(places_T2, start, end)
        inside = text[start:end].strip()
        if not inside:
            continue
        assert found is not None
        covered = text[places_T2[found[0], 0] : places_T2[found[1], 1]]
        assert inside in covered
        for first, last in ((found[0] + 1, found[1]), (found[0], found[1] - 1)):
            pieces = places_T2[first : last + 1]
            if len(pieces):
                bare = text[pieces[0, 0] : pieces[-1, 1]]
                # Pieces of one character (bytes) or of an unclear word stand together.
                assert inside not in bare or bare == covered


@pytest.mark.parametrize("kind", vocab_kinds.KINDS)
def test_the_first_piece_of_a_word_begins_it(kind, tmp_path):
    words = vocab_kinds.load(kind, tmp_path)
    sentence = ["The", "Broncos", "did", "n't", "win", ",", "(", "surprisingly", ")"]
    ids, firsts_W = Aligner(words).words(sentence)
    assert firsts_W[0] == 0 and (np.diff(firsts_W) > 0).all()
    ends = [*firsts_W[1:], len(ids)]
    for word, first, end in zip(sentence, firsts_W, ends, strict=True):
        text = words.decode(ids[first:end]).strip()
        assert text.replace(" ", "").lower() == word.lower() or words.unk_id in ids


# ---- rows with marks ----------------------------------------------------------------


def test_marks_are_those_of_the_papers():
    words = vocab.load("bytes")
    cls, sep, bos = (words.special(m) for m in ("cls", "sep", "bos"))
    a, b = np.array([10, 11]), np.array([12])

    def made(structure, *parts):
        tokens, types, firsts, pooled = head_rows.frame([*parts], structure, words)
        return tokens.tolist(), types.tolist(), firsts, pooled

    assert made("encoder", a) == ([cls, 10, 11, sep], [0, 0, 0, 0], [1], 0)
    assert made("encoder", a, b) == (
        [cls, 10, 11, sep, 12, sep],
        [0, 0, 0, 0, 1, 1],
        [1, 4],
        0,
    )
    for structure in ("decoder", "prefix_lm"):
        assert made(structure, a, b) == (
            [bos, 10, 11, sep, 12, cls],
            [0, 0, 0, 0, 1, 1],
            [1, 4],
            5,
        )
    tokens = [words.pad_id, 10, 11, sep, 12, words.eos_id]
    assert made("encoder_decoder", a, b) == (tokens, [0, 0, 0, 0, 1, 1], [1, 4], 5)
    tokens, types, firsts, pooled = made("permuted", a, b)
    assert tokens == [10, 11, sep, 12, sep, cls] and types == [0, 0, 0, 1, 1, 2]
    assert (firsts, pooled) == ([0, 3], 5)


def test_cutting_is_that_of_bert():
    """The loop of the released code: take the last token of the longer one."""
    for a in range(12):
        for b in range(12):
            for room in range(1, 20):
                first, second = [*range(a)], [*range(b)]
                while len(first) + len(second) > room:
                    (first if len(first) > len(second) else second).pop()
                cut = head_rows.cut([np.arange(a), np.arange(b)], room)
                assert [len(part) for part in cut] == [len(first), len(second)]


def maker(name, head, structure="encoder", length=32, stride=5, spec="bytes"):
    words = vocab.load(spec)
    return head_rows.RowMaker(tasks.TASKS[name], head, structure, words, length, stride)


@pytest.mark.parametrize("structure", ["encoder", "decoder", "encoder_decoder"])
@pytest.mark.parametrize("length", [24, 40, 256])
def test_windows_cover_the_context_and_hold_the_answer(structure, length):
    make = maker("squad", "span", structure, length)
    context = task_files.CONTEXT
    answers = [(word, context.index(word)) for word in ("Broncos", "won", "“They”")]
    records = [
        {"question": "Who?", "context": context, "answers": [answer]}
        for answer in answers
    ] + [{"question": "Who?", "context": context, "answers": []}]
    rows = make.rows(records)
    for i, record in enumerate(records):
        mine = [row for row in rows if row.record == i]
        seen, hits = np.zeros(len(context), bool), 0
        for row in mine:
            assert len(row.tokens) <= length and row.characters is not None
            for begin, end in row.characters[row.characters[:, 1] >= 0]:
                seen[begin:end] = True
            first, last = row.span
            assert row.allowed is not None and row.allowed[first] and row.allowed[last]
            if first == row.pooled:
                continue
            hits += 1
            text = context[row.characters[first, 0] : row.characters[last, 1]]
            assert text == record["answers"][0][0]
        assert all(seen[j] or context[j].isspace() for j in range(len(context)))
        assert (hits > 0) == bool(record["answers"])
        # The answer is trained wherever all of it can be seen.
        for row in mine if record["answers"] else ():
            assert row.characters is not None
            text, start = record["answers"][0]
            cells = row.characters[row.characters[:, 1] >= 0]
            whole = cells[0, 0] <= start and cells[-1, 1] >= start + len(text)
            assert whole == (row.span[0] != row.pooled)


def test_tags_stand_at_first_pieces_and_are_cut_with_them():
    make = maker("ud_ewt", "tags", length=12)
    record = {"words": ["Dogs", "bark", "loudly"], "tags": ["NOUN", "VERB", "ADV"]}
    (row,) = make.rows([record])  # 10 bytes of "Dogs bark loudly"
    number = tasks.UPOS.index
    expected = [-1] * 12
    expected[1], expected[5], expected[10] = map(number, record["tags"])
    assert row.tags is not None and row.tags.tolist() == expected
    assert row.places is not None and row.places.tolist() == [1, 5, 10]
    assert make.cut == 1
    (row,) = maker("ud_ewt", "tags", length=11).rows([record])
    assert row.places is not None and row.places.tolist() == [1, 5, -1]


def test_choice_and_similarity_take_several_rows():
    make = maker("copa", "choice", length=200)
    record = {
        "premise": "The glass fell.",
        "choice1": "It broke.",
        "choice2": "It sang.",
        "question": "effect",
        "label": "choice2",
    }
    rows = make.rows([record])
    assert make.each == 2 and [row.label for row in rows] == [1, -1]
    texts = [vocab.load("bytes").decode(row.tokens[1:-1]) for row in rows]
    asked = "The glass fell. What happened as a result?"
    assert [t.split("<extra_id")[0] for t in texts] == [asked, asked]
    assert texts[0].endswith("It broke.") and texts[1].endswith("It sang.")
    make = maker("mrpc", "similarity", "decoder", length=40)
    record = {"sentence1": "ab", "sentence2": "cde", "label": "equivalent"}
    one, other = make.rows([record])
    assert (one.label, other.label) == (1, -1)
    words = vocab.load("bytes")
    sep = words.special("sep")
    parts = [
        np.split(r.tokens[1:-1], np.flatnonzero(r.tokens[1:-1] == sep))
        for r in (one, other)
    ]
    forth, back = ([p[0].tolist(), p[1][1:].tolist()] for p in parts)
    assert forth == back[::-1]


# ---- batches ------------------------------------------------------------------------


def segments(stream, field="tokens"):
    """(row, segment) -> its cells of a field, in the order of the rows."""
    for row in range(len(stream["segments"])):
        for segment in range(1, stream["segments"][row].max() + 1):
            yield stream[field][row][stream["segments"][row] == segment].tolist()


@pytest.mark.parametrize("structure", task_batches.TEXT)
def test_an_epoch_of_packed_text_holds_every_example_once(structure, tmp_path):
    _, words, train, _ = opened(tmp_path, structure)
    made, pad, eos = train.made, words.pad_id, words.eos_id
    assert isinstance(made, task_batches.TextExamples)
    expected = sorted(
        (i.tolist(), t.tolist()) for i, t in zip(made.inputs, made.targets, strict=True)
    )
    found, count = [], len(made)
    stack = train.examples(np.arange(count))
    example.check(stack, words.size)
    if structure == "encoder_decoder":
        decoder = stack["decoder"]
        found = sorted(
            zip(segments(stack["encoder"]), segments(decoder, "targets"), strict=True)
        )
        for read, written in zip(
            segments(decoder), segments(decoder, "targets"), strict=True
        ):
            assert read == [pad, *written[:-1]]
    else:
        main = stack["main"]
        for tokens, targets, weights, ranks in zip(
            *(segments(main, f) for f in ("tokens", "targets", "weights", "ranks")),
            strict=True,
        ):
            first = weights.index(1.0)
            written = [t for t, w in zip(targets, weights, strict=True) if w]
            assert tokens[first + 1 : first + len(written)] == written[:-1]
            assert tokens[first] == eos  # the inputs' own
            wanted = (
                [0] * (first + 1) if structure == "prefix_lm" else [*range(first + 1)]
            )
            assert ranks[: first + 1] == wanted
            assert ranks[first + 1 :] == [*range(first + 1, len(ranks))]
            found.append((tokens[: first + 1], written))
        found.sort()
    assert found == expected
    assert len(made) < len(expected)  # it is packed
    again = train.examples(np.arange(count, 2 * count))
    name = next(iter(stack))
    rows = [sorted(map(bytes, s[name]["tokens"])) for s in (stack, again)]
    assert rows[0] == rows[1]
    assert (stack[name]["tokens"] != again[name]["tokens"]).any()


def test_batches_are_a_function_of_seed_and_step(tmp_path):
    cfg, words, train, heldout = opened(tmp_path)
    again = task_batches.train(cfg, words)
    host = task_batches.train(cfg, words, np.array([1, 2, 6]))
    assert train.fingerprint == again.fingerprint != heldout.fingerprint
    for step in (0, 5, 1):
        for a, b in ((train[step], again[step]), (train.whole(step), train[step])):
            np.testing.assert_array_equal(a["fingerprint"], b["fingerprint"])
        part, whole = host[step], train[step]
        for field, values in whole["decoder"].items():
            np.testing.assert_array_equal(part["decoder"][field], values[[1, 2, 6]])
    last = heldout[len(heldout) - 1]
    filled = len(heldout) * 8 - len(heldout.made)
    assert filled > 0 and not last["decoder"]["weights"][-filled:].any()
    assert "cut to fit" not in train.describe()
    short = opened(tmp_path, data=dict(inputs_length=16))[2]
    assert "inputs cut to fit" in short.describe()


def test_rows_with_a_head_fill_up_with_nothing(tmp_path):
    data = dict(task_format="head")
    head = dict(head="class", classes=2)
    _, words, train, heldout = opened(tmp_path, "encoder", data, head)
    batch = heldout[len(heldout) - 1]["main"]
    example.check(heldout[len(heldout) - 1], words.size)
    filled = len(heldout) * 8 - len(heldout.made)
    assert (batch["labels"][8 - filled :] == -1).all()
    assert (batch["labels"][: 8 - filled] >= 0).all()
    assert not batch["weights"].any() and batch["places"].shape == (8, 1)
    labels = [train[i]["main"]["labels"] for i in range(3)]
    assert {0, 1} == {*np.concatenate(labels).tolist()}
    # GPT-1's auxiliary task: every next token of the row.
    _, words, train, _ = opened(
        tmp_path, "decoder", data, head, loss=dict(lm_weight=0.5)
    )
    main = train[0]["main"]
    for tokens, targets, weights in zip(
        main["tokens"], main["targets"], main["weights"], strict=True
    ):
        n = int((tokens != words.pad_id).sum())
        assert targets[: n - 1].tolist() == tokens[1:n].tolist()
        assert weights.sum() == n - 1 and weights[: n - 1].all()


REFUSED = {
    "structure": (dict(), dict(structure="encoder"), "'text' .*structure='encoder'"),
    "head": (dict(), dict(head="class", classes=2), "'text' .*head='class' does not"),
    "no head": (dict(task_format="head"), {}, "model.head='' does not fit task toy"),
    "classes": (
        dict(task_format="head"),
        dict(head="class", classes=3),
        "classes=3: task toy with head 'class' has 2. Set it to 2",
    ),
    "unknown": (dict(tasks=("toi",)), {}, "no task 'toi'; did you mean 'toy'. Tasks"),
    "two": (
        dict(tasks=("toy", "rte"), task_format="head"),
        dict(head="class", classes=2),
        "one task is trained at a",
    ),
    "custom key": (
        dict(custom_tasks=dict(toy=dict(trian="x"))),
        {},
        "'trian' is no key; did",
    ),
    "custom kind": (
        dict(custom_tasks=dict(toy=dict(train="x.parquet", inputs=("a",)))),
        {},
        "train='x.parquet'; allowed are .tsv",
    ),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_does_not_go_together_is_refused(kind, tmp_path):
    data, model, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, "encoder_decoder", data, model)


def test_a_task_of_ones_own_may_be_tags_numbers_or_jsonl(tmp_path):
    lines = [{"w": ["a", "b"], "t": ["X", "Y"], "n": 1.5, "s": "a b"}] * 3
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    path = str(tmp_path / "t.jsonl")
    table = {
        "tag": dict(
            train=path,
            dev=path,
            inputs=("w",),
            label="t",
            classes=("X", "Y"),
            head="tags",
        ),
        "num": dict(train=path, dev=path, inputs=("s",), label="n", head="regression"),
    }
    table["text"] = dict(train=path, dev=path, inputs=("s",), label="s", head="")
    tag, num, text = (custom_tasks.find(name, table) for name in table)
    assert (text.metrics, text.heads) == (("exact_match",), ())
    (record, *_) = task_readers.read(text.source, "", "dev")
    assert tasks.text_of(text, record) == ("text s: a b", "a b")
    (record, *_) = task_readers.read(tag.source, "", "dev")
    assert tasks.text_of(tag, record) == ("tag: a b", "X Y")
    (record, *_) = task_readers.read(num.source, "", "train")
    assert tasks.text_of(num, record) == ("num s: a b", "1.6")

"""Labelled tasks: files, splits, T5's texts, rows with marks, batches."""

import csv
import json
import pathlib

import numpy as np
import pytest

from t5x_lite import example, vocab
from t5x_lite.data import custom_tasks, head_rows, task_batches, task_readers, tasks
from t5x_lite.data.alignment import Aligner, cells_of
from tests import task_files, vocab_kinds
from tests.tiny import tiny_config

SHARED = pathlib.Path(__file__).resolve().parents[1].parent / "shared/data/tasks"
REAL = (
    *("subjectivity", "ud_ewt", "xquad_en", "e2e_nlg"),
    pytest.param("sentence_polarity", marks=pytest.mark.slow),
    pytest.param("libreoffice_en_de", marks=pytest.mark.slow),
    pytest.param("pep_titles", marks=pytest.mark.slow),
)


def shared(name: str) -> str:
    if not (SHARED / name).exists():
        pytest.skip("the tasks' files are not in ../shared/data/tasks")
    return str(SHARED)


# ---- T5's texts ---------------------------------------------------------------------

# Raffel et al. 2020, appendix D, and the tests of the released preprocessors.
T5_TEXTS = {
    "cola": (
        {"sentence": "John made Bill master of himself.", "label": "acceptable"},
        "cola sentence: John made Bill master of himself.",
        "acceptable",
    ),
    "sst2": (
        {"sentence": "it confirms fincher 's status .", "label": "positive"},
        "sst2 sentence: it confirms fincher 's status .",
        "positive",
    ),
    "mnli": (
        {
            "hypothesis": "The St. Louis Cardinals have always won.",
            "premise": "yeah well losing is i mean",
            "label": "contradiction",
        },
        "mnli hypothesis: The St. Louis Cardinals have always won. premise: yeah well "
        "losing is i mean",
        "contradiction",
    ),
    "qnli": (
        {
            "question": "Where did Jebe die?",
            "sentence": "Jebe died on the road back to Samarkand.",
            "label": "entailment",
        },
        "qnli question: Where did Jebe die? sentence: Jebe died on the road back to "
        "Samarkand.",
        "entailment",
    ),
    "stsb": (
        {
            "sentence1": "Representatives for Puretunes could not be reached.",
            "sentence2": "Puretunes representatives could not be located.",
            "value": 3.25,
        },
        "stsb sentence1: Representatives for Puretunes could not be reached. "
        "sentence2: "
        "Puretunes representatives could not be located.",
        "3.2",
    ),
    "stsb ": (
        {"sentence1": "Big news.", "sentence2": "No idea.", "value": 1.66},
        "stsb sentence1: Big news. sentence2: No idea.",
        "1.6",
    ),
    "cb": (
        {
            "hypothesis": "Valence was helping",
            "premise": "Valence the void-brain, Valence the virtuous valet.",
            "label": "contradiction",
        },
        "cb hypothesis: Valence was helping premise: Valence the void-brain, Valence "
        "the virtuous valet.",
        "contradiction",
    ),
    "copa": (
        {
            "choice1": "Many citizens relocated to the capitol.",
            "choice2": "Many citizens took refuge in other territories.",
            "premise": "Political violence broke out in the nation.",
            "question": "effect",
            "label": "choice2",
        },
        "copa choice1: Many citizens relocated to the capitol. choice2: Many citizens "
        "took refuge in other territories. premise: Political violence broke "
        "out in the "
        "nation. question: effect",
        "choice2",
    ),
    "multirc": (
        {
            "paragraph": "<b>Sent 1: </b>Once upon a time, there was a squirrel named "
            "Joey.<br><b>Sent 2: </b>Joey loved to go outside and play with his cousin "
            "Jimmy.",
            "question": "Why was Joey surprised the morning he woke up for breakfast?",
            "answer": "There was only pie to eat",
            "label": "True",
        },
        "multirc question: Why was Joey surprised the morning he woke up for "
        "breakfast? "
        "answer: There was only pie to eat paragraph: Sent 1: Once upon a time, there "
        "was a squirrel named Joey. Sent 2: Joey loved to go outside and play with his "
        "cousin Jimmy.",
        "True",
    ),
    "record": (
        {
            "query": "It was @placeholder.",
            "entities": ["A", "B", "C"],
            "passage": "This is the passage\n@highlight\nAnother "
            "sentence.\n@highlight\n"
            "Third sentence.",
            "answers": ["A", "C"],
        },
        "record query: It was @placeholder. entities: A, B, C passage: This is the "
        "passage. Another sentence. Third sentence.",
        "A",
    ),
    "wsc": (
        {
            "text": "Mitchell asked Tom if he could lend some money.",
            "candidate": "Tom",
            "pronoun": "he",
            "place": 4,
        },
        "wsc: Mitchell asked Tom if *he* could lend some money.",
        "Tom",
    ),
    "wsc ": (
        {
            "text": "Carl borrowed a book, but the book was unreadable to him.",
            "candidate": "Carl",
            "pronoun": "him",
            "place": 10,
        },
        "wsc: Carl borrowed a book, but the book was unreadable to *him*.",
        "Carl",
    ),
    "libreoffice_en_de": (
        {"en": "That is good.", "de": "Das ist gut."},
        "translate English to German: That is good.",
        "Das ist gut.",
    ),
}


@pytest.mark.parametrize("name", sorted(T5_TEXTS))
def test_texts_are_those_of_t5(name):
    record, inputs, targets = T5_TEXTS[name]
    assert tasks.text_of(tasks.TASKS[name.strip()], record) == (inputs, targets)


def test_a_pronoun_that_is_not_where_it_should_be_is_refused():
    record = T5_TEXTS["wsc"][0] | {"place": 5}
    with pytest.raises(ValueError, match="word 5 .* is 'could', not 'he'"):
        tasks.text_of(tasks.TASKS["wsc"], record)


# ---- files --------------------------------------------------------------------------


@pytest.mark.parametrize("name", task_files.NAMES)
def test_published_layouts_are_read(name, tmp_path):
    """Every field that a text or a head needs is there, every label is a class."""
    task_files.write(name, tmp_path)
    task = tasks.TASKS[name]
    records = task_readers.read(task.source, str(tmp_path), "dev")
    assert records == task_readers.read(task.source, str(tmp_path), "train")
    assert records
    for record in records:
        inputs, targets = tasks.text_of(task, record)
        assert targets and inputs
        if task.heads and task.heads[0] in ("class", "choice"):
            assert record["label"] in task.classes
            assert all(tasks.parts_of(task, record))
    with pytest.raises(ValueError, match="without a labelled test split"):
        task_readers.read(task.source, str(tmp_path), "test")


def test_fields_are_the_published_columns(tmp_path):
    def first(name, i=0):
        task_files.write(name, tmp_path)
        return task_readers.read(tasks.TASKS[name].source, str(tmp_path), "dev")[i]

    assert first("cola", 1) == {"sentence": "Dog the sleeps.", "label": "unacceptable"}
    assert first("sst2") == {"sentence": 'a "warm film ', "label": "positive"}
    assert first("mrpc")["sentence1"] == 'She said "yes .'
    assert first("stsb", 1)["value"] == 0.34
    assert first("mnli") == {
        "premise": "He sat.",
        "hypothesis": "He did sit.",
        "label": "entailment",
    }
    assert first("boolq")["label"] == "True"
    assert first("record")["entities"] == ["Ann", "Bob"]
    assert first("multirc", 1) | {"group": ""} == {
        "paragraph": "<b>Sent 1: </b>Ann ran.<br><b>Sent 2: </b>Bob slept.<br>",
        "question": "Who ran?",
        "answer": "Bob",
        "label": "False",
        "group": "",
    }
    # QQP's file has lines that its own readers leave out.
    task_files.write("qqp", tmp_path)
    assert len(task_readers.read(tasks.TASKS["qqp"].source, str(tmp_path), "dev")) == 2


WRONG = {
    "label": (
        "rte",
        "0\ta\tb\tmaybe",
        r"line 2, column 'label': label 'maybe'.*entail",
    ),
    "columns": ("rte", "0\ta\tb", "line 2: 3 columns; allowed is 4"),
    "number": ("stsb", "0\t" * 9 + "five", "line 2, value: 'five' is no number"),
    "json": ("cb", "{", r"line 3: not JSON"),
    "array": ("cb", "[1]", r"line 3: list; allowed is an object"),
    "field": (
        "cb",
        '{"premise": "a"}',
        "line 3: no field 'hypothesis'; there is: premise",
    ),
    "string": (
        "cb",
        '{"premise": 3, "hypothesis": "a", "label": "neutral"}',
        "line 3, premise: 3; allowed is a string",
    ),
    "utf-8": ("cb", b"\xff\xfe", "not UTF-8"),
}


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_wrong_files_are_named_with_line_and_column(kind, tmp_path):
    name, line, message = WRONG[kind]
    task_files.write(name, tmp_path)
    source = tasks.TASKS[name].source
    path = tmp_path / source.train
    lines = path.read_bytes().splitlines()
    if source.layout == "tsv":
        lines = lines[:1]
    added = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join([*lines, added]) + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        task_readers.read(source, str(tmp_path), "train")
    assert str(path) in str(error.value)


def test_missing_and_renamed_files_are_named(tmp_path):
    source = tasks.TASKS["rte"].source
    with pytest.raises(FileNotFoundError, match="RTE/train.tsv: there is no such file"):
        task_readers.read(source, str(tmp_path), "train")
    task_files.write("rte", tmp_path)
    path = tmp_path / "RTE/train.tsv"
    path.write_text(path.read_text().replace("sentence2", "other"))
    with pytest.raises(ValueError, match="line 1: no column 'sentence2'"):
        task_readers.read(source, str(tmp_path), "train")


def test_an_answer_must_stand_where_the_file_says(tmp_path):
    wrong = task_files.squad("Denver Broncos", 5)
    (tmp_path / "train-v2.0.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="question q1: at character 5 .*'enver Bronc"):
        task_readers.read(tasks.TASKS["squad2"].source, str(tmp_path), "train")


# ---- splits -------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_drawn_splits_share_no_unit(name):
    source = tasks.TASKS[name].source
    folder = shared(source.train)
    splits = {s: task_readers.read(source, folder, s) for s in task_readers.SPLITS}
    units = {
        split: {str([record[name] for name in source.unit]) for record in found}
        for split, found in splits.items()
    }
    assert not units["train"] & units["dev"]
    if not source.test:
        assert not (units["train"] | units["dev"]) & units["test"]
        whole = sum(len(found) for found in splits.values())
        for split in ("dev", "test"):
            assert 0.05 < len(splits[split]) / whole < 0.2


def test_reviews_are_split_by_their_folds():
    source = tasks.TASKS["movie_reviews"].source
    folder = shared(source.train)
    for split, folds in dict(dev="9", test="8").items():
        found = task_readers.read(source, folder, split)
        assert {record["id"][2] for record in found} == {*folds}
        assert len(found) == 200 * len(folds)


def test_paragraphs_are_split_the_same_way_in_all_languages():
    def ids(language, split):
        source = tasks.TASKS[f"xquad_{language}"].source
        return [r["id"] for r in task_readers.read(source, shared(source.train), split)]

    for split in task_readers.SPLITS:
        assert ids("en", split) == ids("de", split)


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


def custom(folder: pathlib.Path, **more) -> dict:
    """A config's tables for a small TSV task of one's own."""
    rng = np.random.default_rng(0)
    with (folder / "toy.tsv").open("w", newline="") as f:
        rows = csv.writer(f, delimiter="\t")
        rows.writerow(["text", "label"])
        for i in range(70):
            label = ("good", "bad")[i % 2]
            rows.writerow([f"{i}{f' {label}' * int(rng.integers(2, 9))}", label])
    toy = dict(train=str(folder / "toy.tsv"), inputs=("text",), classes=("bad", "good"))
    return dict(
        tasks=("toy",),
        custom_tasks=dict(toy=toy | more),
        batch_size=8,
        inputs_length=64,
        targets_length=16,
    )


def opened(folder, structure="encoder_decoder", data=None, model=None, **sections):
    cfg = tiny_config(
        data=custom(folder) | (data or {}),
        model=dict(structure=structure, vocab_size=384) | (model or {}),
        **sections,
    )
    words = vocab.load("bytes")
    train = task_batches.train(cfg, words)
    return cfg, words, train, task_batches.heldouts(cfg, words)["toy"]


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
    "unknown": (dict(tasks=("toi",)), {}, "no task 'toi'; did you mean 'toy'"),
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

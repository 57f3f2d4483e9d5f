"""transformers' classes with a head for a task: which of ours they are, their names.

A row of COUNTERPARTS is one of their classes that computes what our head does (see
t5x_lite/heads.py), on the same cell. The body has the names of its family; the language
model's output, which they have not, is left out. `regression` is their class of one
output. `similarity` and a mix of layers are in none.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import heads
from t5x_lite.arrays import Lazy, Slot
from t5x_lite.config import ModelConfig
from t5x_lite.interop.tables import LINEAR, Row, Rows, Table, dense, under


class Counterpart(NamedTuple):
    """One of their classes.

    Attributes:
        name: of the class.
        rows: our head's parameters.
        prefix: what it puts before the names of the body.
        config: keys of its config.json on which the head depends.
        note: what must be given to it, so that it reads the cell that ours reads.
    """

    name: str
    rows: Rows
    prefix: str = ""
    config: Mapping[str, Any] = {}
    note: str = ""


READ_AGAIN = (
    "our decoder reads the text up to its end, theirs without its EOS unless it is "
    "given: of x = [start, text, EOS] and its mask m, decoder_input_ids=x,"
)


def _linear(theirs: str) -> Rows:
    return dense("head/kernel", theirs, bias="head/bias")


def _pooled(pooler: str, last: str) -> Rows:
    return dense("head/pooler", pooler) | _linear(last)


def _bert(name: str, pooler: str, span: str = "QuestionAnswering"):
    """BERT's four classes."""
    pooled = _pooled(pooler, "classifier")
    return {
        "class": Counterpart(f"{name}ForSequenceClassification", pooled),
        "choice": Counterpart(f"{name}ForMultipleChoice", pooled),
        "tags": Counterpart(f"{name}ForTokenClassification", _linear("classifier")),
        "span": Counterpart(f"{name}For{span}", _linear("qa_outputs")),
    }


def _xlnet():
    four = _bert("XLNet", "sequence_summary.summary", "QuestionAnsweringSimple")
    summary = dict(summary_type="last", summary_use_proj=True)
    for head in ("class", "choice"):
        four[head] = four[head]._replace(
            rows=_pooled("sequence_summary.summary", "logits_proj"),
            config=summary | dict(summary_activation="tanh"),
            note="it reads the last cell: pad on the left",
        )
    return four


def _gpt(name: str):
    """Theirs has no bias: see `without_bias`."""
    note = "it reads the last token that is not config.pad_token_id"
    rows = {"head/kernel": Row("score.weight", LINEAR)}
    return {"class": Counterpart(f"{name}ForSequenceClassification", rows, note=note)}


def _seq2seq(name: str, prefix: str = ""):
    """Theirs gives the decoder the text without its end, and so reads a cell less."""
    pooled = _pooled("classification_head.dense", "classification_head.out_proj")
    return {
        "class": Counterpart(
            *(f"{name}ForSequenceClassification", pooled, prefix),
            note=f"{READ_AGAIN} input_ids=x, attention_mask=m[:, 1:], encoder_outputs="
            "model.get_encoder()(x[:, 1:], attention_mask=m[:, 1:])",
        ),
        "span": Counterpart(
            *(f"{name}ForQuestionAnswering", _linear("qa_outputs")),
            note=f"{READ_AGAIN} input_ids=x[:, 1:], attention_mask=m[:, 1:]",
        ),
    }


COUNTERPARTS: dict[str, dict[str, Counterpart]] = {
    "bert": _bert("Bert", "bert.pooler.dense"),
    "ernie": _bert("Ernie", "ernie.pooler.dense"),
    "roberta": {
        **_bert("Roberta", "roberta.pooler.dense"),
        "class": Counterpart(
            "RobertaForSequenceClassification",
            _pooled("classifier.dense", "classifier.out_proj"),
        ),
    },
    "albert": _bert("Albert", "albert.pooler"),
    "electra": {
        head: row
        for head, row in _bert("Electra", "").items()
        if head in ("tags", "span")
    },
    "xlnet": _xlnet(),
    "gpt": _gpt("OpenAIGPT"),
    "gpt2": {
        **_gpt("GPT2"),
        "tags": Counterpart("GPT2ForTokenClassification", _linear("classifier")),
        "span": Counterpart("GPT2ForQuestionAnswering", _linear("qa_outputs")),
    },
    "bart": _seq2seq("Bart"),
    "mbart": _seq2seq("MBart"),
    **{name.lower(): _seq2seq(name, "transformer.") for name in ("T5", "MT5", "UMT5")},
}
# (family, head) of a class of theirs that is in no row, and why.
_GELU = "its pooler computes gelu, ours tanh"
_ENCODER = "its tags are of the encoder, ours of the decoder"
WHY_NOT = {
    **{("electra", head): _GELU for head in ("class", "choice")},
    **{(family, "tags"): _ENCODER for family in ("t5", "mt5", "umt5")},
}
# How the names of their classes end.
ENDS = {
    r"ForSequenceClassification": "class",
    r"ForTokenClassification": "tags",
    r"ForMultipleChoice": "choice",
    r"ForQuestionAnswering\w*": "span",
}
# Our parameters of a language model, which classes with a head have not.
LANGUAGE_MODEL = r"(output|classes)/.*"


def find(family: str, head: str) -> Counterpart | None:
    """Their class for a head of ours, or None."""
    named = "class" if head == "regression" else head
    return COUNTERPARTS.get(family, {}).get(named)


def problems(family: str, cfg: ModelConfig) -> list[str]:
    """Why they have no class for this head, a line each."""
    row = find(family, cfg.head)
    if row is None:
        have = [*COUNTERPARTS.get(family, ())]
        have += ["regression"] if "class" in have else []
        why = WHY_NOT.get((family, cfg.head), "")
        there = ", ".join(sorted(have)) or "none"
        return [
            f"config.model.head={cfg.head!r}: no class of {family!r} there computes "
            f"it{why and f' ({why})'}; known of {family!r}: {there}"
        ]
    pooler = "head/pooler" in row.rows
    if cfg.head in heads.POOLED and cfg.head_pooler != pooler:
        return [f"config.model.head_pooler={cfg.head_pooler}, theirs has {pooler}"]
    return []


def table(family: str, whole: Table, head: str) -> Table:
    """The names in the class of this head, of those of the family's language model."""
    row = find(family, head)
    if row is None:  # `problems` has said so
        return whole
    body = {n: r for n, r in whole.rows.items() if not re.match(LANGUAGE_MODEL, n)}
    gone = {r.theirs for n, r in whole.rows.items() if n not in body}
    copies = {
        f"{row.prefix}{copy}": f"{row.prefix}{name}"
        for copy, name in whole.copies.items()
        if copy not in gone and name not in gone
    }
    return Table(
        under("", row.prefix, body) | row.rows,
        copies,
        tuple(f"({re.escape(row.prefix)})?{pattern}" for pattern in whole.unused),
        left=LANGUAGE_MODEL,
        zero=() if "head/bias" in row.rows else ("head/bias",),
    )


def head_of(family: str, theirs: Mapping[str, Any]) -> str:
    """Our head for the class that a config.json names; "" if it is a language model's.

    Raises:
      ValueError: a class whose head is none of ours.
    """
    named = theirs.get("architectures") or [""]
    name = named[0] if isinstance(named, list) and named else ""
    rows = COUNTERPARTS.get(family, {})
    for head, row in rows.items():
        if row.name != name:
            continue
        for key, value in row.config.items():
            if theirs.get(key, value) != value:
                raise ValueError(
                    f"config.json of {name} has {key}={theirs[key]!r}; our head has "
                    f"{key}={value!r} only. {_BODY}"
                )
        return head
    for end, head in ENDS.items():
        if isinstance(name, str) and re.search(f"{end}$", name):
            known = ", ".join(row.name for row in rows.values()) or "none"
            why = WHY_NOT.get((family, head), "")
            raise ValueError(
                f"config.json has architectures=[{name!r}], whose head is none of ours"
                f"{why and f': {why}'}. Known of {family!r}: {known}. {_BODY}"
            )
    return ""


_BODY = (
    "Take the body alone: AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR) and "
    "--from=hf:NEW_DIR --fresh."
)


def labels(theirs: Mapping[str, Any]) -> list[str]:
    """The names of the classes in a config.json, by their numbers; [] = none there.

    Its keys are texts, and some tools sort them so: "10" before "2".

    Raises:
      ValueError: id2label does not name the classes 0, 1, ...
    """
    named = theirs.get("id2label") or {}
    numbers = [str(i) for i in range(len(named))] if isinstance(named, dict) else []
    if not isinstance(named, dict) or {*named} != {*numbers}:
        raise ValueError(
            f"config.json has id2label={named!r}; an object with the keys "
            '"0", "1", ... is needed. Copy the model\'s own config.json there.'
        )
    return [str(named[i]) for i in numbers]


def fields(
    family: str,
    cfg: ModelConfig,
    theirs: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """What their class decides of our config.

    Args:
      cfg: with the head of `head_of`.

    Raises:
      ValueError: a loss that our head has not, no weights of a head, or names of
        more or fewer classes than these have.
    """
    head, row = cfg.head, find(family, cfg.head)
    assert row is not None
    name = row.rows["head/kernel"].theirs
    kernel = weights.get(name)
    if kernel is None:
        raise ValueError(
            f"config.json has architectures=['{row.name}'], but the files have no "
            f"{name}. Copy the model's own config.json there."
        )
    count, loss = len(np.atleast_1d(kernel)), theirs.get("problem_type")
    if head == "class" and (count == 1 or loss == "regression"):
        head = "regression"
    if loss == "multi_label_classification" or (head == "regression" and count > 1):
        raise ValueError(
            f"config.json has problem_type={loss!r} with {count} outputs; our heads "
            "have one class of each text, or one number. "
            f"{_BODY}"
        )
    names = labels(theirs)
    if names and head in ("class", "regression", "tags") and len(names) != count:
        raise ValueError(
            f"config.json has {len(names)} names in id2label, but {name} has {count} "
            "outputs. Copy the model's own config.json there."
        )
    found: dict[str, Any] = dict(head=head)
    found |= dict(classes=count if head in ("class", "tags") else 0)
    if head in heads.POOLED:
        found["head_pooler"] = "head/pooler" in row.rows
    found |= dict(choices=max(len(names), 2) if head == "choice" else 0)
    # There is no language model on top: nothing of it is drawn, if it need not be.
    return found | dict(
        tie_embeddings=True, output_bias=False, transform_output=bool(cfg.d_embed)
    )


def config(family: str, cfg: ModelConfig, labels: Sequence[str]) -> dict[str, Any]:
    """Keys of config.json: the class, the names of its classes, its loss."""
    row = find(family, cfg.head)
    assert row is not None
    count = cfg.choices or heads.outputs(cfg)
    names = list(labels) if len(labels) == count else []
    names = names or [f"LABEL_{i}" for i in range(count)]
    loss = dict(regression="regression", **{"class": "single_label_classification"})
    return dict(row.config) | dict(
        architectures=[row.name],
        id2label={str(i): name for i, name in enumerate(names)},
        label2id={name: i for i, name in enumerate(names)},
        problem_type=loss.get(cfg.head),
        tie_word_embeddings=True,
    )


def _last_norm(cfg: ModelConfig) -> str:
    """Ours; that of a block has all layers."""
    return "stack/norm" if cfg.norm_order == "pre" else "stack/blocks/mlp_norm"


def last_norm(table: Table, cfg: ModelConfig) -> set[str]:
    """Their names of scale and bias of the norm that `without_bias` changes."""
    rows = [table.rows[f"{_last_norm(cfg)}/{part}"] for part in ("scale", "bias")]
    return {row.theirs.format(i=cfg.decoder_layers - 1) for row in rows}


def without_bias(cfg: ModelConfig, params: Mapping[str, np.ndarray]) -> Lazy:
    """The same logits by a head whose bias is zero: the norm before it has more.

    GPT's classes have no bias b. W (h + d) = W h + b for the smallest such d, which the
    last norm's bias takes up; nothing else reads that norm.

    Raises:
      ValueError: b is not in the range of W.
    """
    slots = dict(Lazy.of(params).slots)
    bias_K = np.asarray(slots["head/bias"].read(), np.float64)
    kernel_DK = np.asarray(slots["head/kernel"].read(), np.float64)
    more_D = np.linalg.lstsq(kernel_DK.T, bias_K, rcond=None)[0]
    if not np.allclose(kernel_DK.T @ more_D, bias_K, rtol=1e-6, atol=1e-8):
        raise ValueError(
            "the head's bias cannot be moved into the norm before it, as theirs, which "
            "has none, needs: columns of head/kernel are dependent. Export the "
            "parameters with t5x_lite.export instead."
        )
    name = f"{_last_norm(cfg)}/bias"

    def moved(slot: Slot = slots[name]) -> np.ndarray:
        array = np.array(slot.read(), np.float32)
        last_D = array if array.ndim == 1 else array[-1]
        last_D += more_D.astype(np.float32)
        return array

    def zeros() -> np.ndarray:
        return np.zeros(len(bias_K), np.float32)

    slots[name] = slots[name]._replace(read=moved)
    slots["head/bias"] = slots["head/bias"]._replace(read=zeros)
    return Lazy(slots)

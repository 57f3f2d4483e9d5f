"""transformers' classes with a head and ours, live: `make parity`.

Rows are those that a task is trained on. Where theirs must be called in a certain way,
to read the same cell, it is called as the note says that `convert` prints.
"""

import json
import os
import secrets
from typing import Any

import numpy as np
import pytest

from t5x_lite import heads, model, parameters, vocab
from t5x_lite.config import ModelConfig
from t5x_lite.data import task_batches, tasks
from t5x_lite.interop import hf_config, huggingface, task_heads
from tests import hf_dirs, task_files
from tests.test_parity_convert import nested
from tests.tiny import tiny_config

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("strict_dtypes")]

SEED = int(os.environ.get("PARITY_SEED") or secrets.randbelow(2**31))
WITHIN = 2e-4
LENGTH = 48
IDS = dict(eos_token_id=1, decoder_start_token_id=0, bos_token_id=None)
RECORDS: dict[str, tuple[str, list[dict]]] = {
    "class": (
        "mnli",
        [
            dict(premise="He sat.", hypothesis="He did sit.", label="entailment"),
            dict(premise="Yes", hypothesis="No, a longer one.", label="neutral"),
            dict(premise="A", hypothesis="B", label="contradiction"),
        ],
    ),
    "regression": (
        "stsb",
        [
            dict(sentence1="A jet lands.", sentence2="A jet is landing.", value=5.0),
            dict(sentence1="A man eats.", sentence2="No.", value=0.3),
        ],
    ),
    "choice": (
        "copa",
        [
            dict(
                *({"premise": "The glass fell.", "choice1": "It broke."},),
                choice2="It sang a song.",
                question="effect",
                label="choice1",
            ),
            dict(
                *({"premise": "Wet.", "choice1": "It was noon."},),
                choice2="It rained.",
                question="cause",
                label="choice2",
            ),
        ],
    ),
    "tags": (
        "ud_ewt",
        [
            dict(words=["Dogs", "bark", "loudly"], tags=["NOUN", "VERB", "ADV"]),
            dict(words=["No"], tags=["INTJ"]),
        ],
    ),
    "span": (
        "squad",
        [dict(question="Who?", context=task_files.CONTEXT, answers=[("Broncos", 11)])],
    ),
}
CASES = [
    (family, head)
    for family, rows in task_heads.COUNTERPARTS.items()
    for head in (*rows, *(["regression"] if "class" in rows else []))
]
PRESETS = dict(
    bert="bert_base",
    ernie="bert_base",
    roberta="roberta_base",
    albert="albert_base",
    electra="bert_base",
    xlnet="xlnet_base",
    gpt="gpt",
    gpt2="gpt2",
    bart="bart_base",
    mbart="bart_base",
    t5="t5_small",
    mt5="t5_1_1_small",
    umt5="umt5_small",
)
EXACT = dict(activation="gelu_exact")
MORE: dict[str, dict] = dict(
    roberta=EXACT,
    albert=dict(d_embed=12),
    electra=EXACT | dict(d_embed=12),
    gpt=dict(d_ff=96),
    mbart=dict(norm_order="pre", scale_embedding=True),
)


def config(family: str, head: str) -> ModelConfig:
    from configs.models import PRESETS as SHAPES

    task = tasks.TASKS[RECORDS[head][0]]
    shape = SHAPES[PRESETS[family]] | hf_dirs.SMALL | MORE.get(family, {})
    shape |= dict(encoder_layers=2, decoder_layers=2, max_positions=LENGTH)
    shape |= dict(vocab_size=384, memory_length=0, classes=0, head=head, dropout=0.0)
    if head in ("class", "tags"):
        shape["classes"] = len(task.classes)
    if head == "choice":
        shape["choices"] = len(task.classes)
    return ModelConfig(**shape | dict(head_pooler=family not in ("gpt", "gpt2")))


def batch_of(cfg: ModelConfig) -> dict[str, Any]:
    """All rows that a task of this head is trained on."""
    name, records = RECORDS[cfg.head]
    whole = tiny_config(
        data=dict(inputs_length=LENGTH, task_format="head", stride=20),
        model=dict(structure=cfg.structure, head=cfg.head, classes=cfg.classes)
        | dict(choices=cfg.choices),
    )
    made = task_batches.HeadExamples(
        whole, vocab.load("bytes"), {name: tasks.TASKS[name]}, {name: records}
    )
    batch = made.streams(np.arange(len(made)))
    for stream in batch.values():
        if cfg.types and "types" in stream and cfg.structure == "encoder":
            stream["types"] = np.minimum(stream["types"], cfg.types - 1)
    return batch


def ours(cfg: ModelConfig, params: dict, batch: dict) -> np.ndarray:
    return np.asarray(model.bind(model.build(cfg), params).outputs(batch).head)


def theirs(net, family: str, cfg: ModelConfig, batch: dict) -> np.ndarray:
    """The logits of their class, called as its note says."""
    import torch  # pyright: ignore[reportMissingImports]

    def tensors(arrays: dict) -> dict:
        return {k: torch.tensor(v).long() for k, v in arrays.items()}

    stream = batch["decoder" if "decoder" in batch else "main"]
    tokens, mask = stream["tokens"], stream["segments"]
    given = dict(input_ids=tokens, attention_mask=mask)
    if cfg.types:
        given["token_type_ids"] = stream["types"]
    if family == "roberta":  # theirs counts tokens that are not 1, our EOS
        given["position_ids"] = stream["positions"] + 2
    if family == "xlnet" and cfg.head in heads.POOLED:
        ends = mask.sum(axis=1)
        given = {
            k: np.stack([np.roll(row, LENGTH - n) for row, n in zip(v, ends)])  # noqa: B905
            for k, v in given.items()
        }
    if cfg.structure == "encoder_decoder":
        short = dict(input_ids=tokens[:, 1:], attention_mask=mask[:, 1:])
        given = short | dict(decoder_input_ids=tokens)
        if cfg.head in heads.POOLED:
            given["input_ids"] = tokens
    if cfg.head == "choice":
        given = {k: v.reshape(-1, cfg.choices, LENGTH) for k, v in given.items()}
    with torch.no_grad():
        read = tensors(given)
        if cfg.structure == "encoder_decoder" and cfg.head in heads.POOLED:
            read["encoder_outputs"] = net.get_encoder()(**tensors(short))
        out = net(**read)
        if cfg.head == "span":
            return torch.stack([out.start_logits, out.end_logits], dim=-1).numpy()
        return out.logits.numpy()


def same(cfg: ModelConfig, found: np.ndarray, expected: np.ndarray, batch: dict):
    stream = batch["decoder" if "decoder" in batch else "main"]
    if cfg.head in ("tags", "span"):
        at = stream["segments" if cfg.head == "tags" else "allowed"] > 0
        found, expected = found[at], expected[at]
    # One logit of a few texts may be near 0 by chance, never within what is allowed.
    assert found.shape == expected.shape and np.abs(expected).max() > WITHIN
    np.testing.assert_allclose(found, expected, atol=WITHIN, rtol=0)


def loaded(path, name: str):
    """Their model, which must have used every tensor and drawn none."""
    import transformers  # pyright: ignore[reportMissingImports]

    net, info = getattr(transformers, name).from_pretrained(
        path, output_loading_info=True, attn_implementation="eager"
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    return net.eval()


def test_the_golden_names_are_transformers():
    from tests.goldens import make_heads

    golden = (make_heads.HERE / "heads.json").read_text()
    made = {
        f"{start}For{end}": make_heads.about(name, f"{start}For{end}")
        for name, (start, ends) in make_heads.CLASSES.items()
        for end in ends
    }
    assert made == json.loads(golden)


def fresh(out):
    out.mkdir()
    return out


@pytest.mark.parametrize("family, head", CASES)
def test_a_fine_tuned_run_of_ours_in_their_class(family, head, tmp_path):
    """Every parameter is drawn, biases too."""
    print(f"PARITY_SEED={SEED}")
    cfg, rng = config(family, head), np.random.default_rng(SEED)
    flat = {
        name: 0.3 * rng.standard_normal(p.get_value().shape, np.float32)
        for name, p in parameters.declared(model.build(cfg)).items()
    }
    flat["head/kernel"] *= 4  # [CLS] differs little from text to text
    labels = tasks.TASKS[RECORDS[head][0]].classes
    out = fresh(tmp_path / "out")
    given = IDS | dict(pad_token_id=0)
    huggingface.write(out, cfg, flat, family=family, theirs=given, labels=labels)
    row = task_heads.find(family, head)
    assert row is not None
    net = loaded(out, row.name)
    batch = batch_of(cfg)
    same(cfg, ours(cfg, nested(flat), batch), theirs(net, family, cfg, batch), batch)
    if labels:
        assert [net.config.id2label[i] for i in range(len(labels))] == list(labels)
    assert net.config.num_labels == len(labels or range(heads.outputs(cfg)))


@pytest.mark.parametrize("family, head", CASES)
def test_a_class_of_theirs_comes_in_with_its_head_and_goes_out(family, head, tmp_path):
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    print(f"PARITY_SEED={SEED}")
    torch.manual_seed(SEED)
    row = task_heads.find(family, head)
    assert row is not None
    shape = config(family, head)
    about = hf_config.write(family, shape)
    about = IDS | dict(pad_token_id=0, attn_implementation="eager") | about
    made = transformers.AutoConfig.for_model(str(about.pop("model_type")), **about)
    net = getattr(transformers, row.name)(made).eval()
    with torch.no_grad():
        for p in net.parameters():  # a norm's ones and biases of zero test nothing
            p.add_(0.2 * torch.randn_like(p))
    net.save_pretrained(tmp_path / "in")
    found = huggingface.read(tmp_path / "in")
    assert found.extras["family"] == family and found.cfg.head == head
    batch = batch_of(found.cfg)
    expected = theirs(net, family, found.cfg, batch)
    same(found.cfg, ours(found.cfg, nested(found.params), batch), expected, batch)

    out = fresh(tmp_path / "out")
    given = IDS | dict(pad_token_id=0)
    huggingface.write(out, found.cfg, found.params, family=family, theirs=given)
    again = loaded(out, row.name)
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    same(found.cfg, theirs(again, family, found.cfg, batch), expected, batch)

"""The stages of the study: which runs there are, and the config of each.

A body (structure) is trained on general text, goes on with the text of a domain, then
with the task's own text, and is then fine-tuned; `scratch` leaves out all three.
"""

import pathlib
from typing import Any, NamedTuple

from configs import base

STRUCTURES = {
    "encoder": dict(name="masked_lm"),
    "decoder": dict(name="causal_lm"),
    "encoder_decoder": dict(name="span_corruption", density=0.15, mean_span=3.0),
    "prefix_lm": dict(name="prefix_lm"),
}
STARTS = ("scratch", "general", "domain", "task")


class Task(NamedTuple):
    """A task of the study.

    head, classes: "" = as text, which encoders cannot.
    domain: the text of domain-adaptive training; "" = there is none.
    length, targets: tokens of the inputs, of the targets of a text task.
    score: the metric of the test split that is compared.
    """

    head: str
    classes: int
    domain: str
    length: int
    targets: int
    batch: int
    steps: int
    score: str


TASKS = {
    "sentence_polarity": Task("class", 2, "reviews", 64, 0, 16, 150, "accuracy"),
    "subjectivity": Task("class", 2, "reviews", 64, 0, 16, 150, "accuracy"),
    "ud_ewt": Task("tags", 17, "wiki", 64, 0, 16, 150, "tag_accuracy"),
    "xquad_en": Task("span", 0, "wiki", 256, 0, 8, 150, "squad_f1"),
    "libreoffice_en_de": Task("", 0, "help", 64, 64, 16, 300, "bleu"),
    "e2e_nlg": Task("", 0, "", 64, 64, 16, 300, "bleu"),
    "pep_titles": Task("", 0, "peps", 128, 24, 8, 200, "rouge1"),
}
GENERAL, DOMAIN, TASK = 1000, 200, 80  # steps of 32 x 128 tokens


def body(structure: str, root: pathlib.Path) -> Any:
    """What all runs of a structure share."""
    c: Any = base.get_config()
    layers = 2 if structure == "encoder_decoder" else 3
    c.model.update(
        dict(
            structure=structure,
            d_model=128,
            d_ff=256,
            heads=4,
            head_dim=32,
            encoder_layers=layers,
            decoder_layers=layers,
        )
    )
    c.data.vocab = str(root / "text/vocab.model")
    c.data.cache_dir = str(root / "stores")
    c.compile_cache = str(root / "compile_cache")
    return c


def pretrained(structure: str, text: str, steps: int, before: str, root: pathlib.Path):
    """The config of a stage on unlabelled text."""
    c = body(structure, root)
    base.set_objective(c, **STRUCTURES[structure])
    c.steps, c.eval_every, c.eval_batches, c.log_every = steps, steps, 8, 10
    c.checkpoint.every = 250
    c.data.update(
        dict(
            train=str(root / f"text/{text}_train.jsonl"),
            heldout=str(root / f"text/{text}_heldout.jsonl"),
            inputs_length=128,
            batch_size=32,
        )
    )
    rate, warmup = (1e-3, 10) if before else (2e-3, 100)
    base.adamw(c, rate, warmup, schedule="cosine", final_fraction=0.1)
    c.init_from, c.init_optimizer = before, "reset"
    c.init_forgetting = False
    return c


def tuned(structure: str, name: str, seed: int, before: str, root, data: str):
    """The config of the last stage: fine-tuning on the labelled task."""
    c, task = body(structure, root), TASKS[name]
    c.seed, c.steps, c.log_every = seed, task.steps, 10
    c.eval_every, c.eval_batches, c.checkpoint.every = task.steps, 40, task.steps
    c.data.update(
        dict(
            tasks=(name,),
            task_dir=data,
            task_format="head" if task.head else "text",
            inputs_length=task.length,
            targets_length=task.targets or 2,
            batch_size=task.batch,
        )
    )
    if task.head:
        c.model.head, c.model.classes = task.head, task.classes
    base.adamw(c, 1e-3, task.steps // 10, schedule="linear")
    c.init_from, c.init_optimizer = before, "reset"
    c.init_forgetting = seed == 0
    return c

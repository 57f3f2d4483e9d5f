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
    rate: float
    score: str


TASKS = {
    "sentence_polarity": Task("class", 2, "reviews", 64, 0, 8, 1000, 3e-4, "accuracy"),
    "subjectivity": Task("class", 2, "reviews", 64, 0, 8, 600, 3e-4, "accuracy"),
    "ud_ewt": Task("tags", 17, "wiki", 64, 0, 8, 300, 1e-3, "tag_accuracy"),
    "xquad_en": Task("span", 0, "wiki", 256, 0, 4, 150, 1e-3, "squad_f1"),
    "libreoffice_en_de": Task("", 0, "help", 64, 64, 8, 300, 1e-3, "bleu"),
    "e2e_nlg": Task("", 0, "", 64, 64, 8, 300, 1e-3, "bleu"),
    "pep_titles": Task("", 0, "peps", 128, 24, 8, 200, 1e-3, "rouge1"),
}
GENERAL, DOMAIN, TASK = 2500, 600, 200  # steps of 8 x 128 tokens


def body(structure: str, root: pathlib.Path) -> Any:
    """What all runs of a structure share."""
    c: Any = base.get_config()
    layers = 1 if structure == "encoder_decoder" else 2
    c.model.update(
        dict(
            structure=structure,
            d_model=128,
            d_ff=256,
            heads=4,
            head_dim=32,
            encoder_layers=layers,
            decoder_layers=layers,
            scale_attention=True,
            tie_embeddings=True,
            rescale_logits=False,
            init_std=0.02,
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
    c.checkpoint.every = 500
    c.data.update(
        dict(
            train=str(root / f"text/{text}_train.jsonl"),
            heldout=str(root / f"text/{text}_heldout.jsonl"),
            inputs_length=128,
            batch_size=8,
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
    c.eval_every = c.checkpoint.every = task.steps
    c.eval_batches = 0 if task.head else 40
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
    base.adamw(c, task.rate, task.steps // 10, schedule="linear")
    c.init_from, c.init_optimizer = before, "reset"
    c.init_forgetting = seed == 0
    return c

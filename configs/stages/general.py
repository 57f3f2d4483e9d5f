"""Stage 1 of 4, general text: a very small BERT on novels and scripture.

    for stage in general domain task labelled; do
        python -m t5x_lite.train --config=configs/stages/$stage.py \\
            --workdir=runs/stages/$stage
    done

General, domain-adaptive, task-adaptive, labelled (Gururangan et al. 2020): each config
names the workdir of the stage before it (config.init_from). The domain is a novel that
the general text has not, the task to tell speech from narration in another one
(data/stages/README.md).

2026-11-21, 2 CPU cores beside much other work, one seed: held-out loss 6.0055, unigram
predictor 6.2349; so this stage has hardly begun to read context, and what follows only
shows that the stages work together, see labelled.py."""

from typing import Any

from configs import base

RUNS = {"": "runs/stages", "smoke": "runs/stages-smoke", "study": "runs/stages-study"}


def get_config(arg=""):
    c: Any = base.get_config()
    base.set_objective(c, "masked_lm")
    c.model.update(
        dict(
            structure="encoder",
            d_model=64,
            d_ff=256,
            heads=4,
            head_dim=16,
            encoder_layers=2,
            init_std=0.02,
            positions="learned",
            max_positions=64,
            types=2,
            gated=False,
            activation="gelu_exact",
            bias=True,
            norm="layer",
            scale_attention=True,
            tie_embeddings=True,
            rescale_logits=False,
            transform_output=True,
            output_bias=True,
            embed_norm=True,
        )
    )
    c.data.vocab = "data/vocab_4k.model"
    c.data.inputs_length = 64
    c.data.batch_size = 16
    base.adamw(c, 3e-3, 50)
    c.steps, c.eval_every, c.checkpoint.every = 600, 200, 200
    return base.scaled(c, arg)


def follow(c: Any, stage: str, arg: str) -> Any:
    """Starts from the workdir of another stage, with its model."""
    c.init_from = f"{RUNS[arg]}/{stage}"
    return c

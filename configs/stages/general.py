"""Stage 1 of 4, general text: a small BERT on novels and scripture.

    python -m t5x_lite.train --config=configs/stages/general.py --workdir=runs/stages/general
    python -m t5x_lite.train --config=configs/stages/domain.py --workdir=runs/stages/domain
    python -m t5x_lite.train --config=configs/stages/task.py --workdir=runs/stages/task
    python -m t5x_lite.train --config=configs/stages/labelled.py --workdir=runs/stages/labelled

General, domain-adaptive, task-adaptive, labelled (Gururangan et al. 2020): each config
names the workdir of the stage before it (config.init_from). The domain is a novel that
the general text has not, the task to tell speech from narration in another one
(data/stages/README.md). RESULTS"""

from configs import base

RUNS = {"": "runs/stages", "smoke": "runs/stages-smoke", "study": "runs/stages-study"}


def get_config(arg=""):
    c = base.get_config()
    base.set_objective(c, "masked_lm")
    c.model.update(
        dict(
            structure="encoder",
            d_model=192,
            d_ff=768,
            heads=4,
            head_dim=48,
            encoder_layers=4,
            positions="learned",
            max_positions=128,
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
    c.data.inputs_length = 128
    c.data.batch_size = 16
    base.adamw(c, 1e-3, 100)
    c.steps, c.eval_every, c.checkpoint.every = 1500, 250, 250
    return base.scaled(c, arg)


def follow(c, stage: str, arg: str):
    """Starts from the workdir of another stage, with its model."""
    c.init_from = f"{RUNS[arg]}/{stage}"
    return c

"""MASS-base: a fragment of half the text (Song et al. 2019).

    python -m t5x_lite.train --config=configs/mass.py --workdir=runs/mass \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "mass_base")
    base.set_objective(c, "mass")
    base.adamw(c, 5e-4, 10_000, beta2=0.98)
    c.steps, c.data.batch_size = 125_000, 256
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

"""ELECTRA-small: replaced-token detection (Clark et al. 2020).

    python -m t5x_lite.train --config=configs/electra.py --workdir=runs/electra \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "electra_small")
    base.set_objective(c, "masked_lm", mask=0.85, random=0.0)
    base.adamw(c, 5e-4, 10_000)
    c.data.inputs_length = 128
    c.steps, c.data.batch_size = 1_000_000, 128
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

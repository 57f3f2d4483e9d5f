"""Prefix LM on one stack of T5's shape (Raffel et al. 2020, section 3.2.3).

    python -m t5x_lite.train --config=configs/prefix_lm.py --workdir=runs/prefix_lm \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "t5_prefix_base")
    base.set_objective(c, "prefix_lm")
    c.steps, c.data.batch_size = 524_288, 128
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

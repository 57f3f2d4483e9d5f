"""T5-Efficient-tiny: T5 v1.0's kind, 4+4 layers (Tay et al. 2021).

    python -m t5x_lite.train --config=configs/t5_efficient_tiny.py \\
        --workdir=runs/t5_efficient_tiny --config.data.train='corpus/*.jsonl' \\
        --config.data.heldout=heldout.jsonl

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "t5_efficient_tiny")
    c.steps, c.data.batch_size = 524_288, 128
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"  # the published T5 vocabulary: 32,000 pieces
    c.model.vocab_size = 0
    return base.scaled(c, arg)

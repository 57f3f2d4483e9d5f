"""T5 v1.0-small by span corruption, 512 inputs, 114 targets, Adafactor, 65,536 steps.

    python -m t5x_lite.train --config=configs/t5_small.py --workdir=runs/t5_small \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl \\
        --config.data.vocab=spiece.model

Hardware, wall time, held-out loss: not yet measured; not measured on GPU."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "t5_small")
    c.steps = 65_536
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"  # the published T5 vocabulary: 32,000 pieces
    c.data.batch_size = 128
    return base.scaled(c, arg)

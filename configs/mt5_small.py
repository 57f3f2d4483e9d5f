"""mT5-small: T5.1.1 with a multilingual vocabulary (Xue et al. 2021).

    python -m t5x_lite.train --config=configs/mt5_small.py --workdir=runs/mt5_small \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "mt5_small")
    c.steps, c.data.batch_size = 1_000_000, 1024
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"  # the published one: 250,000 pieces
    c.model.vocab_size = 0
    return base.scaled(c, arg)

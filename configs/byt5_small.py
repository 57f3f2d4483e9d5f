"""ByT5-small: span corruption of bytes, spans of 20 (Xue et al. 2022).

    python -m t5x_lite.train --config=configs/byt5_small.py --workdir=runs/byt5_small \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "byt5_small")
    base.set_objective(c, "span_corruption", density=0.15, mean_span=20.0)
    c.data.inputs_length = 1024
    c.steps, c.data.batch_size = 1_000_000, 1024
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "bytes"
    c.model.vocab_size = 0
    return base.scaled(c, arg)

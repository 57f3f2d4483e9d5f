"""ALBERT-base v2: n-gram masking and sentence order (Lan et al. 2020).

    python -m t5x_lite.train --config=configs/albert.py --workdir=runs/albert \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "albert_base")
    base.set_objective(c, "masked_lm", sentence="sop", ngrams=(6, 3, 2))
    base.adamw(c, 1.76e-3, 3_125, name="lamb")
    c.steps, c.data.batch_size = 125_000, 4096
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

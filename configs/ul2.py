"""UL2's mixture of denoisers on T5.1.1-base (Tay et al. 2022).

    python -m t5x_lite.train --config=configs/ul2.py --workdir=runs/ul2 \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

One stack instead: --config.model.structure=prefix_lm (or decoder).

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "t5_1_1_base")
    base.set_objective(c, "ul2")
    c.steps, c.data.batch_size = 500_000, 128
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

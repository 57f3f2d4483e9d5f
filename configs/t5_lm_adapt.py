"""LM adaptation: a trained T5.1.1 goes on as a prefix LM (Lester et al. 2021).

In the workdir of the finished run, 100,000 steps more:

    python -m t5x_lite.train --config=configs/t5_lm_adapt.py \\
        --workdir=runs/t5_1_1_small --config.checkpoint.accept_changes=True \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

`accept_changes` because the objective is another one from here on. The same two fields
on a run of `structure=prefix_lm` or `decoder` adapt those.

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`, from scratch) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "t5_1_1_small")
    base.set_objective(c, "prefix_lm")
    c.steps = 65_536 + 100_000
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"  # the published T5 vocabulary: 32,000 pieces
    c.data.batch_size = 128
    return base.scaled(c, arg)

"""NEZHA-base: functional relative positions, whole words (Wei et al. 2019).

    python -m t5x_lite.train --config=configs/nezha.py --workdir=runs/nezha \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "nezha_base")
    base.set_objective(c, "masked_lm", sentence="nsp", units="word")
    base.adamw(c, 1e-4, 10_000, name="lamb")
    c.steps, c.data.batch_size = 1_000_000, 256
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

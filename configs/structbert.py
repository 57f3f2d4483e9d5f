"""StructBERT-base: shuffled trigrams, next or previous or random (Wang et al. 2020).

    python -m t5x_lite.train --config=configs/structbert.py --workdir=runs/structbert \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "structbert_base")
    base.set_objective(c, "masked_lm", sentence="three_way", shuffle=0.05)
    base.adamw(c, 1e-4, 10_000)
    c.steps, c.data.batch_size = 1_000_000, 256
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

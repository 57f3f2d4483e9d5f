"""GPT: a causal LM with norms after the sublayers (Radford et al. 2018).

    python -m t5x_lite.train --config=configs/gpt.py --workdir=runs/gpt \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "gpt")
    base.set_objective(c, "causal_lm")
    base.adamw(c, 2.5e-4, 2_000, schedule="cosine")
    c.steps, c.data.batch_size = 100_000, 64
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

"""GPT-2 124M: a causal LM with norms before the sublayers (Radford et al. 2019).

    python -m t5x_lite.train --config=configs/gpt2.py --workdir=runs/gpt2 \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "gpt2")
    base.set_objective(c, "causal_lm")
    base.adamw(c, 6e-4, 2_000, schedule="cosine", weight_decay=0.1)
    c.data.inputs_length = 1024
    c.steps, c.data.batch_size = 100_000, 512
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

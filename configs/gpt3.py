"""GPT-3 125M: every second layer looks back over a band (Brown et al. 2020).

    python -m t5x_lite.train --config=configs/gpt3.py --workdir=runs/gpt3 \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "gpt3_125m")
    base.set_objective(c, "causal_lm")
    base.adamw(
        c,
        6e-4,
        715,
        schedule="cosine",
        final_fraction=0.1,
        weight_decay=0.1,
        beta2=0.95,
        eps=1e-8,
    )
    c.data.inputs_length = 2048
    c.steps, c.data.batch_size = 572_000, 256
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

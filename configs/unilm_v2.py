"""UniLM v2-base: pseudo-masked LM (Bao et al. 2020).

    python -m t5x_lite.train --config=configs/unilm_v2.py --workdir=runs/unilm_v2 \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "unilm_v2_base")
    base.set_objective(c, "pseudo_masked")
    base.adamw(c, 6e-4, 24_000, beta2=0.98)
    c.steps, c.data.batch_size = 500_000, 7680
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

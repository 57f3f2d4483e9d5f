"""MacBERT-base: similar words instead of [MASK], sentence order (Cui et al. 2020).

    python -m t5x_lite.train --config=configs/macbert.py --workdir=runs/macbert \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

    python -m t5x_lite.data.mining similar --data='corpus/*.jsonl' \\
        --vocab=spiece.model --output=similar.npy

and --config.objective.similar=similar.npy.

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "macbert_base")
    base.set_objective(
        c,
        "masked_lm",
        sentence="sop",
        units="word",
        decide="unit",
        ngrams=(4, 3, 2, 1),
        similar="data/similar_4k.npy",
    )
    base.adamw(c, 1e-4, 10_000)
    c.steps, c.data.batch_size = 1_000_000, 2048
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

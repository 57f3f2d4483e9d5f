"""ERNIE 1.0 of Baidu: phrases hidden as a whole (Sun et al. 2019).

    python -m t5x_lite.train --config=configs/ernie.py --workdir=runs/ernie \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

Its stages are three runs, each from the last one's checkpoint in the same workdir, with
config.objective.units=word and config.objective.spans='', then units=phrase, then
phrase with a file of entities as spans, all with
config.checkpoint.accept_changes=True; the phrases come from

    python -m t5x_lite.data.mining phrases --data='corpus/*.jsonl' \\
        --vocab=spiece.model --output=phrases.npz

and --config.objective.spans=phrases.npz.

Hardware, wall time, held-out loss: not yet measured; not measured on GPU. The small
version (`:study`) is in the README's table."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "ernie_base")
    base.set_objective(
        c,
        "masked_lm",
        sentence="nsp",
        units="phrase",
        decide="unit",
        spans="data/phrases_4k.npz",
    )
    base.adamw(c, 1e-4, 10_000)
    c.steps, c.data.batch_size = 1_000_000, 512
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

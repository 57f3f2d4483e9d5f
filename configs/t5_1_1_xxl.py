"""T5.1.1-XXL (11 B) by span corruption, 512 inputs, 114 targets, on 256 v5e chips.

    python -m t5x_lite.plan --config=configs/t5_1_1_xxl.py --topology=v5e:16x16
    python -m t5x_lite.train --config=configs/t5_1_1_xxl.py \\
        --workdir=runs/t5_1_1_xxl --config.data.train='corpus/*.jsonl' \\
        --config.data.heldout=heldout.jsonl --config.data.vocab=spiece.model

Batch 2048, a million steps, Adafactor: Raffel et al. 2020, section 3.6. Hardware, wall
time, held-out loss: not yet measured; not measured on TPU or GPU."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "t5_1_1_xxl")
    c.steps = 1_000_000
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.data.vocab = "spiece.model"  # the published T5 vocabulary: 32,000 pieces
    c.data.batch_size = 2048
    if not arg:  # the small versions take the devices there are
        c.sharding.update(dict(data=1, fsdp=-1))
    return base.scaled(c, arg)

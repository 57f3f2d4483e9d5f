"""BERT-large: masked LM with 80/10/10 and next sentence (Devlin et al. 2019).

    python -m t5x_lite.plan --config=configs/bert_large.py --topology=h100:8x8
    python -m t5x_lite.train --config=configs/bert_large.py --workdir=runs/bert_large \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

Hardware, wall time, held-out loss: not yet measured; not measured on TPU or GPU."""

from configs import base, bert


def get_config(arg=""):
    c = bert.get_config()
    base.set_model(c, "bert_large")
    c.model.dtype = "bfloat16"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

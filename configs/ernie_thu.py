"""ERNIE of Tsinghua: text fused with the entities it mentions (Zhang et al. 2019).

    python -m t5x_lite.train --config=configs/ernie_thu.py --workdir=runs/ernie_thu \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl \\
        --config.objective.entities=entities.npz

entities.npz holds mentions and, optionally, the entities' embeddings: see
`load_entities` in t5x_lite/objectives/entities.py. Without it, mined phrases serve:

    python -m t5x_lite.data.mining phrases --data='corpus/*.jsonl' \\
        --vocab=spiece.model --output=data/phrases_4k.npz

Embeddings of the file can be held fixed, as in the released code, with
config.optim.lr_rules=(("entity_embedding",0.0),(".*",1.0)). That code starts from
BERT's weights and goes through Wikipedia once, 256 examples of 256 tokens a step; here
all but the file's embeddings starts from random weights, and the steps are BERT's.

Hardware, wall time, held-out loss: not yet measured; not measured on GPU."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "ernie_thu_base")
    base.set_objective(
        c, "masked_lm_entities", sentence="nsp", entities="data/phrases_4k.npz"
    )
    base.adamw(c, 1e-4, 10_000)
    c.data.inputs_length = 256
    c.steps, c.data.batch_size = 1_000_000, 256
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0  # the published size belongs to the published vocabulary
    return base.scaled(c, arg)

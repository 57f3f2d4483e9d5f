"""Table 2 of the T5 paper: four architectures, two objectives, two config fields.

    python -m t5x_lite.train --config=configs/t5_table2.py --workdir=runs/table2 \\
        --config.data.train='corpus/*.jsonl' --config.data.heldout=heldout.jsonl

The cells (Raffel et al. 2020, section 3.2.4): `--config.model.structure=`
encoder_decoder | decoder | prefix_lm, the first also with
`--config.model.share_stacks=True`; times `--config.objective.name=` span_corruption |
prefix_lm, the paper's denoising and LM. A decoder's LM predicts everything:
`--config.data.train_inputs=True`.

Hardware, wall time, held-out loss: not yet measured; not measured on GPU."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    base.set_model(c, "t5_base")
    base.set_objective(c, "span_corruption")  # 15 % noise, spans of 3
    c.steps, c.data.batch_size = 524_288, 128
    c.eval_every = 2_000
    c.checkpoint.keep_every = 10_000
    c.model.dtype = "bfloat16"
    c.data.vocab = "spiece.model"
    c.model.vocab_size = 0
    return base.scaled(c, arg)

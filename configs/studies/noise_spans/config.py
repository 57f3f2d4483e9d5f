"""Noise density and span length of span corruption (T5's Tables 6 and 7), equal FLOPs.

    python -m t5x_lite.study run --config=configs/studies/noise_spans/config.py

An encoder-decoder of 2 + 2 layers of width 64 on bytes, of which a piece of T5's
vocabulary has about four: spans of 8, 12, 20 and 40 bytes stand for its 2, 3, 5 and 10
pieces, and `iid` hides single bytes. The objectives' own losses are of different
targets; what is compared is the continuation of a text, as in configs/studies/table2:
63 bytes are read, the next 63 predicted, after 60 steps of training on that
(`continuation`). Beside it T5's baseline task without further training (`baseline`:
15 % in spans of 12).

Run 2026-11-21 on one of two CPU cores that did other work too, 16 minutes for 24 runs.
Nats per byte of the continuation, mean and standard deviation of three seeds (the
unigram predictor: 3.110):

| density, spans of 12 | | 15 %, length of spans | |
| --- | --- | --- | --- |
| 10 % | 2.547 ± 0.008 | i.i.d. bytes | 2.863 ± 0.007 |
| 15 % | 2.534 ± 0.015 | 8 | 2.554 ± 0.006 |
| 25 % | 2.542 ± 0.004 | 12 | 2.534 ± 0.015 |
| 50 % | 2.590 ± 0.003 | 20 | 2.503 ± 0.042 |
| | | 40 | 2.483 ± 0.053 |

As in the paper, 10, 15 and 25 % cannot be told apart (Games-Howell, 5 %), and every
kind of span is better than i.i.d. (by 0.27 to 0.38, though a hidden byte is less than a
hidden piece). 50 % is worse than 10 and 25 % (by 0.043 and 0.048) but cannot be told
from 15 %, whose seeds differ by more. Longer spans have the lower mean, but no two
lengths can be told apart. All stand near what the byte before tells (2.4 to 2.6), so
this is about the begin of training. report.html has it all.
"""

from t5x_lite.studies import grid, ladders

BUDGET = 5e11
TASKS = {"iid_15": {"name": "iid_denoising", "density": 0.15, "style": "spans"}} | {
    f"spans{span}_{round(100 * density)}": {
        "name": "span_corruption",
        "density": density,
        "mean_span": float(span),
    }
    for density, span in (
        *((0.1, 12), (0.15, 12), (0.25, 12), (0.5, 12)),
        *((0.15, 8), (0.15, 20), (0.15, 40)),
    )
}
BASE = {
    "data.vocab": "bytes",
    "data.inputs_length": 256,
    "data.batch_size": 2,
    "eval_batches": 96,
    "optim.learning_rate": 3e-3,
    "model.structure": "encoder_decoder",
    "model.d_model": 64,
    "model.d_ff": 256,
    "model.heads": 4,
    "model.head_dim": 16,
}
CONTINUE = {
    "objective": {"name": "prefix_lm", "split": "fixed", "share": 0.5},
    "data.inputs_length": 64,
    "data.batch_size": 8,
    "eval_batches": 48,
    "steps": 60,
    "eval_every": 60,
    "checkpoint.every": 60,
    "optim.learning_rate": 1e-3,
    "optim.warmup_steps": 6,
}
BASELINE = {"objective": TASKS["spans12_15"]}


def get_study():
    cells = {}
    for name, task in TASKS.items():
        overrides = {"objective": task}
        common = ladders.base("configs/t5_table2.py:study", BASE | overrides)
        cells[name] = ladders.at_flops(common, BUDGET, overrides)
    return grid.Study(
        name="noise_spans",
        config="configs/t5_table2.py:study",
        base=BASE,
        cells=cells,
        seeds=(0, 1, 2),
        evaluations={"baseline": BASELINE},
        adaptations={"continuation": grid.Adaptation(CONTINUE)},
        score="continuation_loss",
    )

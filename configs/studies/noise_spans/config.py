"""Noise density and span length of span corruption (T5's Tables 6 and 7), equal FLOPs.

    python -m t5x_lite.study run --config=configs/studies/noise_spans/config.py

An encoder-decoder of 2 + 2 layers of width 64 on bytes, of which a piece of T5's
vocabulary has about four: spans of 8, 12, 20 and 40 bytes stand for its 2, 3, 5 and 10
pieces, and `iid` hides single bytes. The objectives' own losses are of different
targets; what is compared is the continuation of a text, as in configs/studies/table2:
63 bytes are read, the next 63 predicted, after 60 steps of training on that
(`continuation`). Beside it T5's baseline task without further training (`baseline`:
15 % in spans of 12).

Hardware, hours, result: not yet run."""

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

"""Noise density and span length of span corruption (T5's Tables 6 and 7), equal FLOPs.

    python -m t5x_lite.study run --config=configs/studies/noise_spans/config.py

An encoder-decoder of 2 + 2 layers of width 64 on 4k pieces. The objectives' own losses
are of different targets; what is compared is the continuation of a text as in
configs/studies/table2 (`continuation`: after 30 steps of it), and beside it T5's
baseline task, 15 % in spans of 3 (`baseline`, no further training).

Hardware, hours, result: not yet run."""

from t5x_lite.studies import grid, ladders

BUDGET = 4e11
TASKS = {"iid_15": {"name": "iid_denoising", "density": 0.15, "style": "spans"}} | {
    f"spans{span}_{round(100 * density)}": {
        "name": "span_corruption",
        "density": density,
        "mean_span": float(span),
    }
    for density, span in (
        *((0.1, 3), (0.15, 3), (0.25, 3), (0.5, 3)),
        *((0.15, 2), (0.15, 5), (0.15, 10)),
    )
}
BASE = {
    "data.vocab": "data/vocab_4k.model",
    "data.inputs_length": 128,
    "data.batch_size": 16,
    "eval_batches": 16,
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
    "steps": 30,
    "eval_every": 30,
    "checkpoint.every": 30,
    "optim.learning_rate": 1e-3,
    "optim.warmup_steps": 3,
}
BASELINE = {"objective": TASKS["spans3_15"]}


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

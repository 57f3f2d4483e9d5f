"""A scaling law of a byte decoder: five budgets over two decades, three sizes for each.

    python -m t5x_lite.study run --config=configs/studies/scaling_law/config.py
    python -m t5x_lite.study fit --config=configs/studies/scaling_law/config.py

Five sizes, 16 of width for each layer but for l1_d32, heads 16 wide; 2 to 300 tokens
for each parameter beside the embeddings, at most 2.2 epochs. The largest budget is for
testing the prediction that the four others make.

Two rows of 128 bytes a step, since at these budgets steps are scarce: of 2, 4 and 8
rows with a rate of 4e-3 or 8e-3 (seed 0), l1_d32 at 3e10 FLOPs and l2_d32 at 3e11
reached 2.515 and 2.084 with 2 rows and 4e-3, and at best 2.744 and 2.125 with 4, 3.082
and 2.217 with 8. The rate falls with the root of the width, 4e-3 at 32.

Hardware, hours, result: not yet run."""

from t5x_lite.studies import grid, ladders

SHAPES = {  # name -> (depth, width)
    "l1_d16": (1, 16),
    "l1_d32": (1, 32),
    "l2_d32": (2, 32),
    "l3_d48": (3, 48),
    "l4_d64": (4, 64),
}
GRID = {  # budget in FLOPs -> shapes
    2e10: ("l1_d16", "l1_d32", "l2_d32"),
    6.3e10: ("l1_d16", "l1_d32", "l2_d32"),
    2e11: ("l1_d32", "l2_d32", "l3_d48"),
    6.3e11: ("l2_d32", "l3_d48", "l4_d64"),
    2e12: ("l2_d32", "l3_d48", "l4_d64"),
}
BASE = {
    "data.vocab": "bytes",
    "data.inputs_length": 128,
    "data.batch_size": 2,
    "eval_batches": 192,
    "model.max_positions": 128,
    "model.head_dim": 16,
}


def get_study():
    base = ladders.base("configs/gpt2.py:study", BASE)
    shapes = {}
    for name, (depth, width) in SHAPES.items():
        shape = ladders.shaped(base, depth=depth, width=width, ffn_ratio=4.0)
        rate = round(4e-3 * (32 / width) ** 0.5, 5)
        shapes[name] = shape | {"optim.learning_rate": rate}
    cells = {}
    for budget, names in GRID.items():
        cells |= ladders.isoflop(base, [budget], {name: shapes[name] for name in names})
    return grid.Study(
        name="scaling_law",
        config="configs/gpt2.py:study",
        base=BASE,
        cells=cells,
        seeds=(0, 1, 2),
    )

"""A scaling law of a byte decoder: five budgets over two decades, three sizes for each.

    python -m t5x_lite.study run --config=configs/studies/scaling_law/config.py
    python -m t5x_lite.study fit --help

Five sizes, 16 of width for each layer but for l1_d32, heads 16 wide; 2 to 200 tokens
for each parameter beside the embeddings. The largest budget is for testing the
prediction that the four others make.

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
    1.5e10: ("l1_d16", "l1_d32", "l2_d32"),
    5e10: ("l1_d16", "l1_d32", "l2_d32"),
    1.5e11: ("l1_d32", "l2_d32", "l3_d48"),
    5e11: ("l1_d32", "l2_d32", "l3_d48"),
    1.5e12: ("l2_d32", "l3_d48", "l4_d64"),
}
BASE = {
    "data.vocab": "bytes",
    "data.inputs_length": 128,
    "data.batch_size": 8,
    "eval_batches": 48,
    "model.max_positions": 128,
    "model.head_dim": 16,
    "optim.learning_rate": 4e-3,
}


def get_study():
    base = ladders.base("configs/gpt2.py:study", BASE)
    shapes = {
        name: ladders.shaped(base, depth=depth, width=width, ffn_ratio=4.0)
        for name, (depth, width) in SHAPES.items()
    }
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

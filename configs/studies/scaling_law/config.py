"""A scaling law of a byte decoder: five budgets over two decades, three sizes for each.

    python -m t5x_lite.study run --config=configs/studies/scaling_law/config.py
    python -m t5x_lite.study fit --config=configs/studies/scaling_law/config.py

Seven sizes with heads 8 wide; 1.4 to 1,450 tokens for each parameter beside the
embeddings, at most 1.7 epochs. The largest budget is for testing the prediction that
the four others make.

What came before: with learned positions, or fewer than some 300 steps, models stay on
the plateaus of single bytes and of pairs (3.08 and 2.4 nats: l1_d32 at 2e10 FLOPs gave
2.74, 3.08 and 3.01 with three seeds), so positions are relative here and the smallest
budgets have small models. Of 2, 4 and 8 rows a step, 2 were best by far (l2_d32 at 3e11
FLOPs, rate 4e-3: 2.08, 2.21, 2.27): steps are scarce.

Run 2026-11-21 on one of two CPU cores that did other work too, 20 minutes for 45 runs.
L(N, D) = E + A / N^alpha + B / D^beta (nats per byte, N total, intervals of 95 %): E
0.91 [0.38, 1.22], alpha 0.43 [0.24, 0.63], beta 0.45 [0.24, 0.68]; the best size grows
as C^0.52 [0.38, 0.65] by L(N, D), C^0.59 [0.55, 0.65] by the parabolas, C^0.50 [0.31,
0.94] by the envelope: size and tokens about equally, as Hoffmann et al. 2022 found.

Fitted without the largest budget (3.2 times the rest), L(N, D) predicts its best cell,
1.463, as 1.477 [1.369, 1.591]: +0.013 nats, 0.9 %; the other two with -0.061 and
+0.029. All lie in their intervals, and the best loss before was 1.619. The power law of
compute alone says 1.383 [1.224, 1.568], 5.5 % too low. Of 10 times the compute it says
1.25 [1.13, 1.36] with 233 thousand [113, 477] parameters: further than was tested.
Seeds differ by 0.016 nats. Bytes, one corpus of 2.9 MB, models of 4 to 225 thousand
parameters: the constants are of these. report.html has it all.
"""

from t5x_lite.studies import grid, ladders

SHAPES = {  # name -> (depth, width)
    "l1_d8": (1, 8),
    "l1_d16": (1, 16),
    "l1_d24": (1, 24),
    "l1_d32": (1, 32),
    "l2_d32": (2, 32),
    "l3_d48": (3, 48),
    "l4_d64": (4, 64),
}
GRID = {  # budget in FLOPs -> shapes
    1.5e10: ("l1_d8", "l1_d16", "l1_d24"),
    4.7e10: ("l1_d8", "l1_d16", "l1_d32"),
    1.5e11: ("l1_d16", "l1_d32", "l2_d32"),
    4.7e11: ("l2_d32", "l3_d48", "l4_d64"),
    1.5e12: ("l2_d32", "l3_d48", "l4_d64"),
}
BASE = {
    "data.vocab": "bytes",
    "data.inputs_length": 128,
    "data.batch_size": 2,
    "eval_batches": 192,
    "model.positions": "bias",
    "model.head_dim": 8,
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

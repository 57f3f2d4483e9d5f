"""Depth against width at equal parameters and equal FLOPs, in two structures.

    python -m t5x_lite.study run --config=configs/studies/depth_width/config.py

Every cell has 98,304 parameters beside embeddings and spends 4e11 FLOPs: d_ff makes the
parameters equal to within 1 %, the number of steps the compute. A decoder predicts the
next byte, an encoder-decoder (as deep on either side) corrupted spans, so losses
compare within a structure. Narrow and wide ones need not want the same learning rate,
so each shape has two and the lower loss counts. Does "grow depth first" (Tay et al.
2021) show here?

Run 2026-11-21 on one of two CPU cores that did other work too, 34 minutes for 48 runs.
Held-out nats per predicted byte, mean and standard deviation of three seeds, the better
rate of each shape:

| depth | decoder | encoder-decoder |
| ----- | ------- | --------------- |
| 1 | d96 1.875 ± 0.028 | d64 2.415 ± 0.010 |
| 2 | d64 1.899 ± 0.002 | d40 2.295 ± 0.010 |
| 4 | d48 1.953 ± 0.022 | d32 2.404 ± 0.062 |
| 8 | d32 2.095 ± 0.005 | d24 2.574 ± 0.042 |

"Grow depth first" does not show (Games-Howell, 5 %): 1, 2 and 4 layers of the decoder
cannot be told apart and 8 are worse than each; the encoder-decoder of 2 + 2 is better
than 1 + 1 and 8 + 8, and cannot be told from 4 + 4, whose seeds differ by more. At the
higher rate 8 + 8 vary by 0.14 and nothing counts against them. All decoders want the
higher of the two rates, so their best one may lie above it; a hundred thousand
parameters and 4e11 FLOPs say nothing of large models. report.html has it all.
"""

from t5x_lite.studies import costs, grid, ladders

PARAMETERS, BUDGET = 98_304, 4e11
WIDTHS = {1: 96, 2: 64, 4: 48, 8: 32}  # by depth, decoder: d_ff is 3 to 4 times that
STRUCTURES = {
    "decoder": {"objective": {"name": "causal_lm"}, "model.structure": "decoder"},
    "encdec": {
        "objective": {"name": "span_corruption", "density": 0.15, "mean_span": 6.0},
        "model.structure": "encoder_decoder",
    },
}
# An encoder-decoder has two stacks, and cross-attention: d_ff is 2 to 5 times these.
WIDTHS_OF_TWO = {1: 64, 2: 40, 4: 32, 8: 24}
BASE = {
    "data.vocab": "bytes",
    "data.inputs_length": 128,
    "data.batch_size": 4,
    "eval_batches": 96,
    "model.max_positions": 128,
    "model.positions": "bias",
    "model.head_dim": 8,
    "model.d_ff": 4 * 128,
}
RATES = {f"r{n}e3": {"optim.learning_rate": n / 1000} for n in (2, 4)}


def equal(base, width: int, depth: int) -> dict:
    """The shape whose d_ff makes the parameters those of all cells."""
    shape = ladders.shaped(base, width=width, depth=depth)

    def parameters(d_ff: int) -> int:
        one = costs.resolved(base, shape | {"model.d_ff": d_ff})
        return costs.parameters(one)["non_embedding"]

    each = parameters(2) - parameters(1)
    return shape | {"model.d_ff": 1 + round((PARAMETERS - parameters(1)) / each)}


def get_study():
    cells = {}
    for structure, overrides in STRUCTURES.items():
        common = ladders.base("configs/gpt2.py:study", BASE | overrides)
        widths = WIDTHS if structure == "decoder" else WIDTHS_OF_TWO
        for depth, width in widths.items():
            shape = equal(common, width, depth)
            cells[f"{structure}_l{depth}_d{width}"] = overrides | ladders.at_flops(
                common, BUDGET, shape
            )
    return grid.Study(
        name="depth_width",
        config="configs/gpt2.py:study",
        base=BASE,
        cells=cells,
        axes={"rate": RATES},
        seeds=(0, 1, 2),
    )

"""Depth against width at equal parameters and equal FLOPs, in two structures.

    python -m t5x_lite.study run --config=configs/studies/depth_width/config.py

Every cell has 98,304 parameters beside embeddings and spends 4e11 FLOPs: d_ff makes the
parameters equal to within 1 %, the number of steps the compute. A decoder predicts the
next byte, an encoder-decoder (as deep on either side) corrupted spans, so losses
compare within a structure. Narrow and wide ones need not want the same learning rate,
so each shape has two and the lower loss counts. Does "grow depth first" (Tay et al.
2021) show here?

Hardware, hours, result: not yet run."""

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
RATES = {"r2e3": {"optim.learning_rate": 2e-3}, "r4e3": {"optim.learning_rate": 4e-3}}


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

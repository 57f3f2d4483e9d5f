"""Architecture against objective: the grid of the T5 paper's Table 2, at equal FLOPs.

    python -m t5x_lite.study run --config=configs/studies/table2/config.py

Rows as in Raffel et al. 2020, section 3.2: an encoder-decoder (2 + 2 layers), one with
shared parameters, one of half the depth, a decoder and a prefix-LM (2 layers); each on
denoising (spans of 6 bytes, 15 %) and on language modelling. The compute of training
is the same for all, output layers included.

What is compared is a continuation: 63 bytes are read, the next 63 predicted, the same
text for every cell. No cell is trained on exactly that, so each goes on for 60 steps of
it first (`continuation`, a fresh optimizer); `untuned` is its loss before that.
`ordering` is fine-tuning on another task in the same way: the text from its bytes in
random order.

Hardware, hours, result: not yet run."""

from t5x_lite.studies import grid, ladders

BUDGET = 4e11
DEPTH, WIDTH = 2, 64
DENOISE = {"objective": {"name": "span_corruption", "density": 0.15, "mean_span": 6.0}}
LM = {"objective": {"name": "prefix_lm", "split": "uniform"}}
ENCODER_DECODER = {"model.structure": "encoder_decoder"}
ARCHITECTURES = {
    "encdec": ENCODER_DECODER,
    "shared": ENCODER_DECODER | {"model.share_stacks": True},
    "half": ENCODER_DECODER
    | {"model.encoder_layers": DEPTH // 2, "model.decoder_layers": DEPTH // 2},
    "decoder": {"model.structure": "decoder"},
    "prefix": {"model.structure": "prefix_lm"},
}
BASE = {
    "data.vocab": "bytes",
    "data.inputs_length": 128,
    "data.batch_size": 4,
    "eval_batches": 96,
    "optim.learning_rate": 3e-3,
    "model.d_model": WIDTH,
    "model.d_ff": 4 * WIDTH,
    "model.heads": WIDTH // 16,
    "model.head_dim": 16,
}
TUNED = {
    "steps": 60,
    "eval_every": 60,
    "checkpoint.every": 60,
    "data.batch_size": 8,
    "eval_batches": 48,
    "data.train_inputs": False,
    "optim.learning_rate": 1e-3,
    "optim.warmup_steps": 6,
}
CONTINUE = {
    "objective": {"name": "prefix_lm", "split": "fixed", "share": 0.5},
    "data.inputs_length": 64,
    "data.train_inputs": False,
}
SORT = {"objective": {"name": "deshuffling"}, "data.inputs_length": 64}


def get_study():
    cells = {}
    for architecture, shape in ARCHITECTURES.items():
        for objective, task in {"denoise": DENOISE, "lm": LM}.items():
            task = dict(task)
            if objective == "lm" and architecture == "decoder":
                task["data.train_inputs"] = True  # a decoder's LM predicts everything
            common = ladders.base("configs/t5_table2.py:study", BASE | shape | task)
            cells[f"{architecture}_{objective}"] = ladders.at_flops(
                common, BUDGET, shape | task
            )
    return grid.Study(
        name="table2",
        config="configs/t5_table2.py:study",
        base=BASE,
        cells=cells,
        seeds=(0, 1, 2),
        evaluations={"untuned": CONTINUE},
        adaptations={
            "continuation": grid.Adaptation(CONTINUE | TUNED),
            "ordering": grid.Adaptation(SORT | TUNED),
        },
        score="continuation_loss",
    )

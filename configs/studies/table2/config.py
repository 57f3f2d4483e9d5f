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

Run 2026-11-21 on one of two CPU cores that did other work too, 16 minutes for 30 runs.
Nats per byte of the continuation, mean and standard deviation of three seeds (the
unigram predictor: 3.110):

| architecture | denoising | language model |
| ------------ | --------- | -------------- |
| encoder-decoder | 2.557 ± 0.004 | 2.533 ± 0.012 |
| shared | 2.567 ± 0.016 | 2.540 ± 0.008 |
| half as deep | 2.516 ± 0.011 | 2.424 ± 0.019 |
| prefix-LM | 2.559 ± 0.004 | 2.471 ± 0.011 |
| decoder | 2.558 ± 0.004 | 2.077 ± 0.017 |

Which of the paper's orderings show: sharing costs little (0.010 and 0.007, not more
than noise). Which do not (Games-Howell, 5 %): denoising before language modelling
(reversed for half as deep, prefix-LM and decoder; for the other two the difference may
be noise), encoder-decoder before prefix-LM before decoder (no difference that counts
with denoising, reversed with language modelling), half the depth worse (reversed with
language modelling, where at equal compute it is trained on more text; no difference
that counts with denoising). Why: at 4e11 FLOPs all cells but one stand near what the
byte before tells (2.4 to 2.6), `ordering` included (2.42 to 2.57, as the continuation:
the input is not read yet); the decoder's language model alone, which learns from every
byte it reads, has begun to use its context. And the measure is a language model's. So
this says which cell learns first, not which is better when trained. A labelled task is
left to the fine-tuning stages. report.html has it all.
"""

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

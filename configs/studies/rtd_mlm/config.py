"""ELECTRA's replaced-token detection against a masked LM, at equal FLOPs.

    python -m t5x_lite.study run --config=configs/studies/rtd_mlm/config.py

The same encoder (2 layers of width 64) is trained as ELECTRA's discriminator, its
generator half as wide, or as a masked LM, with the same compute, generator included
(Clark et al. 2020, figure 2 right). A discriminator has no loss over the vocabulary, so
both are fine-tuned in the same way: the order of two pieces of a text (`order`: 200
steps; chance is a loss of 0.693), and 60 steps of a masked LM whose output layer is new
for both (`words`), which is closer to what the masked LM has learned.

Hardware, hours, result: not yet run."""

from t5x_lite.studies import grid, ladders

BUDGET = 1.5e12
MLM = {"name": "masked_lm", "mask": 0.85, "random": 0.0}
CELLS = {
    "rtd": {"objective": MLM, "model.generator_width": 0.5},
    "mlm": {"objective": MLM, "model.generator_width": 0.0},
}
BASE = {
    "data.vocab": "data/vocab_4k.model",
    "data.inputs_length": 128,
    "data.batch_size": 16,
    "eval_batches": 16,
    "model.d_embed": 0,
    "model.d_model": 64,
    "model.d_ff": 256,
    "model.heads": 4,
    "model.head_dim": 16,
}
HEAD = "output/.*"


def tuned(steps: int, **more) -> dict:
    return {
        "model.generator_width": 0.0,
        "steps": steps,
        "eval_every": steps,
        "checkpoint.every": steps,
        "optim.warmup_steps": steps // 10,
    } | more


def get_study():
    cells = {}
    for name, overrides in CELLS.items():
        common = ladders.base("configs/electra.py:study", BASE | overrides)
        cells[name] = ladders.at_flops(common, BUDGET, overrides)
    order = tuned(200, objective=MLM | {"sentence": "sop"})
    order["model.classes"] = 2
    return grid.Study(
        name="rtd_mlm",
        config="configs/electra.py:study",
        base=BASE,
        cells=cells,
        seeds=(0, 1, 2),
        adaptations={
            "words": grid.Adaptation(tuned(60), anew=HEAD),
            "order": grid.Adaptation(order, anew=HEAD),
        },
        score="words_loss",
    )

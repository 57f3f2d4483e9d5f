"""Does a learning rate that was tuned on a narrow decoder fit wider ones?

    python -m t5x_lite.study run --config=configs/studies/mup_transfer/config.py
    python -m configs.studies.mup_transfer.figure RESULTS.jsonl

Widths 32 (the base, where both parametrisations are one model), 96 and 256, seven
rates, under the standard parametrisation and muP. All cells see the same tokens.

Run 2026-11-21 on one of two CPU cores that did other work too, 13 minutes; of width 256
one seed of most rates (`--only=d256 --seeds=0`). Best rate and its held-out loss:

| width | standard | muP |
| ----- | -------- | --- |
| 32 | 0.0078: 3.10 | the same model |
| 96 | 0.0010: 2.69 | 0.0312: 3.10 |
| 256 | 0.0010: 2.51 | 0.0312: 3.10 |

No evidence for a transfer, since there was nothing to transfer: 150 steps leave the
base at what a unigram predictor knows (3.11), and muP makes the wide models learn as
the base does, at every rate (figure.png). Standard ones learn more, the wider the
faster, at an eighth of the base's best rate or less. It takes a base that learns in the
steps it is given; what speaks for the implementation is the coordinate check: flat
under muP, growing under the standard one (tests/test_mup.py; coordcheck.png: `study
coordcheck --config=configs/gpt2.py:study --sizes=32,64,128 --seeds=1 --steps=3
--config.data.batch_size=4 --config.data.inputs_length=32`).
"""

from t5x_lite.studies import grid

BASE_WIDTH, WIDTHS = 32, (32, 96, 256)
RATES = tuple(2.0**k for k in range(-10, -3))
BASE = {
    "data.vocab": "bytes",
    "data.inputs_length": 64,
    "data.batch_size": 8,
    "steps": 150,
    "eval_every": 150,
    "eval_batches": 40,
    "checkpoint.every": 150,
    "model.max_positions": 64,
    "model.decoder_layers": 2,
    "model.head_dim": 16,
    "optim.warmup_steps": 15,
    "optim.weight_decay": 0.0,
}


def get_study():
    cells = {}
    for width in WIDTHS:
        shape = {
            "model.d_model": width,
            "model.d_ff": 2 * width,
            "model.heads": width // 16,
        }
        ways = {"standard": {}}
        if width != BASE_WIDTH:
            ways["mup"] = {
                "model.parametrisation": "mup",
                "model.base_d_model": BASE_WIDTH,
            }
        for way, parametrisation in ways.items():
            for rate in RATES:
                cells[f"{way}_d{width}_r{rate:.4f}"] = (
                    shape | parametrisation | {"optim.learning_rate": rate}
                )
    return grid.Study(
        name="mup_transfer",
        config="configs/gpt2.py:study",
        base=BASE,
        cells=cells,
        seeds=(0, 1, 2),
    )

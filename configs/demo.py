"""The demo: a small T5.1.1 on Austen and the King James Bible.   make demo

    python -m t5x_lite.train --config=configs/demo.py --workdir=runs/demo

2026-11-21, 2 CPU cores: 500 steps, held-out loss 4.3528 nats per target token, unigram
predictor 5.6851, 2 min 57 s with the install (revision 04fc3de); 4.3594 and 5 min 41 s
beside other work (revision 64bc7e2). Picked on this held-out
text: AdamW 3e-3 gave 4.5733 (400 steps, batch 32) and 4.6994 (500 steps, batch 16);
after 120 steps AdamW 6e-3 gave 5.1309 and Adafactor 0.03 4.8779 (part of the text)."""

from configs import base


def get_config(arg=""):
    c = base.get_config()
    c.steps = 500
    c.eval_every = 100
    c.checkpoint.every = 100
    c.data.vocab = "data/vocab_4k.model"
    c.data.inputs_length = 128
    c.data.batch_size = 16
    c.model.update(
        dict(
            d_model=192,
            d_ff=512,
            heads=4,
            head_dim=48,
            encoder_layers=3,
            decoder_layers=3,
        )
    )
    c.optim.name = "adafactor"  # rates are relative to a parameter's size
    c.optim.schedule = "cosine"
    c.optim.learning_rate = 0.03
    c.optim.warmup_steps = 50
    c.optim.final_fraction = 0.05
    c.optim.clip_norm = 1.0
    return base.scaled(c, arg)

"""A smaller decoder, alone and taught by the study's: size, speed, held-out loss.

    python -m configs.studies.real_tasks.distillation --root=ROOT

Students of one layer of width 64 read the general text for 1,000 steps: `alone`;
`logits`, which also learn what ROOT/general/decoder (`run.py` makes it) says; `hidden`,
which learn its layers' states as well. Writes distillation.json beside this file.
"""

import argparse
import json
import pathlib

from configs.studies.real_tasks import stages
from t5x_lite import config
from t5x_lite.studies import runner

VARIANTS = {
    "alone": {},
    "logits": dict(alpha=0.5, temperature=2.0),
    "hidden": dict(alpha=0.5, temperature=2.0, hidden=1.0),
}
STEPS = 1000


def cell(root: pathlib.Path, variant: str, seed: int):
    c = stages.pretrained("decoder", "general", STEPS, "", root)
    c.seed = seed
    c.model.update(decoder_layers=1, d_model=64, d_ff=128, heads=2)
    if variant != "alone":
        c.distill = VARIANTS[variant] | {"teacher": str(root / "general/decoder")}
    if variant == "hidden":
        c.model.distill_width = 128
    return config.freeze(c)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=pathlib.Path, required=True)
    root = parser.parse_args().root.absolute()
    found: dict[str, list] = {variant: [] for variant in VARIANTS}
    for seed in range(3):
        for variant, rows in found.items():
            workdir = root / "distillation" / f"{variant}-s{seed}"
            with runner.log_to(root / f"logs/distillation-{variant}-{seed}.txt"):
                scores = runner.trained(cell(root, variant, seed), workdir)
            row = {"heldout_loss": scores["heldout_loss"]}
            if variant != "alone":
                told = json.loads((workdir / "distillation.json").read_text())
                row |= {who: told[who] for who in ("teacher", "student")}
            rows.append(row)
            print(variant, seed, f"{scores['heldout_loss']:.4f}", flush=True)
    path = pathlib.Path(__file__).with_name("distillation.json")
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

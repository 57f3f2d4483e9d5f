"""Against forgetting: going on with a domain's text alone, with replay, with L2-SP.

    python -m configs.studies.real_tasks.forgetting --root=ROOT

A decoder that was trained on general text (`run.py` makes it in ROOT/general/decoder)
goes on with Python's PEPs for as many tokens in every variant: `plain`; `replay`, a
half of the examples from the general text; `l2_start`, a pull to the parameters that it
started from. Writes forgetting.json beside this file: held-out loss of the domain, and
of the general text before and after.
"""

import argparse
import json
import pathlib

import numpy as np

from configs import base
from configs.studies.real_tasks import stages
from t5x_lite import config
from t5x_lite.studies import runner

VARIANTS = ("plain", "replay", "l2_start_10", "l2_start_100")
STEPS = 120


def cell(root: pathlib.Path, variant: str, seed: int):
    general = str(root / "general/decoder")
    c = stages.pretrained("decoder", "peps", STEPS, general, root)
    c.seed, c.init_forgetting = seed, True
    if variant == "replay":
        texts = {
            name: {
                part: str(root / f"text/{name}_{part}.jsonl")
                for part in ("train", "heldout")
            }
            for name in ("peps", "general")
        }
        base.set_mixture(c, texts)
    elif variant != "plain":
        c.optim.l2_start = float(variant.removeprefix("l2_start_"))
    return config.freeze(c)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=pathlib.Path, required=True)
    root = parser.parse_args().root.absolute()
    found = {}
    for variant in VARIANTS:
        rows = []
        for seed in range(3):
            workdir = root / "forgetting" / f"{variant}-s{seed}"
            with runner.log_to(root / f"logs/forgetting-{variant}-{seed}.txt"):
                own = runner.trained(cell(root, variant, seed), workdir)
            told = json.loads((workdir / "forgetting.json").read_text())
            (general,) = told["ancestors"]
            domain = own.get("heldout_loss/peps", own["heldout_loss"])
            rows.append((domain, general["before"], general["after"]))
        columns = ("domain", "general_before", "general_after")
        found[variant] = {
            name: [round(float(x), 4) for x in values]
            for name, values in zip(columns, np.transpose(rows), strict=True)
        }
        print(variant, found[variant], flush=True)
    path = pathlib.Path(__file__).with_name("forgetting.json")
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

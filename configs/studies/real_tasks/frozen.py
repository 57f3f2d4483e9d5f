"""Frozen features: the last layer, or a learned mix of all of them (ELMo).

    python -m configs.studies.real_tasks.frozen --data=DATA --root=ROOT

Tagging (UD EWT) from the encoder that read the general text (ROOT/general/encoder):
only a linear layer is trained, on the `last` layer or on a `mix` of all (Peters et al.
2018, equation 1); `fine_tuned`: everything is, on the last one. Writes frozen.json
beside this file: tagging accuracy of the test split, three seeds.
"""

import argparse
import json
import pathlib

from configs.studies.real_tasks import run, stages
from t5x_lite import config
from t5x_lite.studies import runner

TASK = "ud_ewt"
VARIANTS = ("last", "mix", "fine_tuned")
FROZEN = ((r"(head|mix)/.*", 10.0), (r".*", 0.0))  # a linear layer takes higher rates


def cell(root: pathlib.Path, data: str, variant: str, seed: int):
    before = str(root / "general/encoder")
    c = stages.tuned("encoder", TASK, seed, before, root, data)
    c.init_forgetting = False
    c.model.mix_layers = variant == "mix"
    if variant != "fine_tuned":
        c.optim.lr_rules = FROZEN
    return config.freeze(c)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--root", type=pathlib.Path, required=True)
    flags = parser.parse_args()
    root, found = flags.root.absolute(), {}
    for variant in VARIANTS:
        found[variant] = []
        for seed in range(3):
            workdir = root / "frozen" / f"{variant}-s{seed}"
            with runner.log_to(root / f"logs/frozen-{variant}-{seed}.txt"):
                runner.trained(
                    cell(root, str(flags.data / "tasks"), variant, seed), workdir
                )
                score = run.tested(workdir, TASK)[stages.TASKS[TASK].score]
            found[variant].append(round(score, 4))
        print(variant, found[variant], flush=True)
    path = pathlib.Path(__file__).with_name("frozen.json")
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

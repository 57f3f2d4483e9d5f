"""Two texts in one run: novels and the Bible, at rates that change.   T5.1.1, small

    for part in train heldout; do
        grep -E '^.{10}"(Emma|Pride|Sense)' data/$part.jsonl > runs/novels_$part.jsonl
        grep -vE '^.{10}"(Emma|Pride|Sense)' data/$part.jsonl > runs/bible_$part.jsonl
    done
    python -m t5x_lite.train --config=configs/mixture.py --workdir=runs/mixture

Instead of rates: `c.data.mixing = "proportional"` with temperature and cap, as T5 mixes
its tasks (Raffel et al. 2020, section 3.5.2). `:smoke` mixes the two files of data/.

2026-11-21, 2 CPU cores, 120 steps with the change at step 60 (from 3 : 1 to 1 : 1):
held-out loss 4.7994 (Bible 4.6157, novels 4.9099), after 40 steps 5.2391 (5.1543,
5.2901), unigram 5.6607. The 500 steps as they stand here, and the wall time of an idle
machine: not yet measured."""

from configs import base, demo


def get_config(arg=""):
    c = demo.get_config(arg)
    sources = {
        name: dict(
            train=f"runs/{name}_train.jsonl",
            heldout=f"runs/{name}_heldout.jsonl",
            rate=rate,
        )
        for name, rate in [("novels", 0.75), ("bible", 0.25)]
    }
    if arg:
        for name, part in [("novels", "train"), ("bible", "heldout")]:
            sources[name]["train"] = f"data/{part}.jsonl"
            sources[name]["heldout"] = "data/heldout.jsonl"
    base.set_mixture(c, sources, rate_changes=((250, "bible", 0.75),))
    return c

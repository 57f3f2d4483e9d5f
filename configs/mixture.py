"""Two texts in one run: novels and the Bible, at rates that change.   T5.1.1, small

    for part in train heldout; do
        grep -E '^.{10}"(Emma|Pride|Sense)' data/$part.jsonl > runs/novels_$part.jsonl
        grep -vE '^.{10}"(Emma|Pride|Sense)' data/$part.jsonl > runs/bible_$part.jsonl
    done
    python -m t5x_lite.train --config=configs/mixture.py --workdir=runs/mixture

Instead of rates: `c.data.mixing = "proportional"` with temperature and cap, as T5 mixes
its tasks (Raffel et al. 2020, section 3.5.2). `:smoke` mixes the two files of data/.

Hardware, wall time, held-out losses: not yet measured."""

from configs import base, demo


def get_config(arg=""):
    c = demo.get_config(arg)
    base.set_mixture(
        c,
        novels=dict(
            train="runs/novels_train.jsonl",
            heldout="runs/novels_heldout.jsonl",
            rate=0.75,
        ),
        bible=dict(
            train="runs/bible_train.jsonl",
            heldout="runs/bible_heldout.jsonl",
            rate=0.25,
        ),
    )
    c.data.rate_changes = ((c.steps // 2, "bible", 0.75),)
    if arg:
        both = dict(train="data/train.jsonl", heldout="data/heldout.jsonl")
        again = dict(train="data/heldout.jsonl", heldout="data/heldout.jsonl")
        base.set_mixture(c, novels=both | dict(rate=0.75), bible=again)
    return c

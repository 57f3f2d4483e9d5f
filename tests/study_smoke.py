"""Trains a small version of every system on the demo text.   make study-smoke

Each run is `python -m t5x_lite.train --config=configs/X.py:study`, a minute or two on 2
CPU cores, in runs/study/X; runs that are finished are not repeated. Prints a table in
Markdown: held-out loss beside the loss of a unigram predictor of the same targets.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import time

from t5x_lite import metrics

# row -> (config, further flags)
SYSTEMS = {
    "BERT": ("bert", []),
    "RoBERTa": ("roberta", []),
    "ALBERT": ("albert", []),
    "ELECTRA": ("electra", []),
    "MacBERT": ("macbert", []),
    "ERNIE (Baidu)": ("ernie", []),
    "ERNIE (Tsinghua)": ("ernie_thu", []),
    "StructBERT": ("structbert", []),
    "NEZHA": ("nezha", []),
    "GPT": ("gpt", []),
    "GPT-2": ("gpt2", []),
    "GPT-3": ("gpt3", []),
    "T5 v1.0": ("t5_small", []),
    "T5 v1.1": ("t5_1_1_small", []),
    "ByT5": ("byt5_small", []),
    "umT5": ("umt5_small", []),
    "UL2, encoder-decoder": ("ul2", []),
    "UL2, prefix-LM": ("ul2", ["--config.model.structure=prefix_lm"]),
    "UL2, decoder": ("ul2", ["--config.model.structure=decoder"]),
    "BART": ("bart", []),
    "MASS": ("mass", []),
    "ProphetNet": ("prophetnet", []),
    "UniLM": ("unilm", []),
    "UniLM v2": ("unilm_v2", []),
    "XLNet": ("xlnet", []),
    "ERNIE-GEN": ("ernie_gen", []),
    "prefix LM": ("prefix_lm", []),
    "LM adaptation": ("t5_lm_adapt", []),
}
for _name in ("iid_denoising", "drop_tokens", "deshuffling"):
    SYSTEMS[f"T5, {_name}"] = ("t5_table2", [f"--config.objective.name={_name}"])
BESIDE = ("heldout_classes_", "heldout_replaced_", "heldout_entities_")
SPANS = ("encoder_decoder", "prefix_lm", "decoder", "encoder", "permuted")
for _structure in SPANS:
    _flags = [f"--config.model.structure={_structure}"]
    if _structure == "permuted":
        _flags.append("--config.model.query_streams=1")
    SYSTEMS[f"span corruption, {_structure}"] = ("t5_table2", _flags)
SYSTEMS["span corruption, shared stacks"] = (
    "t5_table2",
    ["--config.model.share_stacks=True"],
)


def run(row: str, config: str, flags: list[str], root: pathlib.Path) -> dict:
    """Trains one row unless it is finished -> its last line of metrics.jsonl."""
    name = "".join(c if c.isalnum() else "_" for c in row.lower())
    command = [
        *(sys.executable, "-m", "t5x_lite.train"),
        *(f"--config=configs/{config}.py:study", f"--workdir={root / name}", *flags),
    ]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{row}: {' '.join(command)}\n{done.stderr[-2000:]}")
    lines = metrics.read(root / name / "metrics.jsonl")
    last = [line for line in lines if "heldout_loss" in line][-1]
    speed = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    last["tokens_per_second"] = statistics.median(speed)
    last["seconds"] = time.perf_counter() - began
    return last


def row_of(row: str, config: str, flags: list[str], last: dict) -> str:
    found = [
        f"{key.removeprefix('heldout_')} {value:.3f}"
        for key, value in last.items()
        if key.startswith(BESIDE)
    ]
    how = f"`{config}.py:study{' ' + ' '.join(flags) if flags else ''}`"
    return (
        f"| {row} | {how} | {last['heldout_loss']:.3f} | {last['unigram_loss']:.3f} | "
        f"{', '.join(found)} | {last['tokens_per_second']:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path("runs/study"))
    parser.add_argument("--only", help="rows that contain this, in lower case")
    args = parser.parse_args()
    head = (
        "| system | config | held-out loss | unigram | beside it | tokens/s |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    print(head, flush=True)
    for row, (config, flags) in SYSTEMS.items():
        if args.only and args.only not in row.lower():
            continue
        print(
            row_of(row, config, flags, run(row, config, flags, args.root)), flush=True
        )


if __name__ == "__main__":
    main()

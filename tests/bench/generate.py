"""Speed of generation beside transformers'.   python -m tests.bench.generate --rounds=3

On this machine's CPU, in float32: greedy, a fixed number of new tokens behind texts of
32 tokens, one text and 32 at a time; a T5 of T5-small's shape, GPT-2's 124M and a GPT
of a quarter of its width. Both sides load the same weights; the share of tokens that
are the same is printed. A process each, all cores; rounds alternate, and the median of
their ratios is printed. Not timed: loading, and the first call, in which ours compiles
(its seconds are printed).
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from configs import models
from t5x_lite.config import ModelConfig

READ, BATCHES = 32, (1, 32)
SMALL = dict(d_model=192, d_ff=768, heads=3, decoder_layers=6, vocab_size=8192)
TASKS = {
    "t5_small": models.PRESETS["t5_small"],
    "gpt2": models.PRESETS["gpt2"],
    "gpt_mini": models.PRESETS["gpt2"] | SMALL,
}


def texts(rows: int) -> np.ndarray:
    """Random ids [rows, READ]."""
    rng = np.random.default_rng(0)
    return rng.integers(3, 8000, (rows, READ)).astype(np.int32)


def write_weights(task: str, path: pathlib.Path) -> None:
    """A directory of transformers with random weights that both sides load.

    Weights as after a fresh start give the same token for ever, or ties; these are
    larger.
    """
    from t5x_lite import model, parameters
    from t5x_lite.interop import huggingface

    cfg, rng = ModelConfig(**TASKS[task]), np.random.default_rng(0)
    found = {}
    for name, p in parameters.declared(model.build(cfg)).items():
        shape = p.get_value().shape
        found[name] = 0.05 * rng.standard_normal(shape, np.float32)
        if name.endswith("/scale"):
            found[name] += 1.0
    path.mkdir()
    huggingface.write(path, cfg, found)


def ours(path: pathlib.Path, new: int):
    import jax

    from t5x_lite import decoding, model, parameters
    from t5x_lite.interop import huggingface

    found = huggingface.read(path)
    net = model.build(dataclasses.replace(found.cfg, remat="none"))
    flat = {tuple(n.split("/")): jax.device_put(p) for n, p in found.params.items()}
    params = parameters.nested(flat)

    def one(ids: np.ndarray):
        places = np.tile(np.arange(READ, dtype=np.int32), (len(ids), 1))
        stream = dict(
            tokens=ids,
            segments=np.ones_like(ids),
            positions=places,
            ranks=np.zeros_like(ids),
        )
        tokens, _ = decoding.generate(
            net,
            params,
            stream,
            max_length=new,
            eos_id=-1,
            used_ids=found.cfg.vocab_size,
        )
        return np.asarray(tokens)

    return one


def theirs(path: pathlib.Path, new: int):
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    name = json.loads((path / "config.json").read_text())["model_type"]
    auto = "AutoModelForCausalLM" if name == "gpt2" else "AutoModelForSeq2SeqLM"
    model = getattr(transformers, auto).from_pretrained(path).eval()
    config = transformers.GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    model.generation_config = config

    def one(ids: np.ndarray):
        whole = torch.tensor(ids, dtype=torch.long)
        mask = torch.ones_like(whole)
        with torch.no_grad():
            out = model.generate(whole, attention_mask=mask, generation_config=config)
        return out[:, -new:].numpy()

    return one


SIDES = {"ours": ours, "transformers": theirs}


def serve(side: str, path: pathlib.Path, new: int) -> None:
    """Worker: for every batch size read, one timed call after one that is not."""
    one = SIDES[side](path, new)
    first = {}
    for rows in BATCHES:
        start = time.perf_counter()
        one(texts(rows))
        first[rows] = time.perf_counter() - start
    print(json.dumps(first), flush=True)
    for line in sys.stdin:
        ids = texts(int(line))
        one(ids)  # while the others worked, this process's memory grew cold
        start = time.perf_counter()
        tokens = one(ids)
        print(json.dumps([time.perf_counter() - start, tokens.tolist()]), flush=True)


def compare(task: str, rounds: int, new: int) -> None:
    """Prints tokens/s of both sides and the median of the rounds' ratios."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "weights"
        write_weights(task, path)
        command = [sys.executable, "-m", "tests.bench.generate", f"--path={path}"]
        workers, first = {}, {}
        for side in SIDES:
            workers[side] = subprocess.Popen(
                [*command, f"--serve={side}", f"--new={new}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            first[side] = json.loads(workers[side].stdout.readline())
        for rows in BATCHES:
            seconds: dict[str, list[float]] = {side: [] for side in SIDES}
            tokens = {}
            for _ in range(rounds):
                for side, worker in workers.items():
                    print(rows, file=worker.stdin, flush=True)
                    took, tokens[side] = json.loads(worker.stdout.readline())
                    seconds[side].append(took)
            a, b = (np.asarray(tokens[side]) for side in SIDES)
            speed = {s: rows * new / statistics.median(t) for s, t in seconds.items()}
            pairs = zip(seconds["ours"], seconds["transformers"], strict=True)
            ratios = [theirs / mine for mine, theirs in pairs]
            same = np.mean(a == b)
            at = str(rows)
            print(
                f"{task}, {rows} x {new} tokens: ours {speed['ours']:.1f} tokens/s, "
                f"transformers {speed['transformers']:.1f}; ratio "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to "
                f"{max(ratios):.2f}, {rounds} rounds); same tokens {same:.1%}; first "
                f"call {first['ours'][at]:.1f} s, theirs "
                f"{first['transformers'][at]:.1f} s",
                flush=True,
            )
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=64, help="tokens written for a text")
    parser.add_argument("--task", choices=TASKS, help="one model only")
    parser.add_argument("--serve", choices=SIDES, help="run as a worker")
    parser.add_argument("--path", type=pathlib.Path, help="of a worker's weights")
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.path, args.new)
    for task in [args.task] if args.task else TASKS:
        compare(task, args.rounds, args.new)


if __name__ == "__main__":
    main()

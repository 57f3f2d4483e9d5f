"""Speed of the train step beside PyTorch's.   python -m tests.bench.train --rounds=3

T5.1.1-small on this machine's CPU: forward, backward and AdamW, dropout 0.1, untied
head, 8 examples of 512 + 114 tokens, float32 parameters. Every side runs in a process
of its own with all cores; rounds alternate and medians are printed, with the share of
the float32 matrix-product ceiling measured in the same rounds (bfloat16 may exceed it).
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

from configs import models
from t5x_lite import metrics
from t5x_lite.config import Config, ModelConfig, OptimConfig, ShardingConfig

BATCH, INPUTS, TARGETS, CEILING = 8, 512, 114, 4096
MODEL = ModelConfig(**models.PRESETS["t5_1_1_small"], dropout=0.1)
OPTIM = dict(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


def batch() -> dict:
    """Random ids without padding, in our contract."""
    rng = np.random.default_rng(0)

    def stream(length, ranks):
        positions = np.tile(np.arange(length, dtype=np.int32), (BATCH, 1))
        return dict(
            tokens=rng.integers(3, 32_000, (BATCH, length)).astype(np.int32),
            positions=positions,
            segments=np.ones_like(positions),
            ranks=positions * ranks,
        )

    decoder = stream(TARGETS, ranks=1)
    decoder["targets"] = np.roll(decoder["tokens"], -1, axis=1)
    decoder["weights"] = np.ones((BATCH, TARGETS), np.float32)
    return dict(encoder=stream(INPUTS, ranks=0), decoder=decoder)


def ours(dtype: str):
    """-> a function that runs one step, computed in `dtype`, and waits for it."""
    import jax

    from t5x_lite import model as model_lib
    from t5x_lite import optim, sharding, state, step

    cfg = Config(
        model=dataclasses.replace(MODEL, dtype=dtype),
        optim=OptimConfig(name="adamw", schedule="constant", warmup_steps=0, **OPTIM),
        sharding=ShardingConfig(data=1),
    )
    model = model_lib.build(cfg.model)
    tx = optim.make(cfg, model)
    mesh = sharding.make_mesh(cfg.sharding)
    fixed = batch() | dict(fingerprint=np.zeros(BATCH, np.uint32))
    with sharding.use(mesh, cfg.sharding.rules):
        abstract = state.abstract(model, tx, mesh, cfg.sharding.rules)
        current = state.create(model, tx, abstract, seed=0)
        train = jax.jit(
            step.make_train_step(model, tx, cfg, MODEL.vocab_size), donate_argnums=0
        )
        compiled = train.lower(current, fixed).compile()

    def one():
        nonlocal current
        current, out = compiled(current, fixed)
        return float(out["sums"].nll / out["sums"].weight)

    return one


def ceiling():
    """-> a function that multiplies two float32 matrices of 4096 x 4096."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((CEILING, CEILING), jnp.float32)
    product = jax.jit(jnp.matmul)
    return lambda: float(product(x, x)[0, 0])


def theirs(bfloat16: bool):
    """transformers' model, eager PyTorch, its fused AdamW and sdpa attention."""
    import torch
    import transformers

    from t5x_lite.interop import t5

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**t5.hf_config(MODEL))
    ).train()
    # transformers 5 ties the head whatever the config says.
    head = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 512**-0.5)
    model.lm_head.weight = head
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIM["learning_rate"],
        betas=(OPTIM["beta1"], OPTIM["beta2"]),
        eps=OPTIM["eps"],
        weight_decay=OPTIM["weight_decay"],
        fused=True,
    )
    fixed = batch()
    ids = dict(
        input_ids=fixed["encoder"]["tokens"],
        decoder_input_ids=fixed["decoder"]["tokens"],
        labels=fixed["decoder"]["targets"],
    )
    ids = {k: torch.tensor(v, dtype=torch.long) for k, v in ids.items()}

    def one():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = model(**ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return one


SIDES = {
    "ours, float32": lambda: ours("float32"),
    "ours, bfloat16 compute": lambda: ours("bfloat16"),
    "PyTorch eager, float32": lambda: theirs(bfloat16=False),
    "PyTorch eager, bfloat16 autocast": lambda: theirs(bfloat16=True),
    "ceiling": ceiling,
}


def serve(side: str) -> None:
    """Worker: one timed step for every line read, after one that is not timed.

    While the others work, this process's memory grows cold: 1 s of 9 was seen.
    """
    one = SIDES[side]()
    one()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        one()
        start = time.perf_counter()
        value = one()
        print(json.dumps([time.perf_counter() - start, value]), flush=True)


def measure(sides: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round; one process a side, of which one works at a time."""
    command = [sys.executable, "-m", "tests.bench.train", "--serve"]
    workers = {}
    for side in sides:
        workers[side] = subprocess.Popen(
            [*command, side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert json.loads(workers[side].stdout.readline()) == "ready"
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for i in range(rounds):
        for side, worker in workers.items():
            print("", file=worker.stdin, flush=True)
            took, _ = json.loads(worker.stdout.readline())
            seconds[side].append(took)
        row = "  ".join(f"{side} {seconds[side][i]:.2f}" for side in sides)
        print(f"round {i + 1}, seconds: {row}", flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", choices=SIDES, help="run as a worker")
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)

    sides = list(SIDES)
    if not all(importlib.util.find_spec(m) for m in ("torch", "transformers")):
        print("For PyTorch's rows: pip install -e '.[parity]'")
        sides = [side for side in sides if not side.startswith("PyTorch")]
    seconds = measure(sides, args.rounds)

    tokens = BATCH * (INPUTS + TARGETS)
    flops = (
        3
        * BATCH
        * metrics.forward_flops(
            MODEL, dict(encoder=(INPUTS, 0, 0), decoder=(TARGETS, TARGETS, 0))
        )
    )
    top = 2 * CEILING**3 / statistics.median(seconds.pop("ceiling"))
    print(
        f"\n{tokens} tokens and {flops:.3e} FLOPs a step (2mnk of every matrix "
        f"product, forward x 3; metrics.forward_flops)\nceiling: {top / 1e9:.0f} "
        f"GFLOP/s, a {CEILING}^3 float32 product in XLA"
    )
    medians = {side: statistics.median(each) for side, each in seconds.items()}
    ratios = [side for side in sides if side.startswith("ours")]
    print(
        f"{'':34}{'s/step':>8}{'tokens/s':>10}{'of ceiling':>12}"
        + "".join(f"{side + ' / it':>30}" for side in ratios)
    )
    for side, median in medians.items():
        print(
            f"{side:34}{median:8.2f}{tokens / median:10.0f}{flops / median / top:12.0%}"
            + "".join(f"{median / medians[one]:30.2f}" for one in ratios)
        )


if __name__ == "__main__":
    main()

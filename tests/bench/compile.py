"""Compile time of the train step against depth.   python -m tests.bench.compile

T5.1.1 (depth in each of encoder and decoder) and GPT of width 64 on one CPU device:
seconds to trace, lower and compile, medians of rounds that go through all depths. A
scanned stack should not care how often it is run.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from configs import models
from t5x_lite import model as model_lib
from t5x_lite import optim, sharding, state, step
from t5x_lite.config import Config, OptimConfig, ShardingConfig
from t5x_lite.model_config import ModelConfig
from tests.bench import train

SMALL = dict(d_model=64, d_ff=128, heads=4, head_dim=16, vocab_size=30_016)
TASKS = {
    "t5_1_1": train.Task(
        "t5_1_1_small", 2, dict(encoder=(64, 0, 0), decoder=(32, 32, 0))
    ),
    "gpt2": train.Task("gpt2", 2, dict(main=(64, 64, 0))),
}


def prepared(task: train.Task, depth: int):
    """-> (jitted train step, its abstract state and batch, the mesh in force)."""
    layers = dict(encoder_layers=depth, decoder_layers=depth)
    shape = models.PRESETS[task.preset] | SMALL | layers
    cfg = Config(
        model=ModelConfig(**shape),
        optim=OptimConfig(name="adamw", schedule="constant", warmup_steps=0),
        sharding=ShardingConfig(data=1),
    )
    model = model_lib.build(cfg.model)
    tx = optim.make(cfg, model)
    mesh = sharding.make_mesh(cfg.sharding, jax.devices()[:1])
    abstract = state.abstract(model, tx, mesh, cfg.sharding.rules)
    batch = train.batch(task) | {"fingerprint": np.zeros(task.rows, np.uint32)}
    one = step.make_train_step(model, tx, cfg, cfg.model.vocab_size)
    in_force = sharding.use(mesh, cfg.sharding.rules)
    return jax.jit(one, donate_argnums=0), (abstract, batch), in_force


def measure(task: train.Task, depth: int) -> dict[str, float]:
    """Seconds to trace, lower and compile one train step of this depth."""
    jitted, inputs, in_force = prepared(task, depth)
    with in_force:
        marks = [time.perf_counter()]
        traced = jitted.trace(*inputs)
        marks.append(time.perf_counter())
        lowered = traced.lower()
        marks.append(time.perf_counter())
        lowered.compile()
        marks.append(time.perf_counter())
    names = ("trace", "lower", "compile")
    parts = zip(names, marks[1:], marks, strict=False)
    return {name: b - a for name, b, a in parts} | {"total": marks[-1] - marks[0]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", default="12,24,48,96", help="by comma")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    depths = [int(depth) for depth in args.depths.split(",")]
    for name, task in TASKS.items():
        measure(task, depths[0])  # warms up what is done once in a process
        found = {depth: [] for depth in depths}
        for _ in range(args.rounds):
            for depth in depths:
                jax.clear_caches()
                found[depth].append(measure(task, depth))
        parts = list(found[depths[0]][0])
        print(f"{name:8}" + "".join(f"{part:>9}" for part in parts) + "  of the first")
        medians = {
            depth: {p: statistics.median(each[p] for each in rounds) for p in parts}
            for depth, rounds in found.items()
        }
        for depth, each in medians.items():
            ratio = each["total"] / medians[depths[0]]["total"]
            cells = "".join(f"{each[part]:9.2f}" for part in parts)
            print(f"{depth:8}{cells}{ratio:13.2f}x", flush=True)


if __name__ == "__main__":
    main()

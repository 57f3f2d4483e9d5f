"""Speed of the train step beside PyTorch's.   python -m tests.bench.train --rounds=3

On this machine's CPU: forward, backward and AdamW, dropout 0.1, float32 parameters, of
T5.1.1-small (8 examples of 512 + 114 tokens, untied head), BERT-base (8 of 128, 15 % of
the tokens predicted: ours computes the output layer there only, transformers at every
token) or GPT-2 124M (2 of 512). Every side runs in a process of its own with all cores;
rounds alternate and medians are printed, with the share of the float32 matrix-product
ceiling measured in the same rounds (bfloat16 may exceed it).
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

CEILING = 4096
OPTIM = dict(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and the lengths of its streams: name -> (T cells, K predicted, G)."""

    preset: str
    rows: int
    shapes: dict[str, tuple[int, int, int]]

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(**models.PRESETS[self.preset] | dict(dropout=0.1))

    @property
    def tokens(self) -> int:
        return self.rows * sum(T for T, _, _ in self.shapes.values())

    @property
    def flops(self) -> int:
        return 3 * self.rows * metrics.forward_flops(self.model, self.shapes)


TASKS = {
    "t5": Task("t5_1_1_small", 8, dict(encoder=(512, 0, 0), decoder=(114, 114, 0))),
    "bert": Task("bert_base", 8, dict(main=(128, 19, 0))),
    "gpt2": Task("gpt2", 2, dict(main=(512, 512, 0))),
}


def batch(task: Task) -> dict:
    """Random ids without padding, in our contract."""
    rng = np.random.default_rng(0)

    def stream(T, K, causal):
        B = task.rows
        positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        made = dict(
            tokens=rng.integers(3, 30_000, (B, T)).astype(np.int32),
            positions=positions,
            segments=np.ones_like(positions),
            ranks=positions * causal,
        )
        if K:
            made["targets"] = rng.integers(3, 30_000, (B, K)).astype(np.int32)
            made["weights"] = np.ones((B, K), np.float32)
        if 0 < K < T:  # masked LM, with a sentence pair
            places = np.stack([rng.choice(T, K, replace=False) for _ in range(B)])
            made["places"] = np.sort(places, axis=1).astype(np.int32)
            made["types"] = (positions >= T // 2).astype(np.int32)
            made["labels"] = rng.integers(0, 2, B).astype(np.int32)
        return made

    return {
        name: stream(T, K, causal=int(K == T))
        for name, (T, K, _) in task.shapes.items()
    }


def ours(task: Task, dtype: str):
    """-> a function that runs one step, computed in `dtype`, and waits for it."""
    import jax

    from t5x_lite import model as model_lib
    from t5x_lite import optim, sharding, state, step

    cfg = Config(
        model=dataclasses.replace(task.model, dtype=dtype),
        optim=OptimConfig(name="adamw", schedule="constant", warmup_steps=0, **OPTIM),
        sharding=ShardingConfig(data=1),
    )
    model = model_lib.build(cfg.model)
    tx = optim.make(cfg, model)
    mesh = sharding.make_mesh(cfg.sharding)
    fixed = batch(task) | dict(fingerprint=np.zeros(task.rows, np.uint32))
    with sharding.use(mesh, cfg.sharding.rules):
        abstract = state.abstract(model, tx, mesh, cfg.sharding.rules)
        current = state.create(model, tx, abstract, seed=0)
        train = jax.jit(
            step.make_train_step(model, tx, cfg, cfg.model.vocab_size),
            donate_argnums=0,
        )
        compiled = train.lower(current, fixed).compile()

    def one():
        nonlocal current
        current, out = compiled(current, fixed)
        sums = out["sums"]["tokens"]
        return float(sums.nll / sums.weight)

    return one


def ceiling():
    """-> a function that multiplies two float32 matrices of 4096 x 4096."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((CEILING, CEILING), jnp.float32)
    product = jax.jit(jnp.matmul)
    return lambda: float(product(x, x)[0, 0])


def reference(task: Task):
    """-> (transformers' model, its arguments for the same batch)."""
    import torch
    import transformers

    cfg, fixed = task.model, batch(task)
    if "encoder" in fixed:
        from t5x_lite.interop import t5

        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**t5.hf_config(cfg))
        )
        # transformers 5 ties the head whatever the config says.
        head = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 512**-0.5)
        model.lm_head.weight = head
        ids = dict(
            input_ids=fixed["encoder"]["tokens"],
            decoder_input_ids=fixed["decoder"]["tokens"],
            labels=fixed["decoder"]["targets"],
        )
    elif task.preset == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        # It shifts the labels itself: the same number of products.
        ids = dict(input_ids=fixed["main"]["tokens"], labels=fixed["main"]["tokens"])
    else:
        model = transformers.BertForPreTraining(transformers.BertConfig())
        main = fixed["main"]
        labels = np.full_like(main["tokens"], -100)
        np.put_along_axis(labels, main["places"], main["targets"], axis=1)
        ids = dict(
            input_ids=main["tokens"],
            token_type_ids=main["types"],
            labels=labels,
            next_sentence_label=main["labels"],
        )
    ids = {k: torch.tensor(v, dtype=torch.long) for k, v in ids.items()}
    if task.preset != "bert_base":
        ids["use_cache"] = False
    return model.train(), ids


def theirs(task: Task, bfloat16: bool):
    """transformers' model, eager PyTorch, its fused AdamW and sdpa attention."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model, ids = reference(task)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIM["learning_rate"],
        betas=(OPTIM["beta1"], OPTIM["beta2"]),
        eps=OPTIM["eps"],
        weight_decay=OPTIM["weight_decay"],
        fused=True,
    )

    def one():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = model(**ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return one


SIDES = {
    "ours, float32": lambda task: ours(task, "float32"),
    "ours, bfloat16 compute": lambda task: ours(task, "bfloat16"),
    "PyTorch eager, float32": lambda task: theirs(task, bfloat16=False),
    "PyTorch eager, bfloat16 autocast": lambda task: theirs(task, bfloat16=True),
    "ceiling": lambda task: ceiling(),
}


def serve(side: str, task: Task) -> None:
    """Worker: one timed step for every line read, after one that is not timed.

    While the others work, this process's memory grows cold: 1 s of 9 was seen.
    """
    one = SIDES[side](task)
    one()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        one()
        start = time.perf_counter()
        value = one()
        print(json.dumps([time.perf_counter() - start, value]), flush=True)


def measure(name: str, sides: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round; one process a side, of which one works at a time."""
    command = [sys.executable, "-m", "tests.bench.train", f"--task={name}"]
    workers = {}
    for side in sides:
        workers[side] = subprocess.Popen(
            [*command, f"--serve={side}"],
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
    parser.add_argument("--task", choices=TASKS, help="one model only")
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, TASKS[args.task])

    sides = list(SIDES)
    if not all(importlib.util.find_spec(m) for m in ("torch", "transformers")):
        print("For PyTorch's rows: pip install -e '.[parity]'")
        sides = [side for side in sides if not side.startswith("PyTorch")]
    for name in [args.task] if args.task else TASKS:
        table(name, measure(name, sides, args.rounds))


def table(name: str, seconds: dict[str, list[float]]) -> None:
    """Medians, the share of the ceiling, and ratios."""
    task = TASKS[name]
    top = 2 * CEILING**3 / statistics.median(seconds.pop("ceiling"))
    print(
        f"\n{task.preset}: {task.tokens} tokens, {task.flops:.3e} FLOPs a step (2mnk "
        "of every matrix product, forward x 3; metrics.forward_flops)\nceiling: "
        f"{top / 1e9:.0f} GFLOP/s, a {CEILING}^3 float32 product in XLA"
    )
    medians = {side: statistics.median(each) for side, each in seconds.items()}
    ratios = [side for side in seconds if side.startswith("ours")]
    print(
        f"{'':34}{'s/step':>8}{'tokens/s':>10}{'of ceiling':>12}"
        + "".join(f"{side + ' / it':>30}" for side in ratios)
    )
    for side, median in medians.items():
        print(
            f"{side:34}{median:8.2f}{task.tokens / median:10.0f}"
            f"{task.flops / median / top:12.0%}"
            + "".join(f"{median / medians[one]:30.2f}" for one in ratios)
        )
    print(flush=True)


if __name__ == "__main__":
    main()

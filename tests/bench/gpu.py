"""Pretraining speed on one GPU beside PyTorch's.   python -m tests.bench.gpu

Forward, backward and AdamW in bfloat16 compute with float32 parameters, no dropout, of
our train step and of transformers' model with SDPA attention and torch.compile, on the
same random batch. Each side is a process of its own; rounds alternate, medians are
reported. A line of JSON per row and side is printed at once, a table at the end.

    python -m tests.bench.gpu --rows=gpt2,bert_base --sides=cudnn:none,torch:compile
    python -m tests.bench.gpu --smoke        # tiny shapes on the CPU: does it run?

A side is ATTENTION:REMAT of ours (config.model.attention, config.model.remat) or
torch:compile, torch:eager. A row that does not fit is tried again with half the batch,
for all of its sides. BERT computes its output layer at the predicted places only,
transformers at every token.

FLOPs per step = 3 x forward. Forward = 2mnk of every matrix product (projections,
feed-forward, logits at the predicted places), and 4 x queries x keys x N x H for the
attention of a layer, halved where it is causal; a prefix of P of T tokens counts
P^2 + (T^2 - P^2) / 2 pairs. MFU = FLOPs / seconds / the card's dense bf16 peak
(t5x_lite/hardware.py). What remat computes again is not counted.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
import types
from typing import Any

import numpy as np

from configs import models
from t5x_lite import hardware, metrics
from t5x_lite.config import Config, LossConfig, OptimConfig, ShardingConfig
from t5x_lite.model_config import ModelConfig
from tests.bench import train

LOGITS = 2**29  # float32 numbers of a chunk of the loss: 2 GiB
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax"),
    *("torch", "triton", "transformers", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)
SMALL = dict(d_model=64, d_ff=128, heads=4, head_dim=16)
SMALL |= dict(encoder_layers=2, decoder_layers=2)


@dataclasses.dataclass(frozen=True)
class Task(train.Task):
    """A preset, how many rows, its streams: name -> (T cells, K predicted, G).

    Attributes:
      prefix: tokens that all see each other; the model is then a prefix-LM.
      changes: of the preset.
    """

    prefix: int = 0
    changes: dict = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> ModelConfig:
        shape = models.PRESETS[self.preset] | dict(dropout=0.0)
        if self.prefix:
            shape["structure"] = "prefix_lm"
        return ModelConfig(**shape | self.changes)

    @property
    def flops(self) -> int:
        """Of one step; see the head of this file."""
        cfg = self.model
        whole = metrics.forward_flops(cfg, self.shapes)
        causal = dict(encoder_decoder="decoder").get(cfg.structure, "main")
        if cfg.structure == "encoder":
            return 3 * self.rows * whole
        T, P = self.shapes[causal][0], self.prefix
        unseen = (T * T - P * P) // 2
        pairs = cfg.decoder_layers * 4 * unseen * cfg.heads * cfg.head_dim
        return 3 * self.rows * (whole - pairs)

    def batch(self) -> dict:
        made = train.batch(self)
        if self.prefix:
            main = made["main"]
            is_prefix = main["positions"] < self.prefix
            main["ranks"] = np.where(is_prefix, 0, main["positions"]).astype(np.int32)
            # The first target is read off the prefix's last token.
            read = main["positions"] >= self.prefix - 1
            main["weights"] = read.astype(np.float32)
        return made

    def tiny(self) -> "Task":
        """The same in two layers of width 64, two rows of 32 tokens."""
        sizes = {}
        for name, (T, K, G) in self.shapes.items():
            sizes[name] = (32, 32 * (K == T) or 4 * (K > 0), G)
        changes = SMALL | dict(vocab_size=30_016)
        return dataclasses.replace(
            self, rows=2, shapes=sizes, changes=changes, prefix=16 * (self.prefix > 0)
        )


_T5 = dict(encoder=(512, 0, 0), decoder=(114, 114, 0))
_BERT, _GPT = dict(main=(512, 76, 0)), dict(main=(1024, 1024, 0))
TASKS = {
    "t5_base": Task("t5_1_1_base", 64, _T5),
    "t5_large": Task("t5_1_1_large", 32, _T5),
    "bert_base": Task("bert_base", 128, _BERT),
    "bert_large": Task("bert_large", 64, _BERT),
    "gpt2": Task("gpt2", 64, _GPT),
    "gpt2_medium": Task("gpt2_medium", 32, _GPT),
    "prefix_lm": Task("gpt2", 64, _GPT, prefix=512),
}


class Ours:
    """Our train step: one at a time, without waiting; `loss` waits for the last."""

    def __init__(self, task: Task, attention: str, remat: str):
        import jax

        from t5x_lite import model as model_lib
        from t5x_lite import optim, sharding, state, step

        more = dict(dtype="bfloat16", attention=attention, remat=remat)
        # Rows are full: masks are causal or none, but for a prefix.
        more["unpadded"] = attention == "cudnn" and not task.prefix
        known = {f.name for f in dataclasses.fields(ModelConfig)}
        shape = {k: v for k, v in more.items() if k in known}
        model_cfg = dataclasses.replace(task.model, **shape)
        optimizer = OptimConfig(
            name="adamw", schedule="constant", warmup_steps=0, **train.OPTIM
        )
        chunk = max(1, LOGITS // (task.rows * model_cfg.vocab_size))
        cfg = Config(
            model=model_cfg,
            optim=optimizer,
            loss=LossConfig(chunk=chunk, z_loss=0.0),
            sharding=ShardingConfig(data=1),
        )
        self.device = jax.devices()[0]
        model = model_lib.build(cfg.model)
        tx = optim.make(cfg, model)
        mesh = sharding.make_mesh(cfg.sharding, [self.device])
        host = task.batch() | dict(fingerprint=np.zeros(task.rows, np.uint32))
        self.batch = jax.device_put(host, self.device)
        with sharding.use(mesh, cfg.sharding.rules):
            abstract = state.abstract(model, tx, mesh, cfg.sharding.rules)
            self.state = state.create(model, tx, abstract, seed=0)
            one = step.make_train_step(model, tx, cfg, cfg.model.vocab_size)
            lowered = jax.jit(one, donate_argnums=0).lower(self.state, self.batch)
            self.run = lowered.compile()
        self.detail = dict(kind=self.device.device_kind, chunk=chunk, **shape)
        self.detail["parameters"] = model_lib.parameter_count(model)

    def step(self):
        self.state, self.out = self.run(self.state, self.batch)

    def loss(self):
        sums = self.out["sums"]["tokens"]
        return float(sums.nll / sums.weight)

    def peak_bytes(self):
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use")


def say(**found):
    print(json.dumps(found), flush=True)


def serve(task: Task, side: str, steps: int) -> None:
    """Worker: for every line read, `steps` timed steps; JSON out."""
    began = time.perf_counter()
    try:
        first, _, second = side.partition(":")
        if first == "torch":
            from tests.bench import torch_peers

            one = torch_peers.Theirs(task.model, task.batch(), second)
        else:
            one = Ours(task, first, second)
        for _ in range(2):
            one.step()
        one.loss()
    except Exception as e:
        text = f"{type(e).__name__}: {e}"
        memory = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory")
        return say(error=text[:600], too_big=any(m in text for m in memory))
    say(ready=True, start_seconds=time.perf_counter() - began, **one.detail)
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(steps):
            one.step()
        loss = one.loss()
        seconds = (time.perf_counter() - began) / steps
        say(seconds=seconds, loss=loss, peak_bytes=one.peak_bytes())


class Worker:
    """A process that runs one side of one row."""

    def __init__(self, row: str, side: str, rows: int, args):
        command = [sys.executable, "-m", "tests.bench.gpu", f"--serve={side}"]
        command += [f"--rows={row}", f"--batch={rows}", f"--steps={args.steps}"]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if args.smoke:
            command.append("--smoke")
            environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )
        self.rounds: list[dict] = []

    def answer(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return dict(error=f"ended with {self.process.wait()}, see above")

    def round(self):
        assert self.process.stdin is not None
        print("", file=self.process.stdin, flush=True)
        self.rounds.append(self.answer())

    def close(self):
        self.process.communicate()


def measure(row: str, sides: list[str], args) -> list[dict]:
    """A dict for each side, of one row; halves the batch until all of them fit."""
    task = TASKS[row].tiny() if args.smoke else TASKS[row]
    rows = args.batch or task.rows
    while True:
        workers, heads = {}, {}
        for side in sides:
            workers[side] = Worker(row, side, rows, args)
            heads[side] = workers[side].answer()
        if rows > 1 and any(head.get("too_big") for head in heads.values()):
            for worker in workers.values():
                worker.close()
            rows //= 2
            print(f"{row}: does not fit, now {rows} rows", file=sys.stderr)
            continue
        break
    ready = [side for side in sides if "ready" in heads[side]]
    for _ in range(args.rounds):
        for side in ready:
            workers[side].round()
    for worker in workers.values():
        worker.close()
    task = dataclasses.replace(task, rows=rows)
    return [
        result(row, side, task, heads[side], workers[side].rounds) for side in sides
    ]


def result(row: str, side: str, task: Task, head: dict, rounds: list[dict]) -> dict:
    """What is reported of one side of one row."""
    found = dict(row=row, side=side, model=task.preset, batch=task.rows)
    found |= dict(tokens_per_step=task.tokens, flops_per_step=task.flops) | head
    failed = next((r for r in rounds if "error" in r), None)
    if "error" in head or failed:
        return found | (failed or {})
    seconds = [r["seconds"] for r in rounds]
    median = statistics.median(seconds)
    device: Any = types.SimpleNamespace(device_kind=head["kind"])
    chip = hardware.of_device(device)
    return found | dict(
        seconds=seconds,
        step_seconds=median,
        tokens_per_second=task.tokens / median,
        flops_per_second=task.flops / median,
        mfu=task.flops / median / chip.flops if chip else None,
        peak_bytes=rounds[-1]["peak_bytes"],
        loss=rounds[-1]["loss"],
    )


def table(results: list[dict]) -> str:
    """Rows and sides; the ratio is to the row's first side of PyTorch."""
    lines = [
        f"{'row':12} {'side':14} {'batch':>5} {'ms/step':>9} {'tokens/s':>10} "
        f"{'MFU':>6} {'GiB':>6} {'/ PyTorch':>10}"
    ]
    for found in results:
        head = f"{found['row']:12} {found['side']:14} {found['batch']:5}"
        if "error" in found:
            lines.append(f"{head} failed: {found['error'].splitlines()[0][:80]}")
            continue
        peers = [
            r["step_seconds"]
            for r in results
            if r["row"] == found["row"]
            and r["side"].startswith("torch")
            and "step_seconds" in r
        ]
        mfu, peak = found["mfu"], found["peak_bytes"]
        lines.append(
            f"{head} {found['step_seconds'] * 1e3:9.2f} "
            f"{found['tokens_per_second']:10,.0f} "
            f"{'-' if mfu is None else f'{mfu:.1%}':>6} "
            f"{'-' if peak is None else f'{peak / 2**30:.1f}':>6} "
            + (f"{peers[0] / found['step_seconds']:9.2f}x" if peers else f"{'-':>10}")
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_gpu() -> str | None:
    """What is missing, or None. A process of its own: ours takes no memory there."""
    code = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)"
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    seen = (done.stdout.splitlines() or [""])[-1]
    if seen.startswith(("gpu", "cuda")):
        print(f"device: {seen}", file=sys.stderr)
        return None
    return (
        f"no GPU: jax sees {seen or done.stderr[-300:]!r}. This needs an NVIDIA GPU, "
        "pip install 'jax[cuda12]' and, for PyTorch's sides, torch with CUDA and "
        "transformers. To try the script on a CPU: --smoke."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(TASKS), help="which, by comma")
    parser.add_argument(
        "--sides", default="cudnn:none,torch:compile", help="which, by comma"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of one round")
    parser.add_argument("--batch", type=int, default=0, help="rows; 0 = the row's own")
    parser.add_argument("--minutes", type=float, default=0, help="start no row later")
    parser.add_argument("--output", help="also append the lines of JSON to this file")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    rows = args.rows.split(",")
    if unknown := set(rows) - set(TASKS):
        parser.error(f"--rows: {sorted(unknown)} not in {list(TASKS)}")
    if args.serve:
        task = TASKS[rows[0]].tiny() if args.smoke else TASKS[rows[0]]
        serve(dataclasses.replace(task, rows=args.batch), args.serve, args.steps)
        return 0
    if not args.smoke and (missing := check_gpu()):
        print(missing, file=sys.stderr)
        return 2
    began, results = time.monotonic(), []
    print(json.dumps(dict(versions=versions(), xla=os.environ.get("XLA_FLAGS"))))
    for row in rows:
        if args.minutes and time.monotonic() - began > 60 * args.minutes:
            print(f"{row}: not started, --minutes={args.minutes}", file=sys.stderr)
            continue
        for found in measure(row, args.sides.split(","), args):
            results.append(found)
            print(json.dumps(found), flush=True)
            if args.output:
                with open(args.output, "a") as file:
                    print(json.dumps(found), file=file)
    print(f"\n{__doc__.partition('FLOPs per step')[2].join(('FLOPs per step', ''))}")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

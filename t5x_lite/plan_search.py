"""Running many plans, and searching for the mesh, microbatches and remat that pay."""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import tqdm

from t5x_lite import config as config_lib
from t5x_lite.aot import Topology
from t5x_lite.estimate import Job
from t5x_lite.hardware import CHIPS, Chip
from t5x_lite.model_config import REMAT

SEARCHED = (
    *("sharding.data", "sharding.fsdp", "sharding.tensor"),
    *("optim.microbatches", "model.remat"),
)
SET = ("sharding.sequence", "sharding.dcn_data", "sharding.dcn_fsdp")


def run_all(
    cfgs: dict[Any, config_lib.Config],
    topology: Topology,
    jobs: int = 1,
    strict: bool = True,
) -> dict[Any, dict]:
    """Estimates of all configs, `jobs` at a time, with a progress bar.

    Args:
      strict: False = leave out what is refused or what the compiler fails on.

    Raises:
      ValueError: a config cannot be used.
    """
    waiting, running, found = list(cfgs), {}, {}
    every = 0.5 if sys.stderr.isatty() else 60.0  # seconds between two looks
    bar = tqdm.tqdm(
        total=len(cfgs),
        desc=f"compiling for {topology}",
        bar_format="{desc}: {n_fmt}/{total_fmt} done, {elapsed}",
        mininterval=every,
    )
    shown = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < max(1, jobs):
                name = waiting.pop(0)
                running[name] = Job(cfgs[name], topology)
            time.sleep(0.2)
            for name in [n for n, job in running.items() if job.done()]:
                try:
                    found[name] = running[name].result()
                except (ValueError, RuntimeError) as e:
                    if strict:
                        raise
                    bar.write(f"left out: {e}", file=sys.stderr)
                running.pop(name).stop()
                bar.update()
            if time.monotonic() - shown > every:
                shown = time.monotonic()
                bar.refresh()
    finally:
        bar.close()
        for job in running.values():
            job.stop()
    return {name: found[name] for name in cfgs if name in found}


def search(
    cfg: config_lib.Config, topology: Topology, limit: int, jobs: int = 1
) -> list[dict]:
    """Compiles the `limit` most promising candidates; best first, misfits last.

    What cannot fit by its state alone, or does not divide, is left out beforehand; the
    rest is tried in the order of a rough guess of their time.

    Returns:
      What `estimate` found, and `flags`: what to add to the command line to get it.
    """
    guessed = sorted(candidates(cfg, topology), key=lambda c: c[0])
    if not guessed:
        raise ValueError(
            f"--search: no mesh of {devices(topology)} devices divides batch "
            f"{cfg.data.batch_size} and the sizes of the model, and holds the state. "
            "Change config.data.batch_size, or take a larger machine."
        )
    chosen = {i: c for i, (_, c) in enumerate(guessed[:limit])}
    found = run_all(chosen, topology, jobs, strict=False)
    for i, one in found.items():
        one["flags"] = flags(cfg, chosen[i])

    def key(f: dict):
        r = f.get("roofline", {})
        fits = f["memory"].get("fits", True)
        return (not fits, r.get("step", 0.0), r.get("step_without_overlap", 0.0))

    return sorted(found.values(), key=key)


def flags(cfg: config_lib.Config, one: config_lib.Config) -> list[str]:
    """What turns `cfg` into its candidate `one` on a command line."""
    found = []
    for key in (*SEARCHED, *SET):
        section, name = key.split(".")
        before, after = (getattr(getattr(c, section), name) for c in (cfg, one))
        if key in SEARCHED or before != after:
            found.append(f"--config.{key}={after}")
    return found


def devices(topology: Topology) -> int:
    per_chip = 2 if topology.chip and topology.chip.name == "tpu7x" else 1
    return math.prod(topology.shape) * topology.slices * per_chip


def meshes(n: int) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) that multiply to n."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    for tensor in divisors:
        for fsdp in divisors:
            if n % (tensor * fsdp) == 0:
                yield n // (tensor * fsdp), fsdp, tensor


def candidates(
    cfg: config_lib.Config, topology: Topology
) -> Iterator[tuple[float, config_lib.Config]]:
    """(guess of the seconds of a step, config) of all that divide and may fit.

    `config.sharding.sequence` is kept; what lies between slices is data parallel.
    """
    from t5x_lite import dry

    words, _ = dry.vocabulary(cfg)
    cfg = dry.resolve_lengths(cfg, words)
    n, batch = devices(topology), cfg.data.batch_size
    sequence = max(1, cfg.sharding.sequence)
    _, shapes = dry.example(cfg, words)
    for data, fsdp, tensor in meshes(n // sequence):
        sizes = dict(data=data, fsdp=fsdp, tensor=tensor, sequence=sequence)
        sharded = dataclasses.replace(cfg.sharding, **sizes, dcn_data=-1, dcn_fsdp=1)
        if data % topology.slices or batch % (data * fsdp):
            continue
        mine = dataclasses.replace(cfg, sharding=sharded)
        try:
            held, mine = dry.state_bytes(mine, words)
        except ValueError:
            continue  # a dimension does not divide
        for microbatches in (2**k for k in range(8)):
            if batch % (microbatches * data * fsdp):
                break
            for remat in REMAT:
                one = dataclasses.replace(
                    mine,
                    model=dataclasses.replace(mine.model, remat=remat),
                    optim=dataclasses.replace(mine.optim, microbatches=microbatches),
                )
                seconds, least = guess(one, shapes, topology.chip)
                if topology.chip and held + least > topology.chip.hbm_bytes:
                    continue
                yield seconds, one


def guess(cfg: config_lib.Config, shapes: dict, chip: Chip | None):
    """(seconds of a step, bytes of activations and gradients), both rough and low.

    For the order in which candidates are compiled, and to leave out hopeless ones; no
    figure of it is shown.
    """
    from t5x_lite import metrics

    m, s, micro = cfg.model, cfg.sharding, cfg.optim.microbatches
    chip = chip or CHIPS["v5e"]
    ways, devices = s.data * s.fsdp, s.data * s.fsdp * s.tensor * s.sequence
    rows = cfg.data.batch_size / micro / ways
    inner = 3 * (m.heads * m.head_dim) + (3 if m.gated else 2) * m.d_ff
    layers = m.decoder_layers if m.structure != "encoder" else m.encoder_layers
    cells = max(T for T, _, _ in shapes.values())
    both = 2 if m.structure == "encoder_decoder" else 1
    weights = 2.0 * both * layers * m.d_model * (inner + m.heads * m.head_dim)
    weights = (weights + 2.0 * m.vocab_size * m.d_model) / s.tensor
    again = dict(none=1.0, dots=1.0, dots_no_batch=1.05, full=4 / 3)[m.remat]

    residual = 2.0 * rows * cells * m.d_model / s.sequence
    scores = 2.0 * rows * m.heads * cells * cells / s.tensor / s.sequence
    dots = 2.0 * rows * cells * inner / s.tensor / s.sequence
    saved = (
        residual
        + dict(
            none=3 * scores + dots, dots=scores + dots, dots_no_batch=dots, full=0.0
        )[m.remat]
    )
    gradients = weights / s.fsdp * (2 if micro > 1 else 1)
    least = 0.7 * layers * saved + gradients

    flops = 3 * again * metrics.forward_flops(m, shapes) * cfg.data.batch_size / devices
    moved = (3 if m.remat == "full" else 2) * weights * (s.fsdp > 1)
    moved += weights * (s.fsdp > 1) + 2 * weights / s.fsdp * (s.data > 1)
    moved += (s.tensor > 1) * both * layers * residual * (6 * again + 2)
    memory = 3 * weights + both * layers * (12 * residual + 6 * scores + 4 * dots)
    seconds = max(flops / chip.flops, micro * again * memory / chip.hbm_bandwidth)
    return seconds + micro * moved / chip.ici_bandwidth, least

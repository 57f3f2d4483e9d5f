"""Can this run start, and last? Checked before anything takes long.

`python -m t5x_lite.train --preflight --config=... --workdir=...` prints a table of all
checks, compiles the step to know its memory, and exits with 0 or 1. It trains nothing,
builds no token store and leaves every checkpoint as it is. Several processes with one
such command each check that they find each other and run the same code and config.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax

from t5x_lite import (
    cli,
    compatible,
    config,
    distributed,
    dry,
    estimate,
    hardware,
    integrity,
    retention,
    run,
    sharding,
    state,
    stopping,
    vocab,
)
from t5x_lite.data import mixture, sources, store
from t5x_lite.workdir import check_space, only_process, probe

LONG = 2**26  # bytes of text whose tokens take a while


def main(cfg: config.Config, workdir: pathlib.Path) -> int:
    """Prints the table at the lead; 0 if all is well, else 1, in every process."""

    def same() -> dict:
        return distributed.identity(config=config.to_json(cfg))

    with (
        contextlib.ExitStack() as stack,
        distributed.join(same, cfg.peers_timeout) as peers,
    ):
        checks = _Checks(cfg, workdir, peers, stack)
        own = [dataclasses.asdict(row) for row in checks.run()]
        rows = peers.everyone("preflight", own)
        failed = [(rank, r) for rank, each in enumerate(rows) for r in each]
        failed = [(rank, row) for rank, row in failed if row["good"] is False]
        if peers.lead:
            for row in rows[0]:
                print(_line(row))
            for rank, row in failed:
                if rank:
                    print(f"{peers.name(rank)}: {_line(row)}")
            print("not ready" if failed else "ready")
    return int(bool(failed))


def _line(row: dict) -> str:
    mark = {True: "ok", False: "FAIL", None: "-"}[row["good"]]
    return f"{row['name']:12} {mark:4} {row['text']}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One check: good, bad (False) or only a remark (None)."""

    name: str
    good: bool | None
    text: str


class _NotYet(Exception):
    """A remark in place of a check."""


class _Checks:
    def __init__(self, cfg, workdir, peers, stack: contextlib.ExitStack):
        self.cfg, self.workdir, self.peers, self.stack = cfg, workdir, peers, stack
        self.words: vocab.Vocab | None = None
        self.setup: run.Setup | None = None
        self.step: dry.Step | None = None
        self.complete = False

    def run(self) -> list[Row]:
        """All checks, each whether or not those before it failed."""
        rows = []
        for name in (
            *("processes", "workdir", "vocabulary", "text", "model", "checkpoint"),
            *("disk", "memory"),
        ):
            try:
                rows.append(Row(name, True, getattr(self, f"_{name}")()))
            except _NotYet as e:
                rows.append(Row(name, None, str(e)))
            except Exception as e:
                if not cli.is_users(e):
                    raise
                rows.append(Row(name, False, cli.message_of(e)))
        return rows

    def _processes(self) -> str:
        run.prepare_jax(self.cfg)
        same = distributed.identity(config=config.to_json(self.cfg))
        text = json.dumps(same, sort_keys=True)
        kinds = ", ".join(sorted({d.device_kind for d in jax.devices()}))
        return (
            f"{self.peers.count}, {jax.device_count()} x {kinds}; code and config "
            f"{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        )

    def _workdir(self) -> str:
        if not self.peers.lead:
            raise _NotYet("checked by rank 0")
        word = self.stack.enter_context(only_process(self.workdir))
        probe(self.workdir)
        return "; ".join(filter(None, ("writable, and no other process's", word)))

    def _vocabulary(self) -> str:
        self.words = vocab.load(self.cfg.data.vocab, self.cfg.data.sentinels)
        return f"{self.words.spec}: {self.words.size:,} ids"

    def _text(self) -> str:
        if self.words is None:
            raise _NotYet("needs the vocabulary")
        texts = [
            t for p in ("train", "heldout") for t in mixture.sources_of(self.cfg, p)
        ]
        missing, tokens, size = [], 0, 0
        for text in texts:
            if found := stored(self.cfg, self.words, text):
                tokens += found.n_tokens
            else:
                missing.append(text.key)
                size += sum(f.size for f in sources.files(text.spec, text.options))
        self.complete = not missing
        if missing:
            raise _NotYet(
                f"{', '.join(missing)}: {size / 2**20:,.1f} MiB of files will be "
                "tokenised first"
            )
        return f"{len(texts)} complete stores, {tokens:,} tokens"

    def _model(self) -> str:
        stopping.check(self.cfg)
        if self.complete:
            self.setup = run.Setup.of(self.cfg)
            mesh = self.setup.mesh
        else:
            self.step = dry.Step.of(self.cfg, None)
            mesh = self.step.mesh
        split = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1)
        count = sum(
            math.prod(leaf.shape) for leaf in jax.tree.leaves(self._state()["params"])
        )
        return f"{count:,} parameters divide over the mesh ({split or '1 device'})"

    def _state(self) -> dict:
        if self.setup:
            return self.setup.abstract_state
        if self.step:
            return self.step.state
        raise _NotYet("needs the model")

    def _checkpoint(self) -> str:
        directory = self.workdir / "checkpoints"
        steps, asked = retention.steps(directory), self.cfg.checkpoint.restore_step
        if not steps:
            return "none: a new run"
        if not self.peers.lead:
            raise _NotYet("checked by rank 0")
        step = steps[-1] if asked == -1 else asked
        if step not in steps:
            raise ValueError(
                f"config.checkpoint.restore_step={asked} is none of {steps}."
            )
        found = integrity.inspect(directory / str(step))
        if found.problems:
            raise integrity.Damaged(f"{step}: {found.problems[0]}")
        if self.setup is None:
            raise _NotYet(f"{step} is whole; whether it fits needs model and text")
        meta = integrity.read_meta(directory / str(step))
        compatible.check_compatible(meta, self.setup.cfg, self.setup.data_identity())
        return f"{step} is whole and fits; the run goes on from there"

    def _disk(self) -> str:
        if not self.peers.lead:
            raise _NotYet("checked by rank 0")
        return space(self.cfg, self.workdir, self._state())

    def _memory(self) -> str:
        abstract = self._state()
        if self.setup:
            from t5x_lite import train

            with sharding.use(self.setup.mesh, self.setup.cfg.sharding.rules):
                batch = self.setup.to_device(self.setup.train_batches[0])
                beside = self.setup.beside()
                compiled = train.compile_step(self.setup, abstract, batch, beside)
        else:
            assert self.step
            compiled = self.step.lower(jax.default_backend()).compile()
        return memory(compiled)


class _Refused(Exception):
    """`stored` builds nothing."""


def stored(cfg: config.Config, words: vocab.Vocab, text) -> store.TokenStore | None:
    """The token store of a text if it is complete; builds nothing."""

    def refuse(*args, **more) -> Any:
        raise _Refused

    try:
        return mixture.open_text(cfg, words, text, build=refuse)
    except _Refused:
        return None


def before_stores(cfg: config.Config, workdir: pathlib.Path):
    """The checks whose failure would be known only after a long tokenisation.

    Raises:
      ValueError, KeyError, OSError: as `run.Setup.of` and `check_space` do.
    """
    stopping.check(cfg)
    words = vocab.load(cfg.data.vocab, cfg.data.sentinels)
    texts = [t for part in ("train", "heldout") for t in mixture.sources_of(cfg, part)]
    texts = [text for text in texts if not stored(cfg, words, text)]
    mixture.look(texts)
    waiting = [f for text in texts for f in sources.files(text.spec, text.options)]
    if sum(file.size for file in waiting) > LONG:
        space(cfg, workdir, dry.Step.of(cfg, None).state)


def space(cfg: config.Config, workdir: pathlib.Path, abstract_state: dict) -> str:
    """How many checkpoints there will be at most, and that they find room.

    Raises:
      OSError: they do not.
    """
    size, most = state.size_bytes(abstract_state), retention.at_most(cfg)
    have = len(retention.steps(workdir / "checkpoints"))
    check_space(workdir, size, max(1, most - have))
    free = shutil.disk_usage(workdir).free
    return (
        f"at most {most} checkpoints of {size / 2**20:,.1f} MiB at a time "
        f"({have} there), {free / 2**20:,.0f} MiB free"
    )


def memory(compiled) -> str:
    """What the compiled step takes of a device's memory, or of the machine's on CPUs.

    Raises:
      ValueError: it is more than there is.
    """
    need, own = estimate.peak(compiled.memory_analysis()), jax.local_devices()
    device, where = own[0], f"of each {own[0].device_kind}"
    room = (device.memory_stats() or {}).get("bytes_limit")
    if room is None and (chip := hardware.of_device(device)):
        room = chip.hbm_bytes
    if device.platform == "cpu":
        need, room, where = need * len(own), _host_memory(), "of this machine"
    text = f"the step takes {need / 2**20:,.0f} MiB"
    if room is None:
        return f"{text} of a {device.device_kind}, whose memory is not known"
    if need > room:
        raise ValueError(
            f"{text}, and {room / 2**20:,.0f} MiB {where} are there. Raise "
            "config.optim.microbatches, set config.model.remat, lower "
            "config.data.batch_size, or shard with config.sharding.fsdp."
        )
    return f"{text} of the {room / 2**20:,.0f} MiB {where}"


def warn_of_memory(compiled, say: Callable[[str], None]):
    """Says it if a step that was compiled anyway takes more memory than there is."""
    try:
        memory(compiled)
    except ValueError as e:
        say(f"warning: {e}")


def _host_memory() -> int:
    """Bytes of RAM that this process may have."""
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():
        room = min(room, int(text))
    return room

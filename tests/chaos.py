"""One run of two processes, killed again and again: `make chaos`.

    python -m tests.chaos --kills=100 --seed=0

Each kill waits for a phase (start-up, compilation, a step, an evaluation, an
asynchronous save, the deletion of an old checkpoint), stops both processes for a moment
to see where it has landed, and then sends SIGKILL, SIGTERM or SIGSTOP to one or both.
What a process is doing is read from what a run writes anyway: its output, metrics.jsonl
and the names in checkpoints/. Whoever was stopped goes on after a while; whoever was
killed is started again. At the end the run must be, line by line, the one that nobody
disturbed; every checkpoint whole; and no process may have outlived a deadline.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import tqdm

from t5x_lite import cli, metrics, progress, retention
from tests.test_rendezvous import free_port

ROOT = pathlib.Path(__file__).parent.parent
PROCESSES = 2
STEPS_PER_KILL = 12
EVAL_EVERY, SAVE_EVERY = 10, 5
PHASES = ("start-up", "compile", "step", "evaluation", "save", "deletion")
# jax gives up on a lost process after distributed.HEARTBEAT_SECONDS = 60.
ENDS_WITHIN = 150.0
STARTS_WITHIN = 300.0
PEERS_WITHIN = 60
# How often each is drawn; (signal, victims).
BLOWS = {
    (signal.SIGKILL, "both"): 5,
    (signal.SIGKILL, "rank 0"): 1,
    (signal.SIGKILL, "rank 1"): 1,
    (signal.SIGTERM, "both"): 1,
    (signal.SIGTERM, "rank 0"): 1,
    (signal.SIGTERM, "rank 1"): 1,
    (signal.SIGSTOP, "both"): 1,
    (signal.SIGSTOP, "rank 0"): 1,
    (signal.SIGSTOP, "rank 1"): 1,
}


class Wrong(Exception):
    """What must never happen."""


def _holds_something(folder: pathlib.Path) -> bool:
    """False too if it goes away while it is read."""
    try:
        return any(folder.iterdir())
    except FileNotFoundError:
        return False


@dataclasses.dataclass
class Blow:
    phase: str  # where it landed
    sign: signal.Signals
    victims: str
    step: int  # lines of metrics.jsonl then
    seconds: float = 0.0  # until all had ended


class Session:
    """The processes of one start, with their output in files."""

    def __init__(self, workdir: pathlib.Path, shared: pathlib.Path, steps: int):
        self.workdir = workdir
        address = f"127.0.0.1:{free_port()}"
        self.logs = [shared / f"{workdir.name}-{rank}.log" for rank in range(PROCESSES)]
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "t5x_lite.train",
                    *flags(workdir, shared, steps),
                ],
                cwd=ROOT,
                env=environment(address, rank),
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(self.logs)
        ]

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def says(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-4000:] for log in self.logs)

    def send(self, number: int, victims: str = "both"):
        for rank, process in enumerate(self.processes):
            if victims in ("both", f"rank {rank}"):
                process.send_signal(number)

    def ended(self, within: float) -> list[int]:
        """Exit codes, once all have ended.

        Raises:
          Wrong: if one has not; it is killed.
        """
        deadline = time.monotonic() + within
        for rank, process in enumerate(self.processes):
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.send(signal.SIGKILL)
                raise Wrong(
                    f"rank {rank} hung for {within} s:\n{self.says()}"
                ) from None
        return [process.returncode for process in self.processes]

    def phase(self) -> str:
        """What rank 0 is doing, or would be if it were not stopped."""
        said = self.logs[0].read_text(errors="replace")
        if "start-up: import" not in said:
            return "compile" if "resuming after" in said else "start-up"
        names = [p.name for p in (self.workdir / "checkpoints").glob("*")]
        if any("orbax-checkpoint-tmp" in name for name in names):
            return "save"
        if _holds_something(self.workdir / "checkpoints" / "deleted"):
            return "deletion"
        last = tail(self.workdir)
        evaluates = last["step"] % EVAL_EVERY == 0 and "heldout_loss" not in last
        return "evaluation" if evaluates else "step"


def flags(workdir, shared, steps: int) -> list[str]:
    source = ROOT / "data" / "heldout.jsonl"
    return [
        "--config=configs/gpt2.py:smoke",
        f"--workdir={workdir}",
        f"--config.data.train={source}",
        f"--config.data.heldout={source}",
        f"--config.data.cache_dir={shared}/stores",
        f"--config.compile_cache={shared}/compiled",
        f"--config.steps={steps}",
        f"--config.checkpoint.every={SAVE_EVERY}",
        f"--config.eval_every={EVAL_EVERY}",
        "--config.eval_batches=1",
        "--config.model.dropout=0.1",
        "--config.optim.schedule=constant",
        "--config.slow_step=0",
        # One that was struck in its start-up leaves the other to wait for so long.
        f"--config.peers_timeout={PEERS_WITHIN}",
    ]


def environment(address: str, rank: int) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_"))}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(PROCESSES),
        "JAX_PROCESS_ID": str(rank),
        "PYTHONUNBUFFERED": "1",
        "http_proxy": "http://127.0.0.1:9",  # nobody may ask it for the way
    }


def tail(workdir: pathlib.Path) -> dict:
    """The last whole line of metrics.jsonl, {} if there is none."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            whole = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    whole = [
        line for line in whole[-3:] if line.startswith(b"{") and line[-1:] == b"\n"
    ]
    return json.loads(whole[-1]) if whole else {}


def lines(workdir: pathlib.Path) -> int:
    """The last step that is written down."""
    return tail(workdir).get("step", 0)


def sequence(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = metrics.read(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in progress.CLOCKED} for row in rows]


def await_phase(session: Session, phase: str, rng: random.Random, usual: dict):
    """Sleeps until a blow would land there, at a random instant of it."""
    began = time.monotonic()
    until = lines(session.workdir) + rng.randint(1, 8)
    while session.alive():
        found = session.phase()
        usual.setdefault(found, time.monotonic() - began)
        if phase == "start-up":
            time.sleep(rng.uniform(0.0, usual.get("compile", 5.0)))
            return
        if phase == found == "compile":
            time.sleep(rng.uniform(0.0, usual.get("step", 10.0) - usual["compile"]))
            return
        if phase == found and (phase != "step" or lines(session.workdir) >= until):
            time.sleep(rng.uniform(0.0, 0.005))
            return
        # A session that is under way has no start-up any more.
        if phase == "compile" and found not in ("start-up", "compile"):
            return
        if time.monotonic() - began > STARTS_WITHIN:
            session.send(signal.SIGKILL)
            raise Wrong(f"no {phase} within {STARTS_WITHIN} s:\n{session.says()}")
        time.sleep(0.001)


def strike(session: Session, rng: random.Random, sign, victims: str) -> Blow | None:
    """Freezes both to see where they are, then strikes; None: it had ended before."""
    session.send(signal.SIGSTOP)
    if not session.alive():
        session.send(signal.SIGCONT)
        return None
    blow = Blow(session.phase(), sign, victims, lines(session.workdir))
    if sign != signal.SIGSTOP:
        session.send(sign, victims)
        session.send(signal.SIGCONT)
        return blow
    others = {"both": "none", "rank 0": "rank 1", "rank 1": "rank 0"}[victims]
    session.send(signal.SIGCONT, others)
    time.sleep(rng.uniform(0.2, 4.0))
    session.send(signal.SIGCONT)
    return blow


def whole_checkpoints(workdir: pathlib.Path) -> list[int]:
    """Steps whose folder has all its parts; `verify` then reads them."""
    folder = workdir / "checkpoints"
    parts = ("state", "meta", "_CHECKPOINT_METADATA")
    return [
        step
        for step in retention.numbered(folder)
        if all((folder / str(step) / part).exists() for part in parts)
    ]


def torture(
    workdir, shared, kills: int, steps: int, seed: int, minutes: float
) -> list[Blow]:
    ends = time.monotonic() + 60 * minutes
    rng, usual, blows = random.Random(seed), {}, []
    phases = itertools.cycle(PHASES)
    session = None
    for _ in (bar := tqdm.tqdm(range(kills), "kills")):
        if minutes and time.monotonic() > ends:
            break
        phase = next(phases)
        (sign, victims) = rng.choices([*BLOWS], [*BLOWS.values()])[0]
        while True:
            fresh = session is None or not session.alive()
            if session and fresh:
                raise Wrong(f"ended by itself: {session.ended(1.0)}\n{session.says()}")
            had = max(whole_checkpoints(workdir), default=0)
            session = session or Session(workdir, shared, steps)
            await_phase(session, phase, rng, usual)
            began = time.monotonic()
            blow = strike(session, rng, sign, victims)
            if blow:
                break
        blows.append(blow)
        bar.set_postfix_str(f"{blow.phase}, {sign.name} {victims}, step {blow.step}")
        if sign == signal.SIGSTOP:
            continue
        codes = session.ended(ENDS_WITHIN)
        blow.seconds = time.monotonic() - began
        if 0 in codes:
            raise Wrong(f"codes {codes} after {sign.name}:\n{session.says()}")
        session = None
        have = max(whole_checkpoints(workdir), default=0)
        if have < had:
            raise Wrong(f"checkpoint {had} is lost, {have} is left: {blow}")
    if session:  # what was stopped last goes on
        session.send(signal.SIGKILL)
        session.ended(ENDS_WITHIN)
    return blows


def check(workdir: pathlib.Path, expected: pathlib.Path):
    """Is the run the one that nobody disturbed, and all that it left whole?"""
    found, wanted = sequence(workdir), sequence(expected)
    if found != wanted:
        pairs = itertools.zip_longest(found, wanted)
        first = next(pair for pair in pairs if pair[0] != pair[1])
        raise Wrong(f"another sequence: {first[0]}\n  instead of     {first[1]}")
    names = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    whole = sorted(map(str, whole_checkpoints(workdir)))
    if names != whole or whole_checkpoints(workdir) != whole_checkpoints(expected):
        raise Wrong(f"checkpoints/ holds {names}, of which whole are {whole}")
    verified = subprocess.run(
        [sys.executable, "-m", "t5x_lite.verify", f"--workdir={workdir}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=STARTS_WITHIN,
    )
    if verified.returncode:
        raise Wrong(f"verify: {verified.stdout}{verified.stderr}")


def table(blows: list[Blow]) -> list[str]:
    """Where they landed: a row for each phase, a column for each signal."""
    signs = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
    counts = collections.Counter((blow.phase, blow.sign) for blow in blows)
    heads = "".join(f"{sign.name:>9}" for sign in signs)
    rows = [f"{'landed in':12}{heads}{'all':>7}"]
    for phase in PHASES:
        own = [counts[phase, sign] for sign in signs]
        rows.append(f"{phase:12}{''.join(f'{n:9}' for n in own)}{sum(own):7}")
    own = [sum(counts[phase, sign] for phase in PHASES) for sign in signs]
    return [*rows, f"{'all':12}{''.join(f'{n:9}' for n in own)}{sum(own):7}"]


def main(argv: list[str] | None = None):
    parser = cli.parser(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="signals to send")
    parser.add_argument("--seed", type=int, default=0, help="of phases and signals")
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="fewer signals after so many; 0 = all",
    )
    parser.add_argument("--folder", help="for both runs; a new one, which is kept")
    flags = parser.parse_args(argv)
    began = time.monotonic()
    steps = STEPS_PER_KILL * flags.kills
    with contextlib.ExitStack() as stack:
        if flags.folder:
            shared = pathlib.Path(flags.folder).absolute()
            shared.mkdir(parents=True)
        else:
            folder = tempfile.TemporaryDirectory(prefix="chaos-")
            shared = pathlib.Path(stack.enter_context(folder))
        undisturbed, run = shared / "undisturbed", shared / "run"
        try:
            codes = Session(undisturbed, shared, steps).ended(10 * STARTS_WITHIN)
            if any(codes):
                raise Wrong(f"the undisturbed run: {codes}")
            took = time.monotonic() - began
            print(f"undisturbed: {steps} steps in {took:.0f} s", flush=True)
            blows = torture(
                *(run, shared, flags.kills, steps, flags.seed, flags.minutes)
            )
            print("\n".join(table(blows)), flush=True)
            last = Session(run, shared, steps)
            if any(last.ended(10 * STARTS_WITHIN)):
                raise Wrong(f"the last start:\n{last.says()}")
            check(run, undisturbed)
        except Wrong as e:
            for log in sorted(shared.glob("*.log")):
                print(f"---- {log.name}\n{log.read_text(errors='replace')[-6000:]}")
            sys.exit(f"chaos, seed {flags.seed}: {e}")
    starts = sum(blow.sign != signal.SIGSTOP for blow in blows) + 1
    slowest = max(blow.seconds for blow in blows)
    print(
        f"{len(blows)} signals, {starts} starts, seed {flags.seed}: all {steps} steps "
        "and their held-out losses are those of the undisturbed run; every checkpoint "
        f"is whole; the processes had ended within {slowest:.0f} s after a blow. "
        f"{time.monotonic() - began:.0f} s."
    )


if __name__ == "__main__":
    main()

"""Several processes, one run: they find each other, agree, and end together.

How a process learns its place, the first that fits:
  JAX_NUM_PROCESSES=1             alone, whatever is around it
  JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES=N and JAX_PROCESS_ID=RANK (or
  JOB_COMPLETION_INDEX, which Kubernetes sets): the launch file says it
  SLURM (srun), Open MPI (mpirun), Cloud TPU VMs, GKE TPU JobSets: jax reads it there
  none of these                   alone

Rank 0 listens at the coordinator's address. All must run the same code and config; the
workdir must be one directory that all see. When a process fails it tells the others,
who stop at once with the same message. One that is killed cannot tell: the others end
with the first collective that breaks, or after HEARTBEAT_SECONDS at the latest, when
jax aborts them.
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_lite import cli, rendezvous

HEARTBEAT_SECONDS = 60
# What a stopping run waits for its peers' answers, and a failed process for itself.
GRACE_SECONDS = 5
# Config keys that may name another place on every machine.
_LOCAL_KEYS = ("config.data.cache_dir", "config.compile_cache")


@contextlib.contextmanager
def join(same: Callable[[], dict[str, Any]], timeout: int = 300) -> Iterator["Peers"]:
    """Within: this process is one of its run's; before any use of a device.

    An exception inside stops all processes; the end is reached by all together.

    Args:
      same: gives name -> value that all processes must agree on, see `identity`.
      timeout: seconds to wait for all processes.

    Raises:
      ValueError: naming who is missing, came twice or differs, in every process.
    """
    place = rendezvous.detect(timeout)
    if place is None:
        yield Peers()
        return
    roster = rendezvous.meet(place.address, place.count, place.rank, same(), timeout)
    # Its handler would take SIGTERM away from ours; see `Agreement`.
    jax.config.update("jax_enable_preemption_service", False)
    _pass_proxies_by(place.address)
    jax.distributed.initialize(
        place.address,
        place.count,
        place.rank,
        place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        coordinator_bind_address=rendezvous.loopback(place.address),
    )
    # Public jax has no name for the store of keys and values either.
    from jax._src import distributed

    peers = Peers(place.rank, roster, distributed.global_state.client)
    peers.start_listening()
    try:
        yield peers
        peers.finish()
    except BaseException as e:
        peers.fail(e)
        raise


def _pass_proxies_by(address: str):
    """The way to rank 0 leads through no HTTP proxy, whatever the environment says."""
    given = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy", "")
    host = address.rpartition(":")[0].strip("[]")
    os.environ["no_grpc_proxy"] = ",".join(filter(None, (given, host)))
    jax.config.update("jax_check_proxy_envs", False)


def identity(**sections: dict[str, Any]) -> dict[str, Any]:
    """What all processes of a run must have in common, by name.

    Versions, source files, and the values of `sections`, such as
    config=config.to_json(cfg).
    """
    found = {"python": platform.python_version(), "jax": jax.__version__}

    def walk(node, name: str):
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{name}.{key}" if name else key)
        elif name not in _LOCAL_KEYS:
            found[name] = node

    walk(sections, "")
    package = pathlib.Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        found[f"t5x_lite/{path.relative_to(package)}"] = f"sha256 {digest}"
    return found


class Peers:
    """The processes of a run. For one alone every method returns at once.

    All processes must call these methods in the same order.
    """

    def __init__(
        self, rank: int = 0, roster: list[dict] | None = None, client: Any = None
    ):
        self.rank, self.roster = rank, roster or [rendezvous.introduction(0)]
        self._client, self._calls = client, 0
        self._code, self._leaving = 1, threading.Event()

    @property
    def lead(self) -> bool:
        """Is this the process that prints and writes?"""
        return self.rank == 0

    @property
    def count(self) -> int:
        return len(self.roster)

    def name(self, rank: int) -> str:
        """A process for people, "rank 3 (host b, pid 17)"."""
        return rendezvous.name(rank, self.roster[rank])

    def gather(self, name: str, value) -> list | None:
        """Everybody's value (JSON) by rank at rank 0; None elsewhere, without waiting.

        Waits for as long as it takes, and says for whom.
        """
        if self.count == 1:
            return [value]
        key = self._key(name)
        if not self.lead:
            self._client.key_value_set(f"{key}/{self.rank}", json.dumps(value))
            return None
        others = range(1, self.count)
        return [value, *(json.loads(self._get(f"{key}/{r}", r)) for r in others)]

    def from_lead(self, name: str, make):
        """`make()` of rank 0 (JSON) in every process; only rank 0 calls it."""
        if self.count == 1:
            return make()
        key = self._key(name)
        if self.lead:
            value = make()
            self._client.key_value_set(key, json.dumps(value))
            return value
        return json.loads(self._get(key, 0))

    def everyone(self, name: str, value) -> list:
        """Everybody's value (JSON) by rank, in every process."""
        found = self.gather(name, value)
        every: Any = self.from_lead(f"{name}, all", lambda: found)
        return every

    def barrier(self, name: str):
        """Until all are here."""
        self.everyone(name, None)

    def check_same(self, same: dict[str, Any]):
        """Stops the run, with the names, if a process has other values than rank 0."""
        found = self.gather("same", same)
        if found:
            pairs = zip(self.roster, found, strict=True)
            rendezvous.check_same([peer | {"same": each} for peer, each in pairs])

    def check_shared(self, workdir: pathlib.Path):
        """Stops the run if the processes do not see the same directory."""
        if self.count == 1:
            return
        path = workdir / "lock"  # which rank 0 has just written
        mark = self.from_lead("mark", path.read_text)
        for _ in range(30):  # a network file system may show it late
            if self.lead or path.exists() and path.read_text() == mark:
                return
            time.sleep(1)
        raise ValueError(
            f"--workdir={workdir} of {self.name(self.rank)} is not the directory that "
            f"{self.name(0)} writes to. Give one that all machines share."
        )

    def show(self):
        """Prints the roster at rank 0; opens the devices."""
        if self.count == 1:
            return
        own = jax.local_devices()
        about = f"{len(own)} x {own[0].device_kind}" if own else "no devices"
        rows = self.gather("devices", about)
        if rows is None:
            return
        print(f"{self.count} processes, {jax.device_count()} devices:")
        width = max(len(p["host"]) for p in self.roster)
        for rank, (peer, devices) in enumerate(zip(self.roster, rows, strict=True)):
            host, pid = peer["host"], peer["pid"]
            print(f"  rank {rank:<4} {host:{width}}  pid {pid:<8} {devices}")
        sys.stdout.flush()

    # ---- the end ------------------------------------------------------------------
    # One key says how the run ends: null, or who failed. A thread waits for it.

    def start_listening(self):
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def finish(self):
        self.barrier("finished")
        if self.lead:
            self._client.key_value_set("end", "null")
        self._listener.join()

    def fail(self, e: BaseException):
        """Tells the others; the interpreter will exit without waiting for them."""
        self._code = _exit_code(e)
        message = cli.message_of(e)[:2000]
        if isinstance(e, SystemExit):
            message = f"a signal during start-up (exit code {e.code})"
        end = {"rank": self.rank, "message": message, "code": self._code}
        # jax's own exit handler would wait for peers that are gone.
        atexit.register(self._leave)
        try:
            self._client.key_value_set("end", json.dumps(end))
        except jax.errors.JaxRuntimeError:
            # Another was first, and the listener ends this process; or rank 0 is gone.
            self._listener.join(2 * GRACE_SECONDS)

    def _listen(self):
        try:
            end = json.loads(self._get("end", None))
        except jax.errors.JaxRuntimeError:
            return  # rank 0 is gone; jax ends this process
        if end is None:
            return
        own = end["rank"] == self.rank
        if not own:
            message = f"{self.name(end['rank'])} stopped: {end['message']}"
            print(f"\nerror: {message}", file=sys.stderr, flush=True)
            self._client.key_value_set(f"heard/{self.rank}", "")
        if self.lead:  # the others reach each other only through this process
            silent = self._silent({self.rank, end["rank"]})
            if silent:
                print(
                    f"no answer from {', '.join(map(self.name, silent))}: killed, or "
                    "the machine is lost; look there first",
                    file=sys.stderr,
                    flush=True,
                )
        # The main thread prints its error and exits, if it still can.
        if own and not self._leaving.wait(GRACE_SECONDS):
            print(f"error: {end['message']}", file=sys.stderr, flush=True)
        os._exit(end["code"])

    def _silent(self, known: set[int]) -> list[int]:
        deadline, silent = time.monotonic() + GRACE_SECONDS, []
        for rank in sorted(set(range(self.count)) - known):
            left = max(1, round(1000 * (deadline - time.monotonic())))
            try:
                self._client.blocking_key_value_get(f"heard/{rank}", left)
            except jax.errors.JaxRuntimeError:
                silent.append(rank)
        # Who has heard is about to exit; jax aborts who outlives rank 0.
        time.sleep(1)
        return silent

    def _leave(self):
        sys.stdout.flush()
        sys.stderr.flush()
        self._leaving.set()
        if self.lead:
            self._listener.join(2 * GRACE_SECONDS)
        os._exit(self._code)

    def _key(self, name: str) -> str:
        self._calls += 1
        return f"{name}/{self._calls}"

    def _get(self, key: str, rank: int | None) -> str:
        """Waits for a key, which `rank` will set; rank 0 says so every minute."""
        for turn in itertools.count(1):
            try:  # in short turns, so that signals are handled in between
                return self._client.blocking_key_value_get(key, 5000)
            except jax.errors.JaxRuntimeError as e:
                if "DEADLINE_EXCEEDED" not in str(e):
                    raise
            if rank is not None and self.lead and turn % 12 == 0:
                print(f"{turn // 12} min: waiting for {self.name(rank)}", flush=True)
        raise AssertionError


def _exit_code(e: BaseException) -> int:
    """As `cli.run` ends."""
    if isinstance(e, SystemExit):
        return e.code if isinstance(e.code, int) else 1
    if isinstance(e, KeyboardInterrupt):
        return 130
    return cli.exit_code(e)


class Agreement:
    """The largest of a number over all processes, so that all act alike.

    With several processes the answer is that of the call before: it has been computed
    behind the training step by then, and nothing waits for it. All must call it
    equally often.
    """

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._largest = jax.jit(jnp.max, out_shardings=everywhere)
        self._flags, self._pending = {}, None

    def __call__(self, value: int) -> int:
        if self._alone:
            return value
        if value not in self._flags:
            self._flags[value] = jax.make_array_from_callback(
                (self._size,), self._split, lambda _: np.full(1, value, np.int32)
            )
        before, self._pending = self._pending, self._largest(self._flags[value])
        return 0 if before is None else int(before)

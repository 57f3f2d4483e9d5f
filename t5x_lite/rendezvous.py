"""The first meeting of a run's processes, over plain sockets, before jax connects them.

jax aborts a process whose peers do not come, without saying which. Here rank 0 waits at
the coordinator's address, hears everybody's introduction (one line of JSON) and answers
all at once: the roster, or what is wrong.
"""

import contextlib
import json
import operator
import os
import socket
import time
from typing import Any, NamedTuple

from t5x_lite import cli

MOST_BYTES = 1_000_000  # of a message
FIELDS = ("rank", "host", "pid", "count", "same")
SHOWN = 8  # ranks or differences in an error


class Place(NamedTuple):
    """A process among its peers."""

    address: str  # HOST:PORT where rank 0 listens
    count: int
    rank: int
    devices: Any = None  # ids of the machine's devices that are its own; None = all


def detect(timeout: int = 300) -> Place | None:
    """This process's place, from the environment (see `distributed`); None = alone.

    Raises:
      ValueError: if the environment says only a part, or something impossible.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address = os.environ.get(names[0])
    count, rank = (_integer(name) for name in names[1:])
    if count == 1:
        return None
    if rank is None and address and count:
        rank = _integer("JOB_COMPLETION_INDEX")
    ids = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    devices = [int(i) for i in ids.split(",")] if ids else None
    if None in (address, count, rank):
        # jax has no public name for what jax.distributed.initialize() detects.
        from jax._src import clusters

        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            address, count, rank, devices, None, timeout
        )
        address, count, rank, devices = found
    if address is None and count is None and rank is None or count == 1:
        return None
    here = dict(zip(names, (address, count, rank), strict=True))
    missing = [name for name, value in here.items() if value is None]
    if missing:
        raise ValueError(
            f"the environment sets {[n for n in names if n not in missing]} but not "
            f"{missing}. Set all three for every process, or none to run alone."
        )
    assert address is not None and count is not None and rank is not None
    if not (0 <= rank < count and ":" in address):
        raise ValueError(
            f"{here}: JAX_PROCESS_ID must be in [0, JAX_NUM_PROCESSES) and "
            "JAX_COORDINATOR_ADDRESS be HOST:PORT."
        )
    return Place(address, count, rank, devices)


def _integer(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise ValueError(f"{name}={text!r} in the environment must be a number.")
    return int(text)


def introduction(rank: int) -> dict[str, Any]:
    return {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}


def name(rank: int, peer: dict) -> str:
    return f"rank {rank} ({peer['host']}, pid {peer['pid']})"


def loopback(address: str) -> str | None:
    """The address to listen at if it is of this machine only, else None: at all."""
    host = address.rpartition(":")[0]
    return address if host == "localhost" or host.startswith("127.") else None


def meet(
    address: str, count: int, rank: int, same: dict[str, Any], timeout: float
) -> list[dict]:
    """Waits for all processes; -> their introductions by rank.

    Args:
      address: HOST:PORT where rank 0 listens; free again afterwards.
      same: name -> value on which all must agree with rank 0.
      timeout: seconds.

    Raises:
      cli.TryAgain: in all processes that are here, naming who is missing.
      ValueError: in all of them, naming who came twice, counts otherwise or differs.
    """
    mine = introduction(rank) | {"count": count, "same": same}
    deadline = time.monotonic() + timeout
    if rank:
        answer = _introduce(address, rank, mine, deadline, timeout)
    else:
        answer = _receive(address, count, mine, deadline, timeout)
    if "error" in answer:
        kind = cli.TryAgain if answer.get("late") else ValueError
        raise kind(answer["error"])
    return answer["roster"]


def check_same(peers: list[dict]):
    """Refuses peers whose "same" differs from that of rank 0, naming what differs."""
    problems, ours = [], peers[0]["same"]
    for rank, peer in enumerate(peers):
        theirs = peer["same"]
        found = [
            f"{key} is {theirs.get(key)!r}, {ours.get(key)!r} on rank 0"
            for key in sorted({*ours, *theirs})
            if ours.get(key) != theirs.get(key)
        ]
        if found:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            problems.append(f"{name(rank, peer)}: {'; '.join(found[:SHOWN])}{more}")
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(
            "the processes of a run must have the same code, config and data:\n  - "
            + "\n  - ".join(problems[:SHOWN])
            + more
            + "\nGive all the same command and the same files."
        )


def _receive(address: str, count: int, mine, deadline: float, timeout: float) -> dict:
    """Rank 0's part."""
    here: dict[int, tuple[dict, socket.socket | None]] = {0: (mine, None)}
    refused: list[socket.socket] = []
    answer: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(address))
        patience = time.monotonic() + min(10.0, timeout / 2)
        while not answer:
            gone = [r for r, (_, peer) in here.items() if peer and not _alive(peer)]
            for rank in gone:  # it may have been started again
                del here[rank]
            missing = sorted(set(range(count)) - set(here))
            if not missing:
                break
            if time.monotonic() > deadline:
                answer = {"error": _absent(missing, here, count, timeout), "late": True}
                break
            if time.monotonic() > patience:
                patience = deadline
                print(
                    f"waiting for {_ranks(missing)} of {count}, up to {timeout:g} s",
                    flush=True,
                )
            server.settimeout(1.0)
            try:
                peer = stack.enter_context(server.accept()[0])
                hello = _read(peer, 5.0)
                rank = operator.itemgetter(*FIELDS)(hello)[0]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # nobody came, or none of ours
            answer = _refusal(hello, count, here)
            if answer:
                refused.append(peer)
            else:
                here[rank] = hello, peer
        peers = [here[r][0] for r in sorted(here)]
        if not answer:
            roster = [{k: p[k] for k in ("rank", "host", "pid")} for p in peers]
            answer = {"roster": roster}
            try:
                check_same(peers)
            except ValueError as e:
                answer = {"error": str(e)}
        line = json.dumps(answer).encode() + b"\n"
        for peer in [*refused, *(peer for _, peer in here.values())]:
            with contextlib.suppress(OSError):
                if peer:
                    peer.sendall(line)
    return answer


def _refusal(hello: dict, count: int, here: dict) -> dict[str, str]:
    """{"error": ...} for a process that cannot be one of the run's."""
    rank = hello["rank"]
    who, first = name(rank, hello), name(0, here[0][0])
    if hello["count"] != count:
        return {
            "error": f"{who} was started as one of {hello['count']} processes, {first} "
            f"as one of {count}. Give all the same JAX_NUM_PROCESSES."
        }
    if rank in here:
        return {
            "error": f"{who} and {name(rank, here[rank][0])} are both rank {rank}. "
            "Give each its own JAX_PROCESS_ID, and each run its own "
            "JAX_COORDINATOR_ADDRESS."
        }
    return {}


def _absent(missing: list[int], here: dict, count: int, timeout: float) -> str:
    present = [name(rank, peer) for rank, (peer, _) in sorted(here.items())]
    more = " ..." if len(present) > SHOWN else ""
    return (
        f"{len(missing)} of {count} processes did not come within {timeout:g} s: "
        f"{_ranks(missing)}. Here: {', '.join(present[:SHOWN])}{more}. Look at the "
        "output of the missing ones; if they only start slowly, raise "
        "config.peers_timeout."
    )


def _ranks(missing: list[int]) -> str:
    shown = ", ".join(map(str, missing[:SHOWN]))
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    return f"rank{'s' * (len(missing) > 1)} {shown}{more}"


def _introduce(address: str, rank: int, mine, deadline: float, timeout: float) -> dict:
    """The others' part."""
    host, _, port = address.rpartition(":")
    line = json.dumps(mine).encode() + b"\n"
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), 5.0) as peer:
                peer.sendall(line)
                # Rank 0 may have begun to wait later than this process.
                return _read(peer, timeout + deadline - time.monotonic())
        except (OSError, ValueError) as e:
            last = e
            time.sleep(0.2)
    raise cli.TryAgain(
        f"rank 0 did not answer rank {rank} ({socket.gethostname()}, pid "
        f"{os.getpid()}) at {address} within {timeout:g} s ({last}). Look at the "
        "output of rank 0; check the address and that its port can be reached."
    )


def _listen(address: str) -> socket.socket:
    asked = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or loopback(address)
    host, _, port = (asked or address).rpartition(":")
    host = host.strip("[]") if asked else ""
    try:
        if host not in ("", "::"):
            found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            family, _, _, _, where = found[0]
            return socket.create_server(where[:2], family=family, backlog=1024)
        where = ("", int(port))
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                where, family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        return socket.create_server(where, backlog=1024)
    except (OSError, ValueError) as e:
        raise cli.TryAgain(
            f"rank 0 cannot listen at {asked or address} ({e}). Free the port, or give "
            "another one in JAX_COORDINATOR_ADDRESS (JAX_COORDINATOR_PORT under SLURM "
            "and Open MPI)."
        ) from e


def _read(peer: socket.socket, timeout: float) -> dict:
    """One line of JSON, an object."""
    peer.settimeout(timeout)
    with peer.makefile("rb") as lines:
        line = lines.readline(MOST_BYTES)
    found = json.loads(line) if line.endswith(b"\n") else None
    if not isinstance(found, dict):
        raise ValueError("the connection was closed")
    return found


def _alive(peer: socket.socket) -> bool:
    """Has the other side kept its end open? (It says nothing more.)"""
    peer.setblocking(False)
    try:
        return peer.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        peer.settimeout(5.0)

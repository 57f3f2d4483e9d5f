"""How the processes of a run find each other, in threads of this one."""

import json
import os
import pathlib
import socket
import threading
import time

import pytest

from t5x_lite import distributed, rendezvous
from t5x_lite.watchdog import Watchdog


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def meet(*introductions, timeout=20.0):
    """What each of the processes (rank, count, same) learns from the meeting."""
    address, found = f"127.0.0.1:{free_port()}", {}

    def one(i, rank, count, same):
        try:
            found[i] = rendezvous.meet(address, count, rank, same, timeout)
        except ValueError as e:
            found[i] = str(e)

    threads = [
        threading.Thread(target=one, args=(i, *each))
        for i, each in enumerate(introductions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(len(introductions))]


def test_all_learn_the_roster():
    found = meet((2, 3, {}), (0, 3, {}), (1, 3, {}))
    assert found[0] == found[1] == found[2]
    assert [p["rank"] for p in found[0]] == [0, 1, 2]
    assert all(p["pid"] == os.getpid() for p in found[0])


def test_the_missing_are_named_to_all_who_came():
    found = meet((0, 4, {}), (2, 4, {}), timeout=1.5)
    assert found[0] == found[1]
    assert "2 of 4 processes did not come within 1.5 s: ranks 1, 3. Here" in found[0]
    assert "config.peers_timeout" in found[0]


def test_without_rank_0_the_others_say_where_they_looked():
    (found,) = meet((1, 2, {}), timeout=0.5)
    assert "rank 0 did not answer rank 1" in found and "127.0.0.1:" in found


def test_what_differs_is_named_with_its_rank():
    mine = {"config.seed": 0, "config.steps": 3}
    found = meet((0, 3, mine), (1, 3, mine), (2, 3, mine | {"config.seed": 1}))
    assert found[0] == found[1] == found[2]
    assert "rank 2" in found[0] and "rank 1 " not in found[0]
    assert "config.seed is 1, 0 on rank 0" in found[0]
    assert "config.steps" not in found[0]


def test_two_of_one_rank_and_another_count_are_refused():
    found = meet((0, 3, {}), (1, 3, {}), (1, 3, {}))
    assert "are both rank 1" in found[0] and found[0] == found[1] == found[2]
    found = meet((0, 3, {}), (1, 2, {}))
    assert "one of 2 processes" in found[0] and "JAX_NUM_PROCESSES" in found[1]


def test_strangers_and_those_who_left_do_not_count():
    """A port scan, and a process that died while it waited and was started again."""
    port = free_port()
    address, found = f"127.0.0.1:{port}", {}

    def lead():
        found[0] = rendezvous.meet(address, 2, 0, {}, 20.0)

    thread = threading.Thread(target=lead)
    thread.start()
    hello = json.dumps(rendezvous.introduction(1) | {"count": 2, "same": {}})
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b""):
        connect(port, text).close()
    left = connect(port, hello[:20].encode())  # dies before it has said all
    left.close()
    found[1] = rendezvous.meet(address, 2, 1, {}, 20.0)
    thread.join()
    assert found[0] == found[1] and len(found[0]) == 2


def connect(port: int, text: bytes) -> socket.socket:
    while True:
        try:
            peer = socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.01)
            continue
        peer.sendall(text)
        return peer


def test_a_taken_port_is_one_clear_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match="cannot listen at 127.0.0.1:.*another"):
            rendezvous.meet(address, 2, 0, {}, 1.0)


# ---- the environment --------------------------------------------------------------

SLURM = dict(
    SLURM_JOB_ID="4097",
    SLURM_STEP_NODELIST="node[07-09]",
    SLURM_NTASKS="6",
    SLURM_PROCID="4",
    SLURM_LOCALID="1",
)
OPEN_MPI = dict(
    OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    OMPI_COMM_WORLD_SIZE="3",
    OMPI_COMM_WORLD_RANK="2",
    OMPI_COMM_WORLD_LOCAL_RANK="0",
)
EXPLICIT = dict(JAX_COORDINATOR_ADDRESS="here:1234", JAX_NUM_PROCESSES="4")


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        # jax 0.10: 65535 - 4096 + 1 + job modulo 4096; Open MPI's job is / 4096.
        (SLURM, ("node07:61441", 6, 4, [1])),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM | {"JAX_COORDINATOR_PORT": "99"}, ("node07:99", 6, 4, [1])),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, ("node07:61441", 6, 4, [0, 1])),
        (OPEN_MPI, ("10.96.0.1:62624", 3, 2, [0])),
        (EXPLICIT | {"JAX_PROCESS_ID": "3"}, ("here:1234", 4, 3, None)),
        (EXPLICIT | {"JOB_COMPLETION_INDEX": "2"}, ("here:1234", 4, 2, None)),
        (EXPLICIT | SLURM | {"JAX_PROCESS_ID": "3"}, ("here:1234", 4, 3, None)),
        ({"JOB_COMPLETION_INDEX": "2"}, None),
        (EXPLICIT, "JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "must be in"),
        (EXPLICIT | {"JAX_PROCESS_ID": "one"}, "must be a number"),
    ],
)
def test_the_place_comes_from_the_environment(environment, expected, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("JAX_", "SLURM_", "OMPI_", "JOB_", "TPU_", "KUBERNETES")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            rendezvous.detect()
    else:
        found = rendezvous.detect()
        assert found == (expected and rendezvous.Place(*expected))


def test_alone_nothing_waits():
    peers = distributed.Peers()
    assert peers.lead and peers.count == 1
    assert peers.gather("x", 3) == [3] and peers.from_lead("x", lambda: 4) == 4
    peers.barrier("x")
    peers.check_same({"a": 1})
    peers.check_shared(pathlib.Path("nowhere"))


def test_identity_names_keys_and_files_but_no_local_directories():
    data = {"cache_dir": "a", "train": "b"}
    found = distributed.identity(config={"seed": 1, "data": data})
    assert found["config.seed"] == 1 and found["config.data.train"] == "b"
    assert "config.data.cache_dir" not in found
    assert found["t5x_lite/data/order.py"].startswith("sha256 ")


def test_the_watchdog_shows_where_a_step_hangs(tmp_path):
    def lost_in_here(done):
        watchdog.step(done)
        while not path.exists() or "lost_in_here" not in path.read_text():
            time.sleep(0.01)

    path = tmp_path / "stacks-0.txt"
    watchdog = Watchdog(2.0, path, shortest=0.3)
    for done in range(5):
        watchdog.step(done)
    watchdog.rest()
    time.sleep(0.4)
    path.unlink(missing_ok=True)  # of a step before, on a machine that stood still
    time.sleep(0.4)
    assert not path.exists()
    lost_in_here(5)
    watchdog.close()
    assert "step 6 takes" in path.read_text()

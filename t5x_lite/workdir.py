"""The directory of a run: held by one process, written in whole files.

`lock` says in JSON who holds it or held it last: {"pid", "host", "began"} and, after a
clean end, {"ended"}. What counts is the kernel's lock on the file (flock), which ends
with its process, however that ends: a lock of a dead process is simply taken over. On
a network file system that passes flock on (NFS since Linux 2.6.12, Lustre and GPFS as
usually mounted) this holds between machines; where flock works on one machine alone,
two machines could hold one workdir, and whatever starts jobs must not start one twice.
Where there is no flock at all, a live process of this machine is refused by its pid.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator

# What file systems without flock answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def only_process(workdir: pathlib.Path) -> Iterator[str]:
    """Creates the workdir and holds its lock; gives a word about who held it before.

    Gives "" unless the one before it did not end cleanly.

    Raises:
      OSError: the workdir cannot be written.
      ValueError: a live process holds it; names its pid and host.
    """
    path = workdir / "lock"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+")
    except OSError as e:
        raise OSError(
            f"--workdir={workdir} cannot be written ({e.strerror or e}). "
            "Give a directory you may write to."
        ) from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            before = _holder(path)
            if e.errno not in _NO_LOCKS or _lives_here(before):
                raise ValueError(
                    f"--workdir={workdir} is in use by another running process"
                    f"{_name(before)}. Wait for it, stop it, or give another --workdir."
                ) from e
        before = _holder(path)
        own = {"pid": os.getpid(), "host": socket.gethostname(), "began": time.time()}
        _write(lock, own)
        try:
            died = before and "ended" not in before
            yield f"took the lock over{_name(before)}, which died" if died else ""
        finally:
            _write(lock, own | {"ended": time.time()})


def _write(lock, content: dict):
    lock.seek(0)
    lock.truncate()
    lock.write(json.dumps(content) + "\n")
    lock.flush()


def _holder(path: pathlib.Path) -> dict:
    """What the lock file says; {} if it is empty, torn or of an older version."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and {"pid", "host"} <= {*found} else {}


def _name(holder: dict) -> str:
    return f" (pid {holder['pid']} on host {holder['host']})" if holder else ""


def _lives_here(holder: dict) -> bool:
    if not holder or "ended" in holder or holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there, and another user's
        return True
    return True


def replace(path: pathlib.Path, content: str | bytes):
    """Writes a file in one stroke: after a crash it is the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def probe(directory: pathlib.Path):
    """Raises OSError if nothing can be written there."""
    with tempfile.TemporaryDirectory(dir=directory, prefix=".probe-") as made:
        path = pathlib.Path(made) / "1"
        with path.open("wb") as f:
            f.write(bytes(2**16))
            f.flush()
            os.fsync(f.fileno())


def check_space(workdir: pathlib.Path, size: int, count: int):
    """Room for `count` checkpoints of `size` bytes, before any long work.

    Raises:
      OSError: with what is free and what is needed.
    """
    free = shutil.disk_usage(workdir).free
    if free < count * size:
        raise OSError(
            f"--workdir={workdir} has {free / 2**20:,.0f} MiB free; {count} more "
            f"checkpoints need {count * size / 2**20:,.0f} MiB. Free some space, give "
            "another one, or lower config.checkpoint.keep_last or keep_best."
        )

"""One writer a folder: a lock that the operating system releases when its holder dies.

The lock is `flock` on a file, which names its holder for the message to the next one. Processes that the holder forks
do not inherit it, so loader processes that outlive their trainer do not hold it (test_lock.py).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from higgs_tune.shards.errors import UserError

_POLL_S = 0.1
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # some network file systems
_held: set[int] = set()  # descriptors of this process's locks


@contextmanager
def locked(path: Path, writer: str, where: Path, *, patience_s: float = 0.0, hint: str = "") -> Iterator[None]:
    """Hold a lock within the block; its file is removed at the end, and its folder too if it is new and empty.

    Args:
        path: the lock's file.
        writer: the kind of program, for messages. where: the folder that it writes, for messages.
        patience_s: how long to wait for the holder to end.

    Raises:
        UserError: another process holds the lock; or the file cannot be made.
    """
    deadline, is_new = time.monotonic() + patience_s, not path.parent.exists()
    while (descriptor := _acquire(path, where)) is None:
        if time.monotonic() >= deadline:
            raise UserError(f"another {writer} is writing here", where=where, got=_holder(path), hint=hint)
        time.sleep(_POLL_S)
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # not so in a fork
            with suppress(OSError):
                path.unlink()
                if is_new:
                    path.parent.rmdir()  # fails unless it is empty
            _held.remove(descriptor)
            os.close(descriptor)


def _acquire(path: Path, where: Path) -> int | None:
    """The descriptor of the locked file; None while another process holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot make the folder: {error.strerror}", where=where) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise UserError(f"cannot lock the folder: {error.strerror}", where=where) from error
        print(f"warning: this file system has no locks; make sure that nothing else writes here ({where})",
              file=sys.stderr, flush=True)  # fmt: skip
    if not _is_current(path, descriptor):  # its holder has just removed it
        os.close(descriptor)
        return None
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):  # a full disk
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    return descriptor


def _is_current(path: Path, descriptor: int) -> bool:
    """Whether a path still names the file that is open."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """The process that holds a lock, in words."""
    try:
        holder = json.loads(path.read_bytes())
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


def _forget_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)

"""The lock of a folder: one holder, named to the next; gone with its process, whatever that has forked."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.lock import locked

pytestmark = pytest.mark.fast
HOLD = """
import os, sys, time
from pathlib import Path
from higgs_tune.shards.lock import locked
path = Path(sys.argv[1])
with locked(path, "run", path.parent):
    child = os.fork() if sys.argv[2] == "fork" else 0
    if child or sys.argv[2] != "fork":
        print(child, flush=True)
    time.sleep(60)
"""


def hold(path: Path, how: str = "") -> tuple[subprocess.Popen[str], int]:
    """A process that holds the lock, and the one that it has forked, if any."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path), how], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    return holder, int(holder.stdout.readline())


def test_the_holder_is_named_and_its_death_releases_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "out" / ".lock"
    holder, _ = hold(path)
    with pytest.raises(UserError) as refused, locked(path, "run", path.parent, hint="Wait."):
        pass
    said = str(refused.value)
    assert said.startswith(f"another run is writing here ({path.parent}), got process {holder.pid} on ")
    assert socket.gethostname() in said
    assert ", since 2" in said
    assert said.endswith(". Wait.")
    holder.kill()
    holder.wait()
    with locked(path, "run", path.parent):
        assert path.exists()
    assert not path.exists()


def test_a_fork_does_not_hold_it(tmp_path: Path) -> None:
    """As loader processes that outlive a killed trainer for some seconds."""
    path = tmp_path / ".lock"
    holder, child = hold(path, "fork")
    holder.kill()
    holder.wait()
    try:
        with locked(path, "run", tmp_path, patience_s=20):  # the fork may have to let go of it yet
            assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, 9)


def test_it_waits_for_an_ending_holder(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    holder, _ = hold(path)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    with locked(path, "run", tmp_path, patience_s=30):
        assert holder.wait(timeout=30) == -9
    killer.wait()


def test_it_leaves_nothing_of_its_own(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.mkdir()
    for folder in (new, old):
        with locked(folder / ".lock", "run", folder):
            assert folder.exists()
    assert not new.exists()
    assert list(tmp_path.rglob("*")) == [old]
    with locked(new / ".lock", "run", new):
        (new / "kept").touch()
    assert list(new.iterdir()) == [new / "kept"]


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path / ".lock", "run", tmp_path):
        pass
    assert "this file system has no locks" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"), locked(tmp_path / "file" / "x", "run", tmp_path):
        pass

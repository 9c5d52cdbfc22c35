"""Signals that people and job systems send, and the last words of a failed run, alone and under torchrun."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.samples import random_sample
from helpers.tiny import ids_of, train_flags, write_checkpoint, write_set
from higgs_tune.train.checkpoint.folder import checkpoint_step, list_checkpoints, verify_checkpoint
from transformers import PreTrainedTokenizerBase

FAILING = Path(__file__).parent / "helpers" / "failing_rank.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
BEGIN_S, END_S = 300, 120


def _interruptible() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # a shell lets background jobs ignore the first, nohup the second
        signal.signal(number, signal.SIG_DFL)


class Job:
    """A run of very many steps; `out` is its output folder."""

    def __init__(self, flags: list[str], out: Path, launch: list[str]) -> None:
        self.out = out
        self.process = subprocess.Popen(
            [sys.executable, *launch, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_interruptible,  # noqa: PLW1509
        )

    def wait_for_steps(self) -> Job:
        """Until there is a checkpoint."""
        deadline = time.monotonic() + BEGIN_S
        while not list_checkpoints(self.out):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self

    @property
    def children(self) -> list[int]:
        pid = self.process.pid
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def end(self) -> tuple[int, str]:
        """Exit code, and all that was said."""
        try:
            said, _ = self.process.communicate(timeout=END_S)
        finally:
            self.process.kill()
        return self.process.returncode, said


@pytest.fixture(scope="module")
def flags_of(
    tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerBase
) -> Callable[..., list[str]]:
    folder = tmp_path_factory.mktemp("signals")
    write_checkpoint(folder / "model", toy_tokenizer)
    rng, ids = np.random.default_rng(0), ids_of(folder / "model")
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids) for i in range(4)]
    data = write_set(folder / "data", samples, folder / "model")

    def flags(out: Path, **changes: object) -> list[str]:
        given = {"max_steps": 100_000, "logging_steps": 1000, "save_steps": 5, "dataloader_num_workers": 1}
        return train_flags("stage1", folder / "model", data, out, **(given | changes))

    return flags


Flags = Callable[..., list[str]]
ALONE = ["-m", "higgs_tune.train"]


def check_whole(out: Path) -> int:
    """Every checkpoint is whole; returns the newest one's step."""
    for path in list_checkpoints(out):
        verify_checkpoint(path)
    return checkpoint_step(list_checkpoints(out)[0])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 75), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_stop_signal_to_the_whole_group_saves(
    flags_of: Flags, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The terminal sends Ctrl-C to loader processes too; only a job system's signals ask to be started again."""
    job = Job(flags_of(tmp_path / "out"), tmp_path / "out", ALONE).wait_for_steps()
    os.killpg(job.process.pid, number)
    got, said = job.end()
    assert got == code, said
    assert f"stopped by {number.name} at step {check_whole(tmp_path / 'out')}; --resume" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert (tmp_path / "out" / "stopped.json").exists() == (code == 75)
    assert not list(tmp_path.glob("out/.tmp-*"))
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_second_interrupt_ends_at_once(flags_of: Flags, tmp_path: Path) -> None:
    """Stopped within a step that never ends; nothing of it is left under a final name, and no process."""
    job = Job(flags_of(tmp_path / "out"), tmp_path / "out", ALONE).wait_for_steps()
    os.killpg(job.process.pid, signal.SIGSTOP)  # so that the two arrive before a step is over
    workers = job.children
    os.kill(job.process.pid, signal.SIGINT)
    os.killpg(job.process.pid, signal.SIGCONT)
    os.killpg(job.process.pid, signal.SIGINT)
    got, said = job.end()
    assert got == 130
    assert "Traceback" not in said
    check_whole(tmp_path / "out")
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists() and "higgs" in _command_of(pid)]


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_a_closed_terminal_saves(flags_of: Flags, tmp_path: Path) -> None:
    """Every later write to the terminal fails."""
    terminal, side = pty.openpty()
    flags, out = flags_of(tmp_path / "out"), tmp_path / "out"
    pid = os.fork()
    if pid == 0:
        os.close(terminal)
        _login(side)
        _interruptible()
        os.execv(sys.executable, [sys.executable, *ALONE, *flags])
    os.close(side)
    deadline = time.monotonic() + BEGIN_S
    while not list_checkpoints(out) and time.monotonic() < deadline:
        time.sleep(0.05)
        os.set_blocking(terminal, False)
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65536)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    check_whole(out)
    assert (out / "stopped.json").exists()


def _login(side: int) -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(side, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(side, number)


@pytest.mark.parametrize(("number", "is_person"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_torchrun_passes_a_signal_on_and_the_cause_stands_last(
    flags_of: Flags, tmp_path: Path, number: signal.Signals, is_person: bool
) -> None:
    """torchrun ends with a traceback of its own; the run's last words come after it."""
    out = tmp_path / "out"
    job = Job(flags_of(out), out, [*TORCHRUN, *ALONE]).wait_for_steps()
    os.killpg(job.process.pid, number)
    _, said = job.end()
    assert said.splitlines()[-1] == (
        f"stopped by {number.name} at step {check_whole(out)}; --resume_from_checkpoint auto goes on"
    )
    assert (out / "stopped.json").exists() != is_person
    assert not list(out.glob(".tmp-*"))


def root_cause(said: str) -> str:
    return said.rpartition("Root Cause")[2]


def test_torchrun_names_a_user_s_mistake_last(flags_of: Flags, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = Job(flags_of(out, model_path="/nothing/here"), out, [*TORCHRUN, *ALONE])
    code, said = job.end()
    assert code == 1
    assert "traceback : error: no checkpoint here (/nothing/here)" in root_cause(said)


def test_torchrun_names_a_crash_last(flags_of: Flags, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, said = Job(flags_of(out), out, [*TORCHRUN, str(FAILING)]).end()
    assert "ValueError: injected failure" in root_cause(said)


def test_torchrun_names_a_killed_rank_and_exit_75_last(flags_of: Flags, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = Job(flags_of(out), out, [*TORCHRUN, *ALONE]).wait_for_steps()
    os.kill(job.children[-1], signal.SIGKILL)
    _, said = job.end()
    assert "Signal 9 (SIGKILL) received" in said.rpartition("FAILED")[2] or "was it killed" in root_cause(said)
    job = Job(flags_of(out, resume_from_checkpoint="auto"), out, [*TORCHRUN, *ALONE])
    before = list_checkpoints(out)
    while list_checkpoints(out) == before:
        assert job.process.poll() is None
        time.sleep(0.05)
    for rank in job.children:
        os.kill(rank, signal.SIGUSR1)
    _, said = job.end()
    assert "exitcode  : 75" in root_cause(said)
    assert "traceback : stopped by SIGUSR1 at step " in root_cause(said)

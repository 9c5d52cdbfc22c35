"""The cause of a failure as the last thing that a person sees, under torchrun too.

torchrun ends a failed run with a summary that shows, for each failed rank, the content of the JSON file that
TORCHELASTIC_ERROR_FILE names (torch.distributed.elastic.multiprocessing.errors). A signal to torchrun itself ends it
with a traceback of its own instead; a process that waits for that prints the cause after it (test_signals.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

from higgs_tune.shards.errors import UserError
from higgs_tune.train.dist.signals import EXIT_INTERRUPTED, Stopped

_LATER_S = 5  # a consequence is reported later than its cause: torchrun takes the earliest failure for the cause
_PATIENCE_MS = 120_000
_PIPE_ERRORS = (5, 32)  # EIO: the terminal is gone; EPIPE: the reader is gone


@contextlib.contextmanager
def recorded_for_torchrun() -> Iterator[None]:
    """Write the cause of a failure within the block to torchrun's error file."""
    try:
        yield
    except UserError as error:
        record_cause(f"error: {error}")
        raise
    except Stopped as stopped:
        record_cause(stopped.message)
        if os.environ.get("RANK") == "0":
            print_after_torchrun(stopped.message)
        raise
    except SystemExit as left:
        if left.code not in (0, None, EXIT_INTERRUPTED):
            record_cause("error: the arguments were refused; see the message above")
        raise
    except KeyboardInterrupt:
        record_cause("stopped by SIGINT before the first step")
        raise
    except BaseException:
        record_cause(traceback.format_exc())
        raise


def record_cause(text: str, *, is_consequence: bool = False) -> None:
    """Write torchrun's error file, if this process has one and has not written it yet."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):  # noqa: PTH110
        return
    at = str(int(time.time()) + (_LATER_S if is_consequence else 0))
    content = {"message": {"message": text, "extraInfo": {"py_callstack": text, "timestamp": at}}}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(content, file)


def print_after_torchrun(text: str) -> None:
    """Print a line on stderr when torchrun, the parent of this process, has ended."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):  # a system without pidfd
        parent = os.pidfd_open(os.getppid())
        if os.fork() == 0:
            _wait_and_print(parent, text)
        os.close(parent)


def _wait_and_print(parent: int, text: str) -> None:
    """In the fork, which must not hold the rank's devices and files: wait, print, end."""
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.closerange(3, parent)
        os.closerange(parent + 1, 65536)
        waiting = select.poll()
        waiting.register(parent, select.POLLIN)
        if waiting.poll(_PATIENCE_MS):
            os.write(2, f"{text}\n".encode())
    finally:
        os._exit(0)


class _LossyFile(io.FileIO):
    """A terminal or pipe; what is written after its reader has gone is lost, without an error."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in _PIPE_ERRORS:
                raise
            return len(data)


def outlive_terminal() -> None:
    """Go on when the terminal, or the program that reads our output, is gone: the checkpoint matters more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            number = stream.fileno()
            stream.flush()
            raw = io.BufferedWriter(_LossyFile(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True))

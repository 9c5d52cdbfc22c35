"""The errors that a user sees: `UserError` for a mistake in the input, `ShardError` for damaged data.

Each carries one message: what, where, expected, got, hint. A command prints it and exits with code 2.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

# OSErrors that a user can mend: permissions, a full or broken disk, a quota or limit, an unusable name
STORAGE_ERRNOS = frozenset(
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENOTDIR", "ENAMETOOLONG", "ELOOP")
)


def describe(what: str, *, where: object = None, expected: object = None, got: object = None, hint: str = "") -> str:
    """One message from the parts that are given: `what (where), expected E, got G. hint`."""
    text = what
    if where is not None:
        text += f" ({where})"
    if expected is not None:
        text += f", expected {expected}"
    if got is not None:
        text += f", got {got}"
    return f"{text}. {hint}" if hint else text


def few(names: Sequence[str], shown: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def first_line(error: BaseException) -> str:
    """The first line of another package's error message; the error's type where the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class UserError(Exception):
    """A mistake in what the user gave: a path, a flag, a checkpoint, a data file."""

    def __init__(
        self, what: str, *, where: object = None, expected: object = None, got: object = None, hint: str = ""
    ) -> None:
        super().__init__(describe(what, where=where, expected=expected, got=got, hint=hint))


class ShardError(UserError):
    """Damage or disagreement inside a shard set: a checksum, a header, the index, the manifest."""


def run_command(main: Callable[[], None], *, debug: bool | None = None) -> None:
    """Run a command's main function; turn a UserError, or a storage error, into one line on stderr and exit code 2.

    Characters that the terminal's encoding lacks are printed as escapes (`\\u0639`).

    Args:
        main: the command.
        debug: let the traceback through; None: if `--debug` is among the arguments.
    """
    if debug is None:
        debug = "--debug" in sys.argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here a full disk gives one line; at the interpreter's end, a traceback
    except UserError as error:
        if debug:
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the program that reads our output (head, less) has ended
        _drop_output()
        sys.exit(0)
    except OSError as error:
        if debug or error.errno not in STORAGE_ERRNOS:
            raise
        if error.filename is None:  # a write to the standard output
            _drop_output()
        _fail(describe(f"cannot read or write: {error.strerror}", where=error.filename or "standard output"))


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def _drop_output() -> None:
    """Let the rest of the standard output go nowhere, so that the interpreter can end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

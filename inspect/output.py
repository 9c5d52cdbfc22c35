"""Names of output files: checked before the work starts, so that no other file is lost.

In: a path from the command line. Out: nothing, or a UserError.
"""

from __future__ import annotations

from pathlib import Path

from higgs_tune.shards.errors import UserError


def check_replaceable(path: Path, kind: str, signature: bytes) -> None:
    """Make sure that a path is free, or holds an earlier output.

    Args:
        kind: names the kind of file in an error.
        signature: the first bytes of such a file, in lower case.

    Raises:
        UserError: the path is a folder, a device, or another kind of file.
    """
    if path.is_dir():
        raise UserError("the output is a folder", where=path, expected=f"the name of {kind}")
    if not path.exists():
        return
    if not path.is_file():
        raise UserError("the output is not a regular file", where=path, expected=f"the name of {kind}")
    with path.open("rb") as file:
        start = file.read(len(signature))
    if start and start.lower() != signature:
        hint = "Give another name, or remove this file first."
        raise UserError("the output would overwrite another file", where=path, expected=kind, hint=hint)

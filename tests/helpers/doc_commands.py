"""The commands that stand in a page of the docs, and running them in this process."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

from conftest import ROOT

Programs = Mapping[str, Callable[[], Any]]


def blocks(page: str) -> str:
    """The indented code of a page; Python code is fenced."""
    text = re.sub(r"```.*?```", "", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    return "\n".join(re.findall(r"^ {4}(.*)$", text, re.MULTILINE))


def commands(page: str) -> list[str]:
    """The commands of a page, each whole: a line that ends within quotes or in a backslash goes on."""
    found, held = [], ""
    for line in blocks(page).splitlines():
        held += line + "\n"
        try:
            words = shlex.split(held)
        except ValueError:  # within quotes, or after a backslash
            continue
        if words and not line.endswith("\\"):
            found.append(" ".join(held.replace("\\\n", " ").split()))
            held = ""
    assert not held.strip(), held
    return found


def run_command(words: list[str], programs: Programs) -> None:
    """Run a command in this process; `programs` by the name, or of `python -m NAME` by that."""
    name, rest = (words[2], words[3:]) if words[:2] == ["python", "-m"] else (words[0], words[1:])
    with mock.patch.object(sys, "argv", [name, *rest]):
        try:
            programs[name]()
        except SystemExit as ended:
            assert not ended.code, shlex.join(words)

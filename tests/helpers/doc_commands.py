"""The commands that stand in a page of the docs, and running them in this process."""

from __future__ import annotations

import re
import runpy
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
    """Run a command in this process; `programs` by the name, or of `python -m NAME` by that; `python FILE` as it is."""
    if words[0] == "python":
        words = words[2:] if words[1] == "-m" else words[1:]
    name = words[0]
    with mock.patch.object(sys, "argv", words):
        try:
            if name.endswith(".py"):
                runpy.run_path(name, run_name="__main__")
            else:
                programs[name]()
        except SystemExit as ended:
            assert not ended.code, shlex.join(words)

"""higgs-speak in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from higgs_tune.evaluate.speak.cli import main


def speak(model: Path, codec: Path, *arguments: object, code: int = 0) -> None:
    """Run the command; short speech, unless the arguments say otherwise."""
    flags = ["--model_path", model, "--audio_tokenizer_path", codec, "--max_seconds", "0.6", *arguments]
    with mock.patch.object(sys, "argv", ["higgs-speak", *map(str, flags)]), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code


def write_list(path: Path, lines: list[dict[str, Any]]) -> Path:
    """A JSONL list."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def lines_of(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a JSONL file, by id."""
    return {line["id"]: line for line in map(json.loads, path.read_text().splitlines())}

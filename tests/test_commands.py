"""Commands start at once: help, argument errors and light subcommands import no heavy library."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from higgs_tune.shards.reader import ShardSet

# libraries that take from tenths of a second to seconds to import
HEAVY = {
    "boson_multimodal", "datasets", "jinja2", "librosa", "pandas", "peft", "plotly", "pyarrow", "pyloudnorm", "scipy",
    "soundfile", "tensorboard", "torch", "transformers", "webdataset",
}  # fmt: skip
COMMANDS = {
    "export": "higgs_tune.train.export.merge",
    "inspect": "higgs_tune.inspect.cli",
    "preprocess": "higgs_tune.preprocess.cli",
    "speak": "higgs_tune.evaluate.speak.cli",
    "train": "higgs_tune.train.__main__",
}
SUBCOMMANDS = ("stats", "show", "decode", "verify", "diff", "report", "serve")


def imported(module: str, *arguments: str, code: int) -> set[str]:
    """Top-level modules that a command imports before it ends with an exit code."""
    program = f"import sys; from {module} import main; sys.argv[1:] = {arguments!r}; main()"
    command = [sys.executable, "-X", "importtime", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr[-2000:]
    return {name.partition(".")[0] for name in re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE)}


@pytest.mark.fast
@pytest.mark.parametrize("module", COMMANDS.values(), ids=COMMANDS)
def test_help_and_argument_errors_import_nothing_heavy(module: str) -> None:
    for arguments, code in ((["--help"], 0), (["--no_such_flag", "1"], 2), ([], 2)):
        modules = imported(module, *arguments, code=code)
        assert "tyro" in modules
        assert not modules & HEAVY


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_of_subcommands_imports_nothing_heavy(name: str) -> None:
    for arguments, code in ((["--help"], 0), (["--no_such_flag", "1"], 2)):
        assert not imported(COMMANDS["inspect"], name, *arguments, code=code) & HEAVY


def test_subcommands_without_model_import_nothing_heavy(shards: ShardSet, tmp_path: Path) -> None:
    """verify too, where it compares the checkpoints' hashes."""
    folder = str(shards.folder)
    for arguments in (["stats", folder], ["show", folder, "0", "--raw"], ["verify", folder], ["diff", folder, folder]):
        modules = imported(COMMANDS["inspect"], *arguments, code=0)
        assert "numpy" in modules
        assert not modules & HEAVY, arguments

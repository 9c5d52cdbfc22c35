"""The shape of the repository: folders, imports, packaging."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

MAY_IMPORT = {
    "shards": set(),
    "preprocess": {"shards"},
    "train": {"shards", "preprocess"},
    "inspect": {"shards", "preprocess"},
}
SOURCES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).glob("*.py"))]


def test_no_folder_is_a_regular_package() -> None:
    assert not [folder for folder in MAY_IMPORT if (ROOT / folder / "__init__.py").exists()]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_follow_the_rules(path: Path) -> None:
    folder = path.parent.name
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 2
            target = (node.module or "").split(".")[0]
            assert node.level == 1 or target in MAY_IMPORT[folder], f"{folder} imports {target}"
            continue
        else:
            continue
        tops = {name.split(".")[0] for name in names}
        assert not tops & {"higgs_tune", *MAY_IMPORT.keys() - {"inspect"}}, "imports within our code are relative"
        assert not tops & {"torchaudio", "torchvision"}
        if "pickle" in tops:
            assert [alias.name for alias in node.names] == ["UnpicklingError"]
        if folder == "shards":
            assert not tops & {"torch", "transformers", "peft", "boson_multimodal"}


def test_standard_library_wins_at_the_root() -> None:
    code = "import inspect, torch; assert 'lib/python' in inspect.__file__, inspect.__file__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_wheel_holds_every_module(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(ROOT)], check=True, timeout=300, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"higgs_tune/{path.parent.name}/{path.name}" for path in SOURCES}
    expected |= {f"higgs_tune/inspect/{path.name}" for path in (ROOT / "inspect").glob("*.html")}
    assert expected <= names


def test_nothing_installed_needs_torchaudio_or_torchvision() -> None:
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    names = {line.partition("==")[0].lower() for line in locked if not line.startswith("#")}
    assert not names & {"torchaudio", "torchvision"}
    assert all("==" in line for line in locked if not line.startswith("#"))

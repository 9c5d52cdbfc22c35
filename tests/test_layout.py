"""The shape of the repository: folders, direction of imports, packaging."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

MAY_IMPORT = {
    "shards": set(),
    "preprocess": {"shards"},
    "train": {"shards", "preprocess"},
    "inspect": {"shards", "preprocess"},
}
SOURCES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]
# train's rooms from the ground floor up; a room imports from its own floor and those below
FLOORS = (
    ("options", "config", "arguments", "dist"),
    ("data",),
    ("model",),
    ("optim", "metrics"),
    ("state",),
    ("checkpoint", "monitor"),
    ("resolve", "build", "step", "run_io"),
    ("loop", "export", "toy"),
    ("__main__",),
)


def imports_of(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every module that a file imports from, with the names it takes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports within our code are absolute"
            yield node.module or "", [alias.name for alias in node.names]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_folder_is_a_regular_package() -> None:
    assert not [folder for folder in MAY_IMPORT if (ROOT / folder / "__init__.py").exists()]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_follow_the_rules(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for module, names in imports_of(path):
        top, *rest = module.split(".")
        assert top not in MAY_IMPORT.keys() - {"inspect"}, "our code is imported as higgs_tune"
        assert top not in ("torchaudio", "torchvision")
        if top == "higgs_tune":
            assert rest and rest[0] in {folder} | MAY_IMPORT[folder], f"{folder} imports {module}"
        if top == "pickle":
            assert names == ["UnpicklingError"]
        if folder == "shards":
            assert top not in ("torch", "transformers", "peft", "boson_multimodal")


@pytest.mark.parametrize("path", [path for path in SOURCES if path.is_relative_to(ROOT / "train")], ids=name_of)
def test_imports_within_train_point_down(path: Path) -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    own = path.relative_to(ROOT / "train").with_suffix("").parts[0]
    for module, names in imports_of(path):
        if module.startswith("higgs_tune.train"):
            rooms = [module.split(".")[2]] if module.count(".") > 1 else names
            for room in rooms:
                assert floor[room] <= floor[own], f"{own} imports {room}"
            if own == "model" and "data" in rooms:
                assert module == "higgs_tune.train.data.batch"


def test_standard_library_wins_at_the_root() -> None:
    code = "import inspect, torch; assert 'lib/python' in inspect.__file__, inspect.__file__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_wheel_holds_every_module_and_the_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([*command, str(tmp_path), str(ROOT)], check=True, timeout=300, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assets = [path for path in (ROOT / "inspect" / "web" / "page").iterdir() if path.is_file()]
    assert {path.suffix for path in assets} == {".html", ".css", ".js"}
    assert {f"higgs_tune/{name_of(path)}" for path in [*SOURCES, *assets]} <= names


def test_nothing_installed_needs_torchaudio_or_torchvision() -> None:
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    names = {line.partition("==")[0].lower() for line in locked if not line.startswith("#")}
    assert not names & {"torchaudio", "torchvision"}
    assert all("==" in line for line in locked if not line.startswith("#"))

"""The shape of the repository: folders, direction of imports, packaging."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

MAY_IMPORT = {
    "shards": set(),
    "preprocess": {"shards"},
    "train": {"shards", "preprocess"},
    "inspect": {"shards", "preprocess"},
    "evaluate": {"shards", "preprocess", "train"},
}
SOURCES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]
# train's rooms from the ground floor up; a room imports from itself and from the floors below
FLOORS = (
    ("presets", "dist", "set_checks", "eval_sets"),
    ("options",),
    ("config", "data"),
    ("arguments", "model"),
    ("optim", "metrics", "record"),
    ("state",),
    ("checkpoint",),
    ("monitor",),
    ("whisper",),
    ("resolve", "amount"),
    ("build", "step", "run_io", "estimate"),
    ("validate", "dry_run"),
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


@pytest.mark.fast
def test_no_folder_is_a_regular_package() -> None:
    assert not [folder for folder in MAY_IMPORT if (ROOT / folder / "__init__.py").exists()]


@pytest.mark.fast
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


@pytest.mark.fast
@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    """The goal is 300 lines and 50; a little more passes."""
    text = path.read_text()
    assert text.count("\n") <= 330
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 60]


@pytest.mark.fast
def test_no_imports_go_in_a_circle() -> None:
    """Of files, by what they import at the top or within a function."""
    dotted = {".".join(("higgs_tune", *path.relative_to(ROOT).with_suffix("").parts)): path for path in SOURCES}
    graph = {
        name: {full for module, names in imports_of(path) for full in (module, *(f"{module}.{n}" for n in names))}
        for name, path in dotted.items()
    }
    TopologicalSorter({name: needs & dotted.keys() for name, needs in graph.items()}).prepare()


@pytest.mark.fast
@pytest.mark.parametrize("path", [path for path in SOURCES if path.is_relative_to(ROOT / "train")], ids=name_of)
def test_imports_within_train_point_down(path: Path) -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    own = path.relative_to(ROOT / "train").with_suffix("").parts[0]
    for module, names in imports_of(path):
        if module.startswith("higgs_tune.train"):
            rooms = [module.split(".")[2]] if module.count(".") > 1 else names
            for room in rooms:
                assert room == own or floor[room] < floor[own], f"{own} imports {room}"
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
    pages = (ROOT / "inspect" / "web" / "page", ROOT / "preprocess" / "prepare" / "page")
    assets = [path for folder in pages for path in folder.iterdir() if path.is_file()]
    assert {path.suffix for path in assets} == {".html", ".css", ".js"}
    assert {f"higgs_tune/{name_of(path)}" for path in [*SOURCES, *assets]} <= names


def plain_name(requirement: str) -> str:
    """A distribution's normalised name, without version, extras and markers."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!;\[]", requirement)[0]).lower()


def locked(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]


LOCK, DEV_LOCK = ({plain_name(line) for line in locked(f"requirements{kind}.lock")} for kind in ("", "-dev"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {plain_name(name) for names in PROJECT["optional-dependencies"].values() for name in names}


@pytest.mark.fast
def test_locks_pin_every_package_once() -> None:
    for line in locked("requirements.lock") + locked("requirements-dev.lock"):
        assert re.fullmatch(r'[\w.-]+==[\w.]+(; python_version >= "3\.\d+")?', line)
    assert not LOCK & DEV_LOCK
    assert not (LOCK | DEV_LOCK) & {"torchaudio", "torchvision"}


@pytest.mark.fast
def test_run_lock_holds_what_running_needs() -> None:
    """All dependencies, theirs, and every module that running code imports, but for what an extra brings."""
    assert {plain_name(name) for name in PROJECT["dependencies"]} <= LOCK
    for name in LOCK - {"boson-multimodal"}:
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # on this Python it is not needed
        assert not {plain_name(need) for need in needs if "extra ==" not in need} & DEV_LOCK, name
    distributions = importlib.metadata.packages_distributions()
    for path in SOURCES:
        for module, _names in imports_of(path):
            wanted = {plain_name(name) for name in distributions.get(module.split(".")[0], [])} - {"higgs-tune"}
            assert not wanted or wanted & (LOCK | EXTRAS), f"{path} imports {module}"


@pytest.mark.fast
def test_extras_are_imported_where_they_are_used() -> None:
    """Running code starts without them."""
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {plain_name(name.split(".")[0]) for name in names} & (EXTRAS - {"s3fs"}), path


@pytest.mark.fast
def test_every_test_file_has_a_fast_test() -> None:
    files = (ROOT / "tests").glob("test_*.py")
    assert not [path.name for path in files if "pytest.mark.fast" not in path.read_text()]

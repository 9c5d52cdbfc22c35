"""Names in docs, comments and configs exist: files, modules, links, make targets, flags; the README's tree is whole."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

LISTED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
HISTORY = "CHANGELOG.md"
TEXTS = [
    name for name in LISTED if re.search(r"\.(py|md|ya?ml|sh|toml)$|file$", name) and name not in (HISTORY, "LICENSE")
]
GUIDES = [name for name in TEXTS if name.endswith(".md") and not name.startswith(".github")]
ROOMS = ("preprocess/", "shards/", "train/", "inspect/", "evaluate/")
OPTIONS = re.compile(r"^    (\w+): .*", re.MULTILINE)  # the fields of dataclasses
OTHERS_FILES = {"__init__.py", "run_wer.py"}
OTHERS_FLAGS = {
    "help",
    "from",
    "omni",
    "deploy_config",
    "trust_remote_code",
    "nproc_per_node",
    "max_restarts",
    "shutdown_timeout",
    "deps",
}

pytestmark = pytest.mark.fast


def read(name: str) -> str:
    return (ROOT / name).read_text()


def has_module(dotted: str) -> bool:
    """Whether a dotted name is a folder, a file, or something defined at the top of a file."""
    path = ROOT.joinpath(*dotted.split(".")[1:])
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    file = path.parent.with_suffix(".py")
    return file.is_file() and defines(file, path.name)


def defines(file: Path, name: str) -> bool:
    return bool(re.search(rf"^(def |class )?{name}\b", file.read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_modules_exist(name: str) -> None:
    """A file may be named by the end of its path."""
    text = read(name)
    files = set(re.findall(r"(?<![\w./-])((?:\w+/)*\w+\.py)\b", text)) - OTHERS_FILES
    assert not [path for path in files if not any(f"/{listed}".endswith(f"/{path}") for listed in LISTED)]
    dotted_names = set(re.findall(r"\bhiggs_tune(?:\.\w+)+", text)) - {"higgs_tune.json"}
    assert not [dotted for dotted in dotted_names if not has_module(dotted)]
    places = re.findall(r"((?:\w+/)+\w+\.py):([A-Za-z_]\w+)", text)  # file:function
    assert not [place for place in places if not defines(ROOT / place[0], place[1])]


@pytest.mark.parametrize("name", GUIDES)
def test_links_targets_and_flags_exist(name: str) -> None:
    text = read(name)
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert not [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:`| {4})make ([\w-]+)", text)) <= targets
    sources = [read(source) for source in LISTED if source.startswith((*ROOMS, "bench/")) and source.endswith(".py")]
    options = {option for source in sources for option in OPTIONS.findall(source)}
    flags = {flag.replace("-", "_").removeprefix("no_") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)}
    assert flags <= options | OTHERS_FLAGS


def test_readme_names_every_folder() -> None:
    """Its tree: a line for each entry, indented by its depth, a folder ending in a slash."""
    tree = re.findall(r"^( {4}(?: {2})*)([\w./-]+) +\S", read("README.md").partition("## Where things are")[2], re.M)
    parents: list[str] = []
    named: set[str] = set()
    for indent, entry in tree:
        parents = [*parents[: len(indent) // 2 - 2], entry]
        named.add("".join(parents))
    assert not [entry for entry in named if not (ROOT / entry).exists()]
    folders = {f"{Path(name).parent}/" for name in LISTED if name.startswith(ROOMS) and name.endswith(".py")}
    assert folders <= named


def test_every_test_file_is_described() -> None:
    """In a row of tests/README.md that begins with its name."""
    rows = [row.partition(" | ")[0] for row in read("tests/README.md").splitlines() if row.startswith("| `")]
    files = {Path(name).name for name in LISTED if re.fullmatch(r"tests/(helpers/)?\w+\.py", name)}
    assert set(re.findall(r"`(\w+\.py)`", "".join(rows))) == files - {"conftest.py"}

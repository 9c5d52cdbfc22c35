"""The commands on the toy checkpoints that the pages on training show, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from helpers.doc_commands import commands, run_command
from helpers.tiny import metrics_of, run_train
from higgs_tune.inspect.cli import main as higgs_inspect
from higgs_tune.preprocess.cli import main as higgs_preprocess
from higgs_tune.preprocess.prepare.cli import main as higgs_prepare
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.__main__ import main as train

PAGES = ("training", "whisper", "what_trains", "preprocessing", "recipe", "moving", "released_checkpoints", "inspect",
         "prepare")  # fmt: skip
PROGRAMS: dict[str, Callable[[], Any]] = {
    "higgs_tune.train": train, "higgs-preprocess": higgs_preprocess, "higgs-inspect": higgs_inspect,
    "higgs-prepare": higgs_prepare,
}  # fmt: skip
LONG, SHORT = "--max_steps 20 --eval_steps 10", "--max_steps 4 --eval_steps 2"


def on_the_toy(page: str) -> list[str]:
    """The commands of a page on the toy's files and what is made of them; the others have placeholders, or serve."""
    ours = re.compile(r"\bruns/(toy|toy-demo|both|talks|prepared)\b")
    return [command for command in commands(f"{page}.md") if ours.search(command) and " review " not in command]


@pytest.mark.fast
def test_each_page_shows_commands_on_the_toy() -> None:
    assert {page: len(on_the_toy(page)) for page in PAGES} == {
        "training": 2, "whisper": 3, "what_trains": 1, "preprocessing": 5, "recipe": 2, "moving": 1, "inspect": 2,
        "released_checkpoints": 1, "prepare": 7,
    }  # fmt: skip
    for page in PAGES:
        for command in on_the_toy(page):
            words = shlex.split(command)
            script = words[0] == "python" and (ROOT / words[1]).is_file()
            assert words[0] in PROGRAMS or (words[:2] == ["python", "-m"] and words[2] in PROGRAMS) or script, command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, toy: Path, shards: ShardSet) -> Path:
    """A folder as `make toy-demo` leaves it: checkpoints, set, two runs."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "runs" / "toy-demo").mkdir(parents=True)
    links = {"runs/toy": toy, "runs/toy-demo/shards": Path(shards.location), "examples": ROOT / "examples"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    for stage, model in (("stage1", toy / "model"), ("stage2", folder / "runs" / "toy-demo" / "stage1")):
        run_train(stage, model, Path(shards.location), folder / "runs" / "toy-demo" / stage, save_steps=0)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_run(
    page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order; what each page promises is there."""
    monkeypatch.chdir(place)
    for command in on_the_toy(page):
        run_command(shlex.split(command.replace(LONG, SHORT)), PROGRAMS)
    said, runs = capsys.readouterr(), place / "runs"
    if page == "training":
        assert {line["set"] for line in metrics_of(runs / "guarded") if line["kind"] == "eval"} == {"held_out", "again"}
        assert "largest pack that fits" in said.out
    elif page == "whisper":
        assert "Whisper features: text" in said.out
        assert (place / "OUT" / "whisper_tower.json").is_file()
    elif page == "what_trains":
        assert "embed_tokens.modules_to_save" in said.out and "text_lm_head.lora_A" in said.out
    elif page == "preprocessing":
        count = len(json.loads((ROOT / "examples" / "arabic" / "chatml.json").read_text()))
        assert ShardSet(runs / "both").manifest["layouts"] == {"chat": count, "serve": count, "other": 0}
        assert "no training sample has the prompt layout serve" not in said.err
    elif page == "recipe":
        told = re.search(r"here (\d+) steps", " ".join((ROOT / "docs" / "recipe.md").read_text().split()))
        assert told and f"dry run: {told[1]} steps of " in said.out
        assert not (runs / "tried").exists()
    elif page == "moving":
        assert metrics_of(runs / "moved")[-1]["contrastive_loss"] > 0
        assert "no training sample has the prompt layout serve" in said.err
    elif page == "released_checkpoints":
        assert "of disk for 3 checkpoints" in said.out and not (runs / "needed").exists()
    elif page == "prepare":
        rows = [json.loads(line) for line in (runs / "prepared" / "manifest.jsonl").read_bytes().splitlines()]
        assert {row["split"] for row in rows} == {"train", "val"}
        assert len(ShardSet(runs / "prepared-shards").index) == len(rows)
        assert (runs / "prepared-2" / "adapter_model.safetensors").is_file()
    else:
        assert (runs / "two.html").is_file()

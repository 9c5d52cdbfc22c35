"""What the page shows of a training run, without a browser."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.inspect_runs import write_run
from higgs_tune.inspect.web.run import read_run, run_page
from higgs_tune.inspect.web.run_charts import MOST_POINTS
from higgs_tune.shards.errors import UserError


def chart(page: dict[str, Any], name: str) -> dict[str, Any]:
    return {part["name"]: part for part in next(one for one in page["charts"] if one["id"] == f"run-{name}")["data"]}


@pytest.mark.fast
def test_curves_are_the_metrics(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", ["a"]))
    page = run_page(run)
    train = [line for line in run.lines if line["kind"] == "train"]
    loss = chart(page, "loss")
    assert loss["text loss"]["x"] == [line["step"] for line in train]
    assert loss["text loss"]["y"] == [line["text_loss"] for line in train]
    assert loss["audio loss, validation"]["y"] == [line["audio_loss"] for line in run.lines if line["kind"] == "eval"]
    for k in range(8):
        assert chart(page, "books")[f"codebook {k}"]["y"] == [line["audio_loss_per_codebook"][k] for line in train]
    assert not [one for one in page["charts"] if one["id"] == "run-norm"], "all NaN: nothing to draw"
    rows = {row[0]: row[1:] for row in page["validation"]}
    assert rows["text loss"][0] == f"{train[0]['text_loss']:.4f}"
    assert rows["text loss"][1].endswith("(step 500)")
    assert page["trained"]["parameters"] == 4 * 1024
    steps = page["generated"]["rows"][0]["steps"]
    assert [steps[name]["reached_eos"] for name in ("base", "step-000500")] == [False, True]
    assert len(run.audio) == 4


def test_long_runs_are_thinned_and_keep_their_last_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a"])
    lines = [{"kind": "train", "step": step, "text_loss": 1.0} for step in range(3 * MOST_POINTS - 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = run_page(read_run(folder))
    steps = chart(page, "loss")["text loss"]["x"]
    assert page["every"] == 3
    assert len(steps) <= MOST_POINTS
    assert steps[-1] == lines[-1]["step"]
    assert {b - a for a, b in pairwise(steps)} == {3}


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    page = run_page(read_run(tmp_path))
    assert (page["charts"], page["validation"], page["generated"]["rows"]) == ([], [], [])
    assert page["trained"]["parameters"] == 0


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", "{}\n{nonsense}\n", "line 2 is not JSON"),
        ("metrics.jsonl", "[1]\n", "line 1 is not an object"),
        ("trainable.json", "[1, 2]", "a list of objects"),
        ("trainable.json", "nonsense", "not JSON"),
        ("samples/base/samples.json", "{}", "a list of objects"),
        ("config.yaml", "a: [", "not YAML"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = write_run(tmp_path / "run", ["a"])
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_run(folder)
    assert str(folder / name) in str(error.value)


def test_lists_behind_links_are_not_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a"])
    other = write_run(tmp_path / "other", ["b"])
    (folder / "samples" / "step-000900").symlink_to(other / "samples" / "base")
    assert list(read_run(folder).generated) == ["base", "step-000500"]


def test_a_run_without_audio_shows_what_was_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a"])
    listed = folder / "samples" / "step-000500" / "samples.json"
    listed.write_text(json.dumps([json.loads(listed.read_text())[0] | {"text": "something else", "wav": None}]))
    steps = run_page(read_run(folder))["generated"]["rows"][0]["steps"]
    assert (steps["step-000500"]["text"], steps["step-000500"]["clip"]) == ("something else", None)
    assert "text" not in steps["base"]

"""Several training runs beside each other: on one page, and as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.browser import open_browser, resize, wait
from helpers.inspect_runs import write_run
from higgs_tune.inspect import cli
from higgs_tune.inspect.web.compare import comparison
from higgs_tune.inspect.web.run import read_run, run_page
from higgs_tune.shards.reader import ShardSet
from selenium.webdriver.common.by import By

LOOK = {
    "step": 500,
    "source": "validation on held_out",
    "key": "a",
    "text": "السَّلَامُ عَلَيْكُمْ<|eot_id|>",
    "predicted_text": "السلام <b>",
    "codes": {side: [[k, 2, 3, 4, 5] for k in range(8)] for side in ("first", "last")},
    "predicted_codes": {side: [[k, 9, 9, 9, 5] for k in range(8)] for side in ("first", "last")},
    "predicted_eos": [1025] * 8,
    "frames": 50,
    "accuracy_per_codebook": [0.4] * 8,
}


def two_runs(folder: Path, keys: list[str]) -> tuple[Path, Path]:
    """Two runs that differ in rate and text loss; the second also validates on `english`, and warns."""
    one, two = write_run(folder / "one", keys), write_run(folder / "two", keys)
    for run, rate in ((one, 1e-4), (two, 2e-4)):
        options = {"seed": 42, "learning_rate": rate, "output_dir": str(run), "training_stage": "stage2"}
        options["guard"] = ["english:loss:0.1", "old:loss:1"] if run == two else []
        (run / "config.yaml").write_text(yaml.safe_dump({"options": options, "resolved": {"total_steps": 1000}}))
        (run / "diagnostics.jsonl").write_text(json.dumps(LOOK, ensure_ascii=False) + "\n")
    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().split("\n")[:-1]]
    changed = [line | {"text_loss": line["text_loss"] / 2} for line in lines]
    changed += [line | {"set": "english", "text_loss": 7.5} for line in lines if line["kind"] == "eval"]
    changed += [{"kind": "warning", "step": 300, "name": "end_never_right", "message": "none was foreseen"}]
    (two / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    return one, two


@pytest.mark.fast
def test_curves_validation_samples_and_options_stand_side_by_side(tmp_path: Path) -> None:
    one, two = two_runs(tmp_path, ["a", "b"])
    runs = [read_run(one), read_run(two)]
    page = comparison(runs)
    assert page["names"] == ["one", "two"]
    charts: dict[str, Any] = {chart["id"]: chart["data"] for chart in page["charts"]}
    for run, drawn in zip(runs, charts["compare-train--text_loss"], strict=True):
        assert drawn["y"] == [line["text_loss"] for line in run.lines if line["kind"] == "train"]
    assert [drawn["name"] for drawn in charts["compare-eval-english-text_loss"]] == ["two"]
    assert page["options"] == [["guard", "", "english:loss:0.1, old:loss:1"], ["learning_rate", "0.0001", "0.0002"]]
    rows = {row[0]: row[1:] for row in page["validation"]}
    assert rows["english: text loss"][0] == ""
    assert rows["held_out: text loss"][0].startswith("2.0000 → best 1.0067 (step 500)")
    for row in page["samples"]:
        assert row["base"]["clip"] != row["runs"][0]["clip"] != row["runs"][1]["clip"]
        assert [run["step"] for run in row["runs"]] == ["step-000500"] * 2
    assert len(runs[0].audio) == 2 * len(page["samples"]) * 4, "reference, target, base and sample of each run's key"


@pytest.mark.fast
def test_one_run_shows_its_sets_warnings_and_predictions(tmp_path: Path) -> None:
    page = run_page(read_run(two_runs(tmp_path, ["a"])[1]))
    rows = {row[0]: row[1:] for row in page["validation"]}
    assert rows["english: text loss"][0] == "7.5000"
    assert page["warnings"] == [["300", "none was foreseen"]]
    assert page["predictions"] == [LOOK]
    (loss,) = [chart for chart in page["charts"] if chart["id"] == "run-loss"]
    assert {"text loss, validation", "text loss, english"} <= {part["name"] for part in loss["data"]}


@pytest.mark.fast
def test_the_table_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = two_runs(tmp_path, ["a"])
    (one / "adapter_model.safetensors").write_bytes(b"")
    cli.RunsCommand((one, two), json=True).run()
    first, second = json.loads(capsys.readouterr().out)
    assert (first["state"], second["state"]) == ("finished", "unfinished")
    assert (first["step"], first["total_steps"], first["stage"]) == (500, 1000, "stage2")
    assert second["text_loss"] == first["text_loss"] / 2
    assert (second["warnings"], second["learning_rate"]) == (1, 2e-4)
    cli.RunsCommand((one, two)).run()
    said = capsys.readouterr().out
    assert "500/1000" in said
    assert "finished" in said


def test_the_page_shows_them(shards: ShardSet, tmp_path: Path) -> None:
    one, two = two_runs(tmp_path, ["a"])
    for name, runs, parts in (
        ("two", (one, two), ("2 training runs", "Options that differ", "learning_rate", "english: text loss")),
        ("one", (two,), ("Predictions", LOOK["predicted_text"], "none was foreseen", "Right")),
    ):
        cli.ReportCommand(str(shards.folder), tmp_path / f"{name}.html", run_dirs=runs, no_audio=True).run()
        with open_browser(tmp_path / f"profile-{name}") as browser:
            browser.get((tmp_path / f"{name}.html").as_uri())
            section = wait(lambda browser=browser: browser.find_elements(By.ID, "run"), "the runs")[0]
            for part in parts:
                assert part in section.text
            if name == "one":
                (special,) = section.find_elements(By.CLASS_NAME, "special")
                assert (special.text, special.get_attribute("dir")) == ("<|eot_id|>", "ltr")
            resize(browser, 390)
            fits = "return document.documentElement.scrollWidth <= innerWidth"
            wait(lambda browser=browser, fits=fits: browser.execute_script(fits), "the page to fit a phone", 10)
            assert not browser.get_log("browser")

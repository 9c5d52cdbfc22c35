"""Judges of the trainer's samples: figures beside base and targets, the best step by them, mistakes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from higgs_tune.inspect.web.run import read_run, run_page
from higgs_tune.preprocess.judges.edits import count_edits
from higgs_tune.preprocess.judges.normalisers import normaliser
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train import resolve
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.loop import train
from higgs_tune.train.monitor import sample_scores
from higgs_tune.train.monitor.sample_scores import SampleJudges, figures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytest.importorskip("rapidfuzz")


class Listener:
    """Hears a line that depends on the clip's length alone; its voice is the clip's mean level."""

    name, revision = "listener", "1"

    def __init__(self) -> None:
        self.asked = self.embedded = 0

    def transcribe(self, waves_S: Sequence[np.ndarray], language: str) -> list[str]:
        self.asked += len(waves_S)
        assert language == "ar"
        return ["قال" * (len(wave_S) // 3200) for wave_S in waves_S]

    def embed(self, wave_S: np.ndarray) -> np.ndarray:
        self.embedded += 1
        return np.array([np.abs(wave_S).mean(), 0.01], np.float32)


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    judge = Listener()
    for name in ("load_recogniser", "load_speaker_encoder"):
        monkeypatch.setattr(sample_scores, name, lambda *_given: judge)
    monkeypatch.setattr(resolve, "check_judges", lambda *_given: None)
    return judge


@pytest.fixture
def options(shards: ShardSet, toy: Path) -> dict[str, Any]:
    return {
        "training_stage": "single", "model_path": toy / "model", "train_data_dir": (shards.location,),
        "tokens_per_pack": 1024, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 4, "eval_steps": 0,
        "save_steps": 0, "dataloader_num_workers": 0, "skip_alignment_check": True,
        "sample_steps": 2, "num_samples": 3, "sample_max_seconds": 0.6, "sample_language": "ar",
    }  # fmt: skip


def run(options: dict[str, Any], out: Path, **changes: Any) -> list[dict[str, Any]]:
    train(TrainConfig.of(output_dir=out, **(options | changes)))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "samples"]


def test_figures_stand_beside_base_and_targets(options: dict[str, Any], listener: Listener, tmp_path: Path) -> None:
    out = tmp_path / "out"
    judged = {"sample_asr": "x", "sample_speaker_model": "x", "best_by": "samples:cer"}
    lines = run(options, out, **judged)
    assert [line["step"] for line in lines] == [2, 4]
    assert listener.asked <= 3 * 4  # targets, base, two rounds
    assert listener.embedded <= 3 * 4 + 3  # each reference voice once
    entries = {path.parent.name: json.loads(path.read_bytes()) for path in (out / "samples").glob("*/samples.json")}
    apply = normaliser("omnivoice").apply
    for line, name in zip(lines, ("step-000002", "step-000004"), strict=True):
        edits = [count_edits(apply(entry["target_text"]), apply(entry["heard"])) for entry in entries[name]]
        assert line["cer"] == pytest.approx(sum(e.errors for e in edits) / sum(e.length for e in edits))
        assert line["similarity"] == pytest.approx(np.mean([entry["similarity"] for entry in entries[name]]))
        assert {"base_cer", "base_similarity", "target_cer", "target_similarity"} <= line.keys()
        assert line["judges"] == "listener 1; listener 1; language ar; normaliser omnivoice"
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    assert {"samples/cer", "samples/target_similarity"} <= set(board.Tags()["scalars"])
    page = run_page(read_run(out))
    for name in ("cer", "similarity"):
        (chart,) = (chart for chart in page["charts"] if chart["id"] == f"run-{name}")
        curves = {curve["name"]: curve for curve in chart["data"]}
        assert len(curves) == 3  # beside base and target
        for curve, key in zip(curves.values(), (name, f"base_{name}", f"target_{name}"), strict=True):
            assert (curve["x"], curve["y"]) == ([2, 4], [line[key] for line in lines])
    steps = page["generated"]["rows"][0]["steps"]
    assert {"base", "step-000002", "step-000004"} == set(steps) and all("cer" in facts for facts in steps.values())
    best = min(lines, key=lambda line: line["cer"])
    (folder,) = out.glob("best-*")
    assert folder.name == f"best-{best['step']}"


def test_a_judge_that_joins_on_resume_scores_the_base_too(
    options: dict[str, Any], listener: Listener, tmp_path: Path
) -> None:
    """Its figures stand beside the same base and targets as if it had been there from the start."""
    judged = {"sample_asr": "x", "sample_speaker_model": "x"}
    whole = run(options, tmp_path / "whole", **judged)
    first = {"max_steps": 2, "save_steps": 2, "lr_scheduler_type": "constant"}
    (begun,) = run(options, tmp_path / "out", **first)
    assert "cer" not in begun
    lines = run(options, tmp_path / "out", **judged, save_steps=2, resume_from_checkpoint="auto")
    added = {key: value for key, value in lines[-1].items() if key.startswith(("base_", "target_")) or key == "judges"}
    assert added and added == {key: whole[-1][key] for key in added}
    assert lines[-1]["step"] == 4 and {"cer", "similarity"} <= lines[-1].keys()
    base = json.loads((tmp_path / "out" / "samples" / "base" / "samples.json").read_bytes())
    assert all(entry["judges"] == lines[-1]["judges"] for entry in base)
    asked = listener.asked
    run(options, tmp_path / "out", **judged, max_steps=6, save_steps=2, resume_from_checkpoint="auto")
    assert listener.asked - asked <= 3 + 3  # targets and one round: the base is not judged again


def test_samples_and_training_are_the_same_with_judges_and_without(
    options: dict[str, Any], listener: Listener, tmp_path: Path
) -> None:
    run(options, tmp_path / "without")
    run(options, tmp_path / "with", sample_asr="x")
    for path in (tmp_path / "without" / "samples").rglob("*.wav"):
        assert path.read_bytes() == (tmp_path / "with" / path.relative_to(tmp_path / "without")).read_bytes()
    name = "adapter_model.safetensors"
    assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


@pytest.mark.fast
def test_a_sample_without_sound_counts_as_wrong(tmp_path: Path) -> None:
    judges = SampleJudges(Listener(), Listener(), "ar")
    scores = [judges.score(None, "مرحبا بكم", None), judges.score(tmp_path / "no.wav", "نعم", tmp_path / "no.wav")]
    assert [score["cer"] for score in scores] == [1, 1] and scores[0]["heard"] == ""
    assert figures(scores) == {"cer": 1.0}
    assert figures([{"similarity": 0.5}, {"similarity": 0.0}]) == {"similarity": 0.25}
    assert figures([]) == {}


@pytest.mark.fast
def test_mistakes_are_named(options: dict[str, Any], tmp_path: Path) -> None:
    for changes, message in (
        ({"best_by": "samples:cer"}, "--best_by samples:cer needs a judge, expected --sample_asr"),
        ({"best_by": "samples:loss", "sample_asr": "x"}, "no metric loss, expected cer, similarity"),
        ({"sample_steps": 0, "sample_asr": "x"}, "judge samples, expected --sample_steps above 0"),
        ({"training_stage": "stage1", "sample_asr": "x"}, "stage 1 trains no speech"),
        ({"guard": ("samples:cer:0.1",), "eval_steps": 2}, "no evaluation set samples"),
        ({"eval_data_dir": ("samples=x",)}, "samples is the name of the generated samples"),
        ({"sample_asr": str(tmp_path / "nowhere")}, "no checkpoint here"),
    ):
        with pytest.raises(UserError, match=message):
            run(options, tmp_path / "out", **changes)

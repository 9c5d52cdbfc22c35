"""Evaluation sets of one's own: each is measured under its name, one chooses the best, guards watch for forgetting."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import ask
from helpers.samples import random_sample
from helpers.tiny import ids_of, metrics_of, run_train, write_checkpoint, write_set
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.arguments import parse_arguments
from higgs_tune.train.eval_sets import HELD_OUT, EvalMetric, Guard, parse_guard, parse_metric, parse_sets
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.reference import boson_inputs
from higgs_tune.train.monitor.logger import MetricsLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedTokenizerBase

STEPS = {"max_steps": 6, "eval_steps": 2, "learning_rate": 3e-2, "save_steps": 0}


@pytest.fixture(scope="module")
def made(toy_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a set to train on, and two others, `old` and `new`."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "model", toy_tokenizer)
    ids = ids_of(folder / "model")
    for number, name in enumerate(("train", "old", "new")):
        rng = np.random.default_rng(number)
        write_set(
            folder / name, [random_sample(f"{name}{i}", rng, toy_tokenizer, ids) for i in range(4)], folder / "model"
        )
    return folder


def train(made: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    return run_train("single", made / "model", made / "train", out, **(STEPS | options))


def evals(lines: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == "eval" and line["set"] == name]


def both(made: Path) -> tuple[str, str]:
    return f"old={made / 'old'}", f"new={made / 'new'}"


@pytest.fixture(scope="module")
def out(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learns its own samples and so gets worse on others."""
    out = tmp_path_factory.mktemp("run") / "out"
    guards = ("old:audio_loss:0.0001", "new:loss:1000")
    train(made, out, eval_data_dir=both(made), best_by="new:text_loss", guard=guards)
    return out


def text_loss_of_boson(made: Path, name: str) -> float:
    """Mean loss over the text labels of a set, by boson's forward, sample by sample."""
    model, shards = HiggsAudioModel.from_pretrained(made / "model").eval(), ShardSet(str(made / name))  # pyright: ignore
    total, count = 0.0, 0
    for row in range(len(shards)):
        with torch.no_grad():
            result = model(**boson_inputs([shards.read(row)], shards.special_ids, model.config.pad_token_id))
        logits, labels = result.logits[0, :-1], result.expanded_labels[0, 1:]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
        count += int((labels >= 0).sum())
    return total / count


def test_each_set_is_measured_under_its_name(made: Path, out: Path) -> None:
    lines = metrics_of(out)
    for name in ("old", "new"):
        assert [line["step"] for line in evals(lines, name)] == [0, 2, 4, 6]
        assert {line["samples"] for line in evals(lines, name)} == {4}
        assert evals(lines, name)[0]["text_loss"] == pytest.approx(text_loss_of_boson(made, name), abs=2e-5)
    assert not evals(lines, HELD_OUT)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("eval/old/text_loss")] == [0, 2, 4, 6]


def test_each_validation_shows_predictions_of_every_set(out: Path) -> None:
    looks = [json.loads(line) for line in (out / "diagnostics.jsonl").read_text().splitlines()]
    shown = [(look["step"], look["source"]) for look in looks]
    of_base = ", base model"
    assert shown == [
        (step, f"validation on {name}{of_base if not step else ''}") for step in (0, 2, 4, 6) for name in ("old", "new")
    ]
    assert {look["key"].rstrip("0123") for look in looks if "old" in look["source"]} == {"old"}
    assert all(look["predicted_text"] and look["predicted_eos"] for look in looks)


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.fast
def test_the_live_display_shows_each_set_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    rest = ["--training_stage", "single", "--model_path", "M", "--train_data_dir", "D", "--output_dir", str(tmp_path)]
    logger = MetricsLogger(parse_arguments([*rest, "--report_to", "none"]), total_steps=10, step=0, written=None)
    for name, loss in ((HELD_OUT, 4.25), ("english", 2.5)):
        logger.log({"kind": "eval", "set": name, "step": 6, "text_loss": loss})
    logger.close()
    assert re.search(r"eval 6 .*text 4\.2500", terminal.getvalue())
    assert re.search(r"eval english 6 .*text 2\.5000", terminal.getvalue())


def test_of_a_set_that_is_trained_on_the_held_out_samples_count(made: Path, tmp_path: Path) -> None:
    lines = train(made, tmp_path / "out", max_steps=1, val_fraction=0.5, eval_data_dir=(f"again={made / 'train'}",))
    for name in ("loss", "samples", "text_labels"):
        assert [line[name] for line in evals(lines, "again")] == [line[name] for line in evals(lines, HELD_OUT)]


def test_one_metric_chooses_the_best(out: Path) -> None:
    (best,) = [json.loads(path.read_bytes()) for path in out.glob("best-*/state.json")]
    values = {line["step"]: line["text_loss"] for line in evals(metrics_of(out), "new") if line["step"]}
    assert best["best_by"] == "new:text_loss"
    assert best["step"] == min(values, key=lambda step: values[step])
    assert best["metrics"]["text_loss"] == values[best["step"]]


def test_a_guard_warns_where_a_set_gets_worse_than_the_base(out: Path) -> None:
    lines = metrics_of(out)
    warned = [line["step"] for line in lines if line["kind"] == "warning" and line["name"] == "guard old:audio_loss"]
    values = {line["step"]: line["audio_loss"] for line in evals(lines, "old")}
    assert warned == [step for step, value in values.items() if value > values[0] + 0.0001]
    assert warned
    assert not [line for line in lines if line.get("name") == "guard new:loss"]


def test_a_guard_stops_on_two_ranks_and_after_a_resume(made: Path, tmp_path: Path) -> None:
    """The base's figures come with the checkpoint; all ranks stop together."""
    out = tmp_path / "out"
    train(
        made,
        out,
        max_steps=1,
        save_steps=1,
        eval_data_dir=both(made),
        guard=("old:audio_loss:0",),
        lr_scheduler_type="constant",
    )
    given = {"training_stage": "single", "model_path": made / "model", "train_data_dir": (str(made / "train"),)}
    given |= STEPS | {
        "output_dir": out,
        "max_steps": 50,
        "eval_steps": 1,
        "eval_data_dir": both(made),
        "logging_steps": 1,
    }
    given |= {
        "guard": ("old:audio_loss:0",),
        "guard_action": "stop",
        "resume_from_checkpoint": "auto",
        "tokens_per_pack": 1024,
    }
    answer = ask(
        given | {"dataloader_num_workers": 0, "skip_alignment_check": True, "lr_scheduler_type": "constant"}, 2
    )
    assert answer["codes"] == [0, 0], answer["stderr"]
    found = evals(metrics_of(out), "old")
    assert [line["step"] for line in found].count(0) == 1
    assert found[-1]["audio_loss"] > found[0]["audio_loss"]
    assert found[-1]["step"] < 50
    assert "stopped early" in answer["stderr"] and "--guard old:audio_loss:0 is broken" in answer["stderr"]
    assert (out / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_data_dir": ("{old}",)}, "needs a name"),
        ({"eval_data_dir": ("old={old}", "old={new}")}, "given twice"),
        ({"eval_data_dir": ("held_out={old}",)}, "validation split"),
        ({"eval_data_dir": ("old={missing}",)}, "missing"),
        ({"eval_data_dir": ("old={train}",)}, "no sample is held out"),
        ({"eval_data_dir": ("old={old}",), "best_by": "young:loss"}, "no evaluation set young"),
        ({"eval_data_dir": ("old={old}",), "best_by": "old"}, "wrong form"),
        ({"eval_data_dir": ("old={old}",), "best_by": "old:wer"}, "no metric wer"),
        ({"eval_data_dir": ("old={old}",), "guard": ("old:loss",)}, "--guard"),
        ({"eval_data_dir": ("old={old}",), "guard": ("old:loss:-1",)}, "tolerance"),
        ({"eval_data_dir": ("old={old}",), "guard": ("old:loss:nan",)}, "tolerance"),
        ({"eval_data_dir": ("old={old}",), "best_by": "old:loss", "eval_steps": 0}, "needs validation"),
        ({"best_by": "held_out:loss"}, "no sample is held out|no validation split"),
    ],
)
def test_mistakes_are_named(
    made: Path, tmp_path: Path, options: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    places = {name: made / name for name in ("train", "old", "new", "missing")}
    given = {
        name: tuple(text.format(**places) for text in value) if isinstance(value, tuple) else value
        for name, value in options.items()
    }
    with pytest.raises(SystemExit) as error:
        train(made, tmp_path / "out", **given)
    assert error.value.code == 2
    assert re.search(message, capfd.readouterr().err)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.fast
def test_what_people_write_is_read() -> None:
    assert parse_sets(["old=/a/b", "s3.new=s3://x/y=z"]) == {"old": "/a/b", "s3.new": "s3://x/y=z"}
    assert parse_guard("old:text_loss:0.25") == Guard(EvalMetric("old", "text_loss"), 0.25)
    with pytest.raises(UserError, match="no metric mos"):
        parse_metric("--best_by", "old:mos")
    loss, accuracy = parse_guard("a:loss:0.5"), parse_guard("a:text_accuracy:0.1")
    assert [loss.is_broken(value, 2.0) for value in (1.0, 2.5, 2.6, float("nan"))] == [False, False, True, True]
    assert [accuracy.is_broken(value, 0.5) for value in (0.9, 0.45, 0.3)] == [False, False, True]

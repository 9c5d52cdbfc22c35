"""The collapse watch warns of runs that go wrong and of no other; figures of the machine; lines about saves."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from helpers.samples import random_sample
from helpers.tiny import ids_of, run_train, write_checkpoint, write_set
from higgs_tune.inspect.web.run import read_run, run_page
from higgs_tune.train.monitor.diagnostics import isolated
from higgs_tune.train.monitor.system import SystemMonitor, gpu_reader
from higgs_tune.train.monitor.watch import CollapseWatch
from higgs_tune.train.options import OptimArgs
from higgs_tune.train.run_io import make_watch
from higgs_tune.train.state import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedTokenizerBase

VOCABULARY, CODES = 128256, 1026


def line(step: int, **changes: Any) -> dict[str, Any]:
    """A report of a healthy run."""
    known = {"kind": "train", "step": step, "text_loss": 2.0, "audio_loss": 4.5, "audio_loss_per_codebook": [4.5] * 8}
    return known | {"text_labels": 4000, "audio_labels": 80_000, "eos_labels": 160, "eos_accuracy": 0.3} | changes


def validated(audio_loss: float) -> dict[str, Any]:
    return {"kind": "eval", "step": 0, "set": "held_out", "audio_loss": audio_loss}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (None, {}),
        (None, {"audio_loss": None, "audio_loss_per_codebook": None, "eos_accuracy": None}),
        (None, {"text_loss": "nan", "audio_loss": "nan"}),
        ("audio_below_validation", {"audio_loss": 2.0}),
        ("text_above_uniform", {"text_loss": math.log(VOCABULARY) + 0.2}),
        ("codebook_3_at_chance", {"audio_loss_per_codebook": [4.0, 4, 4, math.log(CODES), 5, 5, 5, 5]}),
        ("end_never_right", {"eos_accuracy": 0.0}),
    ],
)
def test_each_sign_is_named_once(name: str | None, changes: dict[str, Any]) -> None:
    watch = CollapseWatch(VOCABULARY, CODES, warmup=10)
    assert not watch.look(validated(4.7))
    said = [warning for step in range(1, 60) for warning in watch.look(line(step, **changes))]
    assert [warning for warning, _ in said] == ([name] if name else [])
    again = [*watch.look(line(60)), *watch.look(line(61, **changes)), *watch.look(line(62, **changes))]
    assert len(again) == (name is not None and name != "end_never_right"), "it has gone and come back"


@pytest.mark.fast
@pytest.mark.parametrize("stop", [1, 11, 12, 14, 40])
def test_a_resumed_run_is_warned_as_one_that_never_stopped(stop: int, tmp_path: Path) -> None:
    collapsed = {"audio_loss": 2.0, "eos_accuracy": 0.0}
    lines = [validated(4.7), *(line(step, **collapsed) for step in range(1, 50))]
    through, before, after = (CollapseWatch(VOCABULARY, CODES, warmup=10) for _ in range(3))
    said = [warning for metrics in lines for warning in through.look(metrics)]
    assert len(said) == 2
    first = [warning for metrics in lines[:stop] for warning in before.look(metrics)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(metrics) + "\n" for metrics in lines[:stop]))
    after.resume(tmp_path / "metrics.jsonl")
    assert first + [warning for metrics in lines[stop:] for warning in after.look(metrics)] == said


@pytest.mark.fast
def test_a_damaged_log_stops_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a machine leaves it that went down: the watch begins anew, and says so."""
    (tmp_path / "metrics.jsonl").write_bytes(json.dumps(line(1)).encode() + b"\n" + bytes(20) + b"\n")
    config = SimpleNamespace(output_dir=tmp_path, optim=OptimArgs(warmup_steps=3))
    model = SimpleNamespace(vocab_size=VOCABULARY, audio_codebook_size=CODES)
    watch = make_watch(cast(Run, SimpleNamespace(config=config, model=model, total_steps=100)))
    assert watch == CollapseWatch(VOCABULARY, CODES, warmup=3)
    assert "the collapse watch begins anew: line 2 is not JSON" in capsys.readouterr().err


@pytest.mark.fast
def test_without_validation_a_loss_near_0_is_a_sign() -> None:
    watch = CollapseWatch(VOCABULARY, CODES, warmup=0)
    said = [warning for step in range(1, 9) for warning, _ in watch.look(line(step, audio_loss=0.05))]
    assert said == ["audio_too_low"]


def test_a_model_that_has_learned_nothing_yet_is_given_time() -> None:
    """Random weights start at chance in every codebook."""
    watch, at_chance = CollapseWatch(VOCABULARY, CODES, warmup=0), [math.log(CODES)] * 8
    early = [watch.look(line(step, audio_loss_per_codebook=at_chance)) for step in range(1, 200)]
    late = [watch.look(line(step, audio_loss_per_codebook=at_chance)) for step in range(200, 300)]
    assert (sum(map(len, early)), sum(map(len, late))) == (0, 8)


def test_figures_of_the_machine_are_those_of_psutil(tmp_path: Path) -> None:
    monitor = SystemMonitor(tmp_path, torch.device("cpu"))
    sum(number * number for number in range(3_000_000))
    figures = monitor.read()
    memory = psutil.virtual_memory()
    assert figures["process_cpu_percent"] > 20
    assert figures["host_memory_used_gb"] + figures["host_memory_free_gb"] == pytest.approx(memory.total / 1e9)
    assert figures["disk_free_gb"] == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, rel=0.05)
    assert figures["loader_processes"] == len(psutil.Process().children(recursive=True))
    assert not [name for name in figures if name.startswith("gpu")]


def test_without_the_extra_a_gpu_has_no_figures(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_reader(torch.device("cuda"))() == {}
    assert "pip install 'higgs-tune[gpu]'" in capsys.readouterr().out


def test_figures_of_a_gpu_have_their_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stand-in for NVIDIA's library, whose numbers are bytes, milliwatts, °C; what it refuses is left out."""
    nvml = ModuleType("pynvml")
    vars(nvml).update(
        NVMLError=type("NVMLError", (Exception,), {}),
        NVML_TEMPERATURE_GPU=0,
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-1234": "handle"}[uuid],
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(used=30 * 10**9, free=50 * 10**9),
        nvmlDeviceGetUtilizationRates=lambda _: SimpleNamespace(gpu=97),
        nvmlDeviceGetPowerUsage=lambda _: 650_000,
        nvmlDeviceGetTemperature=lambda _, kind: {0: 61}[kind],
    )

    def refused(_: object, kind: int) -> int:
        raise vars(nvml)["NVMLError"]("not supported")

    vars(nvml)["nvmlDeviceGetClockInfo"] = refused
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    assert gpu_reader(torch.device("cuda"))() == {
        "gpu_percent": 97.0,
        "gpu_memory_used_gb": 30.0,
        "gpu_memory_free_gb": 50.0,
        "gpu_power_w": 650.0,
        "gpu_temperature_c": 61.0,
    }


Trained = Callable[..., tuple[list[dict[str, Any]], Path]]


@pytest.fixture
def trained(toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Trained:
    """Trains a tiny model on random samples; returns the lines of metrics.jsonl, and the output folder."""
    write_checkpoint(tmp_path / "model", toy_tokenizer)
    ids, rng = ids_of(tmp_path / "model"), np.random.default_rng(0)
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids) for i in range(4)]
    data = write_set(tmp_path / "data", samples, tmp_path / "model")

    def train(**options: Any) -> tuple[list[dict[str, Any]], Path]:
        return run_train("single", tmp_path / "model", data, tmp_path / "out", **options), tmp_path / "out"

    return train


def test_a_run_tells_all(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """Label counts, figures of the machine, a line a save, and predictions at each validation, without being asked."""
    lines, out = trained(max_steps=2, save_steps=1, eval_steps=1, val_fraction=0.25, dataloader_num_workers=1)
    said = capsys.readouterr().err
    figures = [line for line in lines if line["kind"] == "train"]
    for name in ("cpu_percent", "host_memory_free_gb", "disk_free_gb", "loader_cpu_percent", "loader_memory_gb"):
        assert all(isinstance(line[name], float) for line in figures), name
    assert figures[-1]["loader_processes"] >= 1
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/host_memory_free_gb")] == [1, 2]
    assert {"run-machine", "run-memory"} <= {chart["id"] for chart in run_page(read_run(out))["charts"]}
    assert f"{figures[0]['text_labels']:,} text labels  {figures[0]['audio_labels']:,} audio labels" in said
    looks = [json.loads(text) for text in (out / "diagnostics.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [0, 1, 2]
    assert len({look["key"] for look in looks}) == 1, "the same sample each time"
    for look in looks:
        assert f"step {look['step']}, {look['source']}, sample {look['key']}" in said
        assert isolated(look["predicted_text"]) in said
        assert [len(codes) for codes in look["codes"]["first"]] == [min(5, look["frames"])] * 8
    for step in (1, 2):
        assert f"saved {out / f'checkpoint-{step}'}: " in said
    assert said.count("verified; ") == said.count("GB of disk free") >= 3  # two checkpoints and a best


def test_the_disk_is_watched_before_each_save(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    left = iter([10**9, 10**9, *[1000] * 100])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, next(left)))
    with pytest.raises(SystemExit) as error:
        trained(max_steps=3, save_steps=1)
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert "not enough free disk space" in said
    assert "got 0.00 MB" in said


@pytest.mark.fast
def test_right_to_left_texts_and_special_tokens_are_isolated() -> None:
    """And marks that pile up on one letter, as an untrained model says them, do not cover the lines above."""
    assert isolated("سَلَامٌ.<|eot_id|>") == "\u2068سَلَامٌ.\u2066<|eot_id|>\u2069\u2069"
    assert isolated("شُكُّرًا") == "\u2068شُكُّرًا\u2069"
    assert isolated("ي" + "\u064e" * 5) == "\u2068ي" + "\u064e" * 3 + "◌\u064e" * 2 + "\u2069"
    assert isolated("1 <| 2 |> 3") == "\u20681 <| 2 |> 3\u2069"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (["tensorboard"], ("tensorboard",)),
        (["none"], ("none",)),
        (["None"], ("none",)),
        (["tensorboard,wandb"], ("tensorboard", "wandb")),
        (["TensorBoard", "trackio"], ("tensorboard", "trackio")),
        (["tensorboard", "tensorboard"], ("tensorboard",)),
    ],
)
def test_trackers_as_people_write_them(written: list[str], meant: tuple[str, ...], tmp_path: Path) -> None:
    from higgs_tune.train.arguments import parse_arguments

    rest = ["--training_stage", "single", "--model_path", "M", "--train_data_dir", "D", "--output_dir", str(tmp_path)]
    assert parse_arguments([*rest, "--report_to", *written]).reports.report_to == meant
    config = tmp_path / "c.yaml"
    config.write_text(f"report_to: {json.dumps(written)}\n")
    assert parse_arguments(["--config", str(config), *rest]).reports.report_to == meant

"""Checkpoints and resume: bit-equal on the same ranks, the same data on others, refused on what has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import ask
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.checkpoint import folder as checkpoint
from higgs_tune.train.checkpoint.folder import (
    Snapshot,
    checkpoint_step,
    list_checkpoints,
    newest_valid,
    verify_checkpoint,
    write_checkpoint,
)
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.dist.context import DistContext
from higgs_tune.train.loop import train
from safetensors.torch import load_file, save_file

STEPS = 9
LOSSES = ("loss", "text_loss", "audio_loss", "audio_loss_per_codebook", "eos_loss", "grad_norm", "learning_rate")
Options = dict[str, Any]


@pytest.fixture(scope="module")
def options(shards: ShardSet, toy: Path) -> Options:
    """Several packs a step, several epochs, dropout, a moving average, windows that no checkpoint falls on."""
    return {
        "training_stage": "single",
        "model_path": toy / "model",
        "train_data_dir": (shards.location,),
        "tokens_per_pack": 1024,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lora_dropout": 0.1,
        "ema_decay": 0.9,
        "max_steps": STEPS,
        "logging_steps": 4,
        "eval_steps": 4,
        "save_steps": 1,
        "save_total_limit": None,
        "dataloader_num_workers": 0,
        "skip_alignment_check": True,
    }


def run(options: Options, out: Path, **changes: Any) -> Path:
    train(TrainConfig.of(output_dir=out, **(options | changes)))
    return out


@pytest.fixture(scope="module")
def undisturbed(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(options, tmp_path_factory.mktemp("undisturbed") / "out")


def lines(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in metrics if line["kind"] == kind]


def assert_same_weights(one: Path, other: Path, *, atol: float | None = None) -> None:
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        if atol is None:
            assert torch.equal(value, weights[1][name]), name
        else:
            torch.testing.assert_close(value, weights[1][name], atol=atol, rtol=0)


def test_a_checkpoint_holds_what_the_contract_says(undisturbed: Path) -> None:
    folder = undisturbed / f"checkpoint-{STEPS}"
    state = verify_checkpoint(folder)
    assert (state["step"], state["identity"]["stage"], state["options"]["seed"]) == (STEPS, "single", 42)
    files = {path.name for path in folder.iterdir()}
    assert files >= {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "ranks.safetensors"}
    assert not any(path.suffix in (".pt", ".pth", ".bin", ".pkl") for path in undisturbed.rglob("*"))
    optimizer = load_file(folder / "optimizer.safetensors")
    trained = json.loads((undisturbed / "trainable.json").read_text())
    assert len(optimizer) == 3 * len(trained)
    assert state["epoch"] >= 1  # the test covers an epoch's end


@pytest.mark.parametrize("step", [1, 3, 8])
def test_resume_is_bit_equal_at_any_step(options: Options, undisturbed: Path, tmp_path: Path, step: int) -> None:
    """The output folder as a kill after step + 1 would leave it: later files, lines beyond the checkpoint."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    for later in list_checkpoints(out):
        if checkpoint_step(later) > step:
            shutil.rmtree(later)
    (out / "adapter_model.safetensors").unlink()
    run(options, out, resume_from_checkpoint="auto")
    assert_same_weights(undisturbed, out)
    for kind in ("train", "eval"):
        expected, got = lines(undisturbed, kind), lines(out, kind)
        assert [line["step"] for line in got] == [line["step"] for line in expected]
        for a, b in zip(expected, got, strict=True):
            assert {name: a.get(name) for name in LOSSES} == {name: b.get(name) for name in LOSSES}
    last = f"checkpoint-{STEPS}"
    for name in ("optimizer.safetensors", "ema.safetensors", "ranks.safetensors"):
        assert (out / last / name).read_bytes() == (undisturbed / last / name).read_bytes()


def test_one_two_one_ranks_give_the_same_curve(options: Options, tmp_path: Path) -> None:
    """Elastic: 2 packs a step on one rank, then on two, then on one again; the same packs in the same order."""
    same = options | {"lora_dropout": 0.0, "logging_steps": 1, "save_steps": 3, "ema_decay": 0.0}
    alone, out = run(same, tmp_path / "alone"), tmp_path / "elastic"
    for world, until in ((1, 3), (2, 6), (1, STEPS)):
        part = same | {"max_steps": STEPS, "gradient_accumulation_steps": 2 // world, "output_dir": out}
        answer = ask(part | {"resume_from_checkpoint": "auto"}, world, stop_after=until)
        assert set(answer["codes"]) == ({0} if until == STEPS else {75}), answer["stderr"]
    a, b = lines(alone), lines(out)
    assert [line["step"] for line in b] == list(range(1, STEPS + 1))
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert (x["text_labels"], x["audio_labels"]) == (y["text_labels"], y["audio_labels"])
    assert_same_weights(alone, out, atol=1e-4)


@pytest.mark.parametrize("pauses", [{"save_steps": 0, "eval_steps": 0}, {"save_steps": 3, "eval_steps": 5}])
def test_reports_that_come_a_step_late_say_the_same(
    options: Options, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: Options
) -> None:
    """As on a GPU, whose host reads a step's numbers when the next one is queued; with pauses and without."""
    monkeypatch.setattr(DistContext, "is_asynchronous", True)
    kept = (*LOSSES, "step", "epoch", "text_labels", "audio_labels", "bad_steps")
    late, at_once = (
        [{key: line[key] for key in kept} for line in lines(out)]
        for out in (run(options, tmp_path / "out", **pauses), undisturbed)
    )
    assert late == at_once


def test_auto_without_a_checkpoint_starts_afresh(options: Options, undisturbed: Path, tmp_path: Path) -> None:
    out = run(options | {"max_steps": 1, "eval_steps": 0}, tmp_path / "out", resume_from_checkpoint="auto")
    assert lines(out)[0]["loss"] == lines(undisturbed)[0]["loss"]
    (out / "adapter_model.safetensors").unlink()
    shutil.rmtree(out / "checkpoint-1")  # killed before its first checkpoint
    run(options | {"max_steps": 1, "eval_steps": 0}, out, resume_from_checkpoint="auto")
    assert [line["step"] for line in lines(out)] == [1]


def test_a_finished_run_is_not_trained_again(options: Options, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    run(options, out, resume_from_checkpoint="auto")
    assert_same_weights(undisturbed, out)
    assert lines(out) == lines(undisturbed)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


def test_losses_that_an_earlier_version_counted_are_not_dropped_silently(
    options: Options, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint within a logging interval, with fewer sums than now: the next line counts from the resume on."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed / "checkpoint-6", out / "checkpoint-6")
    file, sums = out / "checkpoint-6" / "ranks.safetensors", out / "checkpoint-6" / "checksums.json"
    ranks = load_file(file)
    save_file(ranks | {"window": ranks["window"][:, :-2].contiguous()}, file)
    sums.write_text(json.dumps(json.loads(sums.read_bytes()) | {file.name: checkpoint._checksum(file)}))
    run(options, out, resume_from_checkpoint="auto", max_steps=8, lr_scheduler_type="constant")
    assert "warning: the checkpoint counts its losses as an earlier version did" in capsys.readouterr().err
    (got,) = [line for line in lines(out) if line["step"] == 8]
    whole = next(line for line in lines(undisturbed) if line["step"] == 8)
    assert 0 < got["text_labels"] < whole["text_labels"]


@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", "checksums.json"])
def test_a_damaged_newest_checkpoint_is_passed_over(undisturbed: Path, tmp_path: Path, name: str, how: str) -> None:
    for step in (7, 8):
        shutil.copytree(undisturbed / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    damage(tmp_path / "checkpoint-8" / name, how)
    valid, problems = newest_valid(tmp_path)
    assert valid == tmp_path / "checkpoint-7"
    assert len(problems) == 1
    assert "checkpoint-8" in problems[0]
    with pytest.raises(UserError, match="checkpoint"):
        verify_checkpoint(tmp_path / "checkpoint-8")


def test_resume_falls_back_and_says_so(options: Options, undisturbed: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    damage(out / f"checkpoint-{STEPS}" / "optimizer.safetensors", "flip")
    (out / "adapter_model.safetensors").unlink()
    run(options, out, resume_from_checkpoint="auto")
    said = capfd.readouterr().out
    assert f"warning: the checkpoint is damaged ({out}/checkpoint-{STEPS}/optimizer.safetensors)" in said
    assert f"from step {STEPS - 1}" in said
    assert_same_weights(undisturbed, out)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens_per_pack": 2048}, "plan.tokens_per_pack: 1024 -> 2048"),
        ({"seed": 7}, "plan.seed: 42 -> 7"),
        ({"training_stage": "stage1"}, "stage: single -> stage1"),
        ({"lora_r": 4}, "trained"),
        ({"use_audio_out_self_attention": True}, "architecture"),
    ],
)
def test_what_has_changed_is_refused_by_name(
    options: Options, undisturbed: Path, tmp_path: Path, change: Options, named: str
) -> None:
    path = str(undisturbed / "checkpoint-4")
    with pytest.raises(UserError, match="of another run") as refused:
        run(options | change, tmp_path / "out", resume_from_checkpoint=path)
    assert named in str(refused.value)
    fits = named.startswith("plan")
    assert ("--resume_anyway resumes" in str(refused.value)) == fits
    if fits:
        out = run(options | change, tmp_path / "out", resume_from_checkpoint=path, resume_anyway=True, max_steps=5)
        assert [line["step"] for line in lines(out)] == [5]


def test_another_data_set_is_refused_by_name(
    options: Options, undisturbed: Path, shards: ShardSet, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(shards.folder, other)
    manifest = json.loads((other / "manifest.json").read_bytes())
    manifest["provenance"]["note"] = "another"
    (other / "manifest.json").write_text(json.dumps(manifest))
    path = str(undisturbed / "checkpoint-4")
    with pytest.raises(UserError, match=r"data: \w+… -> \w+…"):
        run(options | {"train_data_dir": (str(other),)}, tmp_path / "out", resume_from_checkpoint=path)


def test_limit_keeps_the_newest_and_the_best_apart(options: Options, tmp_path: Path) -> None:
    out = run(options, tmp_path / "out", save_total_limit=2)
    assert [path.name for path in list_checkpoints(out)] == [f"checkpoint-{STEPS}", f"checkpoint-{STEPS - 1}"]
    losses = {line["step"]: line["loss"] for line in lines(out, "eval")[1:]}
    best = min(losses, key=lambda step: losses[step])
    assert [path.name for path in out.glob("best-*")] == [f"best-{best}"]
    assert load_file(out / f"best-{best}" / "adapter_model.safetensors").keys()
    assert not list(out.glob(".tmp-*"))


@pytest.mark.fast
def test_time_based_saves(options: Options, tmp_path: Path) -> None:
    out = run(options, tmp_path / "out", save_steps=0, save_every_minutes=1e-6, max_steps=3, eval_steps=0)
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-2", "checkpoint-1"]


@pytest.mark.fast
def test_what_reads_back_differently_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Snapshot(1, {"version": 1}, {"a.safetensors": {"x": torch.arange(4.0), "y": torch.ones(2)}})
    save_file = checkpoint.save_file

    def lying(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        save_file({name: value + (name == "y") for name, value in tensors.items()}, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", lying)
    with pytest.raises(UserError, match="reads back differently: y"):
        write_checkpoint(tmp_path / "checkpoint-1", taken)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    write_checkpoint(tmp_path / "checkpoint-1", taken)
    write_checkpoint(tmp_path / "checkpoint-1", taken)  # again, over the same name
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    verify_checkpoint(tmp_path / "checkpoint-1")

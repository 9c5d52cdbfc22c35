"""The fault table: what a long run meets, and what it does then."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import ask
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.checkpoint.folder import checkpoint_step, list_checkpoints, verify_checkpoint
from higgs_tune.train.dist.context import DIST_TIMEOUT
from safetensors.torch import load_file

KILLS, KILLS_IN_SAVES = 20, 5
STOP_S = DIST_TIMEOUT.total_seconds() / 3  # it is not this time-out that ends the run
Options = dict[str, Any]


@pytest.fixture(scope="module")
def options(shards: ShardSet, toy: Path) -> Options:
    return {
        "training_stage": "single",
        "model_path": toy / "model",
        "train_data_dir": (shards.location,),
        "tokens_per_pack": 512,
        "learning_rate": 1e-2,
        "lora_dropout": 0.1,
        "max_steps": 8,
        "logging_steps": 1,
        "eval_steps": 0,
        "save_steps": 2,
        "dataloader_num_workers": 0,
        "skip_alignment_check": True,
        "resume_from_checkpoint": "auto",
    }


def flags_of(options: Options) -> list[str]:
    values = {name: value[0] if isinstance(value, tuple) else value for name, value in options.items()}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_killed_many_times_ends_bit_equal(options: Options, tmp_path: Path) -> None:
    """kill -9 of both ranks at random moments, some of them inside a save."""
    long = options | {"max_steps": 80, "save_steps": 1, "save_total_limit": 2}
    undisturbed = ask(long | {"output_dir": tmp_path / "undisturbed"}, 2)
    assert undisturbed["codes"] == [0, 0], undisturbed["stderr"]
    answer = ask(long | {"output_dir": tmp_path / "killed"}, 2, kills=KILLS, saves=KILLS_IN_SAVES)
    assert answer["codes"] == [0, 0], answer["stderr"]
    assert (answer["killed"], answer["killed_saving"]) == (KILLS, KILLS_IN_SAVES)
    assert same_weights(tmp_path / "undisturbed", tmp_path / "killed")
    runs = [lines(tmp_path / name) for name in ("undisturbed", "killed")]
    losses = [[(line["kind"], line["step"], line.get("loss")) for line in run] for run in runs]
    assert losses[0] == losses[1]
    assert not list((tmp_path / "killed").glob(".tmp-*"))


def test_sigterm_saves_and_exits_75(options: Options, tmp_path: Path) -> None:
    alone = ask(options | {"output_dir": tmp_path / "alone"}, 2)
    assert alone["codes"] == [0, 0]
    stopped = ask(options | {"output_dir": tmp_path / "out"}, 2, stop_after=3)
    assert stopped["codes"] == [75, 75], stopped["stderr"]
    assert "stopped by SIGTERM at step 3; --resume_from_checkpoint auto goes on" in stopped["stderr"]
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-3", "checkpoint-2"]
    assert ask(options | {"output_dir": tmp_path / "out"}, 2)["codes"] == [0, 0]
    assert same_weights(tmp_path / "alone", tmp_path / "out")


def test_sigusr1_to_the_whole_group_with_loader_processes(options: Options, tmp_path: Path) -> None:
    """As Slurm sends it: loader processes get it too, and must not die before the checkpoint."""
    out = tmp_path / "out"
    flags = flags_of(options | {"output_dir": out, "max_steps": 2000, "dataloader_num_workers": 1})
    command = [sys.executable, "-m", "higgs_tune.train", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while not list_checkpoints(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGUSR1)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    step = checkpoint_step(list_checkpoints(out)[0])
    assert f"stopped by SIGUSR1 at step {step}" in said
    verify_checkpoint(list_checkpoints(out)[0])


def test_a_killed_rank_stops_the_others(options: Options, tmp_path: Path) -> None:
    answer = ask(options | {"output_dir": tmp_path / "out", "max_steps": 5000}, 2, kill_rank=1)
    assert answer["codes"] == [1, -9]
    assert "error: rank 0 stops because another rank has stopped: without a word" in answer["stderr"]
    assert answer["s"] < STOP_S


def test_a_failing_rank_tells_the_others_why(options: Options, tmp_path: Path) -> None:
    answer = ask(options | {"output_dir": tmp_path / "out"}, 2, fail_at=[3, 1])
    assert answer["codes"] == [1, 1]
    said = "error: rank 0 stops because another rank has stopped: rank 1: ValueError: injected failure"
    assert said in answer["stderr"]
    assert answer["s"] < STOP_S


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(options: Options, tmp_path: Path) -> None:
    """The run with a NaN in step 3 has, after step 3, the weights and moments of after step 2."""
    every = options | {"output_dir": tmp_path / "out", "save_steps": 1, "save_total_limit": None}
    answer = ask(every, 2, nan_at=[3, 1])
    assert answer["codes"] == [0, 0], answer["stderr"]
    said = "warning: step 3 is skipped (1 so far): loss or gradient is not finite. Rank 1, pack of 0000"
    assert said in answer["stderr"]
    assert lines(tmp_path / "out")[-1]["bad_steps"] == 1
    two, three, four = (tmp_path / "out" / f"checkpoint-{step}" for step in (2, 3, 4))
    assert same_weights(two, three)
    assert not same_weights(three, four)
    moments = [load_file(folder / "optimizer.safetensors") for folder in (two, three)]
    assert all(torch.equal(value, moments[1][name]) for name, value in moments[0].items())
    assert all(value.isfinite().all() for value in load_file(tmp_path / "out" / "adapter_model.safetensors").values())


def test_too_many_bad_steps_stop_the_run(options: Options, toy: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(toy / "model", broken)
    from safetensors.torch import save_file

    weights = load_file(broken / "model.safetensors")
    weights["norm.weight"] *= 1e38  # finite, so that it loads; its products are not
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    changed = {"output_dir": tmp_path / "out", "model_path": broken, "max_bad_steps": 2}
    answer = ask(options | changed, 2)
    assert answer["codes"] == [2, 2], answer["stderr"]
    assert "too many steps were not finite, expected at most --max_bad_steps 2, got 3" in answer["stderr"]


def test_out_of_memory_names_the_pack(options: Options, tmp_path: Path) -> None:
    answer = ask(options | {"output_dir": tmp_path / "out"}, memory_at=[2, 0])
    assert answer["codes"] == [2]
    assert "out of memory" in answer["stderr"]
    assert "positions in" in answer["stderr"]
    assert "lower --tokens_per_pack" in answer["stderr"]


def test_a_full_disk_is_loud_tried_again_and_leaves_nothing(options: Options, tmp_path: Path) -> None:
    """Files are limited to a size that the optimizer's does not fit in."""
    out = tmp_path / "out"
    answer = ask(options | {"output_dir": out}, 2, file_limit=1_500_000)
    assert answer["codes"] == [2, 2], answer["stderr"]
    assert "trying once more" in answer["stderr"]
    assert "error: a checkpoint could not be saved: cannot save the checkpoint" in answer["stderr"]
    assert not list(out.glob("checkpoint-*"))
    assert not list(out.glob(".tmp-*"))


def test_failed_saves_may_be_allowed(options: Options, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = ask(options | {"output_dir": out, "allow_failed_saves": True}, 2, file_limit=1_500_000)
    assert answer["codes"] == [0, 0], answer["stderr"]
    assert answer["stderr"].count("error: cannot save the checkpoint") == 4
    assert load_file(out / "adapter_model.safetensors")


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount"):
        pytest.skip("needs mount")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_too_small_is_refused_before_the_first_step(options: Options, small_disk: Path) -> None:
    answer = ask(options | {"output_dir": small_disk / "out"})
    assert answer["codes"] == [2]
    assert "not enough free disk space" in answer["stderr"]
    assert not (small_disk / "out" / "metrics.jsonl").exists()


def test_a_disk_that_fills_up_in_a_run(options: Options, small_disk: Path) -> None:
    """There is room for what is predicted when the run begins; then someone else takes it."""
    subprocess.run(["mount", "-o", "remount,size=14m", small_disk], check=True)
    out = small_disk / "out"
    answer = ask(options | {"output_dir": out, "save_total_limit": None, "save_steps": 1, "max_steps": 30})
    assert answer["codes"] == [2], answer["stderr"]
    assert "a checkpoint could not be saved: not enough free disk space" in answer["stderr"]
    kept = list_checkpoints(out)
    assert kept
    for path in kept:
        verify_checkpoint(path)
    assert not list(out.glob(".tmp-*"))


@pytest.mark.fast
def test_a_read_only_output_folder_is_refused(options: Options, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    answer = ask(options | {"output_dir": small_disk / "out"})
    assert answer["codes"] == [2]
    assert "Read-only file system" in answer["stderr"]


def test_a_killed_loader_process_is_named(options: Options, tmp_path: Path) -> None:
    """Killed from outside, as the kernel does when memory runs out."""
    out = tmp_path / "out"
    flags = flags_of(options | {"output_dir": out, "max_steps": 2000, "dataloader_num_workers": 1})
    command = [sys.executable, "-m", "higgs_tune.train", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list_checkpoints(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    names = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    worker = next(int(pid) for pid, name in names.items() if "higgs_tune.train" in name)
    os.kill(worker, signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2, said
    assert "a loader process died" in said
    assert str(worker) in said


def test_torchrun_restarts_a_dead_rank(options: Options, tmp_path: Path) -> None:
    """Elastic: torchrun starts all ranks again, and they go on from the newest checkpoint."""
    alone = ask(options | {"output_dir": tmp_path / "alone", "max_steps": 30}, 2)
    assert alone["codes"] == [0, 0]
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=2"]
    launch += ["-m", "higgs_tune.train", *flags_of(options | {"output_dir": out, "max_steps": 30})]
    process = subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not list_checkpoints(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert "from step" in said
    assert same_weights(tmp_path / "alone", out)

"""Processes, signals, kills and Ray change nothing in what is built."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import numpy as np
import pytest
import soundfile
from conftest import preprocess
from higgs_tune.preprocess import check, cli, encode, pipeline
from higgs_tune.preprocess.config import PreprocessConfig
from higgs_tune.preprocess.engine import Stop, Stopped, auto_processes, run_tasks
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.writer import SetWriter

KILLED = 27  # 20 of them by signal 9, or one more
Task = Callable[[Any, int], Any]


def make_data(folder: Path, clips: int) -> Path:
    """A manifest with references of short clips, two speakers, one missing file."""
    rng = np.random.default_rng(0)
    lines = ["audio,text,speaker"]
    for i in range(clips):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(16000 + 500 * i), 16000)
        lines.append(f"{i}.wav,text {i},speaker {i % 2}")
    (folder / "data.csv").write_text("\n".join([*lines, "gone.wav,nothing,speaker 0"]) + "\n")
    return folder / "data.csv"


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file of a set, but for what names machine paths."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    manifest = json.loads(found.pop("manifest.json"))
    del manifest["provenance"]["request"], manifest["provenance"]["paths"]
    return found | {"manifest.json": json.dumps(manifest, sort_keys=True).encode()}


def test_killed_builds_end_byte_identical(toy: Path, tmp_path: Path) -> None:
    """Builds with 2 processes, each hit at a random moment: kill -9 of all, of the parent, of a worker; SIGTERM."""
    data = make_data(tmp_path, 14)
    script = Path(__file__).parent / "helpers" / "killed_builds.py"
    command = [sys.executable, str(script), str(toy), str(data), str(tmp_path), str(KILLED), "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    whole, *builds = [json.loads(line) for line in result.stdout.splitlines()]
    assert whole["code"] == 0
    expected = files_of(tmp_path / "whole")
    assert {"mel-000004.tar", "index.npy", "rejects.jsonl"} <= expected.keys()
    codes = {"group": {-9}, "parent": {-9}, "worker": {2, -9}, "stop": {143}}
    for number, build in enumerate(builds):
        assert build["again"] == 0, (build, (tmp_path / f"{number}.log").read_text())
        assert files_of(tmp_path / str(number)) == expected
        assert build["code"] in codes[build["how"]] | {0}, build
        assert build["gone"], f"processes are left behind: {build}"
        assert not build["temporary"] or build["how"] != "stop"
    assert sum(build["code"] != 0 for build in builds) == KILLED  # the others were done before they were hit


@pytest.mark.parametrize("remote", [False, True])
def test_killed_after_the_manifest(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool) -> None:
    """The set is valid, but the work folder still stands: the next start removes it, and encodes nothing."""
    data, local = make_data(tmp_path, 3), tmp_path / "out"
    out, options = (f"memory://{tmp_path}/set", {"staging": local}) if remote else (local, {})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SetWriter, "clear", Mock(side_effect=KeyboardInterrupt))
        preprocess(toy, data, out, **options)
    assert (local / ".work" / "request.json").exists()
    assert (local / "manifest.json").exists()
    again = {"already_built": True, "samples": 2, "rejects": {"missing_audio": 1, "no_reference": 1}}
    assert preprocess(toy, data, out, **options) == again
    if remote:
        assert not list(local.iterdir())
    else:
        preprocess(toy, data, tmp_path / "whole")
        assert files_of(local) == files_of(tmp_path / "whole")


def test_processes_change_nothing(toy: Path, tmp_path: Path) -> None:
    """As a user starts it: one process, and two that are spawned."""
    data = make_data(tmp_path, 10)
    preprocess(toy, data, tmp_path / "one", num_processes=1)
    preprocess(toy, data, tmp_path / "two", num_processes=2, clips_per_unit=3, samples_per_shard=4096)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.parametrize(
    ("device", "gpus", "gib", "cores", "tasks", "expected"),
    [
        ("auto", 0, 0, 4, 100, 4),
        ("auto", 0, 0, 64, 100, 8),
        ("cpu", 8, 80, 4, 5, 2),
        ("auto", 1, 141, 16, 100, 6),
        ("cuda", 1, 11.6, 16, 100, 2),
        ("cuda", 1, 141, 4, 100, 2),
        ("cuda", 1, 3, 1, 100, 1),
        ("auto", 8, 141, 128, 1000, 48),
        ("auto", 8, 141, 32, 1000, 16),
        ("auto", 8, 141, 128, 4, 8),
        ("cuda:1", 8, 141, 128, 1000, 6),
        ("cuda", 1, 141, 16, 6, 3),
        ("cuda", 0, 0, 16, 100, 1),
        ("cuda:8", 8, 141, 128, 100, 1),
    ],
)
def test_processes_by_default(
    device: str, gpus: int, gib: float, cores: int, tasks: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Mock(total_memory=gib * 2**30))
    assert auto_processes(device, tasks) == expected


def test_stop_finishes_what_is_in_hand(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After SIGINT the unit in hand is committed, the next is not begun, and a new start takes up the rest."""
    data, done = make_data(tmp_path, 10), []
    encode_unit = pipeline.encode_unit

    def hit_once(job: Any, unit: int) -> Any:
        done.append(unit)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return encode_unit(job, unit)

    monkeypatch.setattr(pipeline, "encode_unit", hit_once)
    with pytest.raises(Stopped, match="SIGINT"):
        preprocess(toy, data, tmp_path / "out", clips_per_unit=2)
    assert done == [0, 1]
    assert len(list((tmp_path / "out" / ".work").glob("unit-*"))) == 2
    preprocess(toy, data, tmp_path / "out", clips_per_unit=2)
    assert done == [0, 1, 2, 3, 4, 5]
    preprocess(toy, data, tmp_path / "whole", clips_per_unit=2)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stop_of_a_check(
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    measure_unit = check.measure_unit

    def hit(job: Any, unit: int) -> Any:
        os.kill(os.getpid(), number)
        return measure_unit(job, unit)

    monkeypatch.setattr(check, "measure_unit", hit)
    options = f"--data {make_data(tmp_path, 4)} --model_path {toy}/model --clips_per_unit 2 --num_processes 1"
    monkeypatch.setattr("sys.argv", ["higgs-preprocess", "--check", *options.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    assert capsys.readouterr().err == f"stopped on {signal.Signals(number).name}\n"


def test_signals_do_not_reach_a_worker_that_starts() -> None:
    """A terminal sends them to all processes, from the first moment of each."""
    config = PreprocessConfig(data=Path(), model_path=Path(), check=True, num_processes=2)

    def hit() -> None:
        hit: set[int | None] = set()
        while len(hit) < 2:
            for process in multiprocessing.active_children():
                if process.pid and process.pid not in hit:
                    os.kill(process.pid, signal.SIGINT)
                    os.kill(process.pid, signal.SIGTERM)
                    hit.add(process.pid)

    thread = threading.Thread(target=hit, daemon=True)
    thread.start()
    with Stop() as stop:
        assert sorted(run_tasks(abs, [-1, -2, -3, -4], config, stop)) == [1, 2, 3, 4]
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("step", ["encode_unit", "assemble_shard"])
@pytest.mark.parametrize("ref_drop", [0.0, 1.0])
def test_files_that_were_put_right_are_taken_up(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, ref_drop: float
) -> None:
    """Between a stop and the next start a missing file comes: it is a sample, and a reference, as in a new build."""
    data, calls = make_data(tmp_path, 7), []
    options = {"clips_per_unit": 3, "samples_per_shard": 3, "whisper_features": "mel", "whisper_roles": "both"}
    options |= {"ref_drop": ref_drop, "seed": 1}
    encode_clip, task = encode._encode, getattr(pipeline, step)

    def counting(clip: Any, *args: Any) -> Any:
        calls.append(clip.source)
        return encode_clip(clip, *args)

    def stopping(job: Any, number: int) -> Any:
        result = task(job, number)
        if number == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(encode, "_encode", counting)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, step, stopping)
        preprocess(toy, data, tmp_path / "out", **options)
    assert len(calls) == 7
    soundfile.write(tmp_path / "gone.wav", 0.1 * np.random.default_rng(9).standard_normal(20000), 16000)
    assert preprocess(toy, data, tmp_path / "out", **options)["rejects"] == {}
    if ref_drop == 1.0:  # without references nothing else changes, and only the new file is encoded
        assert calls[7:] == ["gone.wav"]
    preprocess(toy, data, tmp_path / "whole", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("remote", [False, True])
def test_nothing_is_left_of_a_build_without_samples(toy: Path, tmp_path: Path, remote: bool) -> None:
    """The same command, and one with other data, then build what a new folder gets."""
    data, local = tmp_path / "data.csv", tmp_path / "out"
    out, options = (f"memory://{tmp_path}/set", {"staging": local}) if remote else (str(local), {})
    data.write_text("audio,text,speaker\n")
    with pytest.raises(UserError, match="the data holds no samples"):
        preprocess(toy, data, out, ref_drop=1.0, **options)
    for name in ("a.wav", "b.wav"):
        data.write_text(f"audio,text,speaker\n{name},hello,me\n")
        with pytest.raises(UserError, match=r"no sample is left .*'missing_audio': 1"):
            preprocess(toy, data, out, ref_drop=1.0, **options)
        assert [file.name for file in local.iterdir()] == ["rejects.jsonl"]
        assert not remote or not fsspec.filesystem("memory").find(f"{tmp_path}/set")
    soundfile.write(tmp_path / "b.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    assert preprocess(toy, data, out, ref_drop=1.0, **options)["samples"] == 1


@pytest.mark.fast
def test_another_audio_root_is_another_set(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data.csv"
    data.write_text("audio,text,speaker\na.wav,hello,me\n")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    monkeypatch.chdir(tmp_path)
    for root, built in (("one", False), ("two/../one", True)):
        options = {"ref_drop": 1.0, "audio_root": Path(root)}
        assert preprocess(toy, data, tmp_path / "out", **options)["already_built"] == built
    with pytest.raises(UserError, match=r"made from other data or options .*got another audio_root"):
        preprocess(toy, data, tmp_path / "out", ref_drop=1.0, audio_root=Path("two"))


@pytest.mark.fast
def test_a_second_build_of_the_same_folder_is_refused(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(tmp_path, 4)
    encode_unit, seen = pipeline.encode_unit, []

    def build_again(job: Any, unit: int) -> Any:
        with pytest.raises(UserError, match="another higgs-preprocess is writing here"):
            preprocess(toy, data, tmp_path / "out")
        seen.append(unit)
        return encode_unit(job, unit)

    monkeypatch.setattr(pipeline, "encode_unit", build_again)
    assert preprocess(toy, data, tmp_path / "out")["samples"] == 4
    assert seen == [0]


def dying(task: Task, mark: Path) -> Task:
    """The task, whose process is killed the first time that number 1 is done.

    Ray sends a function within a function by its code, so workers need not import this file.
    """

    def run(job: Any, number: int) -> Any:
        result = task(job, number)
        if number == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return run


def test_ray_gives_the_same_bytes_when_workers_are_killed(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local Ray; a worker is killed while encoding, and one while assembling."""
    pytest.importorskip("ray")
    data = make_data(tmp_path, 8)
    options = {"clips_per_unit": 2, "samples_per_shard": 4, "whisper_features": "mel"}
    preprocess(toy, data, tmp_path / "local", **options)
    for name in ("encode_unit", "assemble_shard"):
        monkeypatch.setattr(pipeline, name, dying(getattr(pipeline, name), tmp_path / name))
    preprocess(toy, data, tmp_path / "ray", engine="ray", num_processes=2, **options)
    assert (tmp_path / "encode_unit").exists()
    assert (tmp_path / "assemble_shard").exists()
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")


def test_ray_that_is_not_there_is_a_clear_error(toy: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    data = make_data(tmp_path, 3)
    with pytest.raises(UserError, match=r"cannot reach Ray: .*127\.0\.0\.1:1"):
        preprocess(toy, data, tmp_path / "out", engine="ray", ray_address="127.0.0.1:1")

"""Processes, signals, kills and Ray change nothing in what is built."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from conftest import preprocess
from higgs_tune.preprocess import pipeline
from higgs_tune.preprocess.engine import Stopped
from higgs_tune.shards.errors import UserError

KILLED = 20


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
    """20 builds with 2 processes, each hit at a random moment: kill -9 of all, of the parent, of a worker; SIGTERM."""
    data = make_data(tmp_path, 14)
    script = Path(__file__).parent / "killed_builds.py"
    command = [sys.executable, str(script), str(toy), str(data), str(tmp_path), str(KILLED), "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
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
    assert sum(build["code"] != 0 for build in builds) > KILLED // 2  # most were hit before they were done


def test_processes_change_nothing(toy: Path, tmp_path: Path) -> None:
    """As a user starts it: one process, and two that are spawned."""
    data = make_data(tmp_path, 10)
    preprocess(toy, data, tmp_path / "one", num_processes=1)
    preprocess(toy, data, tmp_path / "two", num_processes=2, clips_per_unit=3, samples_per_shard=4096)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


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


def test_ray_gives_the_same_bytes_when_a_worker_is_killed(toy: Path, tmp_path: Path) -> None:
    """A local Ray; the first worker that is seen at work is killed, once while encoding and once while assembling."""
    data = make_data(tmp_path, 24)
    options = {"clips_per_unit": 2, "samples_per_shard": 5, "whisper_features": "mel"}
    preprocess(toy, data, tmp_path / "local", **options)
    killed: list[str] = []
    finished = threading.Event()

    def kill_workers() -> None:
        work = tmp_path / "ray" / ".work"
        for phase in ("unit", "shard"):
            while not finished.wait(0.002):
                begun = list(work.glob(f"{phase}-*.npz"))
                busy = [p for p in psutil.Process().children(recursive=True) if begun and "ray::run" in _title(p)]
                if busy:
                    busy[0].kill()
                    killed.append(phase)
                    break

    thread = threading.Thread(target=kill_workers)
    thread.start()
    try:
        preprocess(toy, data, tmp_path / "ray", engine="ray", num_processes=2, **options)
    finally:
        finished.set()
        thread.join()
    assert killed[:1] == ["unit"]
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_ray_that_is_not_there_is_a_clear_error(toy: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path, 3)
    with pytest.raises(UserError, match=r"cannot reach Ray: .*127\.0\.0\.1:1"):
        preprocess(toy, data, tmp_path / "out", engine="ray", ray_address="127.0.0.1:1")

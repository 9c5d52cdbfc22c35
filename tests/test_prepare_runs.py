"""higgs-prepare end to end without a model: its files, bad input, kills, engines, and the set that is built from it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import preprocess
from helpers.recordings import make_recording, write_srt
from higgs_tune.preprocess.prepare import cli, pipeline
from higgs_tune.preprocess.prepare.config import PrepareConfig
from higgs_tune.preprocess.prepare.records import Decision, read_recordings, read_segments, write_lines
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.index import SPLIT_VAL
from higgs_tune.shards.reader import ShardSet

LIMITS: dict[str, Any] = {"language": "ar", "vad": "energy", "quality": "none", "num_processes": 1, "max_same_text": 0}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four recordings of two speakers with their cues; their names have spaces, Arabic letters and a newline."""
    folder = tmp_path_factory.mktemp("recordings")
    names = ("first speaker/one two.wav", "first speaker/ثلاثة.wav", "second/four\nfive.wav", "second/six.flac")
    for seed, name in enumerate(names):
        truth = make_recording(folder / name, seed, sentences=4, rate_hz=(16_000, 24_000)[seed % 2])
        write_srt((folder / name).with_suffix(".srt"), truth)
    return folder


def config(recordings: Path, out: Path, **options: Any) -> PrepareConfig:
    given: dict[str, Any] = {"speaker_by": "folder"} | LIMITS | options
    return PrepareConfig(recordings=(recordings,), out=out, **given)


@pytest.fixture(scope="module")
def prepared(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    pipeline.prepare(config(recordings, out))
    return out


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name != "lock"}


def results(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if name != "config.json"}


@pytest.mark.fast
def test_everything_is_written_and_accounted_for(recordings: Path, prepared: Path) -> None:
    segments, made = read_segments(prepared), json.loads((prepared / "accounting.json").read_bytes())
    assert len(segments) == 16 and all(one.keep for one in segments)
    assert all(one.text and one.text_source == "given" and one.snr and one.snr > 20 for one in segments)
    lengths = [soundfile.info(path) for path in recordings.rglob("*") if path.suffix in (".wav", ".flac")]
    assert made["input_ms"] == sum(round(one.frames * 1000 / one.samplerate) for one in lengths)
    assert sum(made["fates_ms"].values()) == made["input_ms"] and made["fates_ms"]["kept"] > 0
    rows = [json.loads(line) for line in (prepared / "manifest.jsonl").read_bytes().splitlines()]
    assert [row["id"] for row in rows] == [one.id for one in segments]
    assert {row["split"] for row in rows} == {"train", "val"} and (prepared / "rejects.jsonl").read_bytes() == b""
    for row in rows:
        assert row["ref_audio"] != row["audio"] and row["duration"] >= 3  # another recording, since there is one


def test_the_manifest_builds_a_set_with_its_split_and_references(prepared: Path, toy: Path, tmp_path: Path) -> None:
    summary = preprocess(toy, prepared / "manifest.jsonl", tmp_path / "shards", val_by="split")
    assert summary["samples"] == 16 and not summary["rejects"]
    shards, segments = ShardSet(tmp_path / "shards"), {one.id: one for one in read_segments(prepared)}
    for row in range(16):
        sample = shards.read(row)
        segment = segments[sample.key]
        reference, target = sample.meta["segments"]
        assert target["seconds"] == pytest.approx(segment.end - segment.start, abs=1e-3)
        assert segment.ref and reference["sha256"] == segments[segment.ref].sha256
        assert bool(shards.index["split"][row] == SPLIT_VAL) == (segment.split == "val")
    with pytest.raises(UserError, match="no sample names its side"):
        rows = [json.loads(line) for line in (prepared / "manifest.jsonl").read_bytes().splitlines()]
        write_lines(tmp_path / "plain.jsonl", [{k: v for k, v in row.items() if k != "split"} for row in rows])
        preprocess(toy, tmp_path / "plain.jsonl", tmp_path / "other", val_by="split")


def test_a_piece_may_refer_to_another_piece_of_its_file_and_not_to_itself(tmp_path: Path, toy: Path) -> None:
    make_recording(tmp_path / "a.wav", 0, sentences=3)
    row = {"audio": "a.wav", "offset": 1.0, "duration": 2.0, "text": "قال", "speaker": "s", "ref_audio": "a.wav"}
    write_lines(tmp_path / "rows.jsonl", [row | {"id": "apart", "ref_offset": 3.0, "ref_duration": 2.0},
                                          row | {"id": "within", "ref_offset": 2.5, "ref_duration": 2.0},
                                          row | {"id": "wrong", "ref_offset": "x"}])  # fmt: skip
    summary = preprocess(toy, tmp_path / "rows.jsonl", tmp_path / "out", val_fraction=0.0)
    assert summary["samples"] == 1 and summary["rejects"] == {"self_reference": 1, "malformed_manifest": 1}


# deciding anew


def test_from_decides_without_audio_and_takes_decisions(prepared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "copy"
    shutil.copytree(prepared, out)
    before = results(out)
    for name in ("first", "second"):
        monkeypatch.setattr("sys.argv", ["higgs-prepare", "--from", str(out)])
        cli.main()
        assert results(out) == before, name
    monkeypatch.setattr("sys.argv", ["higgs-prepare", "--from", str(out), "--min_snr", "75"])
    cli.main()
    assert all(one.reject and one.reject.step == "snr" for one in read_segments(out))
    chosen = read_segments(out)[0].id
    write_lines(out / "decisions.jsonl", [Decision(chosen, "reject"), Decision(chosen, "accept", text="نعم نعم")])
    monkeypatch.setattr("sys.argv", ["higgs-prepare", "--from", str(out)])  # keeps the threshold of the last run
    cli.main()
    (kept,) = (one for one in read_segments(out) if one.keep)
    assert (kept.id, kept.text) == (chosen, "نعم نعم")
    (out / "decisions.jsonl").unlink()
    monkeypatch.setattr("sys.argv", ["higgs-prepare", "--from", str(out), "--min_snr", "10"])
    cli.main()
    assert results(out) == before


@pytest.mark.fast
def test_from_refuses_what_was_not_measured(prepared: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    cases = (
        (["--from", str(prepared), "--max_seconds", "20"], "--from takes thresholds alone, got --max_seconds"),
        (["--from", str(tmp_path)], "no prepared folder"),
        (["--from", str(prepared), "--max_cer", "-1"], "--max_cer is out of range"),
        ([str(tmp_path / "none"), "--out", str(tmp_path / "o")], "no such file or folder"),
        ([str(tmp_path)], "--out is missing"),
        ([str(tmp_path), "--out", str(tmp_path)], "--out is the folder of the recordings"),
        ([str(tmp_path), "--out", str(tmp_path / "o")], "no recordings here"),
    )
    for arguments, message in cases:
        monkeypatch.setattr("sys.argv", ["higgs-prepare", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2 and message in capsys.readouterr().err


# bad input


def test_bad_recordings_are_named_and_the_rest_is_done(recordings: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(recordings, folder)
    good = folder / "second" / "six.flac"
    (folder / "empty.wav").write_bytes(b"")
    (folder / "empty too.wav").write_bytes(b"")
    for name in ("page.mp3", "page too.mp3"):
        (folder / name).write_bytes(b"<!doctype html><html>")
    (folder / "cut off.wav").write_bytes((folder / "first speaker" / "one two.wav").read_bytes()[:200_000])
    (folder / "video.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(500))
    (folder / "zz").mkdir()
    shutil.copy(good, folder / "zz" / "again.flac")
    soundfile.write(folder / "silent.wav", np.zeros(160_000), 16_000)
    soundfile.write(folder / "many.wav", np.zeros((16_000, 4)), 16_000)
    make_recording(folder / "broken text.wav", 9, sentences=2)
    (folder / "broken text.srt").write_bytes(b"nothing with times")
    make_recording(folder / "other text.wav", 8, sentences=2)
    (folder / "other text.srt").write_text("1\n01:00:00,000 --> 01:00:02,000\nHello\n")
    (folder / "folder.wav").mkdir()
    before = files(folder)
    summary = pipeline.prepare(config(folder, tmp_path / "out"))
    assert files(folder) == before
    said = {Path(one.path).name: str(one.error) for one in summary["errors"]}
    errors = {name: error.partition(":")[0] for name, error in said.items()}
    assert errors == {"empty.wav": "unreadable_audio", "page.mp3": "unreadable_audio", "cut off.wav": "truncated_audio",
                      "empty too.wav": "unreadable_audio", "page too.mp3": "unreadable_audio",
                      "video.mp4": "unreadable_audio", "again.flac": "same_file", "silent.wav": "no_speech",
                      "many.wav": "too_many_channels"}  # fmt: skip
    assert all("an empty file" in said[name] for name in ("empty.wav", "empty too.wav")), said
    assert all("an HTML page" in said[name] for name in ("page.mp3", "page too.mp3")), said
    assert "ffmpeg" in said["video.mp4"]
    segments = read_segments(tmp_path / "out")
    bad = [one for one in segments if one.recording.endswith(" text.wav")]
    assert bad and all(one.reject and one.reject.reason == "unreadable_transcript" for one in bad)
    why = {Path(path).stem: reason for path, reason in summary["bad_transcripts"].items()}
    assert why.keys() == {"broken text", "other text"} and "broken text.srt: no line with times" in why["broken text"]
    assert "other text.srt: a text at 3600 s, after the recording's end" in why["other text"]
    assert sum(one.keep for one in segments) == 16
    made = summary["accounting"]
    assert sum(made["fates_ms"].values()) == made["input_ms"] and made["fates_ms"]["duplicate"] > 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_bytes().splitlines()]
    assert len(lines) == len(errors) + len(bad)


@pytest.mark.fast
def test_ffmpeg_decodes_what_libsndfile_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for ffmpeg that "decodes" an mp4 to the recording beside it."""
    truth = make_recording(tmp_path / "sound.flac", 0, sentences=3)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(500))
    (tmp_path / "in" / "b.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(500))
    write_srt(tmp_path / "in" / "a.srt", truth)
    tool = tmp_path / "bin" / "ffmpeg"
    tool.parent.mkdir()
    tool.write_text(f"""#!/bin/sh
case "$*" in *b.mp4*) echo "Stream map '0:a:0' matches no streams." >&2; exit 1;; esac
for last; do :; done; cp {tmp_path}/sound.flac "$last"
""")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    out = tmp_path / "out"
    summary = pipeline.prepare(config(tmp_path / "in", out))
    (error,) = summary["errors"]
    assert error.path.endswith("b.mp4") and "a video without audio" in error.error
    segments = read_segments(out)
    assert len(segments) == 3 and all(one.keep and one.recording.endswith("a.m4a") for one in segments)
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_bytes().splitlines()]
    assert {row["audio"] for row in rows} == {str(next((out / "audio").glob("*.flac")))}


@pytest.mark.fast
def test_a_text_for_a_short_recording_is_taken_whole_and_a_long_one_needs_a_recogniser(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number, name in enumerate(("short.wav", "long.wav")):
        truth = make_recording(folder / name, number, sentences=(2, 6)[number])
        (folder / name).with_suffix(".txt").write_text("\n".join(one.text for one in truth), encoding="utf-8")
    (folder / "list.txt").write_text("short.wav\n\nlong.wav\nnot here.wav\n")
    made = pipeline.prepare(replace(config(folder, tmp_path / "out"), recordings=(folder / "list.txt",)))
    assert [one.path for one in made["errors"]] == [str(folder / "not here.wav")]
    segments = read_segments(tmp_path / "out")
    short = [one for one in segments if one.recording.endswith("short.wav")]
    assert len(short) == 1 and short[0].keep and short[0].text_source == "given"
    long = [one for one in segments if one.recording.endswith("long.wav")]
    assert len(long) == 6 and all(one.reject and one.reject.reason == "unaligned_transcript" for one in long)


# engines, kills


def _die_at(write: int, given: PrepareConfig) -> None:
    """In a process of its own: killed at its n-th durable write, half of which is on the disk."""
    plain, count = durable.atomic_file, 0

    def dying(path: Path) -> Any:
        nonlocal count
        count += 1
        if count == write:
            path.with_name(f"{durable.TEMP_PREFIX}{os.getpid()}-{path.name}").write_bytes(b"half")
            os._exit(9)
        return plain(path)

    durable.atomic_file = dying  # pyright: ignore[reportAttributeAccessIssue]
    pipeline.prepare(given)
    os._exit(0)


def _durable_writes(given: PrepareConfig) -> int:
    """How many an undisturbed run makes."""
    plain, count = durable.atomic_file, 0

    def counting(path: Path) -> Any:
        nonlocal count
        count += 1
        return plain(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "atomic_file", counting)
        pipeline.prepare(given)
    return count


def test_twenty_kills_change_nothing(recordings: Path, prepared: Path, tmp_path: Path) -> None:
    """Evenly from the first to the last durable write."""
    fork, wanted = multiprocessing.get_context("fork"), files(prepared)
    last = _durable_writes(config(recordings, tmp_path / "whole"))
    points = np.linspace(1, last, 20).round().astype(int).tolist()
    assert len(set(points)) == 20
    ends = set[int | None]()
    for number, write in enumerate(points):
        out = tmp_path / str(number)
        given = config(recordings, out)
        process = fork.Process(target=_die_at, args=(write, given))
        process.start()
        process.join(120)
        ends.add(process.exitcode)
        pipeline.prepare(given)
        found = files(out)
        assert {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} == {
            name: hashlib.sha256(data).hexdigest() for name, data in wanted.items()
        }, write
    assert ends == {9}


def test_two_processes_give_the_same_files(recordings: Path, prepared: Path, tmp_path: Path) -> None:
    pipeline.prepare(config(recordings, tmp_path, num_processes=2))
    assert files(tmp_path) == files(prepared)


def test_two_processes_begin_with_the_longer_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording may be ten hours; a task of higgs-preprocess is a few hundred clips, of which a process takes two."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(4)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked: list[tuple[int, list[int]]] = []

    def run_tasks(task: Any, numbers: list[int], given: PrepareConfig, _stop: Any) -> Iterator[Any]:
        asked.append((given.num_processes, numbers))
        yield from map(task, numbers)

    monkeypatch.setattr("higgs_tune.preprocess.engine.run_tasks", run_tasks)
    for number in range(2):
        make_recording(tmp_path / "in" / f"{number}.wav", number, sentences=1 + number)
    for given in (0, 1):
        pipeline.prepare(config(tmp_path / "in", tmp_path / "out", num_processes=given))
    assert asked == [(2, [1, 0]), (1, [1, 0])]


@pytest.fixture(scope="module")
def ray_options() -> Iterator[dict[str, Any]]:
    pytest.importorskip("ray")
    yield {"engine": "ray", "num_processes": 1}


def test_ray_gives_the_same_files(
    recordings: Path, prepared: Path, tmp_path: Path, ray_options: dict[str, Any]
) -> None:
    pipeline.prepare(config(recordings, tmp_path, **ray_options))
    assert files(tmp_path) == files(prepared)


def test_another_option_reuses_what_does_not_depend_on_it(recordings: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(prepared, out)
    kept = {name for name in files(out) if name.startswith("work/listen")}
    pipeline.prepare(config(recordings, out, max_seconds=12.0))
    now = files(out)
    assert {name for name in now if name.startswith("work/listen")} == kept
    assert len([name for name in now if name.startswith("work/cut/")]) == 8
    assert [one.path for one in read_recordings(out)] == [one.path for one in read_recordings(prepared)]

"""higgs-preprocess --check: it finds what is planted, foresees what a build does, and writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import EXAMPLES, preprocess
from higgs_tune.preprocess import cli
from higgs_tune.shards.reader import ShardSet


def run_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> tuple[int, str]:
    """Run the command; returns its exit code and what it printed."""
    monkeypatch.setattr("sys.argv", ["higgs-preprocess", "--check", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), capsys.readouterr().out


@pytest.mark.parametrize("whisper", ["none", "mel"])
def test_it_foresees_what_a_build_does(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, whisper: Any
) -> None:
    """Samples, hours, tokens and disk of the example; nothing is written beside the data."""
    checkpoints = ["--model_path", toy / "model", "--audio_tokenizer_path", toy / "codec"]
    before = sorted(EXAMPLES.parent.rglob("*"))
    arguments = ["--data", EXAMPLES, *checkpoints, "--whisper_features", whisper]
    code, printed = run_check(capsys, monkeypatch, *arguments, "--json")
    report = json.loads(printed)
    assert code == 0
    assert report["fit_to_build"]
    assert before == sorted(EXAMPLES.parent.rglob("*"))

    preprocess(toy, EXAMPLES, tmp_path, whisper_features=whisper)
    shards = ShardSet(tmp_path)
    assert report["samples"] == {"all": 40, "usable": len(shards), "rejected": 0}
    assert report["hours"]["in_samples"] == pytest.approx(shards.manifest["totals"]["seconds"] / 3600, rel=1e-5)
    lengths = shards.index["tokens"].astype(int) + shards.index["mel_tokens"]
    for percent, value in report["tokens"]["percentiles"].items():
        assert value == pytest.approx(float(np.percentile(lengths, int(percent))), abs=3)
    stored = shards.manifest["shards"] + shards.manifest["mel_shards"]
    assert report["predicted"]["disk_bytes"] == pytest.approx(sum(shard["bytes"] for shard in stored), rel=0.1)
    assert report["predicted"]["encode_seconds"] > 0
    assert sum(report["seconds"]["histogram"].values()) == report["clips"]["distinct"] == 40
    assert report["speakers"] == {"count": 4, "single_clip": [], "few_clips": {}}
    assert 0.3 < report["languages"]["arabic"]["tokens_per_character"] < 1.5


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A manifest of good clips with one of everything that can be wrong."""
    rng = np.random.default_rng(0)
    lines = ["audio,text,speaker,ref_audio"]
    for i in range(12):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * rng.standard_normal(32000), 16000)
        lines.append(f"{i}.wav,twenty characters {i:02},a,")
    shutil.copy(tmp_path / "0.wav", tmp_path / "again.wav")
    soundfile.write(tmp_path / "single.wav", 0.1 * rng.standard_normal(32000), 16000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(32000), 16000)
    (tmp_path / "half.wav").write_bytes((tmp_path / "1.wav").read_bytes()[:20000])
    lines += [
        "again.wav,twenty characters 12,a,2.wav",
        "single.wav,twenty characters 13,b,3.wav",
        f"4.wav,{'far too long for two seconds ' * 20},a,5.wav",
        "silent.wav,twenty characters 14,a,5.wav",
        "gone.wav,twenty characters 15,a,5.wav",
        "half.wav,twenty characters 16,a,5.wav",
        "6.wav,,a,5.wav",
        "0.wav,itself by content,a,again.wav",
    ]
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_it_finds_what_is_planted(
    toy: Path, planted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--data", planted / "data.csv", "--model_path", toy / "model"]
    code, printed = run_check(capsys, monkeypatch, *arguments, "--json")
    report = json.loads(printed)
    assert code == 1
    assert not report["fit_to_build"]
    assert report["rejects"] == {"missing_audio": 1, "truncated_audio": 1, "empty_text": 1, "self_reference": 1}
    assert report["empty_texts"] == 1
    assert report["files"] == {"missing": ["gone.wav"], "corrupt": ["half.wav"], "duplicate": [["0.wav", "again.wav"]]}
    assert [outlier["id"] for outlier in report["rate_outliers"]] == ["000000014"]
    assert report["speakers"]["single_clip"] == ["b"]
    assert report["clips"]["flags"] == {"silence": 1}
    assert report["predicted"]["encode_seconds"] is None
    assert preprocess(toy, planted / "data.csv", planted / "out")["rejects"] == report["rejects"]

    code, printed = run_check(capsys, monkeypatch, *arguments)
    assert code == 1
    for line in (
        "not fit to build: 20.00%",
        "problem: 1 rejected for missing_audio: 000000016: no such file",
        "warning: 1 groups of equal files: 0.wav = again.wav",
        "warning: 1 texts do not fit their audio, in characters a second: 000000014 (290 against 10)",
        "warning: 1 clips are flagged for silence",
        "speakers with few clips: b (1)",
    ):
        assert line in printed
    assert run_check(capsys, monkeypatch, *arguments, "--max_reject_share", "0.2")[0] == 0


def piece(name: str, **cut: float) -> dict[str, Any]:
    return {"type": "audio", "audio_url": name, **cut}


def chatml(reference: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    user = [reference, {"type": "text", "text": "say"}]
    answer = [{"type": "text", "text": "hello"}, target]
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


@pytest.mark.fast
def test_self_references_of_chatml_are_found(
    toy: Path, planted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build takes them, since a ChatML sample may mean it; the check says so. Two pieces of a file are no such."""
    first, second = {"offset": 0, "duration": 0.5}, {"offset": 1.0, "duration": 0.5}
    samples = [
        chatml(piece("0.wav"), piece("1.wav")),
        chatml(piece("0.wav"), piece("again.wav")),
        chatml(piece("0.wav", **first), piece("0.wav", **second)),
        chatml(piece("0.wav", **second), piece("again.wav", **second)),
        chatml(piece("0.wav", duration=0.5), piece("again.wav", **first)),
    ]
    data = planted / "data.json"
    data.write_text(json.dumps(samples))
    code, printed = run_check(capsys, monkeypatch, "--data", data, "--model_path", toy / "model")
    assert code == 1
    assert "problem: 3 samples refer to their own target: 000000001, 000000003, 000000004" in printed


@pytest.mark.parametrize(("features", "roles"), [("none", "reference"), ("mel", "both")])
def test_it_rejects_what_a_build_rejects(
    toy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    features: Any,
    roles: Any,
) -> None:
    """At the edges: what the codec cannot take, and a target that is one sample too long for a Whisper window."""
    rng = np.random.default_rng(0)
    lengths = {"over": (30 * 44100 + 1, 44100), "whole": (30 * 24000, 24000)}
    lengths |= {f"short-{samples}": (samples, 44100) for samples in (441, 3526, 3527, 3528)}
    for name, (samples, rate) in lengths.items():
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * rng.standard_normal(samples), rate)
    data = tmp_path / "data.json"
    data.write_text(json.dumps([chatml(piece("whole.wav"), piece(f"{name}.wav")) for name in lengths][::-1]))
    options = {"min_seconds": 0.0, "whisper_features": features, "whisper_roles": roles}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    _, printed = run_check(capsys, monkeypatch, "--data", data, "--model_path", toy / "model", "--json", *flags)
    built = preprocess(toy, data, tmp_path / "out", **options)
    assert json.loads(printed)["rejects"] == built["rejects"]
    assert built["rejects"].pop("too_short") == 2
    assert built["rejects"] == ({"too_long_for_whisper": 1} if features == "mel" else {})


@pytest.mark.fast
def test_where_nothing_can_be_checked(
    toy: Path, planted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (planted / "empty.json").write_text("[]")
    for data, *more in (
        ("empty.json",),
        ("data.csv", "--whisper_features", "encoder"),  # of a model without a tower
        ("data.csv", "--audio_root", planted / "nowhere"),
    ):
        code, printed = run_check(capsys, monkeypatch, "--data", planted / data, "--model_path", toy / "model", *more)
        assert (code, printed) == (2, "")


def test_what_is_printed_fits_every_terminal(
    toy: Path, planted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON is plain ASCII; elsewhere, letters that the terminal lacks are escapes."""
    (planted / "data.csv").write_text("audio,text,speaker,ref_audio\n0.wav,one,\u0639\U0001f600\u00e9,1.wav\n")
    arguments = ["--data", planted / "data.csv", "--model_path", toy / "model", "--json"]
    _, printed = run_check(capsys, monkeypatch, *arguments)
    assert printed.isascii()
    assert json.loads(printed)["speakers"]["single_clip"] == ["\u0639\U0001f600\u00e9"]
    program = "from higgs_tune.shards.errors import run_command; run_command(lambda: print('\\u0639'))"
    command, ascii_only = [sys.executable, "-c", program], {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, env=ascii_only, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "\\u0639\n"


def test_nothing_is_left_behind(
    toy: Path, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (planted / "temp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(planted / "temp"))
    run_check(capsys, monkeypatch, "--data", planted / "data.csv", "--model_path", toy / "model")
    assert list((planted / "temp").iterdir()) == []

"""higgs-preprocess --check: it finds what is planted, foresees what a build does, and writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import EXAMPLES, preprocess
from higgs_tune.preprocess import cli
from higgs_tune.shards.reader import ShardSet


def check(
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
    code, printed = check(capsys, monkeypatch, *arguments, "--json")
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
    code, printed = check(capsys, monkeypatch, *arguments, "--json")
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

    code, printed = check(capsys, monkeypatch, *arguments)
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
    assert check(capsys, monkeypatch, *arguments, "--max_reject_share", "0.2")[0] == 0


def test_self_references_of_chatml_are_found(
    toy: Path, planted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build takes them, since a ChatML sample may mean it; the check says so."""

    def sample(reference: str, target: str) -> dict[str, Any]:
        user = [{"type": "audio", "audio_url": reference}, {"type": "text", "text": "say"}]
        answer = [{"type": "text", "text": "hello"}, {"type": "audio", "audio_url": target}]
        return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}

    data = planted / "data.json"
    data.write_text(json.dumps([sample("0.wav", "1.wav"), sample("0.wav", "again.wav")]))
    code, printed = check(capsys, monkeypatch, "--data", data, "--model_path", toy / "model")
    assert code == 1
    assert "problem: 1 samples refer to their own target: 000000001" in printed


def test_nothing_is_left_behind(
    toy: Path, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (planted / "temp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(planted / "temp"))
    check(capsys, monkeypatch, "--data", planted / "data.csv", "--model_path", toy / "model")
    assert list((planted / "temp").iterdir()) == []

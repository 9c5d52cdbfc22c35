"""higgs-inspect: what it prints is what is stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from higgs_tune.inspect import cli
from higgs_tune.preprocess.codec_checkpoint import load_codec
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import expand


def test_stats(shards: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    cli.Stats(shards.folder, json=True).run()
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 40
    assert found["speakers"] == dict.fromkeys(("amal", "huda", "karim", "zayd"), 10)
    assert found["tokens"] == int(shards.index["tokens"].sum())


def test_show_has_every_position(shards: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    cli.Show(shards.folder, "000000003").run()
    lines = capsys.readouterr().out.splitlines()
    sample = shards.read(3)
    part = expand([sample], shards.special_ids)
    table = next(number for number, line in enumerate(lines) if line.split()[:1] == ["position"])
    rows = [line.split() for line in lines[table + 1 :]]
    assert [int(row[0]) for row in rows] == list(range(part.length))
    assert sum(row[1] == "audio_out" for row in rows) == sample.segment_frames[1] + 9
    first = rows[int(part.audio_at[0])]
    assert first[2:10] == ["1024"] * 8  # the BOS column


def test_decode_is_the_codecs(shards: ShardSet, toy: Path, tmp_path: Path) -> None:
    cli.Decode(shards.folder, ("2",), tmp_path / "x.wav").run()
    wave, rate = soundfile.read(tmp_path / "x.wav", dtype="float32")
    sample = shards.read(2)
    codes = sample.codes_KT[:, -sample.segment_frames[1] :]
    expected = load_codec(toy / "codec").decode(codes)
    assert rate == 24000
    np.testing.assert_allclose(wave, np.clip(expected, -1, 1), atol=1e-4)
    cli.Decode(shards.folder, ("2", "3"), tmp_path / "all").run()
    assert len(list((tmp_path / "all").iterdir())) == 4


def test_report_is_one_page_without_network(shards: ShardSet, tmp_path: Path) -> None:
    cli.Report(shards.folder, tmp_path / "report.html", max_samples=3).run()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<audio") == 6
    assert "http://" not in page
    assert "https://" not in page


def test_unknown_key(shards: ShardSet) -> None:
    with pytest.raises(UserError, match="no such sample"):
        cli.Show(shards.folder, "nobody").run()

"""higgs-prepare against recordings with known truth, and people's decisions up to the rerun; without any model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from higgs_tune.preprocess.prepare.config import PrepareConfig
from higgs_tune.preprocess.prepare.pipeline import decide_again, prepare, saved_config
from higgs_tune.preprocess.prepare.records import DECISIONS, read_segments
from higgs_tune.preprocess.prepare.review import Review

pytestmark = pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("espeak-ng")), reason="needs flite and espeak-ng"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Three minutes of recordings, and what was made of them by loudness and given transcripts."""
    sys.path.insert(0, str(ROOT / "bench"))
    import prepare_truth

    folder = tmp_path_factory.mktemp("truth")
    truth, out = folder / "truth", folder / "prepared"
    prepare_truth.make_truth(prepare_truth.Options(truth, minutes=2))
    prepare(PrepareConfig(recordings=(truth / "recordings",), out=out, language="en", vad="energy", quality="none",
                          num_processes=1))  # fmt: skip
    return truth, out


def test_no_figure_misses_its_bar(made: tuple[Path, Path]) -> None:
    """Boundaries, words, duplicates, splits, references, accounting: those that need no model."""
    import prepare_score

    figures = {figure.name: figure for figure in prepare_score.measure(made[1], made[0])}
    missed = {name: (figure.good, figure.of) for name, figure in figures.items() if figure.misses}
    assert not missed
    for name in ("boundaries within 150 ms", "groups of the same sound kept once", "seconds accounted for"):
        assert figures[name].of > 1, name


@pytest.mark.fast
def test_a_rerun_applies_what_people_decided(made: tuple[Path, Path], tmp_path: Path) -> None:
    """From the server's functions to the manifest, in the folder itself and with another --out."""
    shutil.copytree(made[1], tmp_path / "own")
    own = tmp_path / "own"
    kept = [segment for segment in read_segments(own) if segment.keep]
    one, two, three = kept[:3]
    left = next(
        s
        for s in read_segments(own)
        if not s.keep and s.reject and s.reject.step not in ("segment", "text", "duplicate")
    )
    corrected = " ".join(reversed((two.text or "").split()))
    review = Review(own)
    said: list[dict[str, Any]] = [
        {"id": one.id, "verdict": "reject"}, {"id": two.id, "text": corrected},
        {"id": three.id, "speaker": "guest"}, {"id": left.id, "verdict": "accept"},
    ]  # fmt: skip
    review.decide(json.dumps({"decisions": said}).encode())
    for out in (own, tmp_path / "other"):
        saved = saved_config(own)
        decide_again(PrepareConfig(**{**vars(saved), "from_": own, "out": out}))
        again = {segment.id: segment for segment in read_segments(out)}
        assert again[one.id].reject and not again[one.id].keep
        assert again[two.id].text == corrected and again[three.id].speaker == "guest"
        assert again[left.id].keep and again[left.id].decision
        manifest = {row["id"]: row for row in map(json.loads, (out / "manifest.jsonl").read_text().splitlines())}
        assert one.id not in manifest and manifest[two.id]["text"] == corrected
        assert manifest[three.id]["speaker"] == "guest" and left.id in manifest
        assert (out / DECISIONS).read_bytes() == (own / DECISIONS).read_bytes()

"""The whole way on the miniature: a base that speaks English learns Arabic, by the demo's own commands.

The slow tests take a few minutes of one core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from helpers.samples import random_sample
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.train.data import batch
from transformers import PreTrainedTokenizerBase

MINIATURE = ROOT / "examples" / "miniature"
CODEC = MINIATURE / "codec" / "native"
BIN = Path(sys.executable).parent
sys.path.append(str(ROOT / "bench" / "study"))
from leaked import leaked_labels  # noqa: E402

FORGOTTEN = 0.05  # character error rate that English may lose
SENTENCE = "خمسة ثلاثة سبعة أربعة"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder, after fewer steps on one process."""
    folder = tmp_path_factory.mktemp("the demo") / "demo"
    small = {
        "BIN": str(BIN),
        "PROCESSES": "1",
        "SAMPLES": "2500",
        "STEPS1": "40",
        "STEPS2": "440",
    }
    run = subprocess.run(
        [MINIATURE / "demo.sh", folder], env={**os.environ, **small}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "listen:" in run.stdout
    return folder


def error_rate(demo: Path, language: str, who: str) -> float:
    evaluation = json.loads((demo / "eval" / "eval.json").read_text())
    return evaluation["groups"]["language"][language]["figures"][who]["cer"]["mean"]


@pytest.mark.fast
def test_leaked_labels_stand_at_their_own_targets(
    toy_tokenizer: PreTrainedTokenizerBase, toy_ids: SpecialIds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a position is to say is what it is given; without the leak it is what comes next."""
    sample = random_sample("s", np.random.default_rng(0), toy_tokenizer, toy_ids)
    given: dict[bool, list[int]] = {}
    for leak in (False, True):
        if leak:
            monkeypatch.setattr(batch, "_labels", leaked_labels)
        made = batch.collate([sample], 0.0, toy_ids)
        ids, rows = made["text_ids"], made["text_rows"].long()
        text_positions = made["to_sorted"][: len(ids)].tolist()
        token_at = dict(zip(text_positions, ids.tolist(), strict=True))
        at = [int(made["to_sorted"][row]) + (not leak) for row in rows]
        given[leak] = [token_at[place] for place in at]
        assert given[leak] == made["text_labels"].tolist()
    assert given[True] == given[False]


@pytest.mark.slow
def test_it_learns_arabic_and_keeps_english(demo: Path) -> None:
    """Held-out sentences by the committed recogniser, one voice never trained on among them."""
    assert error_rate(demo, "ar", "ceiling") < 0.05  # what is measured can be heard
    assert error_rate(demo, "ar", "base") > 0.8
    assert error_rate(demo, "ar", "tuned") < error_rate(demo, "ar", "base") / 2
    assert error_rate(demo, "en", "tuned") < error_rate(demo, "en", "base") + FORGOTTEN


@pytest.mark.slow
def test_the_signal_is_right_and_leaked_labels_are_refused(demo: Path, tmp_path: Path) -> None:
    for stage, parts in (("stage1", {"text"}), ("stage2", {"text", "audio"})):
        verdicts: dict[str, Any] = json.loads((demo / stage / "selftest.json").read_text())["verdicts"]
        assert {verdicts[part] for part in parts} == {"right"}
    leaked = [ROOT / "bench" / "study" / "leaked.py", "--training_stage", "single", "--max_steps", "1"]
    where = ["--model_path", MINIATURE / "base", "--train_data_dir", demo / "shards", "--output_dir", tmp_path / "out"]
    run = subprocess.run([sys.executable, *leaked, *where], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "the training signal looks wrong" in run.stdout + run.stderr


@pytest.mark.slow
def test_exports_of_both_layouts_say_the_same(demo: Path, tmp_path: Path) -> None:
    """And what the adapter says: the same samples of the same voice."""
    models = {"adapter": demo / "stage2"}
    for layout in ("original", "native"):
        models[layout] = tmp_path / layout
        subprocess.run(
            [BIN / "higgs-export", demo / "stage2", "--out", models[layout], "--layout", layout, "--dtype", "float32"],
            check=True,
        )
    said = {}
    phrase = json.loads((MINIATURE / "words" / "manifest.jsonl").read_text().splitlines()[-1])  # of nour
    for name, model in models.items():
        out = tmp_path / f"{name}.wav"
        voice = ["--ref_audio", MINIATURE / "words" / phrase["audio"], "--ref_text", phrase["text"]]
        how = ["--layout", "chat", "--temperature", "0", "--ras_win_len", "0", "--max_seconds", "8"]
        given = ["--model_path", model, "--audio_tokenizer_path", CODEC, "--text", SENTENCE, "-o", out]
        subprocess.run([BIN / "higgs-speak", *given, *voice, *how], check=True)
        said[name] = soundfile.read(out)[0]
    assert len(said["adapter"]) > 24_000
    assert (said["original"] == said["native"]).all()
    assert (said["adapter"] == said["original"]).all()

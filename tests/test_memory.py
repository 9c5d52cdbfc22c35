"""Host memory stays bounded in a long run on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.samples import random_sample
from helpers.tiny import ids_of, train_flags, write_checkpoint, write_set
from higgs_tune.shards.memory import SHAPE_CACHES, limit_shape_caches
from transformers import PreTrainedTokenizerBase

STEPS, WARM_UP = 320, 120


def test_memory_levels_off(toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Over packs of which no two have the same shapes. Without `limit_shape_caches`, it grows by 730 MB, of which 70 MB
    come after the warm-up."""
    model, rng = tmp_path / "model", np.random.default_rng(0)
    write_checkpoint(model, toy_tokenizer)
    ids = ids_of(model)
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids, frames=(5, 60)) for i in range(600)]
    data = write_set(tmp_path / "set", samples, model)
    flags = {"full_finetune": True, "max_steps": STEPS, "tokens_per_pack": 512, "save_steps": 0}
    flags |= {"skip_alignment_check": True, "logging_steps": 20}
    command = [sys.executable, "-m", "higgs_tune.train", *train_flags("single", model, data, tmp_path / "out", **flags)]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    peaks = {line["step"]: line["max_memory_gb"] for line in metrics if line["kind"] == "train"}
    assert peaks[STEPS] - peaks[1] < 0.3
    assert peaks[STEPS] - peaks[WARM_UP] < 0.05


@pytest.mark.fast
def test_a_limit_of_the_users_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SHAPE_CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(SHAPE_CACHES[0], "7")
    limit_shape_caches()
    assert [os.environ[name] for name in SHAPE_CACHES] == ["7", "128"]

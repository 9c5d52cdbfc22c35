"""Sets that do not fit a run: other codecs, another tower's features, no speaker names; options that need a tower."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.samples import random_sample
from helpers.tiny import ids_of, run_train, write_checkpoint
from higgs_tune.preprocess.audio.whisper import tower_sha256
from higgs_tune.preprocess.checkpoints.checkpoint import describe_checkpoint
from higgs_tune.shards.format import Sample
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.shards.writer import SetWriter
from transformers import PreTrainedTokenizerBase

Made = tuple[Path, list[Sample]]


@pytest.fixture(scope="module")
def made(toy_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A checkpoint without a tower, and samples for it."""
    model = tmp_path_factory.mktemp("model")
    write_checkpoint(model, toy_tokenizer)
    rng = np.random.default_rng(0)
    return model, [random_sample(f"s{i}", rng, toy_tokenizer, ids_of(model), frames=(3, 12)) for i in range(6)]


def named(sample: Sample, speaker: str | None) -> Sample:
    return Sample(sample.key, sample.meta | {"speaker": speaker}, sample.tokens_2L, sample.codes_KT)


def write_set(
    folder: Path, made: Made, speakers: list[str | None], codec: str = "c" * 64, features: dict[str, Any] | None = None
) -> Path:
    model, samples = made
    features = features or {"whisper": "none"}
    writer = SetWriter(folder, ids_of(model), ValidationSplit(0.0))
    writer.begin()
    writer.write(0, [named(s, speakers[i % len(speakers)]) for i, s in enumerate(samples)], [])
    provenance = {"model": describe_checkpoint(model), "codec": {"weights_sha256": codec}, "features": features}
    writer.finish(1, provenance)
    return folder


def train(model: Path, data: Any, out: Path, **options: object) -> None:
    run_train("single", model, data, out, skip_alignment_check=True, **options)


def refused(capsys: pytest.CaptureFixture[str], *args: Any, **options: object) -> str:
    with pytest.raises(SystemExit) as left:
        train(*args, **options)
    assert left.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("speakers", "message"),
    [
        ([None], "needs the speaker of every sample .*6 of 6 samples without one"),
        (["a", "b", ""], "needs the speaker of every sample .*2 of 6 samples without one"),
        (["a"], "needs several speakers .*expected 2 or more, got a"),
    ],
)
def test_contrastive_loss_needs_speaker_names(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], speakers: list[str | None], message: str
) -> None:
    data = write_set(tmp_path / "set", made, speakers)
    said = refused(capsys, made[0], data, tmp_path / "out", contrastive_loss_weight=0.1)
    assert len(said.splitlines()) == 1
    assert re.search(message, said)
    assert not (tmp_path / "out").exists()
    train(made[0], data, tmp_path / "out")


def test_contrastive_loss_trains_with_names(made: Made, tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", made, ["a", "b"])
    train(made[0], data, tmp_path / "out", contrastive_loss_weight=0.1)


@pytest.mark.fast
def test_sets_of_different_codecs_are_refused(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, same = (write_set(tmp_path / name, made, ["a"]) for name in ("first", "same"))
    other = write_set(tmp_path / "other", made, ["a"], codec="d" * 64)
    said = refused(capsys, made[0], (first, same, other), tmp_path / "out")
    assert "different codecs" in said
    assert f"({other})" in said
    assert f"as {first} has" in said
    train(made[0], (first, same), tmp_path / "out")


@pytest.mark.parametrize("flag", ["train_audio_tower", "train_audio_encoder_proj"])
def test_tower_options_need_a_tower(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    data = write_set(tmp_path / "set", made, ["a"])
    said = refused(capsys, made[0], data, tmp_path / "out", **{flag: True})
    assert f"--{flag}: the checkpoint has no Whisper tower" in said


def test_features_that_are_not_used_are_said(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_set(tmp_path / "set", made, ["a"], features={"whisper": "mel"})
    train(made[0], data, tmp_path / "out")
    assert f"not used: the Whisper features of {data}" in capsys.readouterr().out


def test_encoder_features_of_another_tower_are_refused(
    toy_tokenizer: PreTrainedTokenizerBase, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    write_checkpoint(model, toy_tokenizer, skip_audio_tower=False, encode_whisper_embed=True)
    encoder = {"whisper": "encoder", "tower_sha256": "e" * 64}
    data = write_set(tmp_path / "set", (model, made[1]), ["a"], features=encoder)
    said = refused(capsys, model, data, tmp_path / "out")
    assert "made by another Whisper tower" in said
    encoder["tower_sha256"] = tower_sha256(model)
    train(model, write_set(tmp_path / "own", (model, made[1]), ["a"], features=encoder), tmp_path / "out")

"""Speaking with models that have a Whisper tower, and with checkpoints of runs that train every weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, preprocess
from helpers.samples import random_sample
from helpers.speaking import speak
from helpers.tiny import ids_of, run_train, write_checkpoint, write_set
from higgs_tune.evaluate.speak.engine import SpeechEngine, Task
from higgs_tune.preprocess.input.layout import read_conversation
from higgs_tune.shards.format import Sample
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.export.merge import ExportConfig, export, load_adapter
from higgs_tune.train.model.generate import boson_generate
from higgs_tune.train.model.load import load_model
from higgs_tune.train.model.sampling import Sampling, request_of
from safetensors.torch import load_file
from test_speak import FRAMES, codes_of, engine_of
from transformers import PreTrainedTokenizerBase

CPU = torch.device("cpu")
STEADY: dict[str, object] = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0}


@pytest.fixture(scope="module")
def tower_run(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sample]:
    """A run with a Whisper attached, and a sample of its set, with the log-mel of its reference."""
    folder = tmp_path_factory.mktemp("tower")
    (folder / "some.json").write_text(json.dumps(json.loads(EXAMPLES.read_text())[:3]))
    whisper: dict[str, Any] = {"whisper_features": "mel", "whisper_path": toy / "whisper"}
    preprocess(toy, folder / "some.json", folder / "set", audio_root=EXAMPLES.parent, val_fraction=0.0, **whisper)
    flags = {"whisper_path": toy / "whisper", "max_steps": 3, "tokens_per_pack": 2048}
    run_train("single", toy / "model", folder / "set", folder / "out", **flags, **STEADY)
    return folder / "out", ShardSet(folder / "set").read(0, mels=True)


def codes_of_sample(engine: SpeechEngine, sample: Sample) -> np.ndarray:
    """Its text, spoken in the voice of its reference."""
    told = read_conversation(sample.meta["messages"])
    assert told is not None
    (reference,) = told.references
    path = EXAMPLES.parent / reference.audio["audio_url"]
    (task,) = engine.speak([Task([told.text], (engine.voice(str(path), reference.text or ""),), 0)])
    return task.codes[0]


def test_references_pass_through_the_tower(tower_run: tuple[Path, Sample], toy: Path, tmp_path: Path) -> None:
    """The codes are those of boson's `generate` on the prompt that the run was trained on; merged weights say the same.
    The base alone speaks as if there were no tower."""
    out, sample = tower_run
    ids = ids_of(toy / "model")
    request = request_of(sample, ids, speak=True, max_frames=FRAMES)
    assert request.prompt.mels
    model: Any = load_adapter(out, device=CPU, dtype=torch.float32)
    said = boson_generate(model, request, ids, Sampling(temperature=0))
    assert said.codes_KT is not None
    engine = engine_of(toy, out, max_seconds=FRAMES / 25)
    expected = said.codes_KT[:, :FRAMES]
    np.testing.assert_array_equal(codes_of_sample(engine, sample), expected)
    without = engine_of(toy, toy / "model", max_seconds=FRAMES / 25, layout="chat")
    with engine.base_only():
        base = codes_of_sample(engine, sample)
    np.testing.assert_array_equal(base, codes_of_sample(without, sample))
    assert base.shape != expected.shape or (base != expected).any()
    export(ExportConfig(out, out=tmp_path / "merged", dtype="float32"))
    np.testing.assert_array_equal(
        codes_of_sample(engine_of(toy, tmp_path / "merged", max_seconds=FRAMES / 25), sample), expected
    )


def test_features_reach_what_is_said(tower_run: tuple[Path, Sample], toy: Path) -> None:
    """In the user's turn, long references in chunks of 30 s; as the serving engine, not in the assistant's turns."""
    out, _ = tower_run
    engine = engine_of(toy, out)
    clip = EXAMPLES.parent / "clips" / "huda-01.flac"
    voice = engine.voice(str(clip), "")
    assert [mel.values_CF.dtype for mel in voice.mels] == [np.float16]
    assert len(engine.prompt("x", [voice], 0).prompt.mels) == 1
    serve = engine_of(toy, out, layout="serve")
    assert not serve.prompt("x", [voice], 0).prompt.mels
    (task,) = engine.speak([Task(["First.", "Second."], (), 7)])
    assert len(engine._request(task, 1).prompt.mels) == 1  # the first piece is the voice of the second


@pytest.mark.fast
def test_a_tower_that_is_not_there_is_named(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], toy_tokenizer: PreTrainedTokenizerBase
) -> None:
    options = ("--text", "x", "-o", tmp_path / "o.wav", "--whisper_path", toy / "whisper")
    speak(toy / "model", toy / "codec", *options, code=2)
    assert "--whisper_path is for adapters that were trained with a Whisper tower" in capfd.readouterr().err
    assert not (tmp_path / "o.wav").exists()


def test_checkpoints_of_full_fine_tuning_speak_and_are_exported(
    toy: Path, tmp_path: Path, toy_tokenizer: PreTrainedTokenizerBase
) -> None:
    """They are whole checkpoints: also those of stage 1, whose audio weights do not train. They still resume."""
    base, rng, out = tmp_path / "model", np.random.default_rng(0), tmp_path / "out"
    write_checkpoint(base, toy_tokenizer)
    data = write_set(
        tmp_path / "set", [random_sample(f"s{i}", rng, toy_tokenizer, ids_of(base)) for i in range(4)], base
    )
    full = {"full_finetune": True, "save_steps": 2, **STEADY}
    run_train("stage1", base, data, out, max_steps=2, **full)
    expected = codes_of(engine_of(toy, out))
    np.testing.assert_array_equal(codes_of(engine_of(toy, out / "checkpoint-2")), expected)
    assert codes_of(engine_of(toy, base)).tobytes() != expected.tobytes()
    export(ExportConfig(out / "checkpoint-2", out=tmp_path / "native", layout="native"))
    np.testing.assert_array_equal(codes_of(engine_of(toy, tmp_path / "native")), expected)
    weights = load_model(out / "checkpoint-2", device=CPU, dtype=torch.float32).model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in load_file(out / "model.safetensors").items())
    run_train("stage1", base, data, out, max_steps=3, resume_from_checkpoint="auto", **full)
    run_train("stage1", base, data, tmp_path / "whole", max_steps=3, **full)
    resumed, whole = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())

"""The transformers-native layout through the real command; encoder features; boson's forward as the trainer's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.samples import random_sample
from helpers.tiny import ids_of, run_train, write_checkpoint, write_set
from higgs_tune.preprocess.checkpoints.checkpoint import read_config
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import mel_positions, tower_frames
from higgs_tune.train import optim
from higgs_tune.train.data.batch import collate, mel_window
from higgs_tune.train.export.merge import ExportConfig, export
from higgs_tune.train.model.forward import hidden_states
from higgs_tune.train.model.load import HiggsAudioModel, load_model
from safetensors.torch import load_file, save_file
from torch.optim import AdamW
from transformers import PreTrainedTokenizerBase

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
MEL_BINS = 8
TOWER = {"num_mel_bins": MEL_BINS, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 1}
TOWER |= {"encoder_ffn_dim": 24, "max_source_positions": 1500}


def native_config(boson: dict[str, Any]) -> dict[str, Any]:
    """The config that transformers 5.23 writes for the same sizes (see tests/native)."""
    text = boson["text_config"]
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "max_position_embeddings")
    native = {name: text[name] for name in same}
    native |= {"model_type": "higgs_audio_v2", "num_codebooks": 8, "codebook_size": 1026, "dtype": "float32"}
    native |= {"audio_stream_bos_id": 1024, "audio_stream_eos_id": 1025, "pad_token_id": boson["pad_token_id"]}
    native["rope_parameters"] = {"rope_theta": text["rope_theta"], **text["rope_scaling"]}
    return native


def native_name(name: str) -> str:
    """The native name of one of boson's weights."""
    if name.startswith("audio_decoder_proj."):
        return name.removeprefix("audio_decoder_proj.")
    if name.startswith("audio_codebook_embeddings."):
        return f"model.embed_audio_tokens.embed_audio_tokens.{name.rpartition('.')[2]}"
    return f"model.{name}"


def write_native(folder: Path, boson: Path, change: Callable[[Tensors], object] = lambda tensors: None) -> Path:
    """The same checkpoint in the native layout, perhaps with a change to its weights."""
    folder.mkdir(parents=True)
    shutil.copy(boson / "tokenizer.json", folder)
    shutil.copy(boson / "tokenizer_config.json", folder)
    (folder / "config.json").write_text(json.dumps(native_config(json.loads((boson / "config.json").read_text()))))
    stored = load_file(boson / "model.safetensors")
    tensors = {native_name(name): value for name, value in stored.items() if name != "audio_codebook_weights"}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def boson(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A checkpoint in Boson's layout, and a set for it under `data`."""
    folder, rng = tmp_path_factory.mktemp("boson"), np.random.default_rng(0)
    write_checkpoint(folder / "model", toy_tokenizer, audio_ffn_intermediate_size=96)
    ids = ids_of(folder / "model")
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids, frames=(3, 12), turns=1 + i % 2) for i in range(4)]
    write_set(folder / "data", samples, folder / "model")
    return folder / "model"


def data_of(boson: Path) -> Path:
    return boson.parent / "data"


def refused(capsys: pytest.CaptureFixture[str], *args: Any, **options: Any) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run_train(*args, **options)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def assert_same_steps(one: list[dict[str, Any]], other: list[dict[str, Any]], rel: float) -> None:
    for a, b in zip(one, other, strict=True):
        for name in ("loss", "text_loss", "audio_loss", "eos_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=rel), (a["step"], name)
        assert a["audio_loss_per_codebook"] == pytest.approx(b["audio_loss_per_codebook"], rel=rel)


def test_both_layouts_train_alike(boson: Path, tmp_path: Path) -> None:
    """The same weights in both layouts, on shards made for Boson's: same losses and gradients, step by step."""
    native = write_native(tmp_path / "native", boson)
    found = [
        run_train("single", model, data_of(boson), tmp_path / name, max_steps=3, learning_rate=1e-2)
        for name, model in (("a", boson), ("b", native))
    ]
    assert_same_steps(*found, rel=1e-6)
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    assert adapters[0].keys() == adapters[1].keys()


def test_weights_may_lie_in_several_files(boson: Path, tmp_path: Path) -> None:
    native = write_native(tmp_path / "native", boson)
    tensors = load_file(native / "model.safetensors")
    (native / "model.safetensors").unlink()
    for part in range(2):
        chosen = {name: value for i, (name, value) in enumerate(sorted(tensors.items())) if i % 2 == part}
        save_file(chosen, native / f"model-0000{part + 1}-of-00002.safetensors")
    loaded = load_model(native, device=CPU, dtype=torch.float32).model.state_dict()
    for name, value in load_model(boson, device=CPU, dtype=torch.float32).model.state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_without_a_text_head_only_audio_trains(boson: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native = write_native(tmp_path / "native", boson, lambda tensors: tensors.pop("text_lm_head.weight"))
    for stage in ("stage1", "single"):
        said = refused(capsys, stage, native, data_of(boson), tmp_path / stage)
        assert "no text head, so text cannot be trained" in said
        assert "--text_loss_weight 0" in said
    whole = run_train("single", boson, data_of(boson), tmp_path / "whole", text_loss_weight=0, max_steps=2)
    audio = run_train("single", native, data_of(boson), tmp_path / "audio", text_loss_weight=0, max_steps=2)
    for a, b in zip(whole, audio, strict=True):
        assert a["text_loss"] is None
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)


def test_a_missing_text_head_is_never_written_as_zeros(
    boson: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by an export, nor by training in full; and zeros of older exports count as no head."""
    native = write_native(tmp_path / "native", boson, lambda tensors: tensors.pop("text_lm_head.weight"))
    run_train("single", native, data_of(boson), tmp_path / "audio", text_loss_weight=0)
    with pytest.raises(UserError, match="the base checkpoint has no text head"):
        export(ExportConfig(adapter=tmp_path / "audio", out=tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    said = refused(capsys, "single", native, data_of(boson), tmp_path / "full", text_loss_weight=0, full_finetune=True)
    assert "the base checkpoint has no text head" in said
    zeros = write_native(tmp_path / "zeros", boson, lambda tensors: tensors["text_lm_head.weight"].zero_())
    assert "no text head, so text cannot" in refused(capsys, "stage1", zeros, data_of(boson), tmp_path / "out")


@pytest.mark.fast
def test_what_does_not_fit_is_listed(boson: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def damage(tensors: Tensors) -> None:
        del tensors["model.layers.1.audio_mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
        tensors["audio_lm_head.weight"] = torch.zeros(8200, 64)

    said = refused(capsys, "single", write_native(tmp_path / "m", boson, damage), data_of(boson), tmp_path / "out")
    assert "missing layers.1.audio_mlp.up_proj.weight" in said
    assert "missing norm.weight" in said
    assert "unexpected model.layers.0.mlp.extra.weight" in said
    assert "audio_lm_head.weight: expected [8208, 64], got [8200, 64]" in said
    assert "missing audio_decoder_proj.audio_lm_head" not in said


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_size": 1024}, "codebook_size"),
        ({"num_codebooks": None}, "num_codebooks"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(
    change: dict[str, int | None], message: str, boson: Path, tmp_path: Path
) -> None:
    native = write_native(tmp_path / "m", boson)
    config = json.loads((native / "config.json").read_text()) | change
    (native / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(UserError, match=message):
        read_config(native)


def test_loading_fills_the_wanted_dtype(boson: Path, tmp_path: Path) -> None:
    """Nothing stays on meta, and no float32 copy stays behind."""
    model = load_model(write_native(tmp_path / "m", boson), device=CPU, dtype=torch.bfloat16).model
    for name, value in model.state_dict().items():
        assert value.device == CPU, name
        assert value.dtype == (torch.float32 if name == "audio_codebook_weights" else torch.bfloat16), name
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_whisper_features_without_a_tower_are_refused(
    boson: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "single", boson, data_of(boson), tmp_path / "out", encode_whisper_embed=True)
    assert "no Whisper tower" in said
    assert "audio_encoder_proj" in said


def test_boson_forward_trains_alike(boson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--forward reference` through the trainer: losses, gradient norms and the adapter that comes of them.

    AdamW takes a step of full size whatever the gradient's size, so where a gradient is all but zero, its rounding
    error decides. A larger epsilon lets small gradients make small steps.
    """
    monkeypatch.setattr(optim, "AdamW", partial(AdamW, eps=1e-3))
    options = {"max_steps": 3, "learning_rate": 1e-2, "label_smoothing": 0.1, "gradient_accumulation_steps": 2}
    options |= {"tokens_per_pack": 256, "codebook_loss_weights": (1, 1, 1, 1, 1, 1, 1, 4)}
    found = [
        run_train("single", boson, data_of(boson), tmp_path / forward, forward=forward, **options)
        for forward in ("packed", "reference")
    ]
    assert_same_steps(*found, rel=1e-5)
    packed, reference = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("packed", "reference"))
    for name, value in packed.items():
        torch.testing.assert_close(value, reference[name], atol=1e-6, rtol=0)
        assert "lora_A" in name or value.abs().max() > 1e-3, name  # B begins at zero


class WithTower:
    """A checkpoint with a Whisper tower, the same samples with log-mels and with the tower's output, and their sets."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.path = folder / "model"
        write_checkpoint(self.path, tokenizer, skip_audio_tower=False, audio_encoder_config=TOWER)
        self.ids, rng = ids_of(self.path), np.random.default_rng(0)
        self.model = load_model(self.path, device=CPU, dtype=torch.float32).model
        make: dict[str, Any] = {"mel_bins": MEL_BINS, "frames": (3, 12)}
        self.mel = [random_sample(f"s{i}", rng, tokenizer, self.ids, turns=1 + i % 2, **make) for i in range(3)]
        self.encoded = [encode_features(self.model, sample) for sample in self.mel]
        self.mel_data = write_set(folder / "mel", self.mel, self.path, features="mel")
        self.encoder_data = write_set(folder / "encoder", self.encoded, self.path, features="encoder")


@torch.no_grad()
def encode_features(model: HiggsAudioModel, sample: Sample) -> Sample:
    """The tower's own output in place of each log-mel, as `--whisper_features encoder` stores it."""
    segments = [dict(segment) for segment in sample.meta["segments"]]
    featured = [segment for segment in segments if segment.get("mel_frames")]
    outputs = []
    for mel_CF, segment in zip(sample.mels, featured, strict=True):
        window = torch.from_numpy(mel_window(mel_CF).astype(np.float32))[None]
        valid = torch.arange(1500) < (segment["mel_frames"] - 1) // 2 + 1
        mask = torch.zeros(1, 1, 1500, 1500).masked_fill(~valid, -torch.inf)
        frames = tower_frames(segment["mel_frames"])
        states = model.audio_tower(window, attention_mask=mask).last_hidden_state  # pyright: ignore
        outputs.append(states[0, :frames].T.numpy().astype(np.float16))
        segment["mel_frames"] = frames
    return replace(sample, meta=sample.meta | {"segments": segments}, mels=tuple(outputs))


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerBase) -> WithTower:
    return WithTower(tmp_path_factory.mktemp("tower"), toy_tokenizer)


@torch.no_grad()
def test_stored_tower_output_stands_for_the_tower(tower: WithTower) -> None:
    """The same residual stream from log-mels through boson's tower and from the tower's stored output (float16)."""
    streams = []
    for samples, features in ((tower.mel, "mel"), (tower.encoded, "encoder")):
        batch = collate(samples, 0.0, tower.ids, features=features)
        streams.append(hidden_states(tower.model, batch)[batch["to_sequence"].long()])
        assert sum(sum(mel_positions(sample, features)) for sample in samples) > 0
    torch.testing.assert_close(streams[0], streams[1], atol=5e-3, rtol=0)
    without = [replace(sample, mels=tuple(np.zeros_like(mel) for mel in sample.mels)) for sample in tower.encoded]
    batch = collate(without, 0.0, tower.ids, features="encoder")
    changed = hidden_states(tower.model, batch)[batch["to_sequence"].long()]
    assert (changed - streams[1]).abs().max() > 0.05


def test_encoder_features_train(tower: WithTower, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command; the tower cannot be trained, nor boson's forward be used, without the tower's input."""
    options: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3}
    mel = run_train("single", tower.path, tower.mel_data, tmp_path / "mel", **options)
    stored = run_train("single", tower.path, tower.encoder_data, tmp_path / "encoder", **options)
    assert_same_steps(mel, stored, rel=5e-3)
    for flag in ({"train_audio_tower": True}, {"forward": "reference"}):
        said = refused(capsys, "single", tower.path, tower.encoder_data, tmp_path / "no", **flag)
        assert "--whisper_features mel" in said


def test_mels_train_the_tower_and_projector(tower: WithTower, tmp_path: Path) -> None:
    """In full, saved with the adapter; boson's forward gives the same steps."""
    options: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3, "encode_whisper_embed": True}
    options |= {"train_audio_tower": True, "train_audio_encoder_proj": True}
    found = [
        run_train("single", tower.path, tower.mel_data, tmp_path / forward, forward=forward, **options)
        for forward in ("packed", "reference")
    ]
    assert_same_steps(*found, rel=2e-5)
    saved = load_file(tmp_path / "packed" / "adapter_model.safetensors")
    start = load_file(tower.path / "model.safetensors")
    full = {name.removeprefix("base_model.model."): value for name, value in saved.items() if "lora" not in name}
    assert {name.split(".")[0] for name in full} == {"audio_tower", "audio_encoder_proj"}
    assert all((full[name] - start[name]).abs().max() > 1e-5 for name in full if name.endswith("weight"))


def test_set_without_features_is_refused(tower: WithTower, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_set(tmp_path / "data", [replace(sample, mels=()) for sample in no_mels(tower.mel)], tower.path)
    said = refused(capsys, "single", tower.path, data, tmp_path / "out")
    assert "do not all have its features" in said


def no_mels(samples: list[Sample]) -> list[Sample]:
    return [
        replace(
            s,
            meta=s.meta | {"segments": [{k: v for k, v in g.items() if k != "mel_frames"} for g in s.meta["segments"]]},
        )
        for s in samples
    ]

"""Nothing is lost between stage 1, stage 2, a further run, plain PEFT on boson's class, and the merged checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.samples import random_sample
from helpers.tiny import ids_of, run_train, write_checkpoint, write_set
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.train.data.batch import collate
from higgs_tune.train.export.merge import ExportConfig, export, load_adapter, main
from higgs_tune.train.model.forward import hidden_states
from higgs_tune.train.model.load import HiggsAudioConfig, HiggsAudioModel, load_model
from higgs_tune.train.model.reference import boson_inputs
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

# what stage 1 is given, and what stage 2 is given on top
VARIANTS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "lora": ({}, {}),
    "rslora": ({"use_rslora": True, "lora_r": 4}, {}),
    "dora": ({"use_dora": True, "lora_alpha": 3}, {}),
    "in full": ({"train_heads": True}, {"train_heads": True, "train_audio_embeddings": True}),
    "norms and embeddings": (
        {"train_norms": True, "train_text_embeddings": True},
        {"train_norms": True, "train_audio_head": True},
    ),
    "lora on heads": ({"lora_extra": ("heads",)}, {"lora_extra": ("heads",)}),
    "attention": ({}, {"use_audio_out_self_attention": True}),
    "everything": (
        {"use_dora": True, "use_rslora": True},
        {"train_heads": True, "train_audio_embeddings": True, "use_audio_out_self_attention": True},
    ),
}
STEADY = {"lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 1e-2, "head_learning_rate": 1e-2}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """A base checkpoint, and a set that fits into one pack."""

    base: Path
    data: Path
    samples: list[Sample]
    ids: SpecialIds


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerBase) -> Place:
    folder, rng = tmp_path_factory.mktemp("handover"), np.random.default_rng(0)
    base = folder / "base"
    write_checkpoint(base, toy_tokenizer)
    ids = ids_of(base)
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids, frames=(3, 12), turns=1 + i % 2) for i in range(3)]
    return Place(base, write_set(folder / "data", samples, base), samples, ids)


@dataclass(frozen=True)
class Stages:
    """Output folders of stage 1 and stage 2, and whether audio self-attention was added."""

    one: Path
    two: Path
    attention: bool


@pytest.fixture(scope="module", params=VARIANTS)
def stages(request: pytest.FixtureRequest, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    folder, (first, second) = tmp_path_factory.mktemp("stages"), VARIANTS[request.param]
    run_train("stage1", place.base, place.data, folder / "1", max_steps=2, **STEADY, **first)
    run_train("stage2", folder / "1", place.data, folder / "2", max_steps=3, **STEADY, **second)
    return Stages(folder / "1", folder / "2", "use_audio_out_self_attention" in second)


@torch.no_grad()
def packed_logits(model: HiggsAudioModel, place: Place) -> torch.Tensor:
    """Text and audio logits [N, V + 8 * 1026] of our forward, in sequence order."""
    batch = collate(place.samples, 0.0, place.ids)
    hidden = model.norm(hidden_states(model, batch))[batch["to_sequence"].long()]
    heads = model.audio_decoder_proj
    return torch.cat([heads.text_lm_head(hidden), heads.audio_lm_head(hidden)], dim=1)


@torch.no_grad()
def boson_logits(model: torch.nn.Module, place: Place, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text logits of every position, and audio logits of the output positions, by boson's own forward."""
    out = model.eval()(**boson_inputs(place.samples, place.ids, pad))
    lengths = collate(place.samples, 0.0, place.ids).lengths
    return torch.cat([out.logits[i, :length] for i, length in enumerate(lengths)]), out.audio_logits.flatten(1)


def assert_equal(packed: torch.Tensor, boson: tuple[torch.Tensor, torch.Tensor], place: Place) -> None:
    text, audio = boson
    at = [
        torch.arange(start, start + width) + offset
        for sample, offset in zip(place.samples, offsets(place), strict=True)
        for start, width, is_out in expanded(sample, place)
        if is_out
    ]
    torch.testing.assert_close(packed[:, : text.shape[1]], text, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed[torch.cat(at), text.shape[1] :], audio, atol=1e-5, rtol=0)


def expanded(sample: Sample, place: Place) -> list[tuple[int, int, bool]]:
    from higgs_tune.shards.sequence import expand

    return expand([sample], place.ids).segments


def offsets(place: Place) -> list[int]:
    return np.cumsum([0, *collate(place.samples, 0.0, place.ids).lengths])[:-1].tolist()


def plain_peft(base: Path, adapter: Path, *, attention: bool) -> PeftModel:
    """What docs/training_signal.md tells users of plain PEFT to do."""
    config = HiggsAudioConfig.from_pretrained(base)
    config.use_audio_out_self_attention = attention
    model = HiggsAudioModel.from_pretrained(base, config=config)
    return PeftModel.from_pretrained(model, str(adapter))  # pyright: ignore[reportArgumentType]


def test_adapter_loads_by_plain_peft(place: Place, stages: Stages) -> None:
    """Our loader and our forward, against plain PEFT on boson's class and forward; the adapter has an effect."""
    base = load_model(place.base, device=CPU, dtype=torch.float32).model
    for folder, attention in ((stages.one, False), (stages.two, stages.attention)):
        ours = packed_logits(load_adapter(folder, device=CPU, dtype=torch.float32).get_base_model(), place)  # pyright: ignore[reportArgumentType]
        tuned = plain_peft(place.base, folder, attention=attention)
        assert_equal(ours, boson_logits(tuned, place, base.config.pad_token_id), place)
        assert (ours - packed_logits(base, place)).abs().max() > 0.05


def test_merged_checkpoint_has_the_same_logits(place: Place, stages: Stages, tmp_path: Path) -> None:
    """The merged checkpoint, by our loader and by boson's `from_pretrained`, without PEFT."""
    adapted = load_adapter(stages.two, device=CPU, dtype=torch.float32)
    before = packed_logits(adapted.get_base_model(), place)  # pyright: ignore[reportArgumentType]
    export(ExportConfig(adapter=stages.two, out=tmp_path / "merged", dtype="float32"))
    merged = load_model(tmp_path / "merged", device=CPU, dtype=torch.float32).model
    torch.testing.assert_close(packed_logits(merged, place), before, atol=2e-5, rtol=0)
    read: Any = HiggsAudioModel.from_pretrained
    theirs, problems = read(tmp_path / "merged", output_loading_info=True)
    assert problems["missing_keys"] == problems["unexpected_keys"] == []
    assert_equal(packed_logits(merged, place), boson_logits(theirs, place, merged.config.pad_token_id), place)
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (place.base / "tokenizer.json").read_bytes()


def test_a_further_run_begins_where_stage2_ended(place: Place, stages: Stages, tmp_path: Path) -> None:
    """From the adapter, and from the merged checkpoint: the first loss is that of the trained weights."""
    further = run_train("stage2", stages.two, place.data, tmp_path / "more", learning_rate=1e-30)
    export(ExportConfig(adapter=stages.two, out=tmp_path / "merged", dtype="float32"))
    merged = run_train("single", tmp_path / "merged", place.data, tmp_path / "again", learning_rate=1e-30)
    names = ("loss", "text_loss", "audio_loss")
    assert [further[0][n] for n in names] == pytest.approx([merged[0][n] for n in names], rel=1e-5)
    untuned = run_train("single", place.base, place.data, tmp_path / "base", learning_rate=1e-30)
    assert further[0]["loss"] < untuned[0]["loss"] - 0.05
    before, after = (load_file(f / "adapter_model.safetensors") for f in (stages.two, tmp_path / "more"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_full_finetuning_begins_with_the_merged_adapter(
    stage: str, place: Place, stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first losses are those of LoRA that goes on from the same adapter."""
    further = run_train(stage, stages.two, place.data, tmp_path / "lora", learning_rate=1e-30)
    capsys.readouterr()
    full = run_train(stage, stages.two, place.data, tmp_path / "full", full_finetune=True, learning_rate=1e-30)
    assert f"merged the adapter {stages.two} into its base" in capsys.readouterr().out
    names = ("text_loss",) if stage == "stage1" else ("text_loss", "audio_loss")
    assert [full[0][n] for n in names] == pytest.approx([further[0][n] for n in names], rel=1e-5)


@pytest.mark.parametrize("variant", ["lora", "everything"])
def test_two_runs_take_the_steps_of_one(variant: str, place: Place, tmp_path: Path) -> None:
    """Two steps and a hand-over: the next loss is that of the third step of one run. AdamW's state starts anew."""
    options = STEADY | VARIANTS[variant][0] | VARIANTS[variant][1]
    whole = run_train("single", place.base, place.data, tmp_path / "whole", max_steps=3, **options)
    run_train("single", place.base, place.data, tmp_path / "half", max_steps=2, **options)
    rest = run_train("stage2", tmp_path / "half", place.data, tmp_path / "rest", **STEADY)
    assert rest[0]["loss"] == pytest.approx(whole[2]["loss"], rel=1e-5)
    assert rest[0]["grad_norm"] == pytest.approx(whole[2]["grad_norm"], rel=1e-4)
    assert abs(whole[2]["loss"] - whole[1]["loss"]) > 1e-3


@pytest.mark.fast
def test_added_self_attention_changes_no_logit(place: Place) -> None:
    before, after = (
        load_model(place.base, device=CPU, dtype=torch.float32, audio_attention=wanted) for wanted in (False, True)
    )
    assert after.new_audio_attention
    expected = packed_logits(before.model, place)
    torch.testing.assert_close(packed_logits(after.model, place), expected, atol=1e-5, rtol=0)
    assert_equal(expected, boson_logits(after.model, place, after.model.config.pad_token_id), place)
    after.model.layers[0].audio_attn.o_proj.weight.fill_(0.1)  # pyright: ignore
    assert (packed_logits(after.model, place) - expected).abs().max() > 1e-3


def test_added_modules_train_in_full_at_their_own_rate(place: Place, tmp_path: Path) -> None:
    attention, new = {"use_audio_out_self_attention": True, "max_steps": 3}, "new_module_learning_rate"
    rates = {"fast": {new: 1e-2, "learning_rate": 1e-30}, "still": {new: 1e-30, "learning_rate": 1e-2}}
    for name, rate in rates.items():
        run_train("single", place.base, place.data, tmp_path / name, **(STEADY | attention | rate))
    start = load_model(place.base, device=CPU, dtype=torch.float32, audio_attention=True).model.state_dict()
    for name in rates:
        moved: dict[str, bool] = {}
        for key, value in load_file(tmp_path / name / "adapter_model.safetensors").items():
            own = key.removeprefix("base_model.model.")
            if own in start:
                moved[own] = bool((value - start[own]).abs().max() > 1e-3)
        parts = ("q_proj", "k_proj", "v_proj", "o_proj")
        expected = {f"layers.{i}.audio_attn.{part}.weight" for i in range(2) for part in parts}
        expected |= {f"layers.{i}.audio_post_audio_attn_layer_norm.weight" for i in range(2)}
        assert moved.keys() == expected
        assert set(moved.values()) == {name == "fast"}
    listed = json.loads((tmp_path / "fast" / "trainable.json").read_text())
    full = {entry["module"]: entry["shape"] for entry in listed if "lora" not in entry["module"]}
    assert len(full) == 2 * 5
    assert sum(entry["count"] for entry in listed) == sum(int(np.prod(entry["shape"])) for entry in listed)


def test_heads_and_embeddings_are_in_the_adapter(place: Place, tmp_path: Path) -> None:
    full = {"train_heads": True, "train_audio_embeddings": True, "max_steps": 2}
    run_train("single", place.base, place.data, tmp_path, **STEADY, **full)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    start = load_file(place.base / "model.safetensors")
    names = ("audio_decoder_proj.text_lm_head", "audio_decoder_proj.audio_lm_head", "audio_codebook_embeddings")
    for name in (f"{name}.weight" for name in names):
        assert (saved[f"base_model.model.{name}"] - start[name]).abs().max() > 1e-3


@pytest.mark.fast
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lora_r": 5}, "--lora_r differs from the adapter's"),
        ({"use_dora": True}, "--use_dora differs from the adapter's"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    option: dict[str, object], message: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_train("stage1", place.base, place.data, tmp_path / "1")
    with pytest.raises(SystemExit) as exit_info:
        run_train("stage2", tmp_path / "1", place.data, tmp_path / "2", **option)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_another_base_can_be_given(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the trainer and to the export, where the one that the adapter names has moved; through the commands."""
    shutil.copytree(place.base, tmp_path / "base")
    run_train("stage1", tmp_path / "base", place.data, tmp_path / "1", max_steps=2, **STEADY)
    config = json.loads((tmp_path / "1" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../base"
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    monkeypatch.setattr("sys.argv", ["higgs-export", str(tmp_path / "1"), "--out", str(tmp_path / "merged")])
    for command in (main, lambda: run_train("stage2", tmp_path / "1", place.data, tmp_path / "2")):
        with pytest.raises(SystemExit) as exit_info:
            command()
        assert exit_info.value.code == 2
        assert "the adapter's base checkpoint is not there" in capsys.readouterr().err
    run_train("stage2", tmp_path / "1", place.data, tmp_path / "2", base_model=moved)
    assert json.loads((tmp_path / "2" / "adapter_config.json").read_text())["base_model_name_or_path"] == "../moved"
    monkeypatch.setattr("sys.argv", [*sys.argv, "--base", str(moved)])
    main()
    assert (tmp_path / "merged" / "config.json").is_file()


def test_export_refuses_what_is_no_adapter(place: Place, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter here"):
        export(ExportConfig(adapter=place.base, out=tmp_path / "merged"))
    with pytest.raises(UserError, match="exists already"):
        export(ExportConfig(adapter=place.base, out=tmp_path))

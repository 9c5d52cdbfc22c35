"""What trains: presets and patterns by stage, against lists written out by hand; through the command."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from helpers.samples import random_sample
from helpers.tiny import ids_of, run_on_one_sample, run_train, tiny_config, write_checkpoint, write_set
from higgs_tune.shards.errors import UserError
from higgs_tune.train.config import all_options
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.lora import TrainableOptions, add_lora, base_only, target_modules, trainable
from higgs_tune.train.presets import PRESETS, preset_help
from higgs_tune.train.toy import make_model
from transformers import PreTrainedTokenizerBase

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
TEXT_FFN = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
AUDIO_FFN = {f"audio_{name}" for name in TEXT_FFN}
EXPECTED = {
    ("comprehensive", "stage1"): ATTENTION | TEXT_FFN,
    ("comprehensive", "stage2"): ATTENTION | TEXT_FFN | AUDIO_FFN,
    ("text_only", "stage1"): ATTENTION | TEXT_FFN,
    ("text_only", "stage2"): ATTENTION | TEXT_FFN,
    ("audio_focused", "stage1"): ATTENTION,
    ("audio_focused", "stage2"): ATTENTION | AUDIO_FFN,
    ("attention_only", "stage1"): ATTENTION,
    ("attention_only", "stage2"): ATTENTION,
}


@pytest.fixture(scope="module")
def model(toy_tokenizer: PreTrainedTokenizerBase) -> HiggsAudioModel:
    """One dual layer, and one that audio passes by."""
    return make_model(tiny_config(toy_tokenizer, audio_dual_ffn_layers=[1], use_audio_out_self_attention=True), 0)


@pytest.mark.fast
@pytest.mark.parametrize(("preset", "stage"), EXPECTED)
def test_presets(preset: str, stage: str, model: HiggsAudioModel) -> None:
    parts = EXPECTED[preset, stage]
    wanted = {f"layers.{i}.{part}" for i in range(2) for part in parts if i == 1 or part not in AUDIO_FFN}
    assert set(target_modules(model, TrainableOptions(preset=preset), stage)) == wanted  # pyright: ignore
    assert {name for name, _ in EXPECTED} == PRESETS.keys()


@pytest.mark.fast
def test_choices_help_and_docs_follow_from_the_presets() -> None:
    option = next(option for option in all_options() if option.name == "lora_preset")
    assert [get_args(choice) for choice in option.choices if choice is not type(None)] == [tuple(PRESETS)]
    assert all(f"{name}: {preset.summary}" in preset_help() for name, preset in PRESETS.items())
    docs = (Path(__file__).parents[1] / "docs" / "training_signal.md").read_text()
    table = docs.partition("| `--lora_preset` | LoRA on |\n|---|---|\n")[2].partition("\n\n")[0]
    assert table.splitlines() == [f"| `{name}` | {preset.summary} |" for name, preset in PRESETS.items()]


def test_base_only_leaves_what_trains_as_it_was(model: HiggsAudioModel, tmp_path: Path) -> None:
    """Also when the block raises."""
    peft_model = add_lora(copy.deepcopy(model), TrainableOptions(r=2, heads=True), "stage1", tmp_path, None)
    before = trainable(peft_model).keys()
    with pytest.raises(KeyError), base_only(peft_model):
        raise KeyError
    assert trainable(peft_model).keys() == before


@pytest.mark.fast
def test_patterns_match_whole_names(model: HiggsAudioModel) -> None:
    def targets(pattern: str, stage: str = "single") -> list[str]:
        return target_modules(model, TrainableOptions(pattern=pattern), stage)  # pyright: ignore

    assert targets(r"layers\.1\.self_attn\.[qv]_proj") == ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]
    assert targets(r".*mlp\.down_proj", "stage1") == ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]
    for pattern, stage in (("q_proj", "single"), (r".*audio_mlp.*", "stage1"), (r"layers\.\d+", "single")):
        with pytest.raises(UserError, match="leaves nothing to train"):
            targets(pattern, stage)
    with pytest.raises(UserError, match="not a regular expression"):
        targets("(")


def test_what_trains_is_printed_and_saved(
    toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "model", toy_tokenizer)
    sample = random_sample("s", np.random.default_rng(0), toy_tokenizer, ids_of(tmp_path / "model"))
    data = write_set(tmp_path / "data", [sample], tmp_path / "model")
    pattern = r"layers\.1\.audio_mlp\.up_proj"
    run_train("single", tmp_path / "model", data, tmp_path / "out", lora_target_modules=pattern, lora_r=4)
    listed = json.loads((tmp_path / "out" / "trainable.json").read_text())
    name = "layers.1.audio_mlp.up_proj.lora_{}.default.weight"
    assert listed == [
        {"module": name.format("A"), "shape": [4, 64], "count": 256},
        {"module": name.format("B"), "shape": [96, 4], "count": 384},
    ]
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["layers.*.audio_mlp.up_proj.lora_A.default.weight", "[4,", "64]", "x1", "256"] in said


@pytest.mark.parametrize(
    ("stage", "option", "message"),
    [
        ("stage1", {"train_audio_embeddings": True}, "freezes every audio parameter"),
        ("stage1", {"use_audio_out_self_attention": True}, "freezes every audio parameter"),
        ("stage1", {"text_loss_weight": 0}, "every loss of stage1 has weight 0"),
        ("single", {"text_loss_weight": 0, "audio_loss_weight": 0}, "every loss of single has weight 0"),
        ("single", {"codebook_loss_weights": (1, 2)}, "codebook_loss_weights has a wrong length, expected 8, got 2"),
    ],
)
def test_options_that_train_nothing_are_refused(
    stage: str,
    option: dict[str, object],
    message: str,
    toy_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_on_one_sample(stage, tmp_path, toy_tokenizer, **option)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err

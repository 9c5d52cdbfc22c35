"""The command line and YAML files as people write them: a file means what it says, mistakes are named at once.

The reference is PyYAML's own reading of the file and the command line's reading of the same values.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import EXAMPLES, preprocess
from helpers.build_set import build_set
from helpers.samples import random_sample
from helpers.tiny import ids_of, run_train, write_checkpoint, write_set
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.format import Sample
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.train.arguments import ELSEWHERE, parse_arguments
from higgs_tune.train.config import TrainConfig, all_options
from transformers import PreTrainedTokenizerBase

REST = ["--training_stage", "single", "--model_path", "M", "--train_data_dir", "S", "--output_dir", "O"]


def from_yaml(tmp_path: Path, text: str, rest: list[str] = REST) -> TrainConfig:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode())
    return parse_arguments(["--config", str(path), *rest])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("save_total_limit: null", "save_total_limit", None),
        ("save_total_limit: ~", "save_total_limit", None),
        ("save_total_limit:", "save_total_limit", None),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 1e+2", "learning_rate", 100.0),
        ("weight_decay: .01", "weight_decay", 0.01),
        ("compile: off", "compile", False),
        ('compile: "false"', "compile", False),
        ("compile: 'Yes'", "compile", True),
        ("use_dora: on", "use_dora", True),
        ("lora_target_modules: [q_proj, v_proj]", "lora_target_modules", ("q_proj", "v_proj")),
        ("lora_target_modules: q_proj", "lora_target_modules", ("q_proj",)),
        ("codebook_loss_weights: [1, 2.5]", "codebook_loss_weights", (1.0, 2.5)),
        ("report_to: []", "report_to", ()),
        ("report_to: none", "report_to", ("none",)),
        ("report_to: [tensorboard, wandb]", "report_to", ("tensorboard", "wandb")),
        ("\ufeffseed: 7\r", "seed", 7),
        ("save-steps: 9", "save_steps", 9),
        ("cache_dir: ~/x", "cache_dir", Path.home() / "x"),
    ],
)
def test_a_file_means_what_it_says(tmp_path: Path, text: str, name: str, expected: Any) -> None:
    config = from_yaml(tmp_path, text)
    (option,) = [option for option in all_options() if option.name == name]
    assert option.value_in(config) == expected


def test_home_folders_are_expanded_everywhere(tmp_path: Path) -> None:
    text = "output_dir: ~/out\nmodel_path: ~/m\ntrain_data_dir: [~/a, s3://b/~c]\ntraining_stage: single"
    config = from_yaml(tmp_path, text, [])
    assert (config.output_dir, config.model_path) == (Path.home() / "out", Path.home() / "m")
    assert config.train_data_dir == (str(Path.home() / "a"), "s3://b/~c")
    flags = [*REST[:-2], "--output_dir=~/out"]
    assert parse_arguments(flags).output_dir == Path.home() / "out"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 1\nmax_steps: 2", "given twice: max_steps"),
        ("max-steps: 1\nmax_steps: 2", "given twice"),
        ("learning_rate: null", "learning_rate cannot be null"),
        ("compile: 3", "compile is a switch"),
        ("learning_rate: [1, 2]", "learning_rate takes one value"),
        ("no_compile: true", "no_compile is a switch of the command line only"),
        ("max_grad_norm: -1", "--max_grad_norm is out of range"),
        ("per_device_train_batch_size: 2", "--tokens_per_pack"),
        ("lora_rank: 8", "Here it is --lora_r"),
        ("lora_target_modules: all-linear", "--lora_preset comprehensive"),
        ("val_by: speaker", "--val_by needs --val_fraction"),
        ("forward: reference\ncontrastive_loss_weight: 0.1", "--forward reference has no contrastive loss"),
        ("forward: reference\ntrain_on_reference: true", "--forward reference cannot --train_on_reference"),
        ("report_to: [none, wandb]", "none stands alone"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_yaml(tmp_path, text)


@pytest.mark.parametrize("flag", ["--per_device_train_batch_size=2", "--per-device-train-batch-size", "--bf16"])
def test_flags_of_other_trainers_get_a_hint(flag: str) -> None:
    with pytest.raises(UserError, match="unknown option") as refused:
        parse_arguments([*REST, flag])
    assert any(hint in str(refused.value) for hint in ELSEWHERE.values())


def test_hints_name_only_options_that_exist() -> None:
    known = {option.name for option in all_options()}
    assert not known & ELSEWHERE.keys()
    for hint in ELSEWHERE.values():
        named = [word.strip(".,:;") for word in hint.split() if word.startswith("--")]
        assert {name.removeprefix("--") for name in named} <= known


@pytest.mark.fast
def test_every_option_survives_its_own_file(tmp_path: Path) -> None:
    """config.yaml of a run with every option away from its default gives the same options."""
    config = parse_arguments([*REST, "--save_total_limit", "None", "--mix_weights", "2", "--report_to", "--no-debug"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"options": config.plain()}))
    assert parse_arguments(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("by", ["sample", "speaker"])
def test_the_trainer_holds_out_what_preprocessing_would_have(tmp_path: Path, toy: Path, by: Any) -> None:
    rows = json.loads(EXAMPLES.read_text())
    for row in rows:
        for message in row["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else ():
                if part["type"] == "audio":
                    part["audio_url"] = str(EXAMPLES.parent / part["audio_url"])
    (tmp_path / "few.json").write_text(json.dumps(rows[::3]))
    held = {"val_fraction": 0.3, "val_by": by}
    preprocess(toy, tmp_path / "few.json", tmp_path / "with", **held)
    preprocess(toy, tmp_path / "few.json", tmp_path / "without", val_fraction=0.0)
    with_split, without = ShardSet(tmp_path / "with"), ShardSet(tmp_path / "without")
    assert not len(without.rows_of(validation=True))
    without.hold_out(ValidationSplit(0.3, by))
    expected = with_split.rows_of(validation=True).tolist()
    assert 0 < len(expected) < len(with_split)
    assert without.rows_of(validation=True).tolist() == expected


def test_holding_out_leaves_a_sample_on_both_sides(tmp_path: Path) -> None:
    build_set(tmp_path / "set", shards=1)
    shards = ShardSet(tmp_path / "set")
    for fraction, count in ((1e-9, 1), (0.999999, len(shards) - 1), (0.0, 0)):
        shards.hold_out(ValidationSplit(fraction))
        assert len(shards.rows_of(validation=True)) == count
    shards.manifest["speakers"] = [""]
    with pytest.raises(UserError, match="too few speakers"):
        shards.hold_out(ValidationSplit(0.5, "speaker"))


def textless(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """The sample with no label but those of special tokens, as where the answer is audio alone."""
    tokens_2L = sample.tokens_2L.copy()
    special = list({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    tokens_2L[1][~np.isin(tokens_2L[1], special)] = -100
    return replace(sample, tokens_2L=tokens_2L)


def test_stage1_refuses_answers_of_audio_alone(
    tmp_path: Path, toy_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    write_checkpoint(model, toy_tokenizer)
    rng, ids = np.random.default_rng(0), ids_of(model)
    samples = [random_sample(f"{number:09d}", rng, toy_tokenizer, ids) for number in range(4)]
    write_set(tmp_path / "text", samples, model)
    write_set(tmp_path / "audio", [textless(sample, toy_tokenizer) for sample in samples], model)
    options = {"max_steps": 1, "skip_alignment_check": True, "eval_steps": 0}
    run_train("stage1", model, tmp_path / "text", tmp_path / "1", **options)
    with pytest.raises(SystemExit) as refused:
        run_train("stage1", model, tmp_path / "audio", tmp_path / "2", **options)
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert "stage1 has no text to train on: in 4 of 4 samples" in said
    assert "--training_stage single" in said
    assert not (tmp_path / "2").exists()
    run_train("stage1", model, tmp_path / "audio", tmp_path / "3", allow_textless_stage1=True, **options)

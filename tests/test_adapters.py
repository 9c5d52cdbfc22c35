"""Adapters, from this trainer and others: LoRA where it was asked for, every tensor used, the base found again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import tiny_config
from higgs_tune.preprocess.checkpoints.hub import CHECKPOINT_FILES
from higgs_tune.shards.errors import UserError
from higgs_tune.train.model import base as base_module
from higgs_tune.train.model.adapter import (
    PREFIX,
    adapter_state,
    apply_adapter,
    merge_adapter,
    read_adapter,
    read_adapter_config,
)
from higgs_tune.train.model.base import base_reference, resolve_model
from higgs_tune.train.model.load import HiggsAudioModel, load_model
from higgs_tune.train.model.lora import TrainableOptions, add_lora, target_modules, trainable
from higgs_tune.train.model.module_names import exact_pattern
from higgs_tune.train.toy import make_model, tower_changes
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

CPU = torch.device("cpu")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(toy_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base checkpoint with a Whisper tower, whose layers are called as the decoder's are."""
    folder = tmp_path_factory.mktemp("base") / "model"
    config = tiny_config(toy_tokenizer, use_audio_out_embed_projector=True, **tower_changes())
    make_model(config, 0).save_pretrained(folder)
    toy_tokenizer.save_pretrained(folder)
    return folder


def fresh(base: Path) -> HiggsAudioModel:
    return load_model(base, device=CPU, dtype=torch.float32).model


def adapted(model: nn.Module) -> set[str]:
    """Modules with LoRA, by the names of their parameters."""
    names = (name.removeprefix(PREFIX) for name, _ in model.named_parameters())
    return {name.partition(".lora_A")[0] for name in names if ".lora_A" in name}


def foreign(base: Path, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Write an adapter as another trainer does, by plain PEFT; returns the weights of PEFT's own merge."""
    torch.manual_seed(0)
    given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
    peft_model: Any = get_peft_model(fresh(base), LoraConfig(**given))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    peft_model.peft_config["default"].base_model_name_or_path = str(base)
    peft_model.save_pretrained(folder, save_embedding_layers=False)  # boson's class does not name its own
    return peft_model.merge_and_unload().state_dict()


def assert_same_weights(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, atol=1e-6, rtol=0)


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | values
    (folder / CONFIG).write_text(json.dumps(config))


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    """Rename the tensors of an adapter; None drops one."""
    weights = {change(name): value for name, value in load_file(folder / WEIGHTS).items()}
    save_file({name: value for name, value in weights.items() if name}, folder / WEIGHTS)


@pytest.mark.fast
@pytest.mark.parametrize(("preset", "stage"), [("comprehensive", "single"), ("attention_only", "stage1")])
def test_lora_is_on_the_wanted_modules_and_no_others(preset: str, stage: Any, base: Path, tmp_path: Path) -> None:
    """In our model, and where plain PEFT loads the stored adapter on boson's class."""
    options = TrainableOptions(r=2, preset=preset, features="mel")
    wanted = set(target_modules(fresh(base), options, stage))
    assert not [name for name in wanted if "audio_tower" in name]
    peft_model = add_lora(fresh(base), options, stage, base, None)
    assert adapted(peft_model) == wanted
    assert {name.removeprefix(PREFIX).partition(".lora_")[0] for name in trainable(peft_model)} == wanted
    peft_model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(fresh(base), str(tmp_path))  # pyright: ignore[reportArgumentType]
    assert adapted(loaded) == wanted


@pytest.mark.fast
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_exact_pattern_matches_its_names_alone(data: st.DataObject) -> None:
    parts = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "audio_mlp.up_proj"]
    names = [f"{owner}layers.{i}.{part}" for owner in ("", "audio_tower.") for i in (0, 1, 2, 11) for part in parts]
    names += ["audio_decoder_proj.text_lm_head", "audio_encoder_proj.linear", "linear"]
    chosen = data.draw(st.sets(st.sampled_from(names), min_size=1))
    pattern = exact_pattern(sorted(chosen))
    assert {name for name in names if re.fullmatch(pattern, name)} == chosen


def lacks(*parts: str) -> Callable[[str], str | None]:
    return lambda name: None if any(part in name for part in parts) else name


ELSEWHERE: dict[str, dict[str, Any]] = {
    "names": {},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 64, r"layers\.0\.self_attn\.q_proj": 1}},
    "rank_pattern": {"rank_pattern": {"v_proj": 2, "^layers.1.self_attn.q_proj": 6}},
    "every layer": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "heads": {"target_modules": ["text_lm_head", "audio_lm_head", "audio_out_embed_projector", "linear"]},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "regex": {"target_modules": r".*self_attn\.(q|v)_proj"},
    "excluded": {"exclude_modules": r"audio_tower\..*"},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embeddings and norms": {"modules_to_save": ["embed_tokens", "audio_codebook_embeddings", "norm"]},
    "saved ffn": {"modules_to_save": ["mlp"]},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_adapters_of_other_trainers_are_read_as_peft_reads_them(kind: str, base: Path, tmp_path: Path) -> None:
    """Merged, and continued: the same weights as PEFT's own merge; the adapter has an effect."""
    options = ELSEWHERE[kind]
    expected = foreign(base, tmp_path / "adapter", **options)
    model = fresh(base)
    assert max(float((value - expected[name]).abs().max()) for name, value in model.state_dict().items()) > 1e-2
    merge_adapter(model, read_adapter(tmp_path / "adapter"))
    assert_same_weights(model, expected)
    dora, rslora = options.get("use_dora", False), options.get("use_rslora", False)
    wanted = TrainableOptions(r=4, alpha=8, features="mel", dora=dora, rslora=rslora, preset="attention_only")
    continued: Any = add_lora(fresh(base), wanted, "stage2", base, tmp_path / "adapter")
    assert_same_weights(continued.merge_and_unload(), expected)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_merged_and_refused_for_training(bias: str, base: Path, tmp_path: Path) -> None:
    """The only biases are the tower's."""
    expected = foreign(base, tmp_path, bias=bias)
    model = fresh(base)
    merge_adapter(model, read_adapter(tmp_path))
    assert_same_weights(model, expected)
    with pytest.raises(UserError, match=r"trains biases cannot be trained on .*expected bias: none"):
        add_lora(fresh(base), TrainableOptions(r=4, alpha=8), "stage2", base, tmp_path)


def test_lora_on_embeddings_is_merged_and_refused_for_training(base: Path, tmp_path: Path) -> None:
    expected = foreign(base, tmp_path, target_modules=["embed_tokens", "q_proj"])
    model = fresh(base)
    merge_adapter(model, read_adapter(tmp_path))
    assert_same_weights(model, expected)
    with pytest.raises(UserError, match=r"only LoRA on linear layers can be trained on .*embed_tokens"):
        add_lora(fresh(base), TrainableOptions(r=4, alpha=8), "stage2", base, tmp_path)


NAMES: dict[str, Callable[[str], str]] = {
    "wrapped twice": lambda name: f"{PREFIX}{name}",
    "bare": lambda name: name.removeprefix(PREFIX),
    "ddp": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "adapter's name": lambda name: re.sub(r"(lora_[AB])", r"\1.default", name),
    "native": lambda name: name.replace(f"{PREFIX}layers", f"{PREFIX}model.layers"),
}


@pytest.mark.fast
@pytest.mark.parametrize("form", NAMES)
def test_known_forms_of_tensor_names_are_mapped(form: str, base: Path, tmp_path: Path) -> None:
    expected = foreign(base, tmp_path)
    rename(tmp_path, NAMES[form])
    model = fresh(base)
    merge_adapter(model, read_adapter(tmp_path))
    assert_same_weights(model, expected)


def test_an_adapter_of_the_native_class_is_told_in_bosons_names(base: Path, tmp_path: Path) -> None:
    """transformers' class has `model.` before its layers, in tensor names and in patterns."""
    expected = foreign(base, tmp_path, target_modules=r"layers\.\d+\.(mlp|audio_mlp)\.up_proj")
    rename(tmp_path, NAMES["native"])
    change_config(tmp_path, target_modules=r"model\.layers\.\d+\.(mlp|audio_mlp)\.up_proj")
    model = fresh(base)
    merge_adapter(model, read_adapter(tmp_path))
    assert_same_weights(model, expected)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_adapters_in_half_precision_are_read(name: str, base: Path, tmp_path: Path) -> None:
    expected = foreign(base, tmp_path)
    weights = {key: value.to(getattr(torch, name)) for key, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(weights, tmp_path / WEIGHTS)
    model = fresh(base)
    merge_adapter(model, read_adapter(tmp_path))
    for key, value in expected.items():
        torch.testing.assert_close(model.state_dict()[key], value, atol=1e-2, rtol=0)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "half": (lambda f: rename(f, lacks(".layers.1.")), r": 8 missing \(.*and 5 more\)"),
    "one tensor lost": (lambda f: rename(f, lacks("layers.1.self_attn.q_proj.lora_B")), r": 2 missing \("),
    "b matrices lost": (lambda f: rename(f, lacks("lora_B")), "missing"),
    "other names": (lambda f: rename(f, lambda n: n.replace("self_attn", "attention")), "missing .*; .* unexpected"),
    "other modules": (lambda f: change_config(f, target_modules=["k_proj"]), "missing .*; .* unexpected"),
    "other rank": (lambda f: change_config(f, r=2), r"other shapes: .*expected \[2, "),
    "nothing to adapt": (
        lambda f: change_config(f, target_modules=["qkv"]),
        "PEFT cannot adapt the model|16 unexpected",
    ),
    "pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), r"pickles are not read .*weights_only=True"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "cannot read the adapter"),
    "cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-10]), "cannot read the adapter"),
    "token indices": (lambda f: change_config(f, trainable_token_indices=[1, 2]), r"trainable_token_indices: \[1, 2\]"),
    "lora bias": (lambda f: change_config(f, lora_bias=True), "not supported .*lora_bias: True"),
    "pissa": (lambda f: change_config(f, init_lora_weights="pissa"), "not supported .*init_lora_weights: 'pissa'"),
    "another method": (lambda f: change_config(f, peft_type="IA3"), "not a LoRA adapter"),
    "broken config": (lambda f: (f / CONFIG).write_text("{"), "not JSON"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(kind: str, base: Path, tmp_path: Path) -> None:
    """For merging and for training on."""
    damage, message = REFUSED[kind]
    foreign(base, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=f"(?s){message}"):
        merge_adapter(fresh(base), read_adapter(tmp_path))
    with pytest.raises(UserError, match=f"(?s){message}"):
        add_lora(fresh(base), TrainableOptions(r=2 if kind == "other rank" else 4), "stage2", base, tmp_path)


def test_options_of_a_newer_peft_are_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are unset mean nothing; others are ignored, as PEFT ignores them, but not silently."""
    foreign(base, tmp_path)
    change_config(tmp_path, quantum_config={"x": 1}, use_other=None)
    assert read_adapter_config(tmp_path)
    said = capsys.readouterr().err
    assert "does not know quantum_config, and ignores it" in said
    assert "use_other" not in said


def test_adapters_of_older_versions_go_on(base: Path, tmp_path: Path) -> None:
    """They name modules in a list, so LoRA is on the tower's alike-named ones too; there it stays as it is."""
    names = target_modules(fresh(base), TrainableOptions(), "single")
    expected = foreign(base, tmp_path, target_modules=names)
    for features in ("mel", "encoder"):
        continued: Any = add_lora(
            fresh(base), TrainableOptions(r=4, alpha=8, features=features), "stage2", base, tmp_path
        )
        assert any(name.startswith("audio_tower.") for name in adapted(continued))
        assert not [name for name in trainable(continued) if "audio_tower" in name]
        assert_same_weights(continued.merge_and_unload(), expected)


def test_full_training_and_lora_of_one_module_exclude_each_other(base: Path, tmp_path: Path) -> None:
    foreign(base, tmp_path, target_modules=["text_lm_head", "q_proj"])
    with pytest.raises(UserError, match=r"LoRA on modules that this run trains in full .*text_lm_head"):
        add_lora(fresh(base), TrainableOptions(r=4, alpha=8, heads=True), "stage2", base, tmp_path)
    both = TrainableOptions(r=2, heads=True, pattern=r".*(q_proj|_lm_head)", features="mel")
    names = trainable(add_lora(fresh(base), both, "single", base, None))
    assert {name.removeprefix(PREFIX) for name in names if "lm_head" in name} == {
        f"audio_decoder_proj.{kind}_lm_head.modules_to_save.default.weight" for kind in ("text", "audio")
    }


@pytest.mark.fast
@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        (r"audio_tower\..*", {"features": "encoder"}),
        (r".*q_proj", {"features": "none"}),
        (r"audio_encoder_proj\.linear", {"features": "none"}),
        (r".*text_lm_head", {"text_loss": False}),
    ],
)
def test_targets_that_no_loss_reaches_are_refused(pattern: str, options: dict[str, Any], base: Path) -> None:
    with pytest.raises(UserError, match="names layers that no loss of this run reaches, got "):
        target_modules(fresh(base), TrainableOptions(pattern=pattern, **options), "single")


def place_adapter(folder: Path, base: str | None) -> Path:
    """An adapter's config alone, that names a base."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": base}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.fast
def test_a_base_is_found_by_relative_path_name_and_record(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "work" / "model")
    run = tmp_path / "work" / "runs" / "out"
    assert base_reference(tmp_path / "work" / "model", run) == ("../../model", None)
    out = place_adapter(run, "../../model")
    assert resolve_model(out) == (tmp_path / "work" / "model", out)
    (tmp_path / "work").rename(tmp_path / "moved")  # both together
    out = tmp_path / "moved" / "runs" / "out"
    assert resolve_model(out) == (tmp_path / "moved" / "model", out)
    (out / "config.yaml").write_text(f"resolved: {{base_model: {base}}}")
    alone = out.rename(tmp_path / "alone")  # the adapter alone: its run's record
    assert resolve_model(alone) == (base, alone)
    checkpoint = place_adapter(alone / "checkpoint-5", "../gone")
    assert resolve_model(checkpoint) == (base, checkpoint)
    monkeypatch.chdir(tmp_path / "moved")
    here = place_adapter(tmp_path / "elsewhere", "./model")  # relative to the current folder, as PEFT takes it
    assert resolve_model(here) == (tmp_path / "moved" / "model", here)
    assert resolve_model(here, base) == (base, here)


@pytest.mark.fast
def test_a_base_of_the_hub_keeps_its_name(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "hub" / "models--some--higgs" / "snapshots" / "abc123"
    shutil.copytree(base, cached)
    assert base_reference(cached, tmp_path / "out") == ("some/higgs", "abc123")
    asked: list[Path] = []

    def local(given: Path, files: tuple[str, ...]) -> Path:
        assert files == CHECKPOINT_FILES
        asked.append(given)
        return cached

    monkeypatch.setattr(base_module, "local_checkpoint", local)
    out = place_adapter(tmp_path / "out", "some/higgs")
    change_config(out, revision="abc123")
    assert resolve_model(out) == (cached, out)
    assert asked == [Path("some/higgs@abc123")]


@pytest.mark.fast
@pytest.mark.parametrize("named", [None, "", "/gone/model", "../gone"])
def test_a_base_that_is_not_there_is_one_clear_line(named: str | None, tmp_path: Path) -> None:
    out = place_adapter(tmp_path / "out", named)
    message = "is not there" if named else "names no base checkpoint"
    with pytest.raises(UserError, match=rf"{message} \({re.escape(str(out))}.*--base_model PATH names it"):
        resolve_model(out)
    with pytest.raises(UserError, match="--base PATH names it"):
        resolve_model(out, flag="--base")


def test_a_base_is_no_option_without_an_adapter(base: Path) -> None:
    with pytest.raises(UserError, match="--base_model is for adapters"):
        resolve_model(base, base)


def test_applied_is_as_peft_loads(base: Path, tmp_path: Path) -> None:
    foreign(base, tmp_path, modules_to_save=["text_lm_head"])
    ours = adapter_state(apply_adapter(fresh(base), read_adapter(tmp_path)))
    theirs = adapter_state(PeftModel.from_pretrained(fresh(base), str(tmp_path)))  # pyright: ignore
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())

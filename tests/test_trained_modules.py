"""Modules trained in full and LoRA's extras: which they are, and that they train as in boson's forward."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.samples import random_entry, random_sample, serve_entry
from helpers.tiny import ids_of, run_on_one_sample, run_train, tiny_config, write_checkpoint, write_set
from higgs_tune.shards.errors import UserError
from higgs_tune.train.arguments import parse_arguments
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.model.embed import embed_text
from higgs_tune.train.model.forward import ExecOptions, hidden_states, label_states
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.lora import add_lora, base_only, target_modules, trainable
from higgs_tune.train.model.loss import LossOptions, pack_loss
from higgs_tune.train.model.reference import reference_loss
from higgs_tune.train.model.trainable import Stage, TrainableOptions, parameter_group
from higgs_tune.train.optim import make_optimizer
from higgs_tune.train.options import OptimArgs
from higgs_tune.train.toy import make_model, tower_changes
from safetensors.torch import load_file
from test_forward import Case, make_case, packed_logits
from transformers import PreTrainedTokenizerBase

TEXT_HEAD, AUDIO_HEAD = "audio_decoder_proj.text_lm_head", "audio_decoder_proj.audio_lm_head"
TEXT_NORMS = {f"layers.{i}.{name}_layernorm" for i in range(2) for name in ("input", "post_attention")} | {"norm"}
AUDIO_NORMS = {f"layers.1.audio_{name}_layernorm" for name in ("input", "post_attention")}
# option, stage, the modules that then train in full
IN_FULL: list[tuple[str, Stage, set[str]]] = [
    ("heads", "stage1", {TEXT_HEAD}),
    ("heads", "single", {TEXT_HEAD, AUDIO_HEAD}),
    ("text_head", "stage1", {TEXT_HEAD}),
    ("text_head", "stage2", {TEXT_HEAD}),
    ("audio_head", "stage2", {AUDIO_HEAD}),
    ("norms", "stage1", TEXT_NORMS),
    ("norms", "single", TEXT_NORMS | AUDIO_NORMS),
    ("text_embeddings", "stage1", {"embed_tokens"}),
    ("text_embeddings", "stage2", {"embed_tokens"}),
    ("audio_embeddings", "stage2", {"audio_codebook_embeddings"}),
]
EVERYTHING: dict[str, Any] = dict.fromkeys(
    ("norms", "text_embeddings", "heads", "audio_embeddings", "audio_attention", "audio_encoder_proj"), True
)


@pytest.fixture(scope="module")
def model(toy_tokenizer: PreTrainedTokenizerBase) -> HiggsAudioModel:
    """One dual layer, one that audio passes by, audio self-attention, and a Whisper tower."""
    changes = {"audio_dual_ffn_layers": [1], "use_audio_out_self_attention": True, **tower_changes()}
    return make_model(tiny_config(toy_tokenizer, **changes), 0)


def in_full(model: torch.nn.Module) -> set[str]:
    """Modules that train and are no LoRA's."""
    names = {name.rpartition(".")[0] for name in trainable(model) if ".lora_" not in name}
    return {name.removeprefix("base_model.model.").removesuffix(".modules_to_save.default") for name in names}


@pytest.mark.fast
@pytest.mark.parametrize(("option", "stage", "modules"), IN_FULL)
def test_each_option_trains_its_modules_and_no_others(
    option: str, stage: Stage, modules: set[str], model: HiggsAudioModel, tmp_path: Path
) -> None:
    options: dict[str, Any] = {option: True}
    peft_model = add_lora(copy.deepcopy(model), TrainableOptions(r=2, **options), stage, tmp_path, None)
    assert in_full(peft_model) == modules
    names = [name for name in trainable(peft_model) if ".lora_" not in name]
    assert {parameter_group(name) for name in names} == {"head"}
    assert all(parameter.dtype == torch.float32 for parameter in trainable(peft_model).values())


@pytest.mark.fast
def test_lora_extras_by_stage(model: HiggsAudioModel) -> None:
    preset = {stage: set(target_modules(model, TrainableOptions(), stage)) for stage in ("stage1", "single")}

    def added(stage: Stage, *extra: str, **options: Any) -> set[str]:
        given = TrainableOptions(extra=extra, features="mel", **options)
        return set(target_modules(model, given, stage)) - preset[stage]

    assert added("stage1", "heads") == {TEXT_HEAD}
    assert added("single", "heads") == {TEXT_HEAD, AUDIO_HEAD}
    assert added("single", "heads", text_loss=False) == {AUDIO_HEAD}
    assert added("single", "heads", "projector") == {TEXT_HEAD, AUDIO_HEAD, "audio_encoder_proj.linear"}
    only = TrainableOptions(pattern=r"layers\.\d+\.audio_mlp\..*", extra=("heads",))
    audio_ffn = {f"layers.1.audio_mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert set(target_modules(model, only, "single")) == audio_ffn | {TEXT_HEAD, AUDIO_HEAD}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("stage1", {"audio_head": True}, "--train_audio_head cannot train in stage1"),
        ("stage1", {"extra": ("projector",)}, "--lora_extra projector cannot train in stage1"),
        ("single", {"text_head": True, "text_loss": False}, "no loss of this run reaches the text head"),
        ("single", {"extra": ("heads",), "audio_head": True}, r"--lora_extra heads names modules .*audio_lm_head"),
        ("single", {"extra": ("projector",), "audio_encoder_proj": True, "features": "mel"}, "--lora_extra projector"),
        ("single", {"extra": ("projector",)}, "--lora_extra projector: no such layer"),
    ],
)
def test_contradictions_are_refused(
    stage: Stage, options: dict[str, Any], message: str, model: HiggsAudioModel
) -> None:
    with pytest.raises(UserError, match=message):
        target_modules(model, TrainableOptions(**options), stage)


@pytest.fixture
def case(toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Case:
    """LoRA on the preset's layers, all else that can train in full, with weights that are no longer the base's."""
    case = make_case(toy_tokenizer, "some dual", attention=True, tower=True, projector=True)
    add_lora(case.model, TrainableOptions(r=2, features="mel", **EVERYTHING), "single", tmp_path, None).eval()
    torch.manual_seed(0)
    for parameter in trainable(case.model).values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return case


def test_logits_and_gradients_equal_bosons(case: Case) -> None:
    """Of everything that trains, by our fast and our plain forward."""
    loss, batch = LossOptions(audio=2.0, codebooks=(1, 2, 1, 1, 1, 1, 1, 3), smoothing=0.1), case.batch()
    weights = loss.per_label(torch.cat([batch["label_counts"], batch["pairs"]]).float())
    parameters = trainable(case.model)
    kinds = {re.sub(r"\d+", "*", name) for name in parameters}
    assert {"embed_tokens.modules_to_save.default.weight", "norm.modules_to_save.default.weight"} <= kinds

    def gradients(total: torch.Tensor) -> list[torch.Tensor]:
        return [total, *torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)]

    expected = gradients(reference_loss(case.model, case.boson(), weights, loss).total)
    assert all(float(value.abs().max()) > 0 for value in expected)
    for plain in (False, True):
        states = label_states(case.model, batch, ExecOptions(plain=plain))
        got = gradients(pack_loss(case.model, states, batch, weights, loss, at_labels=True).total)
        for name, a, b in zip(["loss", *parameters], expected, got, strict=True):
            atol = 2e-6 + 1e-5 * float(a.detach().abs().max())  # sums of large terms may be near 0
            torch.testing.assert_close(b, a, atol=atol, rtol=2e-3, msg=name)
    with torch.no_grad():
        text, _ = packed_logits(case, batch)
        boson = case.model(**case.boson()).logits
    lengths = batch.lengths
    theirs = torch.cat([boson[row, :length] for row, length in enumerate(lengths)])
    torch.testing.assert_close(text, theirs, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_nothing_looks_ahead(case: Case) -> None:
    """Other codes in the last segment leave every logit before it bit-equal."""
    sample = case.samples[0]
    part, codes = case.expand(sample), sample.codes_KT.copy()
    codes[:, -sample.segment_frames[-1] :] = (codes[:, -sample.segment_frames[-1] :] + 7) % 1024
    changed = type(sample)(sample.key, sample.meta, sample.tokens_2L, codes, sample.mels)
    unseen = part.segments[-1][0] + 1
    for a, b in zip(*(packed_logits(case, case.batch([s])) for s in (sample, changed)), strict=True):
        assert torch.equal(a[:unseen], b[:unseen])
        assert not torch.equal(a[unseen:], b[unseen:])


@torch.no_grad()
def test_the_base_alone_is_the_base(toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As validation at step 0 sees it: without LoRA and with the base's norms, embeddings and heads."""
    case = make_case(toy_tokenizer, "some dual", attention=True, tower=True, projector=True)
    before = packed_logits(case, case.batch())
    peft_model = add_lora(case.model, TrainableOptions(r=2, features="mel", **EVERYTHING), "single", tmp_path, None)
    for parameter in trainable(peft_model).values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    assert not torch.equal(packed_logits(case, case.batch())[0], before[0])
    with base_only(peft_model):
        for got, expected in zip(packed_logits(case, case.batch()), before, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_float32_masters_leave_the_stream_in_bfloat16(toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As on a GPU: embeddings, norms and the projector train in float32 and are used in the model's dtype."""
    case = make_case(toy_tokenizer, "some dual", attention=True, tower=True, projector=True)
    exact = hidden_states(case.model, case.batch())
    add_lora(case.model.bfloat16(), TrainableOptions(r=2, features="mel", **EVERYTHING), "single", tmp_path, None)
    batch = case.batch()
    assert embed_text(case.model, batch).dtype == torch.bfloat16
    for plain in (False, True):
        hidden = hidden_states(case.model, batch, ExecOptions(plain=plain))
        assert hidden.dtype == torch.bfloat16
        torch.testing.assert_close(hidden.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.fast
def test_rates_and_decay(case: Case) -> None:
    """Norms, embeddings and heads at the heads' rate, added modules at their own; no norm is decayed."""
    options = OptimArgs(learning_rate=1e-4, head_learning_rate=2e-5, new_module_learning_rate=3e-4, weight_decay=0.1)
    peaks = {"lora": 1e-4, "head": 2e-5, "new": 3e-4}
    parameters = trainable(case.model)
    rates = {
        id(parameter): (group["peak"], group["weight_decay"])
        for group in make_optimizer(parameters, options).param_groups
        for parameter in group["params"]
    }
    for name, parameter in parameters.items():
        new = "audio_attn" in name or "audio_encoder_proj" in name
        kind = "lora" if ".lora_" in name else "new" if new else "head"
        assert rates[id(parameter)] == (peaks[kind], 0.1 if parameter.ndim > 1 else 0.0), name


def test_a_resumed_run_is_bit_equal(toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """With norms, embeddings and a head trained in full, on samples of both prompt layouts."""
    write_checkpoint(tmp_path / "model", toy_tokenizer)
    ids, rng = ids_of(tmp_path / "model"), np.random.default_rng(0)
    entries = [serve_entry(rng) if i % 2 else random_entry(rng) for i in range(6)]
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids, entry=entry) for i, entry in enumerate(entries)]
    paths = tmp_path / "model", write_set(tmp_path / "data", samples, tmp_path / "model")
    options: dict[str, object] = {"max_steps": 4, "save_steps": 2, "tokens_per_pack": 256, "learning_rate": 1e-2}
    options |= {"train_norms": True, "train_text_embeddings": True, "train_audio_head": True, "lora_dropout": 0.1}
    whole = run_train("single", *paths, tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    again = run_train("single", *paths, tmp_path / "again", **options, resume_from_checkpoint="auto")
    assert [line["loss"] for line in again] == [line["loss"] for line in whole]
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "again"))
    assert one.keys() == two.keys() >= {"base_model.model.norm.weight", "base_model.model.embed_tokens.weight"}
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("stage", "option", "message"),
    [
        ("stage1", {"train_audio_head": True}, "--train_audio_head cannot train in stage1"),
        ("single", {"train_text_head": True, "text_loss_weight": 0}, "no loss of this run reaches the text head"),
        ("single", {"lora_extra": "projector"}, "--lora_extra projector: no such layer"),
        ("single", {"lora_extra": "heads", "full_finetune": True}, "--full_finetune takes no option of LoRA"),
    ],
)
def test_the_command_refuses(
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


@pytest.mark.fast
def test_earlier_scripts_lists_can_be_had(model: HiggsAudioModel) -> None:
    """The flags that docs/what_trains.md gives for each list give exactly the layers of that list."""
    docs = (Path(__file__).parents[1] / "docs" / "what_trains.md").read_text()
    attention = {f"self_attn.{x}_proj" for x in "qkvo"}
    ffn = {f"{part}.{name}_proj" for part in ("mlp", "audio_mlp") for name in ("gate", "up", "down")}
    outside = {TEXT_HEAD, AUDIO_HEAD, "audio_encoder_proj.linear"}
    lists = {"comprehensive": attention | ffn | outside, "attention_only": attention}
    lists["audio_focused"] = {name for name in ffn if name.startswith("audio_mlp")} | {AUDIO_HEAD}
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name, parts in lists.items():
        row = next(line for line in docs.splitlines() if line.startswith(f"| `{name}` of earlier scripts"))
        flags = re.split(r"(?<!\\)\|", row)[3].strip().strip("`").replace(r"\|", "|")
        config = parse(flags)
        options = TrainableOptions(
            preset=config.lora.lora_preset or "comprehensive",
            pattern=config.lora.target_pattern,
            extra=config.lora.lora_extra,
            features="mel",
        )
        outer = {part for part in parts if "." in part and part.startswith(("audio_decoder", "audio_encoder"))}
        expected = {n for n in linear if any(re.fullmatch(rf"layers\.\d+\.{re.escape(p)}", n) for p in parts)} | outer
        assert set(target_modules(model, options, "single")) == expected, name


def parse(flags: str) -> TrainConfig:
    """The trainer's configuration from flags as docs give them."""
    needed = "--training_stage single --model_path M --train_data_dir D --output_dir O"
    return parse_arguments(shlex.split(f"{needed} {flags}"))

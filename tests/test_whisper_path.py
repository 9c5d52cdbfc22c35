"""--whisper_path: a Whisper encoder on a base without one, from the first loss to the exported checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from helpers.kept import kept_share
from helpers.ranks import ask
from helpers.real_whisper import PARTS, join_parts, write_encoder
from helpers.samples import random_entry, random_sample, serve_entry
from helpers.tiny import ids_of, run_train, tiny_config, write_checkpoint, write_set
from higgs_tune.preprocess.audio.whisper import Tower, log_mel, tower_sha256
from higgs_tune.preprocess.workdir import Features
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.format import Sample
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.amount import amount_of
from higgs_tune.train.arguments import parse_arguments
from higgs_tune.train.data.batch import Batch
from higgs_tune.train.estimate import print_estimate
from higgs_tune.train.export.merge import ExportConfig, export, load_adapter
from higgs_tune.train.model.embed import embed_whisper
from higgs_tune.train.model.flops import Rows, model_flops
from higgs_tune.train.model.forward import Checkpointing, ExecOptions, hidden_states, label_states
from higgs_tune.train.model.load import HiggsAudioConfig, HiggsAudioModel, load_model
from higgs_tune.train.model.lora import add_lora, trainable
from higgs_tune.train.model.loss import LossOptions, pack_loss
from higgs_tune.train.model.memory import activation_bytes
from higgs_tune.train.model.paths import describe_paths
from higgs_tune.train.model.reference import reference_loss
from higgs_tune.train.model.trainable import TrainableOptions
from higgs_tune.train.optim import learning_rates, make_optimizer
from higgs_tune.train.options import OptimArgs
from higgs_tune.train.toy import make_model, tower_changes
from peft import PeftModel
from safetensors.torch import load_file
from test_forward import Case, packed_logits
from test_native import write_native
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerBase, WhisperConfig, WhisperForConditionalGeneration

CPU = torch.device("cpu")
BINS, WIDTH = 8, 16
PROJECTOR = {f"base_model.model.audio_encoder_proj.linear.{name}" for name in ("weight", "bias")}
MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")
STEADY: dict[str, object] = {"warmup_steps": 0, "lr_scheduler_type": "constant", "learning_rate": 1e-2}


def write_whisper(folder: Path, *, seed: int = 0, bins: int = BINS) -> Path:
    """A tiny Whisper with random weights."""
    torch.manual_seed(seed)
    sizes = {"num_mel_bins": bins, "d_model": WIDTH, "vocab_size": 32, "encoder_layers": 2, "decoder_layers": 1}
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24)
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens)).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Place:
    """A base without a tower, a Whisper, and the same samples with log-mel and with encoder features.

    Two of the samples have the prompt layout serve, in which no audio has features.
    """

    base: Path
    whisper: Path
    mel: Path
    encoder: Path
    samples: list[Sample]

    @property
    def pair(self) -> tuple[Path, Path]:
        return self.base, self.encoder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerBase) -> Place:
    folder, rng = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    base, whisper = folder / "base", write_whisper(folder / "whisper")
    write_checkpoint(base, toy_tokenizer)
    ids = ids_of(base)
    entries = [serve_entry(rng) if i in (2, 5) else random_entry(rng) for i in range(6)]
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids, mel_bins=BINS, frames=(3, 12), entry=entry)
               for i, entry in enumerate(entries)]  # fmt: skip
    mel = write_set(folder / "mel", samples, base, features="mel")
    encoder = write_set(folder / "encoder", [encoded(s, Tower(whisper, "cpu")) for s in samples], base,
                        features="encoder")  # fmt: skip
    return Place(base, whisper, mel, encoder, samples)


def encoded(sample: Sample, tower: Tower) -> Sample:
    """The sample with the tower's output in place of its log-mel, as a build stores it."""
    segments, mels, kept = [], iter(sample.mels), []
    for segment in sample.meta["segments"]:
        segments.append(dict(segment))
        if segment.get("mel_frames"):
            features = tower(Features(next(mels).astype(np.float32), segment["mel_frames"]))
            kept.append(features.values_CF.astype(np.float16))
            segments[-1]["mel_frames"] = features.frames
    return replace(sample, meta=sample.meta | {"segments": segments}, mels=tuple(kept))


def attach(place: Place) -> HiggsAudioModel:
    return load_model(place.base, device=CPU, dtype=torch.float32, tower=place.whisper).model


def encoder_of(whisper: Path) -> Any:
    """Transformers' own encoder."""
    model: Any = WhisperForConditionalGeneration.from_pretrained(whisper, torch_dtype=torch.float32)
    return model.eval().model.encoder


def assert_is_whispers_encoder(tower: Any, whisper: Path, mel_1CF: torch.Tensor) -> float:
    """Boson's encoder averages pairs of frames before its last norm; without that it is transformers' encoder.

    Returns the largest difference.
    """
    encoder: Any = encoder_of(whisper)
    states: list[torch.Tensor] = []
    handle = encoder.layer_norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    expected = encoder(mel_1CF)
    handle.remove()
    pooled = torch.nn.functional.avg_pool1d(states[0].transpose(1, 2), 2).transpose(1, 2)
    torch.testing.assert_close(tower(mel_1CF).last_hidden_state, encoder.layer_norm(pooled), atol=2e-4, rtol=1e-4)
    tower.avg_pooler, pooler = torch.nn.Identity(), tower.avg_pooler
    got = tower(mel_1CF).last_hidden_state
    tower.avg_pooler = pooler
    torch.testing.assert_close(got, expected.last_hidden_state, atol=2e-4, rtol=1e-4)
    return float((got - expected.last_hidden_state).abs().max())


@pytest.mark.fast
@torch.no_grad()
def test_the_tower_is_whispers_encoder_and_its_output_is_zero_at_first(place: Place) -> None:
    model: Any = attach(place)
    assert (model.config.skip_audio_tower, model.config.encode_whisper_embed) == (False, True)
    assert_is_whispers_encoder(model.audio_tower, place.whisper, torch.randn(1, BINS, 3000))
    batch = Case(model, place.samples, ids_of(place.base), "mel").batch()
    assert batch.mels is not None
    assert not embed_whisper(model, batch, batch.mels).any()
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def trained(place: Place, tmp_path: Path) -> Case:
    """The tower attached, and everything about it trained, norms and text embeddings too."""
    full = dict.fromkeys(("norms", "text_embeddings", "heads", "audio_tower", "audio_encoder_proj"), True)
    model = attach(place)
    add_lora(model, TrainableOptions(r=2, features="mel", **full), "single", tmp_path, None).eval()  # pyright: ignore
    torch.manual_seed(0)
    for parameter in trainable(model).values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return Case(model, place.samples, ids_of(place.base), "mel")


def test_logits_and_gradients_are_those_of_bosons_class_with_a_tower(trained: Case) -> None:
    loss, batch, parameters = LossOptions(audio=2.0), trained.batch(), trainable(trained.model)
    weights = loss.per_label(torch.cat([batch["label_counts"], batch["pairs"]]).float())

    def gradients(total: torch.Tensor) -> list[torch.Tensor]:
        return [total, *torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)]

    expected = gradients(reference_loss(trained.model, trained.boson(), weights, loss).total)
    moved = [name for name, value in zip(parameters, expected[1:], strict=True) if float(value.abs().max()) > 0]
    assert any("audio_tower" in name for name in moved)
    assert any("audio_encoder_proj" in name for name in moved)
    for plain in (False, True):
        states = label_states(trained.model, batch, ExecOptions(plain=plain))
        got = gradients(pack_loss(trained.model, states, batch, weights, loss, at_labels=True).total)
        for name, a, b in zip(["loss", *parameters], expected, got, strict=True):
            torch.testing.assert_close(b, a, atol=2e-6 + 1e-4 * float(a.abs().max()), rtol=2e-3, msg=name)
    with torch.no_grad():
        boson = trained.model(**trained.boson()).logits
        theirs = torch.cat([boson[row, :length] for row, length in enumerate(batch.lengths)])
        torch.testing.assert_close(packed_logits(trained, batch)[0], theirs, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_nothing_looks_ahead_and_features_reach_what_follows(trained: Case) -> None:
    """Other features of a reference change the logits behind them, and none before."""
    sample = trained.samples[0]
    changed = replace(sample, mels=tuple(-mel for mel in sample.mels))
    first = trained.expand(sample).mel_at[0]
    for a, b in zip(*(packed_logits(trained, trained.batch([s])) for s in (sample, changed)), strict=True):
        assert torch.equal(a[:first], b[:first])
        assert not torch.equal(a[first:], b[first:])


@torch.no_grad()
def test_stored_encoder_features_give_the_states_of_mel_features(place: Place) -> None:
    """Through the frozen tower; stored ones are float16."""
    model: Any = attach(place)
    torch.nn.init.normal_(model.audio_encoder_proj.linear.weight, std=0.05)
    tower, ids = Tower(place.whisper, "cpu"), ids_of(place.base)
    mel = Case(model, place.samples, ids, "mel").batch()
    stored = Case(model, [encoded(sample, tower) for sample in place.samples], ids, "encoder").batch()
    torch.testing.assert_close(hidden_states(model, stored), hidden_states(model, mel), atol=2e-3, rtol=1e-3)


def test_both_kinds_of_features_train_alike(place: Place, tmp_path: Path) -> None:
    runs = [
        run_train("single", place.base, data, tmp_path / data.name, whisper_path=place.whisper, max_steps=3, **STEADY)
        for data in (place.mel, place.encoder)
    ]
    for mel, encoder in zip(*runs, strict=True):
        assert encoder["loss"] == pytest.approx(mel["loss"], rel=1e-3)


@pytest.mark.fast
def test_losses_with_and_without_features_are_printed(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without them, it is the loss of the base itself."""
    run_train("single", *place.pair, tmp_path / "out", whisper_path=place.whisper)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("Whisper features:"))
    told = [float(number) for number in re.findall(r"\d+\.\d+", line)]
    run_train("single", *place.pair, tmp_path / "base")
    out = capsys.readouterr().out
    assert "not used: the Whisper features of" in out
    assert "--whisper_path attaches one" in out
    tests = [json.loads((tmp_path / name / "selftest.json").read_text()) for name in ("out", "base")]
    assert tests[0]["without_features"] == pytest.approx(tests[1]["training_loss"], rel=1e-6)
    assert tests[1]["without_features"] == {}
    for part, given, without in (("text", *told[:2]), ("audio", *told[2:])):
        for losses, got in (("training_loss", given), ("without_features", without)):
            by_name = tests[0][losses]
            mean = by_name["text"] if part == "text" else np.mean([v for n, v in by_name.items() if n != "text"])
            assert got == pytest.approx(mean, abs=6e-4)
    assert told[0] != told[1]  # the frames take positions


@pytest.mark.fast
def test_the_projector_has_its_own_rate_and_warm_up(place: Place, tmp_path: Path) -> None:
    model = attach(place)
    options = TrainableOptions(r=2, features="mel", audio_encoder_proj=True, audio_tower=True)
    parameters = trainable(add_lora(model, options, "single", tmp_path, None))
    optim = OptimArgs(learning_rate=1e-4, new_module_learning_rate=3e-4, projector_learning_rate=1e-3,
                      warmup_steps=2, projector_warmup_steps=8)  # fmt: skip
    peaks = {group["name"]: group["peak"] for group in make_optimizer(parameters, optim).param_groups}
    assert peaks == {"lora": 1e-4, "new": 3e-4, "projector": 1e-3}
    assert [learning_rates(optim, 100, "projector")(step) for step in (0, 3, 7)] == [1 / 8, 4 / 8, 1]
    assert [learning_rates(optim, 100, "lora")(step) for step in (0, 1)] == [1 / 2, 1]
    lines = run_train("single", *place.pair, tmp_path / "out", whisper_path=place.whisper, max_steps=3, warmup_steps=0,
                      lr_scheduler_type="constant", learning_rate=1e-4, projector_learning_rate=1e-2,
                      projector_warmup_steps=2)  # fmt: skip
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-4] * 3)
    assert [line["projector_learning_rate"] for line in lines] == pytest.approx([5e-3, 1e-2, 1e-2])


@pytest.fixture(scope="module")
def stages(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 with the tower attached; stage 2, which is not told of it again; a further run."""
    out = tmp_path_factory.mktemp("stages")
    run_train("stage1", *place.pair, out / "1", whisper_path=place.whisper, max_steps=2, **STEADY)
    run_train("stage2", out / "1", place.encoder, out / "2", max_steps=4, save_steps=2, **STEADY)
    run_train("stage2", out / "2", place.encoder, out / "3", max_steps=1, learning_rate=1e-30)
    return out


def test_the_projector_goes_from_stage_to_stage(stages: Path, place: Place) -> None:
    """Frozen in stage 1, as every audio parameter; from stage 2 on it trains, and is in every adapter."""
    adapters = [load_file(stages / name / "adapter_model.safetensors") for name in "123"]
    assert not PROJECTOR & adapters[0].keys()
    for name in PROJECTOR:
        assert float(adapters[1][name].abs().max()) > 1e-3
        torch.testing.assert_close(adapters[2][name], adapters[1][name], atol=1e-6, rtol=0)
    assert not any("audio_tower" in name for adapter in adapters for name in adapter)
    for folder in (stages / "1", stages / "2", stages / "2" / "checkpoint-2"):
        record = json.loads((folder / "whisper_tower.json").read_text())
        assert (folder / record["whisper_path"]).resolve() == place.whisper.resolve()
        assert record["sha256"] == tower_sha256(place.whisper)


@pytest.mark.parametrize("told_again", [True, False])
def test_a_resumed_run_is_bit_equal(told_again: bool, stages: Path, place: Place, tmp_path: Path) -> None:
    """From a checkpoint of a run on the base itself, with --whisper_path given again or not."""
    out, again = tmp_path / "whole", tmp_path / "again"
    options = {"max_steps": 4, "save_steps": 2, "lora_dropout": 0.1, "train_norms": True, "tokens_per_pack": 256}
    whole = run_train("single", *place.pair, out, whisper_path=place.whisper, **STEADY, **options)
    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoint-4")
    told = {"whisper_path": place.whisper} if told_again else {}
    resumed = run_train("single", *place.pair, again, **STEADY, **options, **told, resume_from_checkpoint="auto")
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (out, again))
    assert one.keys() == two.keys() >= PROJECTOR
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@torch.no_grad()
def test_plain_peft_on_bosons_class(stages: Path, place: Place) -> None:
    """As docs/whisper.md tells it: the config's switches, the encoder's weights, then the adapter."""
    config = HiggsAudioConfig.from_pretrained(place.base)
    config.skip_audio_tower, config.encode_whisper_embed = False, True
    config.audio_encoder_config = attach(place).config.audio_encoder_config
    model: Any = HiggsAudioModel.from_pretrained(place.base, config=config, attn_implementation="sdpa")
    model.audio_tower.load_state_dict(encoder_of(place.whisper).state_dict())
    tuned: Any = PeftModel.from_pretrained(model, str(stages / "2")).eval()
    ours = load_adapter(stages / "2", device=CPU, dtype=torch.float32).get_base_model()
    case = Case(ours, place.samples, ids_of(place.base), "mel")  # pyright: ignore[reportArgumentType]
    batch, boson = case.batch(), tuned(**case.boson()).logits
    theirs = torch.cat([boson[row, :length] for row, length in enumerate(batch.lengths)])
    torch.testing.assert_close(packed_logits(case, batch)[0], theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_export_writes_bosons_layout_with_its_switches(stages: Path, place: Place, tmp_path: Path) -> None:
    export(ExportConfig(adapter=stages / "2", out=tmp_path / "merged", dtype="float32"))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["skip_audio_tower"], config["encode_whisper_embed"]) == (False, True)
    sizes = config["audio_encoder_config"]
    assert (sizes["d_model"], sizes["num_mel_bins"], sizes["encoder_layers"]) == (WIDTH, BINS, 2)
    read: Any = HiggsAudioModel.from_pretrained
    theirs, problems = read(tmp_path / "merged", output_loading_info=True, attn_implementation="sdpa")
    assert problems["missing_keys"] == problems["unexpected_keys"] == []
    adapted = load_adapter(stages / "2", device=CPU, dtype=torch.float32).get_base_model()
    case = Case(adapted, place.samples, ids_of(place.base), "mel")  # pyright: ignore[reportArgumentType]
    before, batch = packed_logits(case, case.batch())[0], case.batch()
    merged = replace(case, model=load_model(tmp_path / "merged", device=CPU, dtype=torch.float32).model)
    torch.testing.assert_close(packed_logits(merged, batch)[0], before, atol=2e-5, rtol=1e-5)
    boson = theirs.eval()(**case.boson()).logits
    torch.testing.assert_close(torch.cat([boson[row, :n] for row, n in enumerate(batch.lengths)]), before, atol=2e-5,
                               rtol=1e-5)  # fmt: skip


@pytest.mark.fast
def test_the_native_layout_is_refused_with_the_reason(stages: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--layout native has no place for a Whisper tower"):
        export(ExportConfig(adapter=stages / "2", out=tmp_path / "merged", layout="native"))
    assert not (tmp_path / "merged").exists()


def test_a_base_in_the_native_layout_takes_a_tower(place: Place, tmp_path: Path) -> None:
    """As the same base in Boson's layout does; the result is exported into Boson's layout."""
    native = write_native(tmp_path / "native", place.base)
    options: dict[str, Any] = {"whisper_path": place.whisper, "max_steps": 3, **STEADY}
    runs = [run_train("single", base, place.encoder, tmp_path / name, **options)
            for name, base in (("a", place.base), ("b", native))]  # fmt: skip
    assert [line["loss"] for line in runs[1]] == pytest.approx([line["loss"] for line in runs[0]], rel=1e-6)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    for name in PROJECTOR:
        assert float(one[name].abs().max()) > 1e-3
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-5)
    export(ExportConfig(adapter=tmp_path / "b", out=tmp_path / "merged", dtype="float32"))
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["skip_audio_tower"]
    with pytest.raises(UserError, match="--layout native has no place for a Whisper tower"):
        export(ExportConfig(adapter=tmp_path / "b", out=tmp_path / "no", layout="native"))


def test_training_in_full_writes_bosons_layout(place: Place, tmp_path: Path) -> None:
    run_train("single", *place.pair, tmp_path, whisper_path=place.whisper, full_finetune=True, max_steps=2, **STEADY)
    model: Any = HiggsAudioModel.from_pretrained(tmp_path)
    assert float(model.audio_encoder_proj.linear.weight.abs().max()) > 1e-3
    tower = attach(place).audio_tower
    assert tower is not None
    for name, value in tower.state_dict().items():
        assert torch.equal(model.audio_tower.state_dict()[name].float(), value), name


@pytest.mark.parametrize(
    "options",
    [{}, {"features": "mel", "train_audio_tower": True}],
    ids=["encoder features", "mel features and a tower that trains"],
)
def test_two_ranks_train_as_one(options: dict[str, Any], place: Place, tmp_path: Path) -> None:
    data = getattr(place, options.pop("features", "encoder"))
    given = {"training_stage": "single", "model_path": place.base, "train_data_dir": [str(data)], "max_steps": 3,
             "tokens_per_pack": 256, "logging_steps": 1, "dataloader_num_workers": 0, "save_steps": 0,
             "whisper_path": place.whisper, **STEADY, **options}  # fmt: skip
    for world, name in ((1, "one"), (2, "two")):
        run = given | {"output_dir": tmp_path / name, "gradient_accumulation_steps": 2 // world}
        answer = ask(run, world)
        assert set(answer["codes"]) == {0}, answer["stderr"]
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                for name in ("one", "two"))  # fmt: skip
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    assert any("audio_tower" in name for name in weights[0]) == bool(options)
    for name in PROJECTOR:
        assert float(weights[0][name].abs().max()) > 1e-3
        torch.testing.assert_close(weights[1][name], weights[0][name], atol=1e-4, rtol=1e-2)


def test_features_that_carry_the_answer_lower_the_loss(
    toy_tokenizer: PreTrainedTokenizerBase, place: Place, tmp_path: Path
) -> None:
    """Ablation: each codebook's code is one of two, and only the features of the reference say which.

    Without them no model can be better than chance at those labels, 0.693 each; half of the labels are EOS. Held-out
    samples have combinations of codes that were not trained on.
    """
    rng, ids, samples = np.random.default_rng(0), ids_of(place.base), []
    for i in range(160):
        sample = random_sample(f"s{i}", rng, toy_tokenizer, ids, mel_bins=BINS, frames=(1, 2))
        bits, segments, at = rng.integers(0, 2, 8), [], 0
        codes, mels = sample.codes_KT.copy() * 0 + 7, []
        for segment in sample.meta["segments"]:
            if segment["role"] == "assistant":
                codes[:, at] = 100 + 300 * bits
                segments.append(segment)
            else:
                mels.append(np.repeat(np.concatenate([bits, 1 - bits])[:, None], 2, 1).astype(np.float16) * 2 - 1)
                segments.append(segment | {"mel_frames": 2})
            at += segment["frames"]
        samples.append(replace(sample, codes_KT=codes, mels=tuple(mels), meta=sample.meta | {"segments": segments}))
    data = write_set(tmp_path / "data", samples, place.base, features="encoder")
    options = {"max_steps": 150, "eval_steps": 150, "val_fraction": 0.2, "tokens_per_pack": 512, "logging_steps": 50,
               "learning_rate": 1e-2, "head_learning_rate": 1e-2, "train_heads": True, "train_audio_embeddings": True,
               "text_loss_weight": 0.1, "save_steps": 0, "warmup_steps": 5}  # fmt: skip
    losses = {}
    for name, tower in (("with", {"whisper_path": place.whisper, "projector_warmup_steps": 20}), ("without", {})):
        lines = run_train("single", place.base, data, tmp_path / name, **options, **tower)
        losses[name] = [line["audio_loss"] for line in lines if line["kind"] == "eval"][-1]
    print(losses)
    assert losses["without"] > 0.3
    assert losses["with"] < losses["without"] - 0.1


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any, **options: Any) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_train(*arguments, **options)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_what_does_not_fit_is_refused(
    place: Place, stages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], toy_tokenizer: Any
) -> None:
    other, out = write_whisper(tmp_path / "other", seed=1), tmp_path / "out"
    said = refused(capsys, "stage2", stages / "1", place.encoder, out, whisper_path=other)
    assert "the adapter was trained with another Whisper tower" in said
    wide = write_whisper(tmp_path / "wide", bins=80)
    shutil.copytree(place.mel, tmp_path / "mel")
    manifest = json.loads((tmp_path / "mel" / "manifest.json").read_text())
    manifest["provenance"]["features"]["extractor"] = {"feature_size": 128}
    (tmp_path / "mel" / "manifest.json").write_text(json.dumps(manifest))
    said = refused(capsys, "single", place.base, tmp_path / "mel", out, whisper_path=wide)
    assert "expected 80 mel bins, got 128" in said
    assert "no audio tower" in refused(capsys, "single", *place.pair, out, whisper_path=place.base)
    assert "no checkpoint here" in refused(capsys, "single", *place.pair, out, whisper_path=tmp_path / "nowhere" / "x")
    own = tmp_path / "own"
    make_model(tiny_config(toy_tokenizer, **tower_changes()), 0).save_pretrained(own)
    toy_tokenizer.save_pretrained(own)
    said = refused(capsys, "single", own, place.encoder, out, whisper_path=place.whisper)
    assert "the checkpoint has a Whisper tower of its own" in said
    assert "--whisper_path attaches one" in refused(capsys, "single", *place.pair, out, encode_whisper_embed=True)
    plain = write_set(tmp_path / "plain", [replace(s, mels=()) for s in place.samples], place.base)
    said = refused(capsys, "single", place.base, plain, out, whisper_path=place.whisper)
    assert "the model has a Whisper tower, and the sets do not all have its features" in said
    said = refused(capsys, "single", *place.pair, out, whisper_path=place.whisper, lora_extra="projector")
    assert "--lora_extra projector names modules that this run trains in full" in said
    assert not out.exists() or not list(out.glob("*.safetensors"))


def test_a_set_that_the_tower_does_not_hear_is_told(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of its samples have the prompt layout serve."""
    unheard = write_set(tmp_path / "set", [place.samples[2], place.samples[5]], place.base, features="mel")
    run_train("single", place.base, unheard, tmp_path / "out", whisper_path=place.whisper)
    assert "warning: no sample has Whisper features" in capsys.readouterr().err
    run_train("single", place.base, place.mel, tmp_path / "heard", whisper_path=place.whisper)
    assert "no sample has Whisper features" not in capsys.readouterr().err


def test_encoder_features_are_refused_once_the_tower_has_trained(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_train("single", place.base, place.mel, tmp_path / "1", whisper_path=place.whisper, train_audio_tower=True)
    said = refused(capsys, "stage2", tmp_path / "1", place.encoder, tmp_path / "2")
    assert "the adapter has trained the Whisper tower" in said
    lines = run_train("stage2", tmp_path / "1", place.mel, tmp_path / "2", learning_rate=1e-30)
    assert len(lines) == 1


def test_a_tower_that_has_moved_is_named(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its reference is relative to the adapter, so both may move together; alone, --whisper_path says where it is."""
    shutil.copytree(place.whisper, tmp_path / "w")
    run_train("single", *place.pair, tmp_path / "a" / "1", whisper_path=tmp_path / "w")
    (tmp_path / "b").mkdir()
    shutil.move(tmp_path / "a" / "1", tmp_path / "b" / "1")
    run_train("stage2", tmp_path / "b" / "1", place.encoder, tmp_path / "2")
    shutil.move(tmp_path / "w", tmp_path / "gone")
    said = refused(capsys, "stage2", tmp_path / "b" / "1", place.encoder, tmp_path / "3")
    assert "the adapter's Whisper tower is not there" in said
    assert "--whisper_path PATH names it" in said
    run_train("stage2", tmp_path / "b" / "1", place.encoder, tmp_path / "3", whisper_path=tmp_path / "gone")


@pytest.fixture(scope="module")
def real_whisper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Whisper base: in CTranslate2's form, and its encoder as a checkpoint of transformers."""
    for name in PARTS:
        pytest.importorskip(name, reason="real Whisper weights come with the extra eval-test")
    folder = tmp_path_factory.mktemp("real")
    joined = join_parts(folder)
    yield joined, write_encoder(joined, folder / "encoder")
    shutil.rmtree(folder)


@torch.no_grad()
def test_real_whisper_weights(real_whisper: tuple[Path, Path], place: Place) -> None:
    """30 s of the example's speech: the attached tower is transformers' encoder, and CTranslate2's where installed."""
    joined, folder = real_whisper
    files = sorted((ROOT / "examples" / "arabic").rglob("*.flac"))
    waves = [soundfile.read(path, dtype="float32") for path in files]
    rate = waves[0][1]
    wave_S = np.concatenate([wave for wave, _ in waves])[: 30 * rate]
    mel = log_mel(wave_S, rate, 80)[0]
    assert mel.frames == 3000
    mel_1CF = torch.from_numpy(mel.values_CF)[None]
    model: Any = load_model(place.base, device=CPU, dtype=torch.float32, tower=folder).model
    difference = assert_is_whispers_encoder(model.audio_tower, folder, mel_1CF)
    stored = Tower(folder, "cpu")(mel)
    torch.testing.assert_close(torch.from_numpy(stored.values_CF.T), model.audio_tower(mel_1CF).last_hidden_state[0],
                               atol=1e-4, rtol=1e-4)  # fmt: skip
    print(f"largest difference from transformers' encoder: {difference:.2e}")
    ctranslate2 = pytest.importorskip("ctranslate2")
    theirs = ctranslate2.models.Whisper(str(joined), compute_type="float32").encode(
        ctranslate2.StorageView.from_array(np.ascontiguousarray(mel_1CF.numpy()))
    )
    model.audio_tower.avg_pooler = torch.nn.Identity()
    ours = model.audio_tower(mel_1CF).last_hidden_state[0]
    cosine = torch.nn.functional.cosine_similarity(ours, torch.from_numpy(np.array(theirs))[0], dim=-1)
    print(f"least cosine with CTranslate2's encoder over {len(cosine)} frames: {float(cosine.min()):.6f}")
    assert float(cosine.min()) > 0.999


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_projector_with_lora_runs_fused_and_keeps_what_is_estimated(
    dropout: float, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over stored features, beside the heads."""
    model, tower = attach(place), Tower(place.whisper, "cpu")
    options = TrainableOptions(r=2, dropout=dropout, features="encoder", extra=("heads", "projector"))
    add_lora(model, options, "single", place.base, None)
    samples = [encoded(sample, tower) for sample in place.samples]
    batch = Case(model, samples, ids_of(place.base), "encoder").batch()
    lines = describe_paths(model, ExecOptions())
    assert all(" fused " in line for line in lines)
    assert any(line.split()[0] == "audio_encoder_proj" and "LoRA r 2" in line for line in lines)
    for mode in MODES:
        assert kept_share(model, batch, ExecOptions(checkpointing=mode), monkeypatch) == pytest.approx(1, abs=0.1), mode


@dataclass(frozen=True)
class Planned:
    """A model whose tower has 128 bins and 64 channels, and samples with log-mel for it, of one reference each."""

    model: HiggsAudioModel
    samples: list[Sample]
    batch: Batch


def plan(place: Place, tokenizer: PreTrainedTokenizerBase, *, trains: bool) -> Planned:
    model = make_model(tiny_config(tokenizer, **tower_changes()), 0)
    add_lora(model, TrainableOptions(r=2, features="mel", audio_tower=trains), "single", place.base, None)
    rng, ids = np.random.default_rng(0), ids_of(place.base)
    entries = [entry for entry in (random_entry(rng) for _ in range(10)) if len(entry["messages"][1]["content"]) == 3]
    samples = [random_sample(f"s{i}", rng, tokenizer, ids, mel_bins=128, frames=(40, 80), entry=entry)
               for i, entry in enumerate(entries[:4])]  # fmt: skip
    return Planned(model, samples, Case(model, samples, ids, "mel").batch())


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_a_tower_costs_what_is_estimated(
    trains: bool, place: Place, toy_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With log-mel features: what backward keeps, nothing where it is frozen; FLOPs by torch's own counter."""
    planned = plan(place, toy_tokenizer, trains=trains)
    model, batch = planned.model, planned.batch
    for mode in MODES:
        assert kept_share(model, batch, ExecOptions(checkpointing=mode), monkeypatch) == pytest.approx(1, abs=0.1), mode
    kept = [activation_bytes(model, windows=windows) for windows in (0, batch.windows / batch.positions)]
    assert (kept[1] > 2 * kept[0]) is trains
    tower, rows = model.audio_tower, Rows(0, 0, 0, 0, 0, 0, windows=batch.windows)
    assert tower is not None and batch.mels is not None
    with FlopCounterMode(display=False) as counter:
        out = tower(batch.mels.float()).last_hidden_state
        if trains:
            out.sum().backward()
    counts = counter.get_flop_counts()["Global"].items()
    products = sum(count for op, count in counts if "attention" not in str(op))
    attention = batch.windows * 2 * 4 * 64 * 1500**2 * (3 if trains else 1)
    assert model_flops(model, rows) == pytest.approx(products + attention, rel=0.1)


@pytest.mark.fast
@pytest.mark.parametrize("features", ["mel", "encoder"])
def test_amounts_count_the_features(
    features: str, place: Place, toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """By the manifest alone: as many text rows as the packs have, a window for each reference."""
    planned = plan(place, toy_tokenizer, trains=False)
    manifest = ShardSet(write_set(tmp_path / "set", planned.samples, place.base, features="mel")).manifest
    amount = amount_of(parse_arguments(["--estimate", "--gpu", "h200"]), [manifest], features)
    assert amount.rows.text == pytest.approx(sum(planned.batch.text_lengths), rel=0.08)
    assert amount.rows.windows == (planned.batch.windows if features == "mel" else 0)


@pytest.mark.fast
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_the_estimate_names_a_slower_tower(trains: bool, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """One that trains runs in float32, which the estimate of speed does not count."""
    given = ["--estimate", "--gpu", "h200", "--training_stage", "stage2", "--model_path", str(place.base),
             "--whisper_path", str(place.whisper), *(["--train_audio_tower"] if trains else [])]  # fmt: skip
    print_estimate(parse_arguments(given))
    assert ("the Whisper tower trains in float32" in capfd.readouterr().out) is trains

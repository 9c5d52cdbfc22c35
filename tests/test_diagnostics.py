"""What diagnostics show, against naive loops over boson's own logits; what is frozen is watched."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.samples import random_sample
from helpers.tiny import ids_of, overfit, run_train, tiny_config, write_checkpoint, write_set
from higgs_tune.shards.errors import UserError
from higgs_tune.train.data.batch import collate
from higgs_tune.train.model.loss import LossOptions
from higgs_tune.train.model.reference import boson_inputs
from higgs_tune.train.monitor.diagnostics import (
    UpdateNorms,
    assert_frozen,
    compare_predictions,
    fingerprint,
    format_diagnostics,
    group_of,
    isolated,
    norms_by_group,
)
from higgs_tune.train.toy import make_model
from torch import nn
from transformers import PreTrainedTokenizerBase

FSI, PDI = "\u2068", "\u2069"


@pytest.mark.fast
def test_predictions_are_those_of_a_naive_loop(toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Half learned, so that some predictions are right and some are not."""
    model, rng = write_checkpoint(tmp_path, toy_tokenizer), np.random.default_rng(0)
    ids = ids_of(tmp_path)
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids, frames=(6, 16), turns=2) for i in range(3)]
    overfit(model, samples, ids, steps=25)
    compared = compare_predictions(model, collate(samples, 0.0, ids), toy_tokenizer, LossOptions())
    with torch.no_grad():
        inputs = boson_inputs(samples, ids, model.config.pad_token_id)
        out = model(**inputs)
    labels, likeliest = out.expanded_labels[0], out.logits[0].argmax(-1)
    at = [t for t in range(1, len(labels)) if labels[t] >= 0]
    assert compared["text"] == toy_tokenizer.decode([int(labels[t]) for t in at])
    assert compared["predicted_text"] == toy_tokenizer.decode([int(likeliest[t - 1]) for t in at])
    assert compared["text"] != compared["predicted_text"]

    right, count = [0] * 8, [0] * 8
    starts = [*inputs["audio_out_ids_start"].tolist(), inputs["audio_out_ids"].shape[1]]
    for begin, end in pairwise(starts):
        for t in range(begin, end - 1):
            target = inputs["label_audio_ids"][:, t + 1].tolist()
            predicted = out.audio_logits[t].argmax(-1).tolist()
            for book in range(8):
                if target[book] >= 0:
                    count[book] += 1
                    right[book] += target[book] == predicted[book]
    segments = samples[0].meta["segments"]
    place = next(number for number, segment in enumerate(segments) if segment["role"] == "assistant")
    frames, before = segments[place]["frames"], sum(segment["frames"] for segment in segments[:place])
    raw_KT = samples[0].codes_KT[:, before : before + frames]
    said_KT = np.array([[int(out.audio_logits[k + t, k].argmax()) for t in range(frames + 1)] for k in range(8)])
    assert compared["frames"] == frames
    assert compared["codes"] == {"first": raw_KT[:, :5].tolist(), "last": raw_KT[:, -5:].tolist()}
    assert compared["predicted_codes"] == {"first": said_KT[:, :5].tolist(), "last": said_KT[:, :-1][:, -5:].tolist()}
    assert compared["predicted_eos"] == said_KT[:, -1].tolist()
    assert compared["accuracy_per_codebook"] == pytest.approx([r / c for r, c in zip(right, count, strict=True)])
    assert 0 < sum(right) < sum(count)


def test_a_sample_without_audio_has_text_only(toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As written sentences are among spoken ones; nor does a pack without a text label ask for one."""
    model, rng = write_checkpoint(tmp_path, toy_tokenizer), np.random.default_rng(0)
    ids = ids_of(tmp_path)
    turns = [{"role": role, "content": "one two three"} for role in ("user", "assistant")]
    written = random_sample("written", rng, toy_tokenizer, ids, entry={"messages": turns})
    compared = compare_predictions(model, collate([written], 0.0, ids), toy_tokenizer, LossOptions())
    assert "codes" not in compared
    assert "accuracy" not in format_diagnostics(compared, 0)


@pytest.mark.fast
def test_every_parameter_has_its_group(toy_tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model(tiny_config(toy_tokenizer, use_audio_out_self_attention=True), 0)
    groups = {name: group_of(f"base_model.model.{name}") for name, _ in model.named_parameters()}
    assert groups["layers.0.self_attn.q_proj.weight"] == "text attention"
    assert groups["layers.0.mlp.up_proj.weight"] == "text FFN"
    assert groups["layers.0.audio_mlp.up_proj.weight"] == "audio FFN"
    assert groups["layers.0.audio_attn.q_proj.weight"] == "audio attention"
    assert groups["audio_decoder_proj.text_lm_head.weight"] == "heads"
    assert {name for name, group in groups.items() if group == "heads"} == {
        "audio_decoder_proj.text_lm_head.weight",
        "audio_decoder_proj.audio_lm_head.weight",
    }


def test_norms_are_naive_sums() -> None:
    names = ("a.self_attn.q", "b.self_attn.k", "a.audio_mlp.up")
    values = {name: torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(names)}
    attention = math.sqrt(sum(float(x) ** 2 for name in names[:2] for x in values[name].flatten()))
    audio = math.sqrt(sum(float(x) ** 2 for x in values[names[2]].flatten()))
    assert norms_by_group(values) == pytest.approx({"text attention": attention, "audio FFN": audio}, rel=1e-5)


def test_updates_are_what_the_optimizer_did() -> None:
    parameters = {f"layer.mlp.{i}": nn.Parameter(torch.ones(4)) for i in range(2)}
    watch, optimizer = UpdateNorms(parameters), torch.optim.SGD(parameters.values(), lr=0.5)
    (3.0 * parameters["layer.mlp.0"].sum()).backward()
    watch.record_gradients()
    optimizer.step()
    norms = watch.norms()
    assert norms["grad_norm"] == pytest.approx({"text FFN": 6.0})
    assert norms["update_norm"] == pytest.approx({"text FFN": 3.0})


def in_place(model: nn.Linear) -> None:
    with torch.no_grad():
        model.weight[0, 0] += 1e-3


def behind_autograd(model: nn.Linear) -> None:
    model.weight.data[0, 0] += 1e-3


def same_sum(model: nn.Linear) -> None:
    with torch.no_grad():
        model.weight.copy_(model.weight.flip(0))


def thawed(model: nn.Linear) -> None:
    model.weight.requires_grad_(True)


@pytest.mark.parametrize("change", [in_place, behind_autograd, same_sum, thawed])
def test_a_changed_frozen_weight_is_named(change: Callable[[nn.Linear], None]) -> None:
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    before = fingerprint(model.named_parameters())
    assert before.keys() == {"weight"}
    with torch.no_grad():
        model.bias.add_(1)
    assert_frozen(model, before)
    change(model)
    with pytest.raises(UserError, match="frozen parameters have changed: weight"):
        assert_frozen(model, before)


def test_arabic_is_isolated() -> None:
    """Right-to-left text stands in isolates, so that it does not reorder labels and numbers around it."""
    text = "سَلَامٌ 12"
    assert isolated(text) == f"{FSI}{text}{PDI}"
    shown = format_diagnostics({"key": "k", "text": text, "predicted_text": "بَيْت"}, step=3).splitlines()
    assert shown[0] == "step 3, sample k"
    assert shown[1].endswith(f"{FSI}{text}{PDI}")
    assert shown[2].endswith(f"{FSI}بَيْت{PDI}")


@pytest.mark.parametrize("stage", ["stage1", "single"])
def test_the_command_shows_and_keeps_them(
    stage: str, toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "model", toy_tokenizer)
    ids = ids_of(tmp_path / "model")
    samples = [random_sample(f"s{i}", np.random.default_rng(i), toy_tokenizer, ids) for i in range(2)]
    data, out = write_set(tmp_path / "data", samples, tmp_path / "model"), tmp_path / "out"
    run_train(stage, tmp_path / "model", data, out, max_steps=4, diagnostics_steps=2, learning_rate=1e-2)
    lines = [json.loads(line) for line in (out / "diagnostics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    groups = {"text attention", "text FFN"} | ({"audio FFN"} if stage == "single" else set())
    for line in lines:
        assert line["grad_norm"].keys() == line["update_norm"].keys() == groups
        assert min(line["grad_norm"].values()) > 0
        assert min(line["update_norm"].values()) > 0
        assert ("codes" in line) == (stage == "single")
        assert "<|eot_id|>" in line["text"]
    assert "predicted text" in capsys.readouterr().err

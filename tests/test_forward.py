"""The packed forward against boson's own forward on its own collator's batch, and what must not leak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import SpecialIds, expand
from higgs_tune.train.batch import Batch, collate
from higgs_tune.train.forward import hidden_states
from higgs_tune.train.loss import LossWeights, pack_loss
from higgs_tune.train.model import HiggsAudioModel, load_model
from samples import boson_collate, boson_inputs, random_sample
from transformers import PreTrainedTokenizerBase

Samples = list[Sample]


@pytest.fixture(scope="module")
def model(toy: Path) -> HiggsAudioModel:
    return load_model(toy / "model", device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def samples(toy_tokenizer: PreTrainedTokenizerBase, toy_ids: SpecialIds) -> Samples:
    rng = np.random.default_rng(1)
    made = [random_sample(f"s{i}", rng, toy_tokenizer, toy_ids, turns=1 + i % 3) for i in range(4)]
    return [*made, random_sample("masked", rng, toy_tokenizer, toy_ids, turns=3, start_index=3)]


def packed_logits(model: HiggsAudioModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Text logits [N, V] and audio logits [N, K, C] at every position of a pack, in sequence order."""
    hidden = model.norm(hidden_states(model, batch))[batch["to_sequence"].long()]
    audio = model.audio_decoder_proj.audio_lm_head(hidden)
    codebooks = model.config.audio_num_codebooks
    return model.audio_decoder_proj.text_lm_head(hidden), audio.view(len(audio), codebooks, -1)


@torch.no_grad()
def test_equals_boson_forward(model: HiggsAudioModel, samples: Samples, toy_ids: SpecialIds) -> None:
    reference = model(**boson_inputs(boson_collate(samples, toy_ids, model.config.pad_token_id)))
    text, audio = packed_logits(model, collate(samples, 0.0, toy_ids))
    start, audio_parts = 0, []
    for row, sample in enumerate(samples):
        part = expand([sample], toy_ids)
        at = slice(start, start + part.length)
        torch.testing.assert_close(text[at], reference.logits[row, : part.length], atol=1e-5, rtol=0)
        audio_parts += [audio[start + a : start + a + width] for a, width, is_out in part.segments if is_out]
        start += part.length
    torch.testing.assert_close(torch.cat(audio_parts), reference.audio_logits, atol=1e-5, rtol=0)


def test_gradients_equal_boson(model: HiggsAudioModel, samples: Samples, toy_ids: SpecialIds) -> None:
    """Loss from boson's logits and its collator's labels, shifted by one, and every parameter's gradient."""
    inputs = boson_inputs(boson_collate(samples, toy_ids, model.config.pad_token_id))
    model.requires_grad_(True)
    out = model(**inputs)
    text = _mean_cross_entropy(out.logits[:, :-1].flatten(0, 1), out.expanded_labels[:, 1:].flatten())
    audio = torch.stack(
        [
            _mean_cross_entropy(out.audio_logits[:-1, k], inputs["label_audio_ids"][k, 1:])
            for k in range(toy_ids.codebooks)
        ]
    ).mean()
    (text + 2 * audio).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    batch = collate(samples, 0.0, toy_ids)
    weights = LossWeights(text=1.0, audio=2.0).per_label(batch["label_counts"].float())
    parts = pack_loss(model, hidden_states(model, batch), batch, weights, with_audio=True)
    parts.total.backward()
    torch.testing.assert_close(parts.total, text + 2 * audio)
    torch.testing.assert_close(parts.sums[0] / parts.counts[0], text.detach())
    torch.testing.assert_close((parts.sums[1:] / parts.counts[1:]).mean(), audio.detach())
    for name, parameter in model.named_parameters():
        gradient, wanted = parameter.grad, expected[name]
        if wanted is None or gradient is None:
            assert wanted is None, name
            continue
        scale = float(wanted.abs().max()) + 1e-12
        torch.testing.assert_close(
            gradient / scale, wanted / scale, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n} {m}"
        )
    model.zero_grad()
    model.requires_grad_(False)


def _mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, labels)


@torch.no_grad()
def naive_losses(model: HiggsAudioModel, sample: Sample, ids: SpecialIds) -> dict[tuple[str, int, int], float]:
    """Cross entropy of every labelled prediction of one sample, one at a time: (kind, position, codebook) -> loss."""
    text, audio = packed_logits(model, collate([sample], 0.0, ids))
    part, losses = expand([sample], ids), {}
    for at, label in zip(part.text_label_at, part.text_labels, strict=True):
        losses["text", int(at), 0] = float(-text[at].log_softmax(-1)[int(label)])
    for at, labels in zip(part.audio_label_at, part.audio_labels_KB.T, strict=True):
        for codebook, label in enumerate(labels):
            if label >= 0:
                losses["audio", int(at), codebook] = float(-audio[at, codebook].log_softmax(-1)[int(label)])
    return losses


@torch.no_grad()
def test_loss_is_a_naive_loop_over_unpacked_samples(
    model: HiggsAudioModel, samples: Samples, toy_ids: SpecialIds
) -> None:
    losses = [naive_losses(model, sample, toy_ids) for sample in samples]
    batch = collate(samples, 0.0, toy_ids)
    weights = LossWeights(1.0, 1.0).per_label(batch["label_counts"].float())
    parts = pack_loss(model, hidden_states(model, batch), batch, weights, with_audio=True)
    for k in range(toy_ids.codebooks + 1):
        kind, codebook = ("text", 0) if k == 0 else ("audio", k - 1)
        naive = [
            loss for found in losses for (what, _, book), loss in found.items() if (what, book) == (kind, codebook)
        ]
        assert len(naive) == int(parts.counts[k])
        assert float(parts.sums[k]) == pytest.approx(sum(naive), rel=1e-5)


def test_masked_turns_have_no_labels(samples: Samples, toy_ids: SpecialIds) -> None:
    """start_index 3 leaves only the second and third answers to train on."""
    part = expand([samples[-1]], toy_ids)
    outputs = [(start, width) for start, width, is_out in part.segments if is_out]
    trained = {int(at) for at in part.audio_label_at}
    assert trained == {at for start, width in outputs[1:] for at in range(start, start + width - 1)}
    assert part.text_label_at.min() > outputs[0][0]


@torch.no_grad()
def test_near_uniform_at_random_init(model: HiggsAudioModel, samples: Samples, toy_ids: SpecialIds) -> None:
    """A loss near zero on random weights would mean that the model sees its targets."""
    batch = collate(samples, 0.0, toy_ids)
    weights = LossWeights(1.0, 1.0).per_label(batch["label_counts"].float())
    parts = pack_loss(model, hidden_states(model, batch), batch, weights, with_audio=True)
    means = parts.sums / parts.counts
    uniform = torch.tensor([float(model.vocab_size), *[1026.0] * toy_ids.codebooks]).log()
    assert (means > 0.95 * uniform).all(), means
    assert (means < 1.15 * uniform).all(), means


@torch.no_grad()
@pytest.mark.parametrize("where", ["token", "frame"])
def test_causality(model: HiggsAudioModel, samples: Samples, toy_ids: SpecialIds, where: str) -> None:
    """Changing a later token or frame leaves the losses of earlier predictions bit-equal."""
    rng = np.random.default_rng(2)
    sample = samples[2]
    before = naive_losses(model, sample, toy_ids)
    changed_at, changed = change(sample, toy_ids, rng, where)
    after = naive_losses(model, changed, toy_ids)
    # the prediction at p has its target at p + 1: those before changed_at - 1 know nothing of the change
    earlier = [name for name in before if name[1] < changed_at - 1]
    assert len(earlier) > 100
    assert all(before[name] == after[name] for name in earlier)
    later = [name for name in before if name[1] >= changed_at and name in after]
    assert any(before[name] != after[name] for name in later)


def change(sample: Sample, ids: SpecialIds, rng: np.random.Generator, where: str) -> tuple[int, Sample]:
    """Change one text token or all codes of one frame in the last third; return the first position that differs."""
    part = expand([sample], ids)
    tokens, codes = sample.tokens_2L.copy(), sample.codes_KT.copy()
    if where == "token":
        token = int(np.flatnonzero(tokens[1] >= 0)[-4])
        tokens[:, token] = int(rng.integers(5, 200))
        placeholders_before = np.isin(tokens[0, :token], (ids.audio_in, ids.audio_out)).sum()
        return int(part.text_at[token - placeholders_before]), replace(sample, tokens_2L=tokens)
    frame = sample.segment_frames[-1] // 2
    codes[:, frame - sample.segment_frames[-1]] = rng.integers(0, 1024, len(codes))
    start = part.segments[-1][0]
    return start + 1 + frame, replace(sample, codes_KT=codes)


@torch.no_grad()
def test_neighbours_in_a_pack_do_not_matter(model: HiggsAudioModel, samples: Samples, toy_ids: SpecialIds) -> None:
    alone, _ = packed_logits(model, collate(samples[:1], 0.0, toy_ids))
    first, _ = packed_logits(model, collate([samples[0], samples[3]], 0.0, toy_ids))
    second, _ = packed_logits(model, collate([samples[3], samples[0]], 0.0, toy_ids))
    torch.testing.assert_close(first[: len(alone)], alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(second[-len(alone) :], alone, atol=1e-6, rtol=0)


def test_zero_weight_pack_has_zero_gradients(model: HiggsAudioModel, samples: Samples, toy_ids: SpecialIds) -> None:
    batch = collate(samples[:1], 0.0, toy_ids, weight=0)
    weights = torch.ones(1 + toy_ids.codebooks)
    model.requires_grad_(True)
    parts = pack_loss(model, hidden_states(model, batch), batch, weights, with_audio=True)
    parts.total.backward()
    assert parts.total.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    model.requires_grad_(False)

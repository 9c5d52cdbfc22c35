"""The loss against naive loops: chunks, smoothing, weights, end of stream, voice similarity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.samples import random_sample
from helpers.tiny import loss_of, tiny_config
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.train.data.batch import Batch, collate
from higgs_tune.train.model import loss
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.loss import TEMPERATURE, LossOptions, contrastive_loss, head_cross_entropy
from higgs_tune.train.toy import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedTokenizerBase

ROWS, BOOKS, CLASSES, HIDDEN = 23, 4, 11, 6


def naive_cross_entropy(
    logits_nKV: torch.Tensor, labels_nK: torch.Tensor, weights_K: list[float], smoothing: float
) -> torch.Tensor:
    """One label at a time, from the definition of smoothing: (1 - s) on the label, s spread over all classes."""
    total = logits_nKV.new_zeros(())
    for row, books in enumerate(labels_nK.tolist()):
        for book, label in enumerate(books):
            if label >= 0:
                log_p_V = logits_nKV[row, book].log_softmax(-1)
                target = -(1 - smoothing) * log_p_V[label] - smoothing * log_p_V.sum() / CLASSES
                total = total + weights_K[book] * target
    return total


@pytest.mark.fast
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_chunked_cross_entropy(smoothing: float, chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and both gradients, whatever the chunks; and no larger block of logits than a chunk is ever made."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk_rows * BOOKS * CLASSES)
    made: list[int] = []
    run_layers = loss.run_layers

    def spy(*args: Any, **options: Any) -> Any:
        outputs, kept = run_layers(*args, **options)
        made.append(outputs[0].numel())
        return outputs, kept

    monkeypatch.setattr(loss, "run_layers", spy)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, requires_grad=True)
    head = nn.Linear(HIDDEN, BOOKS * CLASSES, bias=False)
    labels = torch.randint(-3, CLASSES, (ROWS, BOOKS), generator=generator)
    labels[labels < 0] = -100
    weights, marked = [0.5, 2.0, 0.0, 1.0], 7
    total, stats = head_cross_entropy(hidden, head, labels, torch.tensor(weights), smoothing, marked)
    (3 * total).backward()
    assert max(made) <= chunk_rows * BOOKS * CLASSES
    gradients = [hidden.grad, head.weight.grad]
    hidden.grad = head.weight.grad = None
    logits = (hidden @ head.weight.t()).view(ROWS, BOOKS, CLASSES)
    expected = naive_cross_entropy(logits, labels, weights, smoothing)
    (3 * expected).backward()
    torch.testing.assert_close(total, expected)
    for a, b in zip(gradients, (hidden.grad, head.weight.grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert stats[1].tolist() == [int(((logits.argmax(-1) == labels)[:, k]).sum()) for k in range(BOOKS)]
    ends = torch.where(labels == marked, labels, -100)
    for k in range(BOOKS):
        alone = [float(k == book) for book in range(BOOKS)]
        assert float(stats[2, k]) == pytest.approx(
            float(naive_cross_entropy(logits.detach(), ends, alone, smoothing)), rel=1e-4
        )
    assert stats[3].tolist() == (labels == marked).sum(0).tolist()
    assert stats[4].tolist() == ((logits.argmax(-1) == labels) & (labels == marked)).sum(0).tolist()


@pytest.fixture(scope="module")
def model(toy_tokenizer: PreTrainedTokenizerBase) -> HiggsAudioModel:
    return make_model(tiny_config(toy_tokenizer), 0).requires_grad_(False)


def make_batch(tokenizer: PreTrainedTokenizerBase, ids: SpecialIds, speakers: list[int]) -> Batch:
    rng = np.random.default_rng(0)
    samples = [
        random_sample(f"s{i}", rng, tokenizer, ids, frames=(3, 12), turns=1 + i % 2) for i in range(len(speakers))
    ]
    return collate(samples, 0.0, ids, speakers=speakers)


@pytest.mark.fast
def test_parts_and_weights_add_up(
    model: HiggsAudioModel, toy_tokenizer: PreTrainedTokenizerBase, toy_ids: SpecialIds
) -> None:
    """total = text weight * text + audio weight * weighted mean over codebooks + contrastive weight * contrastive."""
    batch, books = make_batch(toy_tokenizer, toy_ids, [0, 1, 2]), (0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0)
    parts = loss_of(model, batch, LossOptions(text=0.5, audio=2.0, contrastive=0.3, codebooks=books))
    means = (parts.sums.cross_entropy / parts.sums.labels).tolist()
    audio = sum(weight * mean for weight, mean in zip(books, means[1:], strict=True)) / sum(books)
    contrastive = float(parts.sums.contrastive / parts.sums.pairs)
    assert float(parts.total) == pytest.approx(0.5 * means[0] + 2.0 * audio + 0.3 * contrastive, rel=1e-5)
    assert contrastive > 0.01


def test_end_of_stream_is_counted_apart(
    model: HiggsAudioModel, toy_tokenizer: PreTrainedTokenizerBase, toy_ids: SpecialIds
) -> None:
    batch = make_batch(toy_tokenizer, toy_ids, [0, 0])
    whole = loss_of(model, batch)
    segments = batch.trained_segments
    assert segments == 3
    assert whole.sums.eos_labels.tolist() == [segments] * 8
    labels = batch["audio_labels_KL"]
    is_end = labels == toy_ids.stream_eos
    labels[is_end] = -100  # a view: the batch has lost its ends
    batch["label_counts"][1:] -= segments
    without = loss_of(model, batch)
    lost = whole.sums.cross_entropy[1:] - without.sums.cross_entropy[1:]
    torch.testing.assert_close(lost, whole.sums.eos_cross_entropy, atol=1e-3, rtol=1e-4)
    assert [*without.sums.eos_cross_entropy, *without.sums.eos_labels] == [0.0] * 16


def naive_contrastive(states_AH: torch.Tensor, owners: list[int], speakers: list[int]) -> float:
    """Mean over frames, cosine, softmax over references, share of the speaker's: one sample at a time."""
    pooled: dict[int, np.ndarray] = {}
    for owner in set(owners):
        frames = [states_AH[i].double().numpy() for i, o in enumerate(owners) if o == owner]
        mean = np.mean(frames, axis=0)
        pooled[owner] = mean / np.linalg.norm(mean)
    both = [s for s in range(len(speakers)) if 2 * s in pooled and 2 * s + 1 in pooled]
    total = 0.0
    for s in both:
        scores = {o: math.exp(float(pooled[2 * s + 1] @ pooled[2 * o]) / TEMPERATURE) for o in both}
        own = sum(score for o, score in scores.items() if speakers[o] == speakers[s])
        total -= math.log(own / sum(scores.values()))
    return total


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_contrastive_loss_is_a_naive_loop(data: st.DataObject) -> None:
    """Any number of samples (one, too), shared speakers, samples without a reference or a target; finite gradients."""
    count = data.draw(st.integers(1, 6))
    speakers = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    owners = data.draw(st.lists(st.integers(0, 2 * count - 1), min_size=1, max_size=20))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    states = torch.randn(len(owners), 5, generator=generator, requires_grad=True)
    arrays = {"owners": torch.tensor(owners), "speakers": torch.tensor(speakers)}

    class Pack(dict[str, torch.Tensor]):
        lengths, weight = [1] * count, 1

    loss_value = contrastive_loss(states, Pack(arrays))  # pyright: ignore[reportArgumentType]
    assert float(loss_value.detach()) == pytest.approx(naive_contrastive(states.detach(), owners, speakers), abs=1e-4)
    loss_value.backward()
    assert states.grad is not None
    assert torch.isfinite(states.grad).all()


def test_contrastive_loss_has_a_gradient_only_where_it_is_wanted(
    model: HiggsAudioModel, toy_tokenizer: PreTrainedTokenizerBase, toy_ids: SpecialIds
) -> None:
    batch = make_batch(toy_tokenizer, toy_ids, [0, 1, 2, 1])
    plain, weighted = (loss_of(model, batch, LossOptions(contrastive=weight)) for weight in (0.0, 1.0))
    assert [*plain.sums.contrastive, *plain.sums.pairs] == [0.0, 0.0]
    assert float(weighted.total) > float(plain.total)
    one = loss_of(model, make_batch(toy_tokenizer, toy_ids, [7]), LossOptions(contrastive=1.0))
    assert [*one.sums.contrastive, *one.sums.pairs] == [0.0, 1.0]
    assert torch.isfinite(one.total)

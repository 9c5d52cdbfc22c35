"""Batched generation against boson's own `generate`: the same tokens, the same stops, whatever the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.samples import random_sample
from higgs_tune.preprocess.input.layout import Reference, build_conversation
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.train.data.batch import collate
from higgs_tune.train.model import decoding
from higgs_tune.train.model.decoding import generate_batch
from higgs_tune.train.model.forward import hidden_states
from higgs_tune.train.model.generate import boson_generate
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.loss import LossOptions, pack_loss
from higgs_tune.train.model.sampling import Said, Sampling, request_of
from higgs_tune.train.toy import make_model, model_config
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

GREEDY = Sampling(temperature=0)


def small_model(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> HiggsAudioModel:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    config = model_config(tokenizer, **({"audio_dual_ffn_layers": [0, 1]} | changes))
    config.text_config.hidden_size, config.text_config.num_hidden_layers = 128, 2
    config.text_config.head_dim = 32
    config._attn_implementation = "sdpa"
    return make_model(config, seed=0).eval()


@pytest.fixture(scope="module")
def samples(toy_tokenizer: PreTrainedTokenizerBase, toy_ids: SpecialIds) -> list[Sample]:
    """The reference in the user's turn, of every other sample in an assistant's turn."""
    rng = np.random.default_rng(0)
    audio = {"type": "audio", "audio_url": "a.wav"}
    serve = [
        build_conversation("serve", f"word {i}", audio, [Reference(audio, "سَلَامٌ")] * (i % 3)) if i % 2 else None
        for i in range(12)
    ]
    return [random_sample(f"s{i}", rng, toy_tokenizer, toy_ids, frames=(2, 24), entry=serve[i]) for i in range(12)]


@pytest.fixture(scope="module")
def learned(samples: list[Sample], toy_tokenizer: PreTrainedTokenizerBase, toy_ids: SpecialIds) -> HiggsAudioModel:
    """A model that knows a few of the samples by heart, so that it ends texts and audio by itself."""
    model = small_model(toy_tokenizer)
    batch, options = collate(samples[:4], 0.0, toy_ids), LossOptions()
    weights = options.per_label(torch.cat([batch["label_counts"], batch["pairs"]]).float())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(120):
        loss = pack_loss(model, hidden_states(model, batch), batch, weights, options).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def assert_same(ours: Said, theirs: Said) -> None:
    assert ours.tokens == theirs.tokens
    assert (ours.codes_KT is None) == (theirs.codes_KT is None)
    if ours.codes_KT is not None and theirs.codes_KT is not None:
        np.testing.assert_array_equal(ours.codes_KT, theirs.codes_KT)
    assert ours.reached_eos == theirs.reached_eos


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_greedy_choice_gives_bosons_tokens(
    learned: HiggsAudioModel, samples: list[Sample], toy_ids: SpecialIds, batch_size: int
) -> None:
    """24 prompts of mixed lengths, with and without text to say first; some end by themselves, others are cut off."""
    cases = [(sample, speak) for sample in samples for speak in (True, False)]
    requests = [request_of(sample, toy_ids, speak=speak, max_frames=14) for sample, speak in cases]
    results = dict(generate_batch(learned, requests, toy_ids, GREEDY, batch_size=batch_size))
    assert sorted(results) == list(range(len(cases)))
    ended = 0
    for number, request in enumerate(requests):
        theirs = boson_generate(learned, request, toy_ids, GREEDY)
        assert_same(results[number], theirs)
        ended += theirs.reached_eos
    assert 4 <= ended < len(cases)


@pytest.mark.parametrize(
    "changes",
    [
        {"audio_dual_ffn_layers": [1]},
        {"audio_adapter_type": "dual_ffn_fast_forward", "audio_dual_ffn_layers": [1]},
        {"use_audio_out_self_attention": True},
    ],
    ids=["text layer", "fast forward", "audio attention"],
)
def test_every_kind_of_layer(
    samples: list[Sample], toy_tokenizer: PreTrainedTokenizerBase, toy_ids: SpecialIds, changes: dict[str, Any]
) -> None:
    model = small_model(toy_tokenizer, **changes)
    requests = [request_of(sample, toy_ids, speak=False, max_frames=6) for sample in samples[:6]]
    results = dict(generate_batch(model, requests, toy_ids, GREEDY, batch_size=4))
    for number, request in enumerate(requests):
        assert_same(results[number], boson_generate(model, request, toy_ids, GREEDY))


@pytest.mark.fast
def test_a_seed_gives_the_same_codes_in_any_batch(
    learned: HiggsAudioModel, samples: list[Sample], toy_ids: SpecialIds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not up to rounding: each step's logits are the same bit by bit, alone and in every batch."""
    sampling = Sampling(temperature=1.0, top_p=0.9, ras_window=7)
    requests = [request_of(s, toy_ids, speak=True, max_frames=12, seed=i) for i, s in enumerate(samples)]
    logits: dict[int, list[torch.Tensor]] = {}
    draw = decoding._Decoder._draw_codes

    def spy(self: Any, sequences: Any, logits_BKV: torch.Tensor) -> np.ndarray:
        for sequence, logits_KV in zip(sequences, logits_BKV, strict=True):
            logits.setdefault(sequence.number, []).append(logits_KV.clone())
        return draw(self, sequences, logits_BKV)

    monkeypatch.setattr(decoding._Decoder, "_draw_codes", spy)
    alone = dict(generate_batch(learned, requests, toy_ids, sampling, batch_size=1))
    alone_logits, logits = logits, {}
    for batch_size in (2, 7, 12):
        logits.clear()
        together = dict(generate_batch(learned, requests[::-1], toy_ids, sampling, batch_size=batch_size))
        for number in range(len(requests)):
            other = len(requests) - 1 - number
            assert_same(alone[number], together[other])
            assert all(map(torch.equal, alone_logits[number], logits[other]))


def choose_alike(monkeypatch: pytest.MonkeyPatch, *, least: bool) -> None:
    """In place of drawing, boson's loop and ours take the least likely code that may be drawn, or the second best."""

    def chosen(weights: torch.Tensor, never: torch.Tensor) -> torch.Tensor:
        if least:
            return weights.masked_fill(never, torch.inf).argmin(-1, keepdim=True)
        first, second = weights.topk(2).indices.split(1, -1)
        return torch.where(never.gather(-1, second), first, second)

    def multinomial(probabilities: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return chosen(probabilities, probabilities == 0)

    def inverse_cdf(scores_BKV: torch.Tensor, _: Any) -> np.ndarray:
        return chosen(scores_BKV, scores_BKV.isinf())[..., 0].numpy()

    monkeypatch.setattr(torch, "multinomial", multinomial)
    monkeypatch.setattr(torch.Tensor, "multinomial", multinomial)
    monkeypatch.setattr(decoding, "_inverse_cdf", inverse_cdf)


@pytest.mark.parametrize(
    ("sampling", "least"),
    [
        (Sampling(temperature=0, ras_window=7, ras_repeats=1), False),
        (Sampling(temperature=0, ras_window=3, ras_repeats=1), False),
        (Sampling(temperature=0.6, top_p=1.0, top_k=5), True),
        (Sampling(temperature=1.3, top_p=0.8, top_k=None, ras_window=7), True),
        (Sampling(temperature=1.0, top_p=0.9, top_k=20, ras_window=5), False),
    ],
    ids=["RAS", "short RAS", "top k", "top p, RAS", "all"],
)
def test_every_option_of_sampling_is_bosons(
    learned: HiggsAudioModel,
    samples: list[Sample],
    toy_ids: SpecialIds,
    monkeypatch: pytest.MonkeyPatch,
    sampling: Sampling,
    least: bool,
) -> None:
    """Which codes may be drawn, which are drawn again, and from what: told by a choice that is no draw."""
    choose_alike(monkeypatch, least=least)
    requests = [request_of(sample, toy_ids, speak=True, max_frames=16) for sample in samples]
    results = dict(generate_batch(learned, requests, toy_ids, sampling, batch_size=5))
    plain = dict(generate_batch(learned, requests, toy_ids, GREEDY, batch_size=5))
    for number, request in enumerate(requests):
        assert_same(results[number], boson_generate(learned, request, toy_ids, sampling))
    assert any(not np.array_equal(results[i].codes_KT, plain[i].codes_KT) for i in plain)  # pyright: ignore[reportArgumentType]


def test_sampled_codes_have_bosons_distribution(
    learned: HiggsAudioModel, samples: list[Sample], toy_ids: SpecialIds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probabilities of the first steps, as boson's loop draws from them, and the frequencies that we draw."""
    seen: list[torch.Tensor] = []
    multinomial = torch.multinomial

    def spy(probabilities: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        seen.append(probabilities.clone())
        return multinomial(probabilities, *rest, **named)

    monkeypatch.setattr(torch, "multinomial", spy)
    sampling, draws = Sampling(temperature=0.8, top_p=0.9), 400
    requests = [request_of(samples[5], toy_ids, speak=True, max_frames=1, seed=seed) for seed in range(draws)]
    boson_generate(learned, requests[0], toy_ids, sampling)
    monkeypatch.undo()
    codes = [result.codes_KT for _, result in generate_batch(learned, requests, toy_ids, sampling, batch_size=64)]
    first = np.array([int(codes_KT[0, 0]) for codes_KT in codes if codes_KT is not None and codes_KT.size])
    expected = seen[0][0].numpy()
    frequency = np.bincount(first, minlength=len(expected))[: len(expected)] / draws
    assert set(np.flatnonzero(frequency)) <= set(np.flatnonzero(expected))
    assert np.abs(frequency - expected).max() < 4 * np.sqrt(0.25 / draws)

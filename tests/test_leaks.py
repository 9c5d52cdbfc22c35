"""What a position may see, on every configuration: itself and what stands before it in its own sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from higgs_tune.shards.format import Sample
from higgs_tune.train.model import forward
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_forward import SWITCHES, Case, make_case, packed_logits
from transformers import PreTrainedTokenizerBase

SETTINGS = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=SWITCHES, ids=lambda s: "-".join(str(x) for x in s))
def case(request: pytest.FixtureRequest, toy_tokenizer: PreTrainedTokenizerBase) -> Case:
    return make_case(toy_tokenizer, *request.param)


def altered(case: Case, sample: Sample, seed: int) -> Sample:
    """Other codes, other tokens and other features at the same lengths."""
    rng = np.random.default_rng(seed)
    tokens_2L = sample.tokens_2L.copy()
    is_text = ~np.isin(tokens_2L[0], (case.ids.audio_in, case.ids.audio_out))
    tokens_2L[0, is_text] = rng.integers(5, 400, int(is_text.sum()))
    codes_KT = rng.integers(0, 1024, sample.codes_KT.shape).astype(np.uint16)
    mels = tuple(rng.uniform(-1, 1, mel.shape).astype(np.float16) for mel in sample.mels)
    return replace(sample, tokens_2L=tokens_2L, codes_KT=codes_KT, mels=mels)


@SETTINGS
@given(order=st.permutations(range(3)), seed=st.integers(0, 1 << 20))
@torch.no_grad()
def test_other_samples_of_a_pack_are_not_seen(case: Case, order: list[int], seed: int) -> None:
    """Whatever the others hold, and wherever a sample stands among them, its logits are bit-equal."""
    samples = [case.samples[i] for i in order]
    kept = seed % 3
    changed = [s if i == kept else altered(case, s, seed + i) for i, s in enumerate(samples)]
    lengths = case.batch(samples).lengths
    own = slice(sum(lengths[:kept]), sum(lengths[: kept + 1]))
    before, after = (packed_logits(case, case.batch(chosen)) for chosen in (samples, changed))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[own], b[own])
        assert not torch.equal(a, b)


@SETTINGS
@given(data=st.data())
def test_gradients_reach_only_what_may_be_seen(
    case: Case, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of one position's logits with respect to every row that enters the layers."""
    batch, entered = case.batch(), []
    make_context = forward.make_context

    def spy(model: Any, batch: Any, like: torch.Tensor, *rest: Any) -> forward.PackContext:
        entered.append(like.requires_grad_())
        return make_context(model, batch, like, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(forward, "make_context", spy)
        text, audio = packed_logits(case, batch)
    at = data.draw(st.integers(0, batch.positions - 1))
    weights = torch.randn(text.shape[1], generator=torch.Generator().manual_seed(at))
    (gradient,) = torch.autograd.grad(text[at] @ weights + audio[at].square().sum(), entered[0])
    seen = gradient[batch["to_sequence"].long()].abs().amax(1) > 0
    ends = np.cumsum(batch.lengths)
    begin = int(ends[ends <= at].max(initial=0))
    assert not seen[:begin].any()
    assert not seen[at + 1 :].any()
    assert seen[at]


@pytest.mark.fast
@torch.no_grad()
def test_features_are_seen_from_their_segment_on(case: Case) -> None:
    """Whisper features of a sample's last input segment change nothing before it."""
    if case.features == "none":
        assert "mel_rows" not in case.batch().layout
        return
    sample = next(sample for sample in case.samples if len(sample.mels) > 1)
    other = replace(sample, mels=(*sample.mels[:-1], -sample.mels[-1]))
    part = case.expand(sample)
    first = int(part.mel_at[np.flatnonzero(np.diff(part.mel_at) > 1)[-1] + 1])
    before, after = (packed_logits(case, case.batch([s])) for s in (sample, other))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:first], b[:first])
        assert not torch.equal(a[first:], b[first:])

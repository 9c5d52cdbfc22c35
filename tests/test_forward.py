"""The packed forward against boson's own, on every configuration of the architecture: logits, gradients, causality."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.samples import random_entry, random_sample, serve_entry
from higgs_tune.preprocess.checkpoints.checkpoint import special_ids
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import Expanded, SpecialIds, expand, mel_positions
from higgs_tune.train.data.batch import Batch, collate
from higgs_tune.train.model.forward import ExecOptions, hidden_states, label_states
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.loss import LossOptions, LossParts, pack_loss
from higgs_tune.train.model.reference import boson_inputs, reference_loss
from higgs_tune.train.toy import make_model, model_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MEL_BINS = 8
TOWER = {"num_mel_bins": MEL_BINS, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 1}
TOWER |= {"encoder_ffn_dim": 24, "max_source_positions": 1500}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
ADAPTERS = {"all dual": ("dual_ffn", [0, 1, 2]), "some dual": ("dual_ffn", [1])}
ADAPTERS |= {"forward all": ("dual_ffn_fast_forward", [0, 1, 2]), "forward some": ("dual_ffn_fast_forward", [0, 2])}
SWITCHES = list(itertools.product(ADAPTERS, (False, True), (False, True), (False, True)))


@dataclass(frozen=True)
class Case:
    """A model of one configuration, and samples for it."""

    model: HiggsAudioModel
    samples: list[Sample]
    ids: SpecialIds
    features: str

    def batch(self, samples: Sequence[Sample] | None = None, **options: Any) -> Batch:
        return collate(self.samples if samples is None else samples, 0.0, self.ids, features=self.features, **options)

    def boson(self) -> dict[str, Any]:
        pad = self.model.config.pad_token_id
        return boson_inputs(self.samples, self.ids, pad, mel=self.features == "mel")

    def expand(self, sample: Sample) -> Expanded:
        return expand([sample], self.ids, [mel_positions(sample, self.features)])

    def loss(self, batch: Batch, options: LossOptions) -> LossParts:
        counts = torch.cat([batch["label_counts"], batch["pairs"]]).float()
        return pack_loss(self.model, hidden_states(self.model, batch), batch, options.per_label(counts), options)


def make_case(
    tokenizer: PreTrainedTokenizerBase, adapter: str, attention: bool, tower: bool, projector: bool, count: int = 3
) -> Case:
    kind, layers = ADAPTERS[adapter]
    changes: dict[str, Any] = {"audio_adapter_type": kind, "audio_dual_ffn_layers": layers}
    changes |= {"use_audio_out_self_attention": attention}
    changes |= {"use_audio_out_embed_projector": projector, "audio_embed_avg": projector}
    if tower:
        changes |= {"skip_audio_tower": False, "audio_encoder_config": TOWER}
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    config = model_config(tokenizer, **changes)
    for name, value in SMALL.items():
        setattr(config.text_config, name, value)
    config._attn_implementation = config.audio_encoder_config._attn_implementation = "sdpa"
    model = make_model(config, seed=1).requires_grad_(False).eval()
    ids = special_ids(config.to_dict(), Path())
    rng = np.random.default_rng(1)
    made: dict[str, Any] = {"mel_bins": MEL_BINS if tower else 0, "frames": (3, 16)}
    entries = [serve_entry(rng) if i == 1 else random_entry(rng, turns=1 + i % 3) for i in range(count - 1)]
    samples = [random_sample(f"s{i}", rng, tokenizer, ids, entry=entry, **made) for i, entry in enumerate(entries)]
    samples.append(random_sample("masked", rng, tokenizer, ids, turns=3 if count > 3 else 2, start_index=3, **made))
    return Case(model, samples, ids, "mel" if tower else "none")


@pytest.fixture(scope="module", params=SWITCHES, ids=lambda s: "-".join(str(x) for x in s))
def case(request: pytest.FixtureRequest, toy_tokenizer: PreTrainedTokenizerBase) -> Case:
    return make_case(toy_tokenizer, *request.param)


@pytest.fixture(scope="module")
def plain(toy_tokenizer: PreTrainedTokenizerBase) -> Case:
    """The released configuration."""
    return make_case(toy_tokenizer, "forward all", attention=False, tower=False, projector=False, count=6)


def packed_logits(case: Case, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Text logits [N, V] and audio logits [N, K, C] at every position of a pack, in sequence order."""
    model = case.model
    hidden = model.norm(hidden_states(model, batch))[batch["to_sequence"].long()]
    audio = model.audio_decoder_proj.audio_lm_head(hidden)
    return model.audio_decoder_proj.text_lm_head(hidden), audio.view(len(audio), case.ids.codebooks, -1)


@pytest.mark.fast
@torch.no_grad()
def test_logits_equal_boson(case: Case) -> None:
    reference = case.model(**case.boson())
    text, audio = packed_logits(case, case.batch())
    start, audio_parts = 0, []
    for row, sample in enumerate(case.samples):
        part = case.expand(sample)
        at = slice(start, start + part.length)
        torch.testing.assert_close(text[at], reference.logits[row, : part.length], atol=1e-5, rtol=0)
        audio_parts += [audio[start + a : start + a + width] for a, width, is_out in part.segments if is_out]
        start += part.length
    torch.testing.assert_close(torch.cat(audio_parts), reference.audio_logits, atol=1e-5, rtol=0)


def test_gradients_equal_boson(case: Case) -> None:
    """The loss of boson's forward on its collator's labels, shifted by one, and every parameter's gradient."""
    options = LossOptions(text=1.0, audio=2.0, codebooks=(1, 2, 1, 1, 1, 1, 1, 3), smoothing=0.1)
    case.model.requires_grad_(True)
    runs, batch = [], case.batch()
    weights = options.per_label(torch.cat([batch["label_counts"], batch["pairs"]]).float())
    for run in (lambda: reference_loss(case.model, case.boson(), weights, options), lambda: case.loss(batch, options)):
        parts = run()
        parts.total.backward()
        gradients = {name: parameter.grad for name, parameter in case.model.named_parameters()}
        case.model.zero_grad(set_to_none=True)
        runs.append((parts, gradients))
    case.model.requires_grad_(False)
    (boson, expected), (packed, gradients) = runs
    torch.testing.assert_close(packed.total, boson.total, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(vars(packed.sums), vars(boson.sums), atol=1e-4, rtol=1e-5)
    compared = 0
    for name, wanted in expected.items():
        got = gradients[name]
        if wanted is None or got is None:
            assert wanted is None or not wanted.any(), name
            assert got is None or not got.any(), name
            continue
        error, scale = float((got - wanted).abs().max()), float(wanted.abs().max()) + 1e-9
        assert error <= 5e-5 * scale, (name, error, scale)
        compared += 1
    assert compared >= 30


def test_plain_kernels_give_the_same_numbers(case: Case) -> None:
    """The forward that a reader can check against boson's, and the fast one: loss, and every parameter's gradient."""
    batch, parameters = case.batch(), list(case.model.requires_grad_(True).parameters())
    weights = LossOptions().per_label(torch.cat([batch["label_counts"], batch["pairs"]]).float())
    results = []
    for plain in (True, False):
        states = label_states(case.model, batch, ExecOptions(plain=plain))
        total = pack_loss(case.model, states, batch, weights, LossOptions(), at_labels=True).total
        results.append([total, *torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)])
    case.model.requires_grad_(False)
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@torch.no_grad()
def test_nothing_looks_ahead(case: Case, data: st.DataObject) -> None:
    """Permuting or changing what lies ahead leaves every earlier logit bit-equal, whatever the configuration."""
    sample = case.samples[data.draw(st.integers(0, len(case.samples) - 1))]
    kind = data.draw(st.sampled_from(["frames", "tokens"]))
    part = case.expand(sample)
    if kind == "frames":
        segment = data.draw(st.integers(0, len(part.segments) - 1))
        frames = sample.segment_frames[segment]
        first = data.draw(st.integers(0, frames - 1))
        begin = sum(sample.segment_frames[:segment])
        codes = sample.codes_KT.copy()
        order = data.draw(st.permutations(range(first, frames)))
        codes[:, begin + first : begin + frames] = (codes[:, [begin + i for i in order]] + 7) % 1024
        changed, unseen = replace(sample, codes_KT=codes), part.segments[segment][0] + 1 + first
    else:
        positions = np.flatnonzero(~np.isin(sample.tokens_2L[0], (case.ids.audio_in, case.ids.audio_out)))
        token = int(positions[data.draw(st.integers(1, len(positions) - 1))])
        tokens = sample.tokens_2L.copy()
        tokens[0, token] = (tokens[0, token] + 1) % 200 + 5
        changed, unseen = replace(sample, tokens_2L=tokens), int(part.text_at[np.searchsorted(positions, token)])
    before, after = (packed_logits(case, case.batch([s])) for s in (sample, changed))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:unseen], b[:unseen])
    assert any(not torch.equal(a[unseen:], b[unseen:]) for a, b in zip(before, after, strict=True))


@torch.no_grad()
def naive_losses(case: Case, sample: Sample) -> dict[tuple[str, int, int], float]:
    """Cross entropy of every labelled prediction of one sample, one at a time: (kind, position, codebook) -> loss."""
    text, audio = packed_logits(case, case.batch([sample]))
    part, losses = case.expand(sample), {}
    for at, label in zip(part.text_label_at, part.text_labels, strict=True):
        losses["text", int(at), 0] = float(-text[at].log_softmax(-1)[int(label)])
    for at, labels in zip(part.audio_label_at, part.audio_labels_KB.T, strict=True):
        for codebook, label in enumerate(labels):
            if label >= 0:
                losses["audio", int(at), codebook] = float(-audio[at, codebook].log_softmax(-1)[int(label)])
    return losses


@torch.no_grad()
def test_loss_is_a_naive_loop_over_unpacked_samples(plain: Case) -> None:
    losses = [naive_losses(plain, sample) for sample in plain.samples]
    parts = plain.loss(plain.batch(), LossOptions())
    for k in range(plain.ids.codebooks + 1):
        wanted = ("text", 0) if k == 0 else ("audio", k - 1)
        naive = [loss for of_sample in losses for (kind, _, book), loss in of_sample.items() if (kind, book) == wanted]
        assert len(naive) == int(parts.sums.labels[k])
        assert float(parts.sums.cross_entropy[k]) == pytest.approx(sum(naive), rel=1e-5)
    segments = sum(len(case_segments(plain, sample)) for sample in plain.samples)
    assert parts.sums.eos_labels.tolist() == [segments] * plain.ids.codebooks


def case_segments(case: Case, sample: Sample) -> list[int]:
    """First positions of the segments that are trained on."""
    part = case.expand(sample)
    return [start for start, _, is_out in part.segments if is_out and start in part.audio_label_at]


def test_masked_turns_have_no_labels(plain: Case) -> None:
    """start_index 3 leaves only the second and third answers to train on."""
    part = plain.expand(plain.samples[-1])
    outputs = [(start, width) for start, width, is_out in part.segments if is_out]
    trained = {int(at) for at in part.audio_label_at}
    assert trained == {at for start, width in outputs[1:] for at in range(start, start + width - 1)}
    assert part.text_label_at.min() > outputs[0][0]


def test_reference_audio_is_trained_on_only_when_asked(plain: Case) -> None:
    sample = plain.samples[0]
    inputs = [start for start, _, is_out in plain.expand(sample).segments if not is_out]
    assert not set(inputs) & set(plain.expand(sample).audio_label_at.tolist())
    asked = expand([sample], plain.ids, train_inputs=True)
    assert set(inputs) <= set(asked.audio_label_at.tolist())
    assert int((asked.audio_labels_KB[0] >= 0).sum()) == sum(sample.segment_frames) + len(sample.segment_frames)


@torch.no_grad()
def test_near_uniform_at_random_init(plain: Case) -> None:
    """A loss near zero on random weights would mean that the model sees its targets."""
    parts = plain.loss(plain.batch(), LossOptions())
    means = parts.sums.cross_entropy / parts.sums.labels
    uniform = torch.tensor([float(plain.model.vocab_size), *[1026.0] * plain.ids.codebooks]).log()
    assert (means > 0.95 * uniform).all(), means
    assert (means < 1.15 * uniform).all(), means


@torch.no_grad()
def test_neighbours_in_a_pack_do_not_matter(case: Case) -> None:
    samples = case.samples
    alone, _ = packed_logits(case, case.batch(samples[:1]))
    first, _ = packed_logits(case, case.batch([samples[0], samples[2]]))
    second, _ = packed_logits(case, case.batch([samples[2], samples[0]]))
    torch.testing.assert_close(first[: len(alone)], alone, atol=2e-6, rtol=0)
    torch.testing.assert_close(second[-len(alone) :], alone, atol=2e-6, rtol=0)


def test_samples_without_audio(case: Case) -> None:
    """Alone or among others they get the same states; whatever trains gets a gradient, as DDP waits for one."""
    whole = case.samples[0]
    kept = (whole.tokens_2L[0] != case.ids.audio_in) & (whole.tokens_2L[0] != case.ids.audio_out)
    meta, no_codes_KT = whole.meta | {"segments": []}, np.zeros((case.ids.codebooks, 0), np.uint16)
    texts = Sample("text", meta, whole.tokens_2L[:, kept], no_codes_KT, ())
    alone, among, nothing = (case.batch(chosen) for chosen in ([texts], [whole, texts, *case.samples[1:]], []))
    with torch.no_grad():
        states = hidden_states(case.model, among)[among["to_sequence"].long()].split(among.lengths)[1]
        torch.testing.assert_close(hidden_states(case.model, alone), states, atol=1e-5, rtol=1e-5)
    heads = case.model.audio_decoder_proj
    trained = {n: p for n, p in case.model.named_parameters() if ".q_proj." in n or "audio_encoder_proj" in n}
    trained |= {f"heads.{n}": p for n, p in heads.named_parameters()}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    for batch in (alone, among, nothing):
        case.loss(batch, LossOptions()).total.backward()
        assert not [n for n, p in trained.items() if p.grad is None]
        case.model.zero_grad(set_to_none=True)
    case.model.requires_grad_(False)


def test_zero_weight_pack_has_zero_gradients(plain: Case) -> None:
    options = LossOptions(contrastive=1.0)
    batch = plain.batch(plain.samples[:2], weight=0, speakers=[0, 1])
    plain.model.requires_grad_(True)
    parts = pack_loss(plain.model, hidden_states(plain.model, batch), batch, torch.ones(10), options)
    parts.total.backward()
    plain.model.requires_grad_(False)
    assert parts.total.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in plain.model.parameters())
    plain.model.zero_grad(set_to_none=True)


def test_contrastive_loss(plain: Case) -> None:
    """Finite and 0 for one sample; falls when target states move towards their own speaker's references."""
    one = plain.loss(plain.batch(plain.samples[:1], speakers=[3]), LossOptions(contrastive=1.0))
    assert [*one.sums.contrastive, *one.sums.pairs] == [0.0, 1.0]
    assert torch.isfinite(one.total)
    from higgs_tune.train.model.loss import contrastive_loss

    batch = plain.batch(plain.samples[:3], speakers=[0, 1, 2])
    target = torch.eye(3)[batch["owners"] // 2] * 4
    rng = torch.Generator().manual_seed(0)
    mixed = torch.randn(len(target), 3, generator=rng, requires_grad=True)
    apart, near = contrastive_loss(mixed, batch), contrastive_loss(target + 0.01 * mixed, batch)
    assert near.item() < 0.1 < apart.item()
    apart.backward()
    assert mixed.grad is not None
    assert torch.isfinite(mixed.grad).all()
    same = plain.batch(plain.samples[:3], speakers=[5, 5, 5])
    assert float(contrastive_loss(mixed.detach(), same)) == pytest.approx(0, abs=1e-5)


def test_cuda_attention_is_called_as_torch_wants_it(plain: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable-length kernel runs on a GPU only; here a naive stand-in checks how it is called."""
    from higgs_tune.train.model import attention, forward

    asks = [True]

    def stand_in(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        cu_q, cu_k, longest_q, longest_k = args
        assert torch.equal(cu_q, cu_k)
        assert cu_q.dtype == torch.int32
        assert longest_q == longest_k == int(cu_q.diff().max())
        assert options.pop("window_size") == (-1, 0)
        assert options.pop("enable_gqa", False) == asks[0]
        assert not options
        groups, out = q.shape[1] // k.shape[1], torch.zeros_like(q)
        for a, b in itertools.pairwise(cu_q.tolist()):
            scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b].repeat_interleave(groups, 1)) / q.shape[-1] ** 0.5
            scores = scores.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), -torch.inf)
            out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[a:b].repeat_interleave(groups, 1))
        return out

    expected = packed_logits(plain, plain.batch())[0]
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    for asks[0] in (True, False):
        monkeypatch.setattr(attention, "_varlen_asks_for_gqa", lambda: asks[0])
        monkeypatch.setattr(forward, "causal_attention", attention._flash)
        torch.testing.assert_close(packed_logits(plain, plain.batch())[0], expected, atol=1e-5, rtol=0)


def test_rows_with_labels_alone_give_the_same_loss_and_gradients(case: Case) -> None:
    """The last layer leaves out what no label needs."""
    options, batch = LossOptions(), case.batch()
    weights = options.per_label(torch.cat([batch["label_counts"], batch["pairs"]]).float())
    case.model.requires_grad_(True)
    gradients = []
    for at_labels in (False, True):
        hidden = label_states(case.model, batch) if at_labels else hidden_states(case.model, batch)
        pack_loss(case.model, hidden, batch, weights, options, at_labels=at_labels).total.backward()
        gradients.append([p.grad for p in case.model.parameters() if p.grad is not None])
        case.model.zero_grad(set_to_none=True)
    case.model.requires_grad_(False)
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)

"""Training and inference agree: what a model learned by our loss, boson's own `generate` says exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.samples import random_sample
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.train.data.batch import collate
from higgs_tune.train.model.forward import hidden_states
from higgs_tune.train.model.generate import boson_generate
from higgs_tune.train.model.loss import LossOptions, pack_loss
from higgs_tune.train.model.sampling import Sampling, request_of
from higgs_tune.train.toy import make_model, model_config
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def test_overfitted_model_says_its_targets(toy_tokenizer: PreTrainedTokenizerBase, toy_ids: SpecialIds) -> None:
    """Four samples learned by heart: greedy generation gives their text and all 8 codebooks, EOS included."""
    assert isinstance(toy_tokenizer, PreTrainedTokenizerFast)
    rng = np.random.default_rng(0)
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, toy_ids, frames=(4, 14)) for i in range(4)]
    config = model_config(toy_tokenizer)
    config.text_config.hidden_size, config.text_config.num_hidden_layers = 128, 2
    config.text_config.head_dim, config.audio_dual_ffn_layers = 32, [0, 1]
    config._attn_implementation = "sdpa"
    model = make_model(config, seed=0)
    batch, options = collate(samples, 0.0, toy_ids), LossOptions()
    weights = options.per_label(torch.cat([batch["label_counts"], batch["pairs"]]).float())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    parts = None
    for _ in range(120):
        parts = pack_loss(model, hidden_states(model, batch), batch, weights, options)
        optimizer.zero_grad()
        parts.total.backward()
        optimizer.step()
    assert parts is not None
    assert torch.equal(parts.sums.correct, parts.sums.labels)  # every prediction is right, teacher-forced

    model.eval()
    for sample in samples:
        target = sample.codes_KT[:, -sample.segment_frames[-1] :]
        for speak in (True, False):
            request = request_of(sample, toy_ids, speak=speak, max_frames=30)
            said = boson_generate(model, request, toy_ids, Sampling(temperature=0))
            assert said.reached_eos
            assert said.codes_KT is not None
            np.testing.assert_array_equal(said.codes_KT, target)
        labelled = [int(label) for label in sample.tokens_2L[1] if label >= 0]
        assert said.tokens == labelled


@pytest.mark.fast
def test_cut_off_generation_is_known(toy_tokenizer: PreTrainedTokenizerBase, toy_ids: SpecialIds) -> None:
    """An untrained model runs on; it is stopped, and says so."""
    assert isinstance(toy_tokenizer, PreTrainedTokenizerFast)
    sample = random_sample("s", np.random.default_rng(0), toy_tokenizer, toy_ids)
    config = model_config(toy_tokenizer)
    config._attn_implementation = "sdpa"
    request = request_of(sample, toy_ids, speak=True, max_frames=8, seed=1)
    said = boson_generate(make_model(config, seed=0).eval(), request, toy_ids, Sampling())
    assert not said.reached_eos
    assert said.codes_KT is not None
    assert 0 < said.codes_KT.shape[1] <= 16
    again = boson_generate(make_model(config, seed=0).eval(), request, toy_ids, Sampling())
    assert again.codes_KT is not None
    np.testing.assert_array_equal(said.codes_KT, again.codes_KT)

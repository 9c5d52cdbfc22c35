"""Intervals: coverage of the truth, pairing, and figures that nothing stands for."""

from __future__ import annotations

import numpy as np
import pytest
from higgs_tune.evaluate.bootstrap import resample
from higgs_tune.evaluate.figures import changes, shuffled


@pytest.mark.fast
def test_intervals_cover_the_truth_in_95_percent_of_1000_evaluations() -> None:
    """Corpus rate, mean of utterance rates and a skewed mean, 150 utterances each, against their true values."""
    rng = np.random.default_rng(1)
    evaluations, utterances = 1000, 150
    length = rng.integers(3, 25, (utterances, evaluations)).astype(float)
    chance = rng.beta(1, 9, (utterances, evaluations))  # an utterance's own error rate; the mean is 0.1
    errors = rng.binomial(length.astype(int), chance).astype(float)
    skewed = rng.exponential(1.0, (utterances, evaluations))
    ones = np.ones_like(length)
    for numerators, denominators, truth in (
        (errors, length, 0.1),
        (errors / length, ones, 0.1),
        (skewed, ones, 1.0),
    ):
        intervals = [
            resample_all.interval(i) for resample_all in [resample(numerators, denominators)] for i in range(1000)
        ]
        covered = np.mean([given["low"] <= truth <= given["high"] for given in intervals if given])
        assert 0.935 <= covered <= 0.965


@pytest.mark.fast
def test_differences_are_paired() -> None:
    """Two systems that fail on the same utterances: the paired interval is far narrower than the two apart."""
    rng = np.random.default_rng(0)
    hard = rng.exponential(0.2, 300)
    values = np.stack([hard, hard + 0.02 + rng.normal(0, 0.01, 300)], 1)
    both = resample(values, np.ones_like(values))
    one, two, apart = both.interval(0), both.interval(1), both.difference(1, 0)
    assert one and two and apart
    assert 0.018 < apart["low"] < apart["mean"] < apart["high"] < 0.022
    assert one["high"] > two["low"]
    again = resample(values[:, ::-1], np.ones_like(values)).difference(0, 1)
    assert again == apart


@pytest.mark.fast
def test_figures_without_values() -> None:
    numerators, denominators = np.array([[1.0, 0], [0, 0], [2, 0]]), np.array([[1.0, 0], [0, 0], [1, 0]])
    resampled = resample(numerators, denominators)
    interval = resampled.interval(0)
    assert interval and interval["mean"] == 1.5 and interval["n"] == 2
    assert 1 <= interval["low"] <= interval["high"] <= 2
    assert resampled.interval(1) is None and resampled.difference(0, 1) is None
    one = resample(np.ones((1, 1)), np.ones((1, 1))).interval(0)
    assert one == {"mean": 1, "low": 1, "high": 1, "n": 1}


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((40, 2))
    whole = resample(values, np.ones_like(values))
    monkeypatch.setattr("higgs_tune.evaluate.bootstrap._CELLS", 400)
    parts = resample(values, np.ones_like(values))
    np.testing.assert_allclose(parts.ratios_BM, whole.ratios_BM)


@pytest.mark.fast
def test_the_floor_takes_other_texts() -> None:
    texts = ["a", "b", "a", "a", "c", "a"]
    other = shuffled(texts)
    assert all(texts[at] != texts[number] for number, at in enumerate(other))
    assert sorted(shuffled([str(i) for i in range(50)])) == list(range(50))
    assert all(at != number for number, at in enumerate(shuffled(["same"] * 3)))


@pytest.mark.fast
def test_only_what_is_more_than_chance_is_a_change() -> None:
    def bound(low: float, high: float) -> dict[str, float]:
        return {"mean": (low + high) / 2, "low": low, "high": high, "n": 9}

    paired = {
        "tuned": {
            "wer": bound(-0.2, -0.1),
            "cer": bound(-0.2, 0.1),
            "sim": bound(-0.3, -0.1),
            "quality": bound(1e-17, 1e-17),
            "run_on_rate": bound(0.1, 0.2),
            "silence": bound(0.1, 0.2),
        }
    }
    assert changes(paired) == {"tuned": {"better": ["wer"], "worse": ["sim", "run_on_rate"]}}

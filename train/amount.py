"""How much a run trains on, for --estimate: from the totals of manifests, or from hours of speech."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from higgs_tune.shards.format import FRAME_RATE_HZ
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.model.flops import Rows

SAMPLE = Rows.typical(489)  # of the benchmarks' lengths, docs/benchmarks.md
SAMPLE_S = 6.2  # of target speech in it
FILL = 0.994  # of a pack, as the plan reaches it
SEGMENTS = 2  # of a sample: a reference and a target
EXTRA_POSITIONS = 9  # of a segment, beyond its frames


@dataclass(frozen=True)
class Amount:
    """What an epoch trains on.

    samples: of training. rows: of all of them. hours: of audio, or of target speech where that is given. source: where
    it is from, for people.
    """

    samples: float
    rows: Rows
    hours: float
    source: str

    def __mul__(self, factor: float) -> Amount:
        return Amount(self.samples * factor, self.rows * factor, self.hours * factor, self.source)

    def packs(self, tokens_per_pack: int) -> int:
        return max(1, math.ceil(self.rows.positions / (FILL * tokens_per_pack)))


def amount_of(config: TrainConfig, manifests: list[dict[str, Any]], features: str) -> Amount:
    """What an epoch trains on: the sets' training samples, or `--hours` of speech, by default one."""
    if not manifests:
        hours = config.planning.hours or 1.0
        samples = hours * 3600 / SAMPLE_S
        rows = _with_whisper(SAMPLE * samples, samples, FRAME_RATE_HZ * SAMPLE_S * samples, features)
        return Amount(samples, _with_labels(config, rows), hours, f"{hours:,.4g} h of target speech")
    amounts = [_amount_of_set(config, manifest, features) for manifest in manifests]
    if weights := config.data.mix_weights:  # one pass over the first set; the others by their shares of packs
        of_weight = amounts[0].rows.positions / weights[0]
        amounts = [
            amount * (weight * of_weight / max(1, amount.rows.positions))
            for amount, weight in zip(amounts, weights, strict=True)
        ]
    hours = sum(amount.hours for amount in amounts)
    rows = Rows(*(sum(values) for values in zip(*(vars(amount.rows).values() for amount in amounts), strict=True)))
    source = f"{hours:,.4g} h of audio, references included, by {len(amounts)} manifest{'s' * (len(amounts) > 1)}"
    return Amount(sum(amount.samples for amount in amounts), rows, hours, source)


def _amount_of_set(config: TrainConfig, manifest: dict[str, Any], features: str) -> Amount:
    """The training samples of a set, by its totals."""
    totals, held_out = manifest["totals"], config.validation.val_fraction
    samples = totals["samples"]
    share = 1 - (totals["validation_samples"] / max(1, samples) if held_out is None else held_out)
    frames = totals.get("audio_frames", FRAME_RATE_HZ * totals["seconds"])
    audio = min(totals["tokens"], frames + samples * SEGMENTS * EXTRA_POSITIONS)
    positions, references = totals["tokens"], max(0, frames - totals["audio_labels"])
    rows = Rows(positions, positions - audio, audio, positions**2 / max(1, samples), totals["text_labels"],
                totals["audio_labels"])  # fmt: skip
    rows = _with_whisper(rows, samples, references, features)
    return Amount(samples, _with_labels(config, rows), totals["seconds"] / 3600, "") * share


def _with_whisper(rows: Rows, samples: float, frames: float, features: str) -> Rows:
    """The rows with Whisper features of one reference a sample: `frames` text rows more, as many as it has codes."""
    if features == "none":
        return rows
    positions, windows = rows.positions + frames, samples if features == "mel" else 0.0
    return replace(rows, positions=positions, text=rows.text + frames, squares=positions**2 / max(1, samples),
                   windows=windows)  # fmt: skip


def _with_labels(config: TrainConfig, rows: Rows) -> Rows:
    """The rows with the labels that have a loss."""
    text = rows.text_labels if config.loss.text_loss_weight else 0.0
    audio = rows.audio_labels if config.with_audio else 0.0
    return replace(rows, text_labels=text, audio_labels=audio)

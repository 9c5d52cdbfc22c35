"""The collapse watch: figures that a healthy run does not show, and what they mean.

In: lines of metrics, as they are logged. Out: warnings, each once until its sign has gone.
Guarantees (test_watch.py): a run whose audio loss falls far under validation, whose text loss stays above a uniform
guess, with a codebook at chance, or that never ends a clip, is warned of; a healthy one is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from higgs_tune.shards.durable import read_json_lines
from higgs_tune.train.eval_sets import HELD_OUT

IN_A_ROW = 2  # reports that must show a sign before it is believed
SHARE_OF_VALIDATION = 0.5  # training's audio loss under this share of validation's
TOO_LOW = 0.5  # nats of audio loss that no codes of speech support
LEARNED = 0.5  # nats under the uniform loss: a codebook that has learned something
NEAR_CHANCE = 0.05  # nats
SLOW = 200  # steps after the warm-up by which every codebook has learned something
MANY_ENDS = 400  # EOS labels without a right one


@dataclass
class CollapseWatch:
    """Looks at each line of metrics.

    vocabulary, codebook: number of classes of the two heads. warmup: steps in which the signs are not looked at.
    """

    vocabulary: int
    codebook: int
    warmup: int
    _seen: dict[str, int] = field(default_factory=dict)
    _validation: float | None = None
    _ends: int = 0

    def resume(self, path: Path) -> None:
        """Take up what earlier starts of a run saw, so that each warning comes as if there had been one start.

        Args:
            path: their metrics.jsonl.

        Raises:
            UserError: a line of it is damaged.
        """
        for line in read_json_lines(path):
            self.look(line)

    def look(self, metrics: dict[str, Any]) -> list[tuple[str, str]]:
        """Warnings that a line gives rise to: names and messages."""
        if metrics["kind"] == "eval" and metrics.get("set", HELD_OUT) == HELD_OUT:
            self._validation = _number(metrics.get("audio_loss"))
        if metrics["kind"] != "train" or metrics["step"] <= self.warmup:
            return []
        signs = dict(self._signs(metrics))
        self._seen = {name: self._seen.get(name, 0) + 1 for name in signs}
        return [(name, signs[name]) for name, times in self._seen.items() if times == IN_A_ROW]

    def _signs(self, metrics: dict[str, Any]) -> Iterator[tuple[str, str]]:
        audio, text = _number(metrics.get("audio_loss")), _number(metrics.get("text_loss"))
        if audio is not None:
            yield from self._low_audio(audio)
        uniform = math.log(self.vocabulary)
        if text is not None and text > uniform + 3 / math.sqrt(max(1, metrics["text_labels"])):
            yield (
                "text_above_uniform",
                f"the text loss {text:.2f} is above that of a uniform guess ({uniform:.2f}): labels compared at the "
                "wrong position, another tokenizer, or a learning rate that has destroyed the model",
            )
        yield from self._chance(metrics)
        yield from self._endless(metrics)

    def _low_audio(self, audio: float) -> Iterator[tuple[str, str]]:
        seen = self._validation
        if seen is not None and audio < SHARE_OF_VALIDATION * seen:
            yield (
                "audio_below_validation",
                f"the audio loss {audio:.2f} is under half of validation's {seen:.2f}: the model learns its training "
                "clips by heart; stop earlier, take fewer epochs or more data",
            )
        elif audio < TOO_LOW:
            yield (
                "audio_too_low",
                f"the audio loss {audio:.2f} is lower than any model reaches on speech that it has not seen: it copies "
                "its input (labels not shifted) or has learned its clips by heart. Listen to samples (--sample_steps)",
            )

    def _chance(self, metrics: dict[str, Any]) -> Iterator[tuple[str, str]]:
        uniform = math.log(self.codebook)
        losses = [_number(value) for value in metrics.get("audio_loss_per_codebook") or ()]
        known = [value for value in losses if value is not None]
        has_learned = bool(known) and min(known) < uniform - LEARNED
        for number, value in enumerate(losses):
            if (
                value is not None
                and value > uniform - NEAR_CHANCE
                and (has_learned or metrics["step"] > self.warmup + SLOW)
            ):
                yield (
                    f"codebook_{number}_at_chance",
                    f"codebook {number} is at chance ({value:.2f}, a uniform guess {uniform:.2f}): its codes are "
                    "another codec's, or its part of the head does not learn (--train_audio_head)",
                )

    def _endless(self, metrics: dict[str, Any]) -> Iterator[tuple[str, str]]:
        right = _number(metrics.get("eos_accuracy"))
        if right is None:
            return
        self._ends = 0 if right > 0 else self._ends + int(metrics["eos_labels"])
        if self._ends >= MANY_ENDS:
            yield (
                "end_never_right",
                f"none of the last {self._ends} EOS labels was foreseen: generated speech will run on. Clips cut in "
                "the middle of a word have no end to learn; early in a run it passes",
            )


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None

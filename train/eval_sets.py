"""Names of evaluation sets and of their metrics, as people write them in options.

In: `NAME=SHARDS`, `NAME:metric`, `NAME:metric:tolerance`. Out: checked values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from higgs_tune.shards.errors import UserError

HELD_OUT = "held_out"  # the validation split of the training sets
SAMPLES = "samples"  # the generated samples
LOSSES = ("loss", "text_loss", "audio_loss", "eos_loss")
ACCURACIES = ("text_accuracy", "audio_accuracy", "eos_accuracy")
SCORES = ("cer", "similarity")  # of generated samples
HIGHER_IS_BETTER = (*ACCURACIES, "similarity")
AUDIO_ONLY = ("audio_loss", "eos_loss", "audio_accuracy", "eos_accuracy")
_NAME = re.compile(r"[^\s=:/\\]+")


@dataclass(frozen=True)
class EvalMetric:
    """A metric of one evaluation set, written `NAME:metric`."""

    set_name: str
    metric: str

    def __str__(self) -> str:
        return f"{self.set_name}:{self.metric}"

    def value_in(self, results: Mapping[str, Mapping[str, Any]]) -> float | None:
        """Its value in the metrics of each set; None where there is no label for it."""
        value = results.get(self.set_name, {}).get(self.metric)
        return None if value is None else float(value)

    def gain(self, value: float, before: float) -> float:
        """How much better a value is than an earlier one: above 0 is better, for every metric."""
        return value - before if self.metric in HIGHER_IS_BETTER else before - value


@dataclass(frozen=True)
class Guard:
    """A metric that may get worse than the base model's by at most `tolerance`."""

    metric: EvalMetric
    tolerance: float

    def is_broken(self, value: float, base: float) -> bool:
        """Whether a value is worse than allowed; one that is not finite is."""
        return not -self.metric.gain(value, base) <= self.tolerance


def parse_sets(given: Iterable[str]) -> dict[str, str]:
    """Locations of evaluation sets by name, from `NAME=SHARDS`.

    Raises:
        UserError: no name, a name twice, or the name of the held-out split.
    """
    sets: dict[str, str] = {}
    for text in given:
        name, equals, location = text.partition("=")
        if not (equals and location and _NAME.fullmatch(name)):
            raise UserError("--eval_data_dir needs a name for each set", expected="NAME=SHARDS", got=text)
        reserved = {HELD_OUT: "the training sets' validation split", SAMPLES: "the generated samples"}
        if name in sets or name in reserved:
            why = f"the name of {reserved[name]}" if name in reserved else "given twice"
            raise UserError(f"--eval_data_dir: {name} is {why}", expected="another name", got=text)
        sets[name] = location
    return sets


def parse_metric(flag: str, text: str, form: str = "NAME:metric") -> EvalMetric:
    """`NAME:metric`.

    Raises:
        UserError: it has another form, or there is no such metric.
    """
    name, colon, metric = text.partition(":")
    if not (colon and name):
        raise UserError(f"{flag} has the wrong form", expected=form, got=text)
    known = SCORES if name == SAMPLES else (*LOSSES, *ACCURACIES)
    if metric not in known:
        raise UserError(f"{flag}: no metric {metric}", expected=", ".join(known), got=text)
    return EvalMetric(name, metric)


def parse_guard(text: str) -> Guard:
    """`NAME:metric:tolerance`, the tolerance in the metric's unit: nats, or a share from 0 to 1.

    Raises:
        UserError: it has another form, there is no such metric, or the tolerance is no number from 0 on.
    """
    form = "NAME:metric:tolerance"
    rest, _, last = text.rpartition(":")
    metric = parse_metric("--guard", rest or text, form)
    try:
        tolerance = float(last)
    except ValueError:
        tolerance = math.nan
    if not (0 <= tolerance < math.inf):
        raise UserError(
            "--guard: the tolerance is no number from 0 on", expected=f"{form}, such as old:loss:0.1", got=text
        )
    return Guard(metric, tolerance)

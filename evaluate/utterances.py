"""One utterance as measured: errors, similarity, quality and timing of one line as one system spoke it.

In: a line, its judgement, a normaliser. Out: an `Utterance`, and its line of `utterances.jsonl`. A line that the system
did not speak counts as wrong: every word deleted (one without text: rate 1), similarity 0, quality 1 (the lowest of its
scale).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from higgs_tune.evaluate.judging import Judgement
from higgs_tune.evaluate.lists import Line
from higgs_tune.preprocess.judges.edits import Edits, count_edits, differences
from higgs_tune.preprocess.judges.interface import cosine
from higgs_tune.preprocess.judges.normalisers import Normaliser

WORST_SIMILARITY, WORST_QUALITY = 0.0, 1.0
RUN_ON_RATIO, RUN_ON_CHARACTERS = 1.5, 10  # more is heard than this many times the text, and this much more
RUN_ON_SECONDS = 2.0  # or the clip lasts longer than this many times the real recording
LENGTHS = ((5, "1-5 words"), (10, "6-10 words"), (20, "11-20 words"), (40, "21-40 words"))


@dataclass(frozen=True)
class Utterance:
    """One line as one system spoke it.

    Attributes:
        similarity: cosine to the reference voice; None without a speaker encoder, or a usable reference.
        quality: predicted scores; None without a quality model.
        target_seconds: of the real recording; None without one.
        reference_fault: why there is no similarity.
        counted: whether it has figures; a line without a real recording has none of them.
    """

    line: Line
    judged: Judgement
    wav: str
    chosen: Normaliser
    similarity: float | None = None
    quality: dict[str, float] | None = None
    target_seconds: float | None = None
    reference_fault: str = ""
    counted: bool = True

    @cached_property
    def text(self) -> str:
        """The normalised text."""
        return self.chosen.apply(self.line.text)

    @cached_property
    def heard(self) -> str:
        """The normalised transcript."""
        return self.chosen.apply(self.judged.heard)

    @cached_property
    def words(self) -> Edits:
        """Word errors."""
        return count_edits(self.text.split(), self.heard.split())

    @cached_property
    def characters(self) -> Edits:
        """Character errors; spaces count."""
        return count_edits(self.text, self.heard)

    @property
    def wer(self) -> float:
        """Word errors over words of the text; 1 where there is no text."""
        return self.words.rate if self.text else 1.0

    @property
    def cer(self) -> float:
        """Character errors over characters of the text; 1 where there is no text."""
        return self.characters.rate if self.text else 1.0

    @property
    def duration_ratio(self) -> float | None:
        """Length against the real recording's."""
        seconds = self.judged.seconds
        return seconds / self.target_seconds if seconds is not None and self.target_seconds else None

    @property
    def characters_per_second(self) -> float | None:
        """Speaking rate: letters of the text a second of the clip."""
        return len(self.text.replace(" ", "")) / self.judged.seconds if self.judged.seconds else None

    @property
    def runs_on(self) -> bool:
        """Whether the system went on speaking after the text."""
        more = len(self.heard) - len(self.text)
        long = len(self.heard) > RUN_ON_RATIO * len(self.text) and more >= RUN_ON_CHARACTERS
        endless = self.judged.cut_off or self.judged.problem == "too_long"
        return long or endless or (self.duration_ratio or 0) > RUN_ON_SECONDS

    @property
    def length_group(self) -> str:
        """The bracket of the text's length."""
        count = len(self.text.split())
        return next((name for most, name in LENGTHS if count <= most), "over 40 words")

    def as_line(self, system: str, judges: dict[str, str]) -> dict[str, Any]:
        """The line of `utterances.jsonl`.

        Args:
            judges: name and revision of each.
        """
        return {
            "id": self.line.id,
            "system": system,
            "language": self.line.language,
            "speaker": self.line.speaker,
            "dialect": self.line.dialect,
            "wav": self.wav,
            "problem": self.judged.problem,
            "detail": self.judged.detail,
            "text": self.line.text,
            "heard": self.judged.heard,
            "text_normalised": self.text,
            "heard_normalised": self.heard,
            "differences": differences(self.text.split(), self.heard.split()),
            "word_edits": asdict(self.words),
            "character_edits": asdict(self.characters),
            "counted": self.counted,
            "wer": _rounded(self.wer if self.counted else None),
            "cer": _rounded(self.cer if self.counted else None),
            "sim": _rounded(self.similarity if self.counted else None),
            "reference_fault": self.reference_fault,
            "quality": self.quality if self.counted else None,
            "run_on": self.runs_on,
            "cut_off": self.judged.cut_off,
            "silence": self.judged.silence,
            "seconds": self.judged.seconds,
            "chars_per_second": _rounded(self.characters_per_second),
            "duration_ratio": _rounded(self.duration_ratio),
            "length": self.length_group,
            "normaliser": self.chosen.name,
            "judges": judges,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def measure(
    line: Line,
    judged: Judgement,
    chosen: Normaliser,
    *,
    wav: str = "",
    reference_D: np.ndarray | str | None = None,
    rates_quality: bool = False,
    target_seconds: float | None = None,
    counted: bool = True,
) -> Utterance:
    """Measure one line.

    Args:
        reference_D: embedding of the reference voice, or why there is none; None: no similarity is measured.
        rates_quality: whether a quality model was at work.
    """
    similarity = quality = None
    if isinstance(reference_D, np.ndarray):
        near = None if judged.embedding_D is None else cosine(reference_D, judged.embedding_D)
        similarity = WORST_SIMILARITY if near is None else near
    if rates_quality:
        quality = judged.quality or {"overall": WORST_QUALITY}
    fault = reference_D if isinstance(reference_D, str) else ""
    return Utterance(line, judged, wav, chosen, similarity, quality, target_seconds, fault, counted)

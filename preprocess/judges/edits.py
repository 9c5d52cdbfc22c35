"""Edit distance between a text and its transcript: substitutions, deletions, insertions, and the differences to show.

Alignments are rapidfuzz's (Levenshtein, all costs 1), which jiwer uses too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from higgs_tune.shards.errors import UserError


@dataclass(frozen=True, slots=True)
class Edits:
    """Edits that turn a text into its transcript; `length`: units (words or characters) of the text."""

    substitutions: int
    deletions: int
    insertions: int
    length: int

    @property
    def errors(self) -> int:
        """All edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors a unit of the text, as one utterance's WER or CER; above 1 where much was inserted."""
        return self.errors / self.length if self.length else float(self.errors > 0)


def levenshtein() -> Any:
    """rapidfuzz's module of edit distances.

    Raises:
        UserError: it is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("counting errors needs rapidfuzz", hint="pip install higgs-tune[eval]") from error
    return Levenshtein


def count_edits(text: Sequence[str], heard: Sequence[str]) -> Edits:
    """The fewest edits between two sequences of words, or two strings (then the units are characters)."""
    counts = {"replace": 0, "delete": 0, "insert": 0}
    for edit in levenshtein().editops(text, heard):
        counts[edit.tag] += 1
    return Edits(counts["replace"], counts["delete"], counts["insert"], len(text))


def differences(text: Sequence[str], heard: Sequence[str]) -> list[tuple[str, str, str]]:
    """The alignment as runs of words: (equal|replace|delete|insert, words of the text, words heard)."""
    return [
        (run.tag, " ".join(text[run.src_start : run.src_end]), " ".join(heard[run.dest_start : run.dest_end]))
        for run in levenshtein().opcodes(text, heard)
    ]

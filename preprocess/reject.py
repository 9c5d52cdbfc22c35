"""A sample that cannot be used: it is left out under a named reason, never replaced, never dropped without a word."""

from __future__ import annotations


class Reject(Exception):
    """Raised where a sample or a clip fails; the pipeline turns it into one line of rejects.jsonl.

    Attributes:
        reason: a short fixed name, to count by.
        detail: what was expected and what was found.
        file: the audio file that it is about, if any.
    """

    def __init__(self, reason: str, detail: str, file: str = "") -> None:
        detail, file = (text.encode("utf-8", "backslashreplace").decode() for text in (detail, file))  # fit for JSON
        super().__init__(reason, detail, file)
        self.reason, self.detail, self.file = reason, detail, file

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"

"""The reject of a sample that cannot be used: it is left out, under a named reason, with a line in rejects.jsonl."""

from __future__ import annotations

from typing import Any


class Reject(Exception):
    """Raised where a sample or a clip fails; the pipeline turns it into one line of rejects.jsonl.

    Attributes:
        reason: a short fixed name, to count by.
        detail: expected and got.
        file: the audio file at fault, if any.
        key: of the sample, where the reject stands in its place.
    """

    key: str | None = None

    def __init__(self, reason: str, detail: str, file: str = "") -> None:
        detail, file = (text.encode("utf-8", "backslashreplace").decode() for text in (detail, file))  # fit for JSON
        super().__init__(reason, detail, file)
        self.reason, self.detail, self.file = reason, detail, file

    def of(self, key: str) -> Reject:
        """The reject of the sample with this key."""
        self.key = key
        return self

    def as_line(self, key: str, position: int) -> dict[str, Any]:
        """The line of rejects.jsonl for the sample with this key, at this position in the data."""
        return {"id": key, "position": position, "reason": self.reason, "detail": self.detail, "file": self.file}

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"

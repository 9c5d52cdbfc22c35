"""Turns column values of a data set (dates, bytes, NaN) into JSON values."""

from __future__ import annotations

import math
from datetime import date, time
from typing import Any


def plain(value: Any) -> Any:
    """The value as JSON can hold it; idempotent.

    NaN and infinite numbers become null, dates and times ISO 8601, bytes their number (`<17 bytes>`), other types that
    JSON lacks (decimals, durations) their text.

    Raises:
        RecursionError: it is nested too deeply.
    """
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value.isoformat() if isinstance(value, date | time) else str(value)

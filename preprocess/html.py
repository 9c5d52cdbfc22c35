"""What every page needs: values that no parser reads as markup, a content security policy, a server's headers."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from typing import Any

from higgs_tune.shards.durable import to_json

SECURITY_HEADERS = {
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def for_html(value: Any) -> str:
    """JSON in which no HTML parser reads the end of a script or a comment."""
    text = to_json(value).decode()
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def policy(scripts: Iterable[str], connect: str, media: str = "data: blob:") -> str:
    """A content security policy: only these scripts run; data comes from `connect`, and audio from `media`, only."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    rules = {
        "default-src": "'none'",
        "script-src": hashes or "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "media-src": media,
        "connect-src": connect,
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())

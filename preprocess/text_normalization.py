"""Normalization of texts, the same for training and for speaking: `none`, `nfc`, `arabic`.

In: a text as it was written. Out: the text that is tokenized. docs/text_normalization.md says what each rule does. Only
the standard library is used. A set's manifest names its normalization; a model trained on the set is to be given texts
that went through the same one.
Guarantees: normalizing twice changes nothing more; `none` returns the text itself (tests/test_text_normalization.py).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from higgs_tune.preprocess.text_tokens import TokenLimit

TextNormalization = Literal["none", "nfc", "arabic"]


@dataclass(frozen=True)
class TextOptions:
    """Which texts are taken, and how they are normalized.

    Attributes:
        max_chars: longest single text, in characters. tokens: its limit in tokens, if there is one.
        normalization: see `normalize_text`.
    """

    max_chars: int = 20_000
    normalization: TextNormalization = "none"
    tokens: TokenLimit | None = None


TATWEEL = "\u0640"
# letters as shapes; U+FD3E and U+FD3F (ornate brackets) are not
PRESENTATION = re.compile("[\ufb50-\ufd3d\ufd40-\ufdff\ufe70-\ufefc]")
BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
INVISIBLE = "\u00ad\u034f\u180e\u200b-\u200d\u2060-\u2064\ufe00-\ufe0f\ufeff\U000e0000-\U000e007f"
LINE_BREAKS = "\n\r\u0085\u2028\u2029"
OTHER_SPACES = "\t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000"
DIGITS = str.maketrans("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹", "01234567890123456789")
_REMOVED = re.compile(f"[{TATWEEL}{BIDI}{INVISIBLE}]")
_SPACES = re.compile(f"[ {OTHER_SPACES}{LINE_BREAKS}]+")


def normalize_text(text: str, kind: TextNormalization) -> str:
    """The text after the rules of `kind`."""
    if kind == "none":
        return text
    if kind == "nfc":
        return unicodedata.normalize("NFC", text)
    text = PRESENTATION.sub(lambda shape: unicodedata.normalize("NFKC", shape[0]).lstrip(" "), text)
    text = _REMOVED.sub("", text).translate(DIGITS)
    return unicodedata.normalize("NFC", _SPACES.sub(" ", text).strip(" "))

"""Text normalisers by name: how texts are made alike before errors are counted.

In: a text, and the name of a published evaluation's rules. Out: words with single spaces. Rates compare only under one
normaliser, so its name stands beside every figure.

Sources: Seed-TTS-eval's run_wer.py (BytedanceSpeech/seed-tts-eval) with zhon's list of CJK punctuation; the Arabic
rules of OmniVoice's evaluation (k2-fsa/OmniVoice) and of Habibi's (SWivid/Habibi).
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from higgs_tune.shards.errors import UserError

Apply = Callable[[str], str]

# zhon.hanzi.punctuation as ranges of code points, both ends included
_ZHON = (
    (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64), (0x3000, 0x3003),
    (0x3008, 0x3011), (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0x2013, 0x2014), (0x2018, 0x2019),
    (0x201B, 0x201F), (0x2026, 0x2027), (0xFE4F, 0xFE4F), (0xFE51, 0xFE51), (0xFE54, 0xFE54), (0xB7, 0xB7),
)  # fmt: skip
_SEEDTTS_DELETED = dict.fromkeys(
    [ord(mark) for mark in string.punctuation if mark != "'"]
    + [point for first, last in _ZHON for point in range(first, last + 1)]
)
_DIACRITICS = dict.fromkeys([*range(0x064B, 0x0653), 0x0656, 0x0657])
_OMNIVOICE = _DIACRITICS | {ord("ٱ"): "ا"}
_TATWEEL = 0x0640


def _digits(first: int) -> dict[int, str]:
    return {first + value: str(value) for value in range(10)}


_HABIBI = (
    {ord("ء"): None, _TATWEEL: None, ord("ؤ"): "و", ord("ئ"): "ي", ord("ة"): "ه", ord("پ"): "ب", ord("ڤ"): "ف"}
    | dict.fromkeys(map(ord, "آأإ"), "ا")
    | _digits(0x0660)
    | _digits(0x06F0)
)


@dataclass(frozen=True)
class Normaliser:
    """name: as `--normaliser` takes it; rules: in a sentence; apply: text to normalised text."""

    name: str
    rules: str
    apply: Apply

    def words(self, text: str) -> list[str]:
        """The words of the normalised text."""
        return self.apply(text).split()


def _one_spaced(text: str) -> str:
    return " ".join(text.split())


def _seedtts_en(text: str) -> str:
    return _one_spaced(text.translate(_SEEDTTS_DELETED).lower())


def _omnivoice(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).lower()
    spaced = "".join(" " if unicodedata.category(mark).startswith("P") else mark for mark in text)
    return _one_spaced(spaced.translate(_OMNIVOICE))


def _habibi(text: str) -> str:
    return _one_spaced(_omnivoice(text).translate(_HABIBI))


NORMALISERS = {
    given.name: given
    for given in (
        Normaliser("seedtts_en", "ASCII and CJK punctuation but ' deleted, lower case", _seedtts_en),
        Normaliser(
            "omnivoice",
            "NFKC, lower case, punctuation to spaces, U+064B–0652 and U+0656–0657 deleted, ٱ to ا",
            _omnivoice,
        ),
        Normaliser(
            "habibi",
            "as omnivoice; ء and tatweel deleted, آأإ to ا, ؤ to و, ئ to ي, ة to ه, پ to ب, ڤ to ف, "
            "Eastern digits to Western",
            _habibi,
        ),
    )
}


def normaliser(name: str) -> Normaliser:
    """The normaliser of this name.

    Raises:
        UserError: there is none.
    """
    if name not in NORMALISERS:
        raise UserError("unknown normaliser", expected=", ".join(NORMALISERS), got=name)
    return NORMALISERS[name]


def compact(text: str, apply: Apply) -> str:
    """A text as its characters are compared: normalised, without spaces."""
    return apply(text).replace(" ", "")

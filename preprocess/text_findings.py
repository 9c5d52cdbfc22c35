"""Finds what is doubtful in texts: characters that look right and are other ones, remains of markup and of encodings.

In: a text. Out: the names of its findings. `DESCRIPTIONS` says what each means and what helps; `--check` reports them.
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache

from higgs_tune.preprocess.text_normalization import (
    BIDI,
    INVISIBLE,
    LINE_BREAKS,
    OTHER_SPACES,
    PRESENTATION,
    TATWEEL,
)

ARABIC = "--text_normalization arabic"
DESCRIPTIONS = {
    "mojibake": "UTF-8 that was read in another encoding (Ø§Ù„, ط§ظ„): convert the list again from its source",
    "replacement_character": "U+FFFD or ???, where an encoding lost letters: restore them",
    "html_entities": "HTML entities (&amp;): unescape them",
    "escape_literals": r"escapes as text (\u0627, \n): decode them",
    "tags": "tags or special tokens (<think>, <audio>): they are trained on as text",
    "urls": "URLs or mail addresses",
    "doubled_quotes": 'quotes as CSV doubles them (""): the list was written as CSV and read as text',
    "presentation_forms": f"letters as shapes (ﻻ, ﷲ), as PDF files have them: {ARABIC}",
    "tatweel": f"tatweel (ـ), which only stretches a word: {ARABIC}",
    "bidi_marks": f"marks of writing direction, which are not spoken: {ARABIC}",
    "invisible_characters": f"invisible characters (zero-width, soft hyphen, tags): {ARABIC}",
    "unusual_spaces": f"other spaces than U+0020: {ARABIC}",
    "line_breaks": f"line breaks: {ARABIC}",
    "mixed_digits": f"digits of several scripts (2 ٢ ۲): {ARABIC}, or write the numbers out",
    "mixed_letters": "Arabic and Persian forms of one letter (ي ی, ك ک)",
    "decomposed": "letters apart from their marks (NFD): --text_normalization nfc",
    "mark_order": "vowel marks in another order than Unicode's: --text_normalization nfc makes them all alike",
    "symbols": "emoji and other symbols, which are not spoken",
    "private_characters": "characters of private use, or unassigned ones: their shape is known to one font only",
    "visual_order": "letters in the order of display (reversed): words begin with marks or with ة, ى",
}
_PATTERNS = {
    "replacement_character": re.compile("\ufffd|\\?{3,}"),
    "escape_literals": re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|[nrt])"),
    "tags": re.compile(r"</?[A-Za-z][^<>]{0,200}>|<\|[^|<>]{1,60}\|>"),
    "urls": re.compile(r"\bhttps?://|\bwww\.\w|\b[\w.+-]+@[\w-]+\.[a-z]{2,}\b", re.IGNORECASE),
    "doubled_quotes": re.compile(r'\A\s*".*"".*"\s*\Z', re.DOTALL),
    "presentation_forms": PRESENTATION,
    "tatweel": re.compile(TATWEEL),
    "bidi_marks": re.compile(f"[{BIDI}]"),
    "invisible_characters": re.compile(f"[{INVISIBLE}]"),
    "unusual_spaces": re.compile(f"[{OTHER_SPACES}]"),
    "line_breaks": re.compile(f"[{LINE_BREAKS}]"),
}
# forms of which a set of Arabic texts is to have one, by the finding that names the mixture
VARIANTS = {
    "mixed_digits": (re.compile("[0-9]"), re.compile("[٠-٩]"), re.compile("[۰-۹]")),
    "mixed_letters": (re.compile("[يك]"), re.compile("[یک]")),
}
_ARABIC = re.compile("[\u0620-\u064a\u0671-\u06d3]")
_ARABIC_WORD = re.compile("[\u0620-\u065f\u0670-\u06d3]{2,}")
_MISPLACED = re.compile("[\u064b-\u0652\u0670ةى]")  # never the first of a word
_LEADING_STOP = re.compile('\\s*[.؟!،؛:]\\s*[\u0620-\u064a].*[^.؟!،؛:»")\\s]\\s*', re.DOTALL)
_FOREIGN_RUN = re.compile("[^\\x00-\\x7f]{2,}")
_UTF8_PAIRS = {
    "cp1252": re.compile(rb"(?:[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2})+"),
    "cp1256": re.compile(rb"(?:[\xd8-\xdb][\x80-\xbf]){2,}|(?:[\xc3-\xc5][\x80-\xbf]){2,}"),
    "cp1251": re.compile(rb"(?:[\xd0-\xd1][\x80-\xbf]){2,}|(?:[\xd8-\xdb][\x80-\xbf]){2,}"),
}


def text_findings(text: str) -> set[str]:
    """Names of what is doubtful in a text by itself."""
    names = {name for name, pattern in _PATTERNS.items() if pattern.search(text)}
    tests = {
        "mojibake": _is_mojibake(text),
        "html_entities": "&" in text and html.unescape(text) != text,
        "symbols": any(unicodedata.category(c) == "So" for c in text if not c.isascii()),
        "private_characters": any(unicodedata.category(c) in ("Co", "Cn") for c in text if not c.isascii()),
        "visual_order": _is_reversed(text),
    }
    composed = unicodedata.normalize("NFC", text)
    if composed != text:
        tests["mark_order" if sorted(composed) == sorted(text) else "decomposed"] = True
    return names | {name for name, found in tests.items() if found}


def variants(text: str) -> set[tuple[str, int]]:
    """(finding, number of the form) of each form in an Arabic text of which a set is to have one."""
    if not _ARABIC.search(text):
        return set()
    return {(name, i) for name, forms in VARIANTS.items() for i, form in enumerate(forms) if form.search(text)}


def excerpt(text: str, length: int = 40) -> str:
    """The beginning of a text; what a terminal does not show as escapes."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:length])
    return "".join(shown) + ("…" if len(text) > length else "")


def _is_mojibake(text: str) -> bool:
    """Whether a run of characters is UTF-8 that was read in another encoding."""
    for run in _FOREIGN_RUN.findall(text):
        for encoding, pattern in _UTF8_PAIRS.items():
            data = bytes(_bytes_of(encoding).get(c, 0x20) for c in run)
            decoded = (pair.decode(errors="ignore") for pair in pattern.findall(data))  # some are not UTF-8
            if any(text and _spoken(text) for text in decoded):
                return True
    return False


def _spoken(text: str) -> bool:
    """Whether decoded characters are ones that texts have: letters, marks, punctuation."""
    return all(unicodedata.category(c)[0] in "LMPZNS" for c in text)


@lru_cache(maxsize=8)
def _bytes_of(encoding: str) -> dict[str, int]:
    """The byte of each character above ASCII; undefined bytes stand for themselves."""
    made: dict[str, int] = {}
    for byte in range(0x80, 0x100):
        try:
            made[bytes([byte]).decode(encoding)] = byte
        except UnicodeDecodeError:
            made[chr(byte)] = byte
    return made


def _is_reversed(text: str) -> bool:
    """Whether Arabic letters stand in the order of display: the signs of word ends stand at word starts."""
    text = PRESENTATION.sub(lambda shape: unicodedata.normalize("NFKC", shape[0]), text)
    words = _ARABIC_WORD.findall(text)
    if any(_MISPLACED.match(word) for word in words) or _LEADING_STOP.fullmatch(text):
        return True
    ends = sum(len(word) > 3 and word.endswith("لا") for word in words)
    return ends > 1 and not any(word.startswith("ال") for word in words)

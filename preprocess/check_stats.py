"""Statistics of texts and speaking rates that --check reports; plain values in and out."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from higgs_tune.preprocess.text_findings import DESCRIPTIONS, VARIANTS, excerpt, text_findings, variants

OUTLIER_FACTOR = 2.5  # more than this many times faster or slower than the language's median
OUTLIER_LEAST = 8  # samples of a language below which its median says little
EXAMPLES = 5  # of each finding
PERCENTS = (0, 5, 50, 95, 100)


@lru_cache(maxsize=65536)
def _script(character: str) -> str:
    """The first word of a letter's Unicode name: LATIN, ARABIC, CJK, …; empty for other characters."""
    return unicodedata.name(character, "").partition(" ")[0] if character.isalpha() else ""


def dominant_script(text: str) -> str:
    """The script of most letters of a text, lower case; `none` without letters."""
    counts = Counter(filter(None, map(_script, text)))
    return counts.most_common(1)[0][0].lower() if counts else "none"


def percentiles(values: Sequence[float]) -> dict[str, Any]:
    """Percentiles by percent; empty without values."""
    if not values:
        return {"percentiles": {}}
    return {"percentiles": {str(p): round(float(np.percentile(values, p)), 3) for p in PERCENTS}}


def language_table(texts: Iterable[tuple[str, int, int]]) -> dict[str, dict[str, Any]]:
    """Texts, characters and tokens of each language, from (language, characters, tokens) of each text."""
    sums: dict[str, list[int]] = {}
    for language, characters, tokens in texts:
        totals = sums.setdefault(language, [0, 0, 0])
        for i, more in enumerate((1, characters, tokens)):
            totals[i] += more
    return {
        language: {"texts": n, "characters": c, "tokens": t, "tokens_per_character": round(t / max(c, 1), 3)}
        for language, (n, c, t) in sorted(sums.items())
    }


def findings_table(samples: Iterable[tuple[str, list[str]]]) -> dict[str, dict[str, Any]]:
    """How many samples have each finding in their texts, with examples, from (key, texts) of each sample.

    Digits and letters of which a set is to have one form are findings in the samples that have another form than most.
    """
    findings: dict[str, list[tuple[str, str]]] = {}
    forms: dict[tuple[str, int], dict[str, str]] = {}
    for key, texts in samples:
        first: dict[str, str] = {}
        for text in texts:
            for name in text_findings(text):
                first[name] = text  # the last, which is the answer's
            for form in variants(text):
                forms.setdefault(form, {})[key] = text
        for name, text in first.items():
            findings.setdefault(name, []).append((key, text))
    for name in VARIANTS:
        by_form = sorted((list(keys.items()) for form, keys in forms.items() if form[0] == name), key=len)
        others = dict(pair for pairs in by_form[:-1] for pair in pairs)
        if others:
            findings[name] = list(others.items())
    return {
        name: {
            "samples": len(findings[name]),
            "examples": [{"id": key, "text": excerpt(text)} for key, text in findings[name][:EXAMPLES]],
        }
        for name in DESCRIPTIONS
        if name in findings
    }


def rate_outliers(rates: list[tuple[str, str, float]]) -> list[dict[str, Any]]:
    """Samples whose text is far too long or too short for their audio, worst first.

    Args:
        rates: (key, language, characters a second) of each spoken text.
    """
    by_language: dict[str, list[float]] = {}
    for _, language, rate in rates:
        by_language.setdefault(language, []).append(rate)
    typical = {name: float(np.median(values)) for name, values in by_language.items() if len(values) >= OUTLIER_LEAST}
    distances = [
        (abs(math.log(rate / typical[language])), key, language, rate)
        for key, language, rate in rates
        if language in typical
    ]
    worst = [entry for entry in sorted(distances, reverse=True) if entry[0] > math.log(OUTLIER_FACTOR)]
    return [
        {"id": key, "language": name, "characters_per_second": round(rate, 2), "median": round(typical[name], 2)}
        for _, key, name, rate in worst
    ]

"""Figures of systems: each with its interval, for all lines and by language, speaker, dialect and length; and paired.

In: the utterances of each system, in the same order of lines. Out: plain dicts for `eval.json`. A figure is
`{mean, low, high, n}`, or None where no line has a value; `low` and `high` bound it with 95 % confidence.

`wer`, `cer`: errors of all lines over units of all texts (corpus). `wer_mean`, `cer_mean`: mean of the lines' own
rates, as Seed-TTS-eval reports.

Shapes: N lines, M figures of all systems.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from higgs_tune.evaluate.bootstrap import SEED, resample
from higgs_tune.evaluate.utterances import WORST_QUALITY, Utterance

Value = tuple[float, float] | None  # numerator and denominator; None: the line has no value


def _of(value: float | None) -> Value:
    return None if value is None else (value, 1.0)


def _quality(name: str) -> Callable[[Utterance], Value]:
    return lambda utterance: _of(None if utterance.quality is None else utterance.quality.get(name, WORST_QUALITY))


FIGURES: dict[str, Callable[[Utterance], Value]] = {
    "wer": lambda u: (u.words.errors, u.words.length),
    "wer_mean": lambda u: _of(u.wer),
    "cer": lambda u: (u.characters.errors, u.characters.length),
    "cer_mean": lambda u: _of(u.cer),
    "sim": lambda u: _of(u.similarity),
    "quality": _quality("overall"),
    "run_on_rate": lambda u: _of(float(u.runs_on)),
    "silence": lambda u: _of(u.judged.silence),
    "chars_per_second": lambda u: _of(u.characters_per_second),
    "duration_ratio": lambda u: _of(u.duration_ratio),
}
GROUPS: dict[str, Callable[[Utterance], str]] = {
    "language": lambda u: u.line.language,
    "speaker": lambda u: u.line.speaker,
    "dialect": lambda u: u.line.dialect,
    "length": lambda u: u.length_group,
}

BETTER = {"wer": -1, "wer_mean": -1, "cer": -1, "cer_mean": -1, "sim": 1, "quality": 1, "run_on_rate": -1}  # which way

ROUNDING = 1e-9  # smaller differences are none

Systems = dict[str, list[Utterance]]


def compare(systems: Systems, base: str, *, seed: int = SEED) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of each system, and of each system minus `base`, on the same resamples.

    A difference is over the lines that have a value in both.
    """
    extra = sorted({name for said in systems.values() for u in said for name in u.quality or ()} - {"overall"})
    functions = FIGURES | {f"quality_{name}": _quality(name) for name in extra}
    pairs = [[_pairs(said, function) for function in functions.values()] for said in systems.values()]
    columns_MN2 = list(np.array(pairs).reshape(len(systems) * len(functions), -1, 2))
    column = {(system, name): at for at, (system, name) in enumerate((s, name) for s in systems for name in functions)}
    shared = {
        (system, name): _shared(columns_MN2, column[system, name], column[base, name])
        for system in systems
        if system != base
        for name in functions
    }
    table_NM2 = np.array(columns_MN2).transpose(1, 0, 2)
    resampled = resample(table_NM2[:, :, 0], table_NM2[:, :, 1], seed=seed)
    figures = {
        system: {name: resampled.interval(column[system, name]) for name in functions} | {"counts": _counts(said)}
        for system, said in systems.items()
    }
    paired = {
        system: {name: resampled.difference(*shared[system, name]) for name in functions}
        for system in systems
        if system != base
    }
    return figures, paired


def _shared(columns_MN2: list[np.ndarray], one: int, two: int) -> tuple[int, int]:
    """The two columns with only those lines that have a value in both; adds them where they are not there."""
    present_one, present_two = (columns_MN2[at][:, 1] > 0 for at in (one, two))
    if (present_one == present_two).all():
        return one, two
    both_N1 = (present_one & present_two)[:, None]
    columns_MN2 += [columns_MN2[one] * both_N1, columns_MN2[two] * both_N1]
    return len(columns_MN2) - 2, len(columns_MN2) - 1


def _pairs(said: list[Utterance], function: Callable[[Utterance], Value]) -> list[tuple[float, float]]:
    return [(utterance.counted and function(utterance)) or (0.0, 0.0) for utterance in said]


def _counts(said: list[Utterance]) -> dict[str, int]:
    """Utterances, those with a problem, and edits."""
    said = [utterance for utterance in said if utterance.counted]
    counts = {"utterances": len(said), "problems": sum(bool(u.judged.problem) for u in said)}
    for unit in ("words", "characters"):
        edits = [getattr(u, unit) for u in said]
        counts[unit] = sum(given.length for given in edits)
        for kind in ("substitutions", "deletions", "insertions"):
            counts[f"{unit[:-1]}_{kind}"] = sum(getattr(given, kind) for given in edits)
    return counts


def compare_groups(systems: Systems, base: str) -> dict[str, Any]:
    """`{grouping: {group: {figures, paired}}}`, for each grouping that any line names."""
    lines = next(iter(systems.values()))
    groups: dict[str, Any] = {}
    for grouping, name_of in GROUPS.items():
        names = [name_of(utterance) for utterance in lines]
        if any(names):
            groups[grouping] = {
                name or "unknown": _compare_part(systems, base, [at for at, own in enumerate(names) if own == name])
                for name in sorted(set(names))
            }
    return groups


def judged_by(figures: dict[str, Any], about: dict[str, Any]) -> dict[str, dict[str, str]]:
    """`{figure: {judge, revision, normaliser}}`: what each was measured with; empty where there is no such thing.

    Args:
        figures: by system.
        about: with `judges` and `normaliser`.
    """
    names = list(next(iter(figures.values())))
    return {name: _origin(name, about) for name in names if name != "counts"}


def _origin(name: str, about: dict[str, Any]) -> dict[str, str]:
    judge = about["judges"].get(_ROLES.get(name.partition("_")[0], "")) or {"name": "", "revision": ""}
    reads = name.startswith(("wer", "cer", "run_on", "chars"))
    return {
        "judge": judge["name"],
        "revision": judge["revision"] or ("unknown revision" if judge["name"] else ""),
        "normaliser": about["normaliser"]["name"] if reads else "",
    }


_ROLES = {"wer": "asr", "cer": "asr", "run": "asr", "sim": "speaker", "quality": "quality"}


def verdict(name: str, difference: dict[str, float] | None) -> str:
    """`better` or `worse` where a paired difference is more than chance, by its interval; else empty."""
    way = BETTER.get(name, 0)
    bounds = [way * difference[side] for side in ("low", "high")] if difference else [0.0]
    return "better" if min(bounds) > ROUNDING else "worse" if max(bounds) < -ROUNDING else ""


def changes(paired: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """`{system: {better, worse}}`: the figures whose difference to the base is more than chance."""
    return {
        system: {kind: [name for name in BETTER if verdict(name, given.get(name)) == kind] for kind in _KINDS}
        for system, given in paired.items()
    }


_KINDS = ("better", "worse")


def _compare_part(systems: Systems, base: str, rows: list[int]) -> dict[str, Any]:
    figures, paired = compare({system: [said[at] for at in rows] for system, said in systems.items()}, base)
    return {"figures": figures, "paired": paired}


def shuffled(texts: list[str], *, seed: int = SEED) -> list[int]:
    """For each text the number of another text, for the floor: the next one that differs, in a random circle of all."""
    order = np.random.default_rng(seed).permutation(len(texts)).tolist()
    other = list(range(len(texts)))
    for place, number in enumerate(order):
        circle = (order[(place + step) % len(order)] for step in range(1, len(order)))
        other[number] = next((at for at in circle if texts[at] != texts[number]), order[place - 1])
    return other


def find_swaps(said: list[Utterance]) -> dict[str, str]:
    """Lines that speak another line's text: their ids, with the id whose text was heard.

    A line with more than half of its characters wrong that is within a fifth of another line's text.
    """
    from rapidfuzz.distance import Levenshtein  # pyright: ignore[reportMissingImports]
    from rapidfuzz.process import extractOne  # pyright: ignore[reportMissingImports]

    texts = {utterance.line.id: utterance.text for utterance in said}
    swaps = {}
    for utterance in said:
        if utterance.cer > 0.5 and utterance.heard:
            best = extractOne(utterance.heard, texts, scorer=Levenshtein.normalized_distance, score_cutoff=0.2)
            if best and best[2] != utterance.line.id:
                swaps[utterance.line.id] = best[2]
    return swaps

"""Turns a manifest into ChatML: each row becomes "speak this text in the voice of that clip".

In: rows with `audio`, `text`, `speaker` and, optionally, `ref_audio`, `ref_text`, `id`; other columns go to `misc`.
Out: one ChatML entry for each row, in order.

Reference policy: a row's own `ref_audio` is its reference. Without one, the reference is another row's clip of the
same speaker: a different file, at least `--ref_min_seconds` long, chosen by a hash of `--seed` and the row's audio, so
that it stays the same when other speakers come or go. Rows that are rejects by their columns or their audio's header
are not references. A hash also chooses the `--ref_drop` share of rows that get no reference. A row that is its own
reference, or whose speaker has no other clip, is a reject.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash
from higgs_tune.preprocess.audio.audio import clip_seconds
from higgs_tune.preprocess.audio.clip import Clip
from higgs_tune.preprocess.config import Job
from higgs_tune.preprocess.input.chatml import check_storable, check_text
from higgs_tune.preprocess.input.jsonable import plain
from higgs_tune.preprocess.reject import Reject

SYSTEM = "Generate audio following instruction."
INSTRUCTION = "Read this text in the same voice: "
PLAIN_INSTRUCTION = "Read this text: "
COLUMNS = ("audio", "text", "speaker", "ref_audio", "ref_text", "id")
HEADER_THREADS = 8
DISTINCT = "distinct_audio"  # marks an entry whose audios must differ in content, too


def to_chatml(rows: list[Any], job: Job) -> Iterator[Any]:
    """One entry, or Reject, for each row."""
    checked = [_checked(row, job.config.max_text_chars) for row in rows]
    candidates = _candidates(checked, job)
    for row in checked:
        try:
            yield row if isinstance(row, Reject) else _entry(row, _reference(row, candidates, checked, job))
        except Reject as reject:
            yield reject


def _checked(row: Any, max_text_chars: int) -> dict[str, Any] | Reject:
    try:
        return _usable(row, max_text_chars)
    except Reject as reject:
        return reject


def _usable(row: Any, max_text_chars: int) -> dict[str, Any]:
    """The row, with None in its empty cells.

    Raises:
        Reject: it is not a row, a column is missing or of a wrong type, or its text cannot be used.
    """
    if isinstance(row, Reject):
        raise row
    if not isinstance(row, dict):
        raise Reject("malformed_manifest", f"expected a row with columns, got {row!r:.60}")
    check_storable(row)
    row = {name: None if plain(value) in ("", None) else value for name, value in row.items()}  # NaN is no value
    if not isinstance(row.get("audio"), str):
        raise Reject("malformed_manifest", f"audio: expected a string, got {row.get('audio')!r:.60}")
    if row.get("text") is None:
        raise Reject("empty_text", "text is empty")
    for name, kind in (("text", str), ("speaker", str | int), ("ref_audio", str), ("ref_text", str)):
        value = row.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise Reject("malformed_manifest", f"{name}: expected a string, got {value!r:.60}")
    check_text(row["text"], "row", max_text_chars)
    return row


def _candidates(rows: list[dict[str, Any] | Reject], job: Job) -> dict[str, list[int]]:
    """Numbers of the rows that may be references, by speaker."""
    by_speaker: dict[str, list[int]] = {}
    usable = [i for i, row in enumerate(rows) if isinstance(row, dict) and row.get("speaker") is not None]
    wanted = any(isinstance(row, dict) and row.get("ref_audio") is None for row in rows) and job.config.ref_drop < 1
    if not wanted:
        return by_speaker
    shortest = max(job.config.ref_min_seconds, job.config.min_seconds)

    def long_enough(i: int) -> bool:
        row = rows[i]
        assert isinstance(row, dict)
        seconds = clip_seconds(Clip(row["audio"], str(job.audio_base / row["audio"])), job.audio)
        return seconds is not None and shortest <= seconds <= job.config.max_seconds

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        for i, good in zip(usable, pool.map(long_enough, usable), strict=True):
            row = rows[i]
            if good and isinstance(row, dict):
                by_speaker.setdefault(str(row["speaker"]), []).append(i)
    return by_speaker


def _reference(
    row: dict[str, Any], candidates: dict[str, list[int]], rows: list[dict[str, Any] | Reject], job: Job
) -> tuple[str, str | None] | None:
    """(audio, text or None) of the row's reference; None without one (`--ref_drop`).

    Raises:
        Reject: the reference is the row itself, its text cannot be used, or there is none.
    """
    config, audio = job.config, row["audio"]
    if _uniform(f"drop {config.seed} {audio}") < config.ref_drop:
        return None
    if row.get("ref_audio") is not None:
        if _same_file(row["ref_audio"], audio, job):
            raise Reject("self_reference", "ref_audio is the row's own audio", audio)
        text = row.get("ref_text")
        return row["ref_audio"], text and check_text(text, "ref_text", config.max_text_chars)
    clips = candidates.get(str(row.get("speaker")), [])
    start = int(_uniform(f"reference {config.seed} {audio}") * len(clips))
    for step in range(len(clips)):
        other = rows[clips[(start + step) % len(clips)]]
        assert isinstance(other, dict)
        if not _same_file(other["audio"], audio, job):
            return other["audio"], other["text"]
    detail = f"speaker {row.get('speaker')!r:.60} has no other clip of at least {config.ref_min_seconds:g} s"
    raise Reject("no_reference", detail, audio)


def _same_file(one: str, two: str, job: Job) -> bool:
    try:
        return one == two or os.path.realpath(job.audio_base / one) == os.path.realpath(job.audio_base / two)
    except ValueError:  # a name with a NUL byte; reading the file gives the reject
        return False


def _uniform(name: str) -> float:
    """A number in [0, 1), a hash of the name."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass")) / 2**64


def _entry(row: dict[str, Any], reference: tuple[str, str | None] | None) -> dict[str, Any]:
    """The ChatML entry of one row."""
    user: list[dict[str, str]] = []
    if reference:
        audio, text = reference
        user += [{"type": "text", "text": text}] if text else []
        user += [{"type": "audio", "audio_url": audio}]
    user += [{"type": "text", "text": (INSTRUCTION if reference else PLAIN_INSTRUCTION) + row["text"]}]
    answer = [{"type": "text", "text": row["text"]}, {"type": "audio", "audio_url": row["audio"]}]
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
    ]
    misc = {name: plain(value) for name, value in row.items() if name not in COLUMNS and value is not None}
    entry = {"id": row.get("id"), "messages": messages, "speaker": row.get("speaker"), "misc": misc or None}
    return entry | {DISTINCT: True}

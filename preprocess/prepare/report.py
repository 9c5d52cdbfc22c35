"""The report of a prepared folder: one HTML page that needs no network and no other file.

In: the folder's records, and the recordings for its players. Out: `report.html`, with the funnel, every threshold and
what it costs, speakers, the worst agreements. It runs no script; text from the data is escaped. `review.py` serves the
same page with a list in which a person decides.

Guarantees: the same folder gives the same page; text from the data is never markup; a recording that is gone costs its
players only (tests/test_prepare_report.py).
"""

from __future__ import annotations

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import soundfile
from higgs_tune.preprocess.html import policy
from higgs_tune.preprocess.judges.edits import differences
from higgs_tune.preprocess.prepare.config import PrepareConfig, from_saved
from higgs_tune.preprocess.prepare.drawing import amount, drawn, hue, map_points, pairs, shown_edge
from higgs_tune.preprocess.prepare.reading import RATE_HZ, read_cut, usable_file
from higgs_tune.preprocess.prepare.records import (
    ACCOUNTING,
    CONFIG,
    REPORT,
    STEPS,
    Recording,
    Segment,
    read_recordings,
    read_segments,
)
from higgs_tune.preprocess.prepare.speakers import read_embeddings, voice_distances
from higgs_tune.preprocess.prepare.thresholds import edges_of, histogram
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.durable import atomic_file, from_json

PAGE = Path(__file__).parent / "page"
WORST, VOICES, VOICE_SAMPLES, SAMPLED_VOICES, FILES = 24, 100, 2, 8, 2000
MEDIA_TYPE = "audio/flac"
ClipSource = Callable[[Segment], str]


@dataclass(frozen=True)
class Prepared:
    """What a prepared folder holds. accounting: milliseconds by fate."""

    folder: Path
    config: PrepareConfig
    segments: list[Segment]
    recordings: list[Recording]
    accounting: dict[str, int]


def read_prepared(folder: Path) -> Prepared:
    """Read a prepared folder.

    Raises:
        UserError: it is none, or is damaged.
    """
    segments, recordings = read_segments(folder), read_recordings(folder)
    saved = from_json((folder / CONFIG).read_bytes(), "the config", folder / CONFIG)
    counted = from_json((folder / ACCOUNTING).read_bytes(), "the accounting", folder / ACCOUNTING)
    return Prepared(folder, from_saved(saved["options"], folder / CONFIG), segments, recordings, counted["fates_ms"])


def write_report(folder: Path) -> Path:
    """Write the page of a prepared folder into it.

    Raises:
        UserError: the folder is none, or cannot be written.
    """
    prepared = read_prepared(folder)
    with atomic_file(folder / REPORT) as file:
        for piece in page(prepared, partial(_inline_clip, folder)):
            file.write(piece.encode())
    return folder / REPORT


def clip_flac(folder: Path, segment: Segment) -> bytes:
    """A segment's sound as FLAC: libsndfile's Vorbis and Opus have another serial number each time.

    Raises:
        Reject: the recording is gone or changed.
    """
    path = usable_file(Path(segment.recording), folder, segment.sha256)
    wave_S, buffer = read_cut(path, round(segment.start * 1000), round(segment.end * 1000)), io.BytesIO()
    soundfile.write(buffer, wave_S.clip(-1, 1), RATE_HZ, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _inline_clip(folder: Path, segment: Segment) -> str:
    """A data URL; empty where the recording cannot be read."""
    try:
        return f"data:{MEDIA_TYPE};base64,{base64.b64encode(clip_flac(folder, segment)).decode()}"
    except (Reject, OSError):
        return ""


def page(prepared: Prepared, clip: ClipSource, *, token: str = "") -> Iterable[str]:
    """The page, in pieces.

    Args:
        clip: the address of a segment's sound, or empty.
        token: of the server, for the page in which a person decides; empty for the report.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters.update(name=lambda path: Path(path).name, clock=_clock)
    script = (PAGE / "review.js").read_text(encoding="utf-8")
    return environment.get_template("page.html").generate(
        clip=clip,
        served=bool(token),
        token=token,
        script=script,
        style=(PAGE / "style.css").read_text(encoding="utf-8"),
        policy=policy([script] if token else [], "'self'" if token else "'none'", media="'self'" if token else "data:"),
        **_funnel(prepared),
        **_thresholds(prepared),
        **_voices(prepared.segments),
        worst=_worst(prepared.segments),
        **_files(prepared),
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes // 60)}:{int(minutes % 60):02d}:{rest:04.1f}"


def _funnel(prepared: Prepared) -> dict[str, Any]:
    """Tiles, and rows from the whole input to what is kept."""
    fates = dict(prepared.accounting)
    kept, total = fates.pop("kept", 0), sum(prepared.accounting.values())
    order = [*(fate for fate in fates if fate not in STEPS), *(step for step in STEPS if step in fates)]
    rows, left = [_funnel_row("recordings", 0, total, total)], total
    for fate in order:
        left -= fates[fate]
        rows.append(_funnel_row(fate.replace("_", " "), fates[fate], left, total))
    segments = prepared.segments
    counts: Counter[tuple[str, str]] = Counter()
    lengths: Counter[tuple[str, str]] = Counter()
    for segment in segments:
        if segment.reject:
            key = (segment.reject.step, segment.reject.reason)
            counts[key] += 1
            lengths[key] += segment.milliseconds
    kept_segments = [segment for segment in segments if segment.keep]
    tiles = [
        ("recorded", amount(total / 1000)),
        ("kept", amount(kept / 1000)),
        ("segments kept", f"{len(kept_segments):,} of {len(segments):,}"),
        ("speakers kept", f"{len({segment.speaker for segment in kept_segments}):,}"),
        ("held out", amount(sum(s.milliseconds for s in kept_segments if s.split == "val") / 1000)),
    ]
    reasons = [(*key, f"{count:,}", amount(lengths[key] / 1000)) for key, count in counts.most_common()]
    return {"tiles": tiles, "funnel": rows, "reasons": reasons}


def _funnel_row(name: str, lost: int, left: int, total: int) -> dict[str, Any]:
    return {
        "name": name,
        "lost": f"−{amount(lost / 1000)}" if lost else "",
        "left": amount(left / 1000),
        "left_percent": round(100 * left / max(total, 1), 2),
        "lost_percent": round(100 * lost / max(total, 1), 2),
    }


def _thresholds(prepared: Prepared) -> dict[str, Any]:
    """Each threshold's chart, edge and costs; lengths and, where voices were measured, their distances."""
    config = prepared.config
    edges = [shown_edge(edge) for edge in edges_of(prepared.segments, config)]
    plain = [_lengths(prepared)] if prepared.segments else []
    plain += _distances(prepared)
    return {"edges": edges, "plain_charts": plain}


def _lengths(prepared: Prepared) -> dict[str, Any]:
    segments, bounds = prepared.segments, (prepared.config.min_seconds, prepared.config.max_seconds)
    seconds = [segment.milliseconds / 1000 for segment in segments]
    chart = drawn(histogram(seconds, seconds, [segment.keep for segment in segments], bounds), bounds)
    sentence = "--min_seconds and --max_seconds; other values cut the recordings anew."
    return {"title": "Length of segments (s)", "sentence": sentence, "chart": chart}


def _distances(prepared: Prepared) -> list[dict[str, Any]]:
    """Distances of voices, with the threshold of clustering."""
    embeddings_ND, segments = read_embeddings(prepared.folder), prepared.segments
    if embeddings_ND is None or len(embeddings_ND) != len(segments):
        return []
    numbers = [i for i, one in enumerate(segments) if one.keep and np.any(embeddings_ND[i])]
    values, same = voice_distances(embeddings_ND[numbers], [segments[i].speaker or "" for i in numbers])
    if not len(values):
        return []
    bounds = (prepared.config.speaker_distance,)
    chart = drawn(histogram(values, np.ones(len(values)), same, bounds), bounds, ("of one speaker", "of two"), pairs)
    sentence = "--speaker_distance; pairs of kept segments, of one speaker (blue) and of two (orange)."
    return [{"title": "Distance of voices (cosine)", "sentence": sentence, "chart": chart}]


def _voices(segments: Sequence[Segment]) -> dict[str, Any]:
    """The map, and speakers by the length that is kept, with clips of the largest."""
    by_speaker: defaultdict[str, list[Segment]] = defaultdict(list)
    for segment in segments:
        if segment.speaker is not None:
            by_speaker[segment.speaker].append(segment)

    def kept(name: str) -> list[Segment]:
        return [segment for segment in by_speaker[name] if segment.keep]

    order = sorted(by_speaker, key=lambda name: (-sum(s.milliseconds for s in kept(name)), name))
    voices = [
        {
            "name": name,
            "hue": hue(number),
            "split": ", ".join(sorted({segment.split for segment in kept(name) if segment.split})),
            "kept": amount(sum(segment.milliseconds for segment in kept(name)) / 1000),
            "kept_segments": len(kept(name)),
            "segments": len(by_speaker[name]),
            "samples": kept(name)[:VOICE_SAMPLES] if number < SAMPLED_VOICES else [],
        }
        for number, name in enumerate(order[:VOICES])
    ]
    hues = {name: hue(number) for number, name in enumerate(order)}
    return {"voices": voices, "more_voices": max(0, len(order) - VOICES), "points": map_points(segments, hues)}


def _worst(segments: Sequence[Segment]) -> list[tuple[Segment, list[tuple[str, str, str]]]]:
    """The texts that agree least with what was heard, and their differences by words."""
    compared = [s for s in segments if s.cer is not None and s.text is not None and s.asr_text is not None]
    compared.sort(key=lambda segment: (-(segment.cer or 0), segment.id))
    return [(s, differences((s.text or "").split(), (s.asr_text or "").split())) for s in compared[:WORST]]


def _files(prepared: Prepared) -> dict[str, Any]:
    kept = Counter[str]()
    for segment in prepared.segments:
        kept[segment.recording] += segment.milliseconds * segment.keep
    good = [file for file in prepared.recordings if file.error is None]
    files = [
        {"path": file.path, "length": amount(file.seconds), "kept": amount(kept[file.path] / 1000)}
        for file in good[:FILES]
    ]
    return {"files": files, "problems": [file for file in prepared.recordings if file.error is not None][:FILES]}

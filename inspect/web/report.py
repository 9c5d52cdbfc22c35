"""The report: one HTML page that needs no network and no other file.

In: a shard set, its codec, perhaps a run folder. Out: the page. Each distinct clip is decoded and written once, however
many samples share it, and only a few clips are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.inspect.checkpoints import Checkpoints
from higgs_tune.inspect.output import check_replaceable
from higgs_tune.inspect.stats import evenly, scan_samples
from higgs_tune.inspect.view import Segment
from higgs_tune.inspect.web.charts import code_charts, data_charts
from higgs_tune.inspect.web.clips import decode_all, ogg_of_file
from higgs_tune.inspect.web.compare import runs_info
from higgs_tune.inspect.web.html import PAGE_START, Blob, for_html, plotly_script, render
from higgs_tune.inspect.web.pages import as_base64, detail, list_row, packed_codes, searchable, set_info
from higgs_tune.inspect.web.run import RunFolder
from higgs_tune.preprocess.progress import ProgressBar
from higgs_tune.shards.durable import atomic_file, check_writable
from higgs_tune.shards.format import checksum
from higgs_tune.shards.reader import ShardSet

SCAN_SAMPLES = 20_000  # more would take minutes and change no chart


@dataclass
class _Clips:
    """The distinct clips of the page, by a hash of their codes."""

    codes: dict[str, np.ndarray] = field(default_factory=dict)

    def name(self, segment: Segment) -> str:
        name = f"{checksum(packed_codes(segment.codes_KT)):016x}"
        self.codes.setdefault(name, segment.codes_KT)
        return name


def write_report(
    shards: ShardSet,
    checkpoints: Checkpoints,
    path: Path,
    *,
    max_samples: int,
    runs: Sequence[RunFolder] = (),
    audio: bool,
) -> int:
    """Write the page.

    Args:
        max_samples: number of samples on it, spread evenly over the set.
        runs: training runs to show; of several, a comparison.
        audio: decode the clips; else the page has no players for them.

    Raises:
        UserError: the page cannot be written, or would overwrite another file; nothing is read before this is known.

    Returns:
        Number of samples on the page.
    """
    check_replaceable(path, "an HTML page", PAGE_START)
    least_bytes = len(plotly_script())
    check_writable(path.parent, least_bytes, least_bytes)
    rows = evenly(len(shards), max_samples)
    clips, lines, details = _Clips(), [], []
    for row in rows:
        sample = shards.read(row)
        lines.append(list_row(shards, row, sample, clips.name) | {"search": searchable(sample)})
        content = for_html(detail(shards, row, sample, checkpoints, clips.name))
        details.append(Blob(f"sample-{row}", content))
    codec = checkpoints.codec if audio else None
    scanned = scan_samples(shards, SCAN_SAMPLES)
    info: dict[str, Any] = set_info(shards) | {
        "rows": lines,
        "audio": audio,
        "scanned": scanned.samples,
        "charts": {"data": data_charts(shards, scanned), "codes": code_charts(scanned)},
        **runs_info(runs),
    }
    with atomic_file(path) as file:
        for piece in render(f"{info['name']}: report", info, _blobs(details, clips, codec, runs)):
            file.write(piece.encode())
    return len(rows)


def _blobs(details: list[Blob], clips: _Clips, codec: Any, runs: Sequence[RunFolder]) -> Iterator[Blob]:
    """Details of the samples, codes and audio of each clip, audio of the run."""
    yield from details
    for name, codes_KT in clips.codes.items():
        yield Blob(f"codes-{name}", as_base64(packed_codes(codes_KT)))
    if codec:
        with ProgressBar() as progress:
            progress.start("decode", len(clips.codes), "clips")
            for name, audio in decode_all(codec, clips.codes.items()):
                yield Blob(f"clip-{name}", as_base64(audio))
                progress.advance(1)
    for number, path in enumerate(runs[0].audio if runs else ()):
        yield Blob(f"clip-run/{number}", as_base64(ogg_of_file(path)))

"""The report: one HTML page that needs no network and no other file.

In: a shard set, its codec, perhaps a run folder. Out: the page. Never: all audio in memory; each distinct clip is
decoded, compressed and written once, however many samples share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.inspect.checkpoints import Checkpoints
from higgs_tune.inspect.stats import evenly, scan
from higgs_tune.inspect.view import Segment
from higgs_tune.inspect.web.charts import code_charts, data_charts
from higgs_tune.inspect.web.clips import decode_all, ogg_of_file
from higgs_tune.inspect.web.html import Blob, for_html, render
from higgs_tune.inspect.web.pages import as_base64, detail, list_row, packed_codes, searchable, set_info
from higgs_tune.inspect.web.run import Run, run_page
from higgs_tune.preprocess.progress import ProgressBar
from higgs_tune.shards.durable import atomic_file
from higgs_tune.shards.format import checksum
from higgs_tune.shards.reader import ShardSet

SCAN_SAMPLES = 20_000  # more would not change a chart, and cost minutes


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
    run: Run | None,
    audio: bool,
) -> int:
    """Write the page.

    Args:
        max_samples: samples on it, taken evenly over the set.
        run: a training run to show.
        audio: decode the clips; else the page has no players for them.

    Returns:
        How many samples it shows.
    """
    rows = evenly(len(shards), max_samples)
    clips, lines, details = _Clips(), [], []
    for row in rows:
        sample = shards.read(row)
        lines.append(list_row(shards, row, sample, clips.name) | {"search": searchable(sample)})
        found = detail(shards, row, sample, checkpoints, clips.name)
        details.append(Blob(f"sample-{row}", for_html(found)))
    codec = checkpoints.codec if audio else None
    seen = scan(shards, SCAN_SAMPLES)
    info: dict[str, Any] = set_info(shards) | {
        "rows": lines,
        "audio": audio,
        "scanned": seen.samples,
        "charts": {"data": data_charts(shards, seen), "codes": code_charts(seen)},
        "run": run_page(run) if run else None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        for piece in render(f"{info['name']}: report", info, _blobs(details, clips, codec, run)):
            file.write(piece.encode())
    return len(rows)


def _blobs(details: list[Blob], clips: _Clips, codec: Any, run: Run | None) -> Iterator[Blob]:
    """Details, then codes and audio of each clip, then the run's audio."""
    yield from details
    for name, codes_KT in clips.codes.items():
        yield Blob(f"codes-{name}", as_base64(packed_codes(codes_KT)))
    if codec:
        with ProgressBar() as progress:
            progress.start("decode", len(clips.codes), "clips")
            for name, audio in decode_all(codec, clips.codes.items()):
                yield Blob(f"clip-{name}", as_base64(audio))
                progress.advance(1)
    for number, path in enumerate(run.audio if run else ()):
        yield Blob(f"clip-run/{number}", as_base64(ogg_of_file(path)))

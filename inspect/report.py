"""The report: one HTML page that needs no network and no other file.

In: a shard set and its codec. Out: the page: summary, and for each sample its texts, a player and a code grid for
each segment. Never: text from the data as markup (the template escapes everything).
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import soundfile
from PIL import Image

from ..shards.durable import write_bytes
from ..shards.format import Sample
from ..shards.reader import ShardSet
from .view import Checkpoints, segment_codes, segment_label, statistics


def write_report(shards: ShardSet, checkpoints: Checkpoints, path: Path, max_samples: int) -> int:
    """Write the page; return how many samples it shows."""
    rows = np.unique(np.linspace(0, len(shards) - 1, min(max_samples, len(shards))).round().astype(int)).tolist()
    samples = [_sample(shards, row, checkpoints) for row in rows]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template("report.html").render(
        name=shards.folder.resolve().name, statistics=statistics(shards), samples=samples, total=len(shards)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, page.encode())
    return len(samples)


def _sample(shards: ShardSet, row: int, checkpoints: Checkpoints) -> dict[str, Any]:
    sample = shards.read(row)
    entry = shards.index[row]
    return {
        "key": sample.key,
        "speaker": sample.meta["speaker"] or "",
        "split": "validation" if entry["split"] else "training",
        "tokens": int(entry["tokens"]),
        "texts": list(_texts(sample)),
        "segments": [
            {
                "label": segment_label(number, sample.meta["segments"][number]),
                "audio": flac_url(checkpoints.codec.decode(codes_KT), checkpoints.codec.config.sample_rate_hz),
                "grid": grid_url(codes_KT),
            }
            for number, codes_KT in enumerate(segment_codes(sample))
        ],
    }


def _texts(sample: Sample) -> list[tuple[str, str]]:
    return [
        (message["role"], part["text"])
        for message in sample.meta["messages"]
        for part in message["content"]
        if part["type"] == "text"
    ]


def flac_url(wave_S: np.ndarray, sample_rate_hz: int) -> str:
    """A clip as a data: URL, 16-bit FLAC."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wave_S, -1, 1), sample_rate_hz, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(buffer.getvalue()).decode()


def grid_url(codes_KT: np.ndarray) -> str:
    """Codes as a data: URL of a picture: a row a codebook, a pixel a frame, brightness by code."""
    buffer = io.BytesIO()
    Image.fromarray((codes_KT >> 2).astype(np.uint8)).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

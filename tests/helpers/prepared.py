"""A prepared folder as higgs-prepare writes it, without its work: recordings of noise and made-up measurements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import soundfile
from higgs_tune.preprocess.prepare.config import PrepareConfig, to_saved
from higgs_tune.preprocess.prepare.records import (
    ACCOUNTING,
    CONFIG,
    RECORDINGS,
    SEGMENTS,
    Recording,
    RejectReason,
    Segment,
    segment_id,
    write_lines,
)
from higgs_tune.shards.durable import to_json, write_bytes
from higgs_tune.shards.writer import file_sha256

RATE_HZ = 16_000
WORDS = ["كان", "البحر", "هادئا", "في", "ذلك", "الصباح", "وخرج", "الصياد", "إلى", "عمله", "مبكرا", "مع", "ابنه"]
MARKUP = "<img src=x onerror=\"document.title='broken'\"> & </script><script>document.title='broken'</script>"


def make_prepared(folder: Path, recordings: int = 3, segments: int = 12, seed: int = 0) -> list[Segment]:
    """Write a prepared folder; every measurement has values on both sides of its threshold.

    Args:
        recordings, segments: number of recordings, and of segments of 4 s in each.
    """
    rng, config = Random(seed), PrepareConfig(language="ar")
    folder.mkdir(parents=True)
    made: list[Segment] = []
    files: list[Recording] = []
    for number in range(recordings):
        path, seconds = folder / f"تسجيل {number}.wav", 5.0 * segments
        noise_S = np.random.default_rng(number).standard_normal(int(seconds * RATE_HZ)).astype(np.float32)
        soundfile.write(path, 0.1 * noise_S, RATE_HZ)
        sha256 = file_sha256(path)
        files.append(Recording(str(path), sha256, seconds, RATE_HZ, 1))
        for at in range(segments):
            start = 5.0 * at + 0.5
            text = " ".join(rng.sample(WORDS, 7))
            heard = text.split()
            heard[rng.randrange(7)] = rng.choice(WORDS)
            segment = Segment(
                id=segment_id(sha256, round(start * 1000), round((start + 4) * 1000)),
                recording=str(path),
                sha256=sha256,
                start=start,
                end=start + 4.0,
                text=MARKUP if number == at == 0 else text,
                text_source="given",
                asr_text=" ".join(heard),
                cer=round(rng.uniform(0, 0.3), 3),
                quality=round(rng.gauss(3.3, 0.3), 2),
                snr=round(rng.gauss(22, 6), 1),
                clipping=round(max(0.0, rng.gauss(0.0002, 0.0004)), 5),
                sound=round(rng.uniform(0, 0.7), 3),
                seconds_per_char=round(rng.gauss(0.09, 0.01), 4),
                language="ar",
                language_probability=round(min(1.0, rng.uniform(0.75, 1.1)), 3),
                speaker=f"speaker-{number}",
                embedding_map=(round(rng.gauss(number, 0.2), 3), round(rng.gauss(number % 2, 0.2), 3)),
            )
            made.append(_decided(segment, config, rng))
    files.append(Recording(str(folder / "broken.wav"), "", 0.0, 0, 0, f"unreadable_audio: {MARKUP}"))
    write_lines(folder / SEGMENTS, made)
    write_lines(folder / RECORDINGS, files)
    write_bytes(folder / CONFIG, to_json({"command": "higgs-prepare", "options": to_saved(config)}, indent=1))
    write_bytes(folder / ACCOUNTING, to_json(_accounting(made, files)))
    return made


def _decided(segment: Segment, config: PrepareConfig, rng: Random) -> Segment:
    """The first threshold that a segment misses."""
    checks = [
        ("quality", "low_quality", segment.quality, config.min_quality, 1),
        ("snr", "low_snr", segment.snr, config.min_snr, 1),
        ("clipping", "clipped", segment.clipping, config.max_clipping, -1),
        ("language", "other_language", segment.language_probability, config.min_language_probability, 1),
        ("agreement", "disagreement", segment.cer, config.max_cer, -1),
    ]
    for step, reason, value, threshold, sign in checks:
        assert value is not None
        if (value - threshold) * sign < 0:
            return replace(segment, reject=RejectReason(step, reason, value, threshold))
    return replace(segment, keep=True, split="val" if rng.random() < 0.2 else "train")


def _accounting(segments: list[Segment], files: list[Recording]) -> dict[str, object]:
    fates: dict[str, int] = {}
    for segment in segments:
        fate = segment.reject.step if segment.reject else "kept"
        fates[fate] = fates.get(fate, 0) + segment.milliseconds
    fates["silence"] = round(1000 * sum(file.seconds for file in files)) - sum(fates.values())
    return {"fates_ms": fates}

"""Join the example's clips to recordings, two a speaker, with cues beside them: something to try higgs-prepare on.

python examples/arabic/recordings.py runs/talks
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import soundfile

HERE = Path(__file__).parent
PAUSES_S = (0.9, 0.5, 1.2)  # after each clip, in turn


def stamp(seconds: float) -> str:
    whole, part = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d},{part:03d}"


def join(clips: list[tuple[str, Path]], out: Path) -> None:
    """Write a recording of (text, file) pairs, and its cues."""
    parts: list[np.ndarray] = []
    cues, at, rate = list[str](), 0.0, 0
    for number, (text, file) in enumerate(clips):
        wave_S, rate = soundfile.read(file, dtype="float32")
        pause_S = np.zeros(int(PAUSES_S[number % len(PAUSES_S)] * rate), np.float32)
        cues.append(f"{number + 1}\n{stamp(at)} --> {stamp(at + len(wave_S) / rate)}\n{text}\n")
        parts += [wave_S, pause_S]
        at += (len(wave_S) + len(pause_S)) / rate
    out.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(out, np.concatenate(parts), rate)
    out.with_suffix(".srt").write_text("\n".join(cues), encoding="utf-8")


def main() -> None:
    folder, of_speaker = Path(sys.argv[1]), dict[str, list[tuple[str, Path]]]()
    for entry in json.loads((HERE / "chatml.json").read_bytes()):
        text, audio = entry["messages"][-1]["content"]
        of_speaker.setdefault(entry["speaker"], []).append((text["text"], HERE / audio["audio_url"]))
    for speaker, clips in of_speaker.items():
        for number, begin in enumerate(range(0, len(clips), 5), 1):
            join(clips[begin : begin + 5], folder / speaker / f"talk {number}.flac")


if __name__ == "__main__":
    main()

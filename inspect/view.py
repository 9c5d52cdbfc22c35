"""One sample as people see it: its segments, its texts, every position of its sequence.

In: a stored `Sample` and the special ids. Out: plain values for a table, a file or a page. Never: files, torch.

Labels stand where boson's collator puts them: at the position of the token that they name. A position with a label is
predicted by the position before it. Shapes: K codebooks, T frames of a segment.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from higgs_tune.shards.format import FRAME_RATE_HZ, Sample
from higgs_tune.shards.sequence import IGNORE, SpecialIds, expand, mel_positions

MODALITIES = ("text", "whisper", "audio_in", "audio_out")
DOTTED_CIRCLE = "\u25cc"  # carries a combining mark that stands alone
_CONTROLS = ("Cc", "Cs", "Co", "Cn", "Zl", "Zp")  # Unicode categories
_BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@dataclass(frozen=True)
class Segment:
    """One audio segment of a sample.

    Attributes:
        number: its place in the sample, from 0.
        role: of its message. source: the file that it was made of.
        frames, seconds: of its codes, and of its source.
        trained: the model is trained to say it.
        codes_KT: uint16 [K, T], raw.
    """

    number: int
    role: str
    source: str
    frames: int
    seconds: float
    trained: bool
    codes_KT: np.ndarray

    @property
    def kind(self) -> str:
        """`target` for what the model is trained to say, `ref` for what it is given."""
        return "target" if self.trained else "ref"

    @property
    def label(self) -> str:
        return f"{self.number} {self.kind}, {self.frames / FRAME_RATE_HZ:.2f} s, {self.source}"


def segments_of(sample: Sample, ids: SpecialIds) -> list[Segment]:
    """The audio segments of a sample, in order."""
    input_ids, label_ids = sample.tokens_2L
    places = np.flatnonzero((input_ids == ids.audio_in) | (input_ids == ids.audio_out)).tolist()
    trained = [bool(input_ids[at] == ids.audio_out and label_ids[at] >= 0) for at in places]
    codes = np.split(sample.codes_KT, np.cumsum(sample.segment_frames)[:-1], axis=1) if places else []
    return [
        Segment(number, str(info["role"]), str(info["source"]), info["frames"], float(info["seconds"]), said, raw_KT)
        for number, (info, said, raw_KT) in enumerate(zip(sample.meta["segments"], trained, codes, strict=True))
    ]


@dataclass(frozen=True)
class Turn:
    """One message: its role, whether its content is trained on, and its parts: a text, or a segment's number."""

    role: str
    trained: bool
    parts: list[str | int]


def turns_of(sample: Sample) -> list[Turn]:
    """The messages of a sample."""
    turns, audios, start = [], 0, sample.meta.get("start_index")
    for number, message in enumerate(sample.meta["messages"]):
        parts: list[str | int] = []
        for part in message["content"]:
            parts.append(str(part["text"]) if part["type"] == "text" else audios)
            audios += part["type"] != "text"
        role = str(message["role"])
        turns.append(Turn(role, role == "assistant" and (start is None or number >= start), parts))
    return turns


def target_text(sample: Sample) -> str:
    """What the model is trained to say; where it only says audio, the text that it was last asked for."""
    turns = turns_of(sample)
    said = [part for turn in turns if turn.trained for part in turn.parts if isinstance(part, str)]
    asked = [part for turn in turns if turn.role == "user" for part in turn.parts if isinstance(part, str)]
    return " ".join(said) or (asked[-1] if asked else "")


def all_text(sample: Sample) -> str:
    """Every text of a sample."""
    return "\n".join(part for turn in turns_of(sample) for part in turn.parts if isinstance(part, str))


def speaker_of(sample: Sample) -> str:
    return str(sample.meta.get("speaker") or "")


@dataclass(frozen=True)
class Position:
    """One position of the expanded sequence.

    modality: one of MODALITIES. token: id, at a text position. codes: K delayed codes, at an audio position.
    text_label: id, or None where nothing is supervised; audio_labels: K codes, -100 where nothing is supervised.
    """

    number: int
    modality: str
    token: int | None
    codes: list[int] | None
    text_label: int | None
    audio_labels: list[int] | None


def positions(sample: Sample, ids: SpecialIds, features: str = "none") -> Iterator[Position]:
    """Every position of a sample, as the model sees it."""
    seen = expand([sample], ids, [mel_positions(sample, features)])
    tokens = dict(zip(seen.text_at.tolist(), seen.text_ids.tolist(), strict=True))
    codes = dict(zip(seen.audio_at.tolist(), seen.codes_KA.T.tolist(), strict=True))
    text_labels = dict(zip((seen.text_label_at + 1).tolist(), seen.text_labels.tolist(), strict=True))
    audio_labels = dict(zip((seen.audio_label_at + 1).tolist(), seen.audio_labels_KB.T.tolist(), strict=True))
    modality = np.full(seen.length, "text", dtype=object)
    modality[seen.mel_at] = "whisper"
    for start, width, is_out in seen.segments:
        modality[start : start + width] = "audio_out" if is_out else "audio_in"
    unlabelled = [IGNORE] * ids.codebooks
    for at in range(seen.length):
        row = codes.get(at)
        labels = audio_labels.get(at, unlabelled) if row else None
        yield Position(at, modality[at], tokens.get(at), row, text_labels.get(at), labels)


def visible(text: str) -> str:
    """A token's text so that every character shows: controls escaped, a lone combining mark on a dotted circle."""
    shown = "".join(_escaped(c) if unicodedata.category(c) in (*_CONTROLS, "Cf") else c for c in text)
    shown = shown.replace(" ", "␣")
    return DOTTED_CIRCLE + shown if shown and unicodedata.category(shown[0]).startswith("M") else shown


def printable(text: str) -> str:
    """A text without anything that could steer a terminal or the direction of what follows; its lines stay."""
    steers = ((unicodedata.category(c) in _CONTROLS and c not in "\n\t") or c in _BIDI_CONTROLS for c in text)
    return "".join(_escaped(c) if steer else c for c, steer in zip(text, steers, strict=True))


def _escaped(character: str) -> str:
    return repr(character)[1:-1]


def facts(sample: Sample, entry: Any) -> dict[str, Any]:
    """What the index says of a sample, by name."""
    names = ("shard", "offset", "length", "tokens", "mel_tokens", "text_labels", "audio_labels", "audio_frames")
    return {
        "speaker": speaker_of(sample),
        "split": "validation" if entry["split"] else "training",
        **{name: int(entry[name]) for name in names},
        "seconds": round(float(entry["seconds"]), 3),
        "start_index": sample.meta.get("start_index"),
    }

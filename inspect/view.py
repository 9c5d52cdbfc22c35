"""One sample as people read it: its segments, its texts, every position of its sequence.

In: a stored `Sample` and the special ids. Out: plain values for a table, a file or a page.

A label stands at the position of the token that it names, as in boson's collator; the position before predicts it.
Shapes: K codebooks, T frames of a segment.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from higgs_tune.shards.errors import ShardError
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
        role: of its message. source: the audio file that was encoded.
        frames: length of its codes. seconds: length of its source.
        trained: its codes have labels.
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
        """`target` for a trained segment, `ref` for one that the model is given."""
        return "target" if self.trained else "ref"

    @property
    def label(self) -> str:
        return f"{self.number} {self.kind}, {self.frames / FRAME_RATE_HZ:.2f} s, {self.source}"


def segments_of(sample: Sample, ids: SpecialIds) -> list[Segment]:
    """The audio segments of a sample, in order.

    Raises:
        ShardError: there are more or fewer placeholders than segments.
    """
    input_ids, label_ids = sample.tokens_2L
    places = np.flatnonzero((input_ids == ids.audio_in) | (input_ids == ids.audio_out)).tolist()
    trained = [bool(input_ids[at] == ids.audio_out and label_ids[at] >= 0) for at in places]
    if len(places) != len(sample.meta["segments"]):
        got, expected = len(places), len(sample.meta["segments"])
        raise ShardError(
            "audio placeholders and segments differ", where=f"sample {sample.key}", expected=expected, got=got
        )
    codes = np.split(sample.codes_KT, np.cumsum(sample.segment_frames)[:-1], axis=1) if places else []
    return [
        Segment(number, str(info["role"]), str(info["source"]), info["frames"], float(info["seconds"]), said, raw_KT)
        for number, (info, said, raw_KT) in enumerate(zip(sample.meta["segments"], trained, codes, strict=True))
    ]


@dataclass(frozen=True)
class Turn:
    """One message. trained: its content has labels. parts: texts, and the numbers of segments."""

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
    """The text of the trained turns; where these hold only audio, the last text of the user."""
    turns = turns_of(sample)
    trained = [part for turn in turns if turn.trained for part in turn.parts if isinstance(part, str)]
    user = [part for turn in turns if turn.role == "user" for part in turn.parts if isinstance(part, str)]
    return " ".join(trained) or (user[-1] if user else "")


def all_text(sample: Sample) -> str:
    """All texts of a sample, one a line."""
    return "\n".join(part for turn in turns_of(sample) for part in turn.parts if isinstance(part, str))


def speaker_of(sample: Sample) -> str:
    return str(sample.meta.get("speaker") or "")


@dataclass(frozen=True)
class Position:
    """One position of the expanded sequence.

    Attributes:
        modality: one of MODALITIES.
        token: id, at a text position. codes: K delayed codes, at an audio position.
        text_label: id; None without a label. audio_labels: K codes; -100 without a label.
    """

    number: int
    modality: str
    token: int | None
    codes: list[int] | None
    text_label: int | None
    audio_labels: list[int] | None


def positions(sample: Sample, ids: SpecialIds, features: str = "none") -> Iterator[Position]:
    """Every position of a sample's expanded sequence."""
    expanded = expand([sample], ids, [mel_positions(sample, features)])
    tokens = dict(zip(expanded.text_at.tolist(), expanded.text_ids.tolist(), strict=True))
    codes = dict(zip(expanded.audio_at.tolist(), expanded.codes_KA.T.tolist(), strict=True))
    text_labels = dict(zip((expanded.text_label_at + 1).tolist(), expanded.text_labels.tolist(), strict=True))
    audio_labels = dict(zip((expanded.audio_label_at + 1).tolist(), expanded.audio_labels_KB.T.tolist(), strict=True))
    modality = np.full(expanded.length, "text", dtype=object)
    modality[expanded.mel_at] = "whisper"
    for start, width, is_out in expanded.segments:
        modality[start : start + width] = "audio_out" if is_out else "audio_in"
    unlabelled = [IGNORE] * ids.codebooks
    for at in range(expanded.length):
        row = codes.get(at)
        labels = audio_labels.get(at, unlabelled) if row else None
        yield Position(at, modality[at], tokens.get(at), row, text_labels.get(at), labels)


def visible(text: str) -> str:
    """A token's text with every character visible: controls escaped, a lone combining mark on a dotted circle."""
    shown = "".join(_escaped(c) if unicodedata.category(c) in (*_CONTROLS, "Cf") else c for c in text)
    shown = shown.replace(" ", "␣")
    return DOTTED_CIRCLE + shown if shown and unicodedata.category(shown[0]).startswith("M") else shown


def printable(text: str) -> str:
    """A text with control characters and changes of direction escaped; line breaks and tabs stay."""
    controls = ((unicodedata.category(c) in _CONTROLS and c not in "\n\t") or c in _BIDI_CONTROLS for c in text)
    return "".join(_escaped(c) if control else c for c, control in zip(text, controls, strict=True))


def _escaped(character: str) -> str:
    return repr(character)[1:-1]


def facts(sample: Sample, entry: Any) -> dict[str, Any]:
    """The index row of a sample, by name."""
    names = ("shard", "offset", "length", "tokens", "mel_tokens", "text_labels", "audio_labels", "audio_frames")
    return {
        "speaker": speaker_of(sample),
        "split": "validation" if entry["split"] else "training",
        **{name: int(entry[name]) for name in names},
        "seconds": round(float(entry["seconds"]), 3),
        "start_index": sample.meta.get("start_index"),
    }

"""From a stored sample to the sequence that the model sees: placeholders expanded, delay pattern, shifted labels.

In: a `Sample` and the checkpoint's special ids. Out: an `Expanded`: which positions hold text and which hold audio
frames, the delayed codes, and for every supervised prediction its position and target. Never: torch, padding, files.

Shapes: N positions, P text positions, M positions of Whisper features, A audio positions (input and output segments),
K codebooks, T frames of a segment; a segment takes W = T + 2 + K - 1 positions: BOS and EOS columns, and the shift of
the last codebook. The Whisper features of an input segment, where the model uses them, stand before its codes.
The delay pattern is that of MusicGen (https://arxiv.org/abs/2306.05284, section 2.2).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import overload

import numpy as np

from .errors import ShardError
from .format import Sample

IGNORE = -100
MEL_WINDOW = 3000  # mel frames of the 30 s that Whisper's tower takes


@dataclass(frozen=True)
class SpecialIds:
    """The ids that come from a checkpoint's config, never from constants."""

    audio_in: int
    audio_out: int
    stream_bos: int
    stream_eos: int
    codebooks: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Expanded:
    """One sample as the model sees it; all positions count from the start of the sample.

    A prediction at position p has its target at p + 1: `text_label_at` and `audio_label_at` hold p.

    Attributes:
        length: N.
        text_at: int64 [P], positions of text tokens; text_ids: int32 [P].
        mel_at: int64 [M], positions of Whisper features, segment after segment.
        audio_at: int64 [A], positions of audio frames; codes_KA: int32 [K, A], delayed, with BOS and EOS.
        text_label_at: int64 [labels], ascending; text_labels: int32 [labels].
        audio_label_at: int64 [B], positions of output frames that predict something;
        audio_labels_KB: int32 [K, B], -100 where a codebook predicts nothing there.
        segments: (first position, positions, is output) of each audio segment.
    """

    length: int
    text_at: np.ndarray
    text_ids: np.ndarray
    mel_at: np.ndarray
    audio_at: np.ndarray
    codes_KA: np.ndarray
    text_label_at: np.ndarray
    text_labels: np.ndarray
    audio_label_at: np.ndarray
    audio_labels_KB: np.ndarray
    segments: list[tuple[int, int, bool]]


@overload
def segment_positions(frames: int, codebooks: int) -> int: ...
@overload
def segment_positions(frames: np.ndarray, codebooks: int) -> np.ndarray: ...
def segment_positions(frames: int | np.ndarray, codebooks: int) -> int | np.ndarray:
    """Positions that a segment of `frames` frames takes: BOS, frames, EOS, and the delay."""
    return frames + 2 + codebooks - 1


def tower_frames(mel_frames: int) -> int:
    """Frames that Whisper's tower makes of mel frames: a strided convolution, then pooling by two."""
    return ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1 if mel_frames else 0


def mel_window(mel_CF: np.ndarray) -> np.ndarray:
    """Stored log-mel, float16 [C, F], as the padded 30 s that the tower takes: float32 [C, MEL_WINDOW].

    The padding is what `WhisperFeatureExtractor` makes of silence: 1e-10, clamped at 8 below the maximum in log10, in
    its scale of (x + 4) / 4.
    """
    window = np.full((len(mel_CF), MEL_WINDOW), max(float(mel_CF.max()) - 2.0, -1.5), np.float32)
    window[:, : mel_CF.shape[1]] = mel_CF
    return window


def mel_positions(sample: Sample, features: str) -> list[int]:
    """Positions of Whisper features before each segment's codes.

    Args:
        features: `none`, `mel` (the tower runs in the model) or `encoder` (its output is stored). Only input
            segments have such positions; features of an output segment have no place in the sequence.
    """
    if features == "none":
        return [0] * len(sample.segment_frames)
    count = tower_frames if features == "mel" else int
    roles = [segment["role"] for segment in sample.meta["segments"]]
    return [count(frames) if role != "assistant" else 0 for frames, role in zip(sample.mel_frames, roles, strict=True)]


def packed_length(token_count: int, segment_frames: list[int], codebooks: int) -> int:
    """Positions of a sample whose `token_count` text tokens hold one placeholder for each segment."""
    return token_count + sum(segment_positions(frames, codebooks) - 1 for frames in segment_frames)


def _diagonal_view(buffer_KW: np.ndarray, first: int, width: int) -> np.ndarray:
    """A writable view [K, width] whose row k starts at column `first + k` of the buffer."""
    row, column = buffer_KW.strides
    return np.lib.stride_tricks.as_strided(
        buffer_KW[:, first:], (len(buffer_KW), width), (row + column, column), writeable=True
    )


def delay(codes_KT: np.ndarray, ids: SpecialIds) -> np.ndarray:
    """int32 [K, W]: codebook k shifted right by k between BOS columns (1024) and EOS columns (1025)."""
    codebooks, frames = codes_KT.shape
    width = segment_positions(frames, codebooks)
    out_KW = np.full((codebooks, width), ids.stream_eos, np.int32)
    out_KW[np.tri(codebooks, width, dtype=bool)] = ids.stream_bos
    _diagonal_view(out_KW, 1, frames)[:] = codes_KT
    return out_KW


def undelay(delayed_KW: np.ndarray) -> np.ndarray:
    """Inverse of `delay`: the raw codes [K, T], without BOS and EOS."""
    codebooks, width = delayed_KW.shape
    return _diagonal_view(np.ascontiguousarray(delayed_KW), 1, width - 1 - codebooks).copy()


def delayed_labels(codes_KT: np.ndarray, ids: SpecialIds) -> np.ndarray:
    """int32 [K, W - 1]: column j holds what position j of the segment predicts, the content of column j + 1.

    Fillers are -100; each codebook's EOS is supervised once.
    """
    codebooks, frames = codes_KT.shape
    out_KB = np.full((codebooks, segment_positions(frames, codebooks) - 1), IGNORE, np.int32)
    labels = _diagonal_view(out_KB, 0, frames + 1)
    labels[:, :frames] = codes_KT
    labels[:, frames] = ids.stream_eos
    return out_KB


def expand(sample: Sample, ids: SpecialIds, features: str = "none") -> Expanded:
    """Expand one stored sample.

    Args:
        features: which Whisper features the model takes: `none`, `mel` or `encoder`.

    Raises:
        ShardError: the number of placeholders and of segments differ, or the codebooks do.
    """
    input_ids, label_ids = sample.tokens_2L
    frames = np.asarray(sample.segment_frames, np.int64)
    is_out = input_ids == ids.audio_out
    place_at = np.flatnonzero(is_out | (input_ids == ids.audio_in))
    _check(sample, ids, len(place_at), len(frames))

    widths = np.ones(len(input_ids), np.int64)
    before = mel_positions(sample, features)
    widths[place_at] = segment_positions(frames, ids.codebooks) + before
    ends = np.cumsum(widths)
    starts = ends - widths
    is_text = np.ones(len(input_ids), bool)
    is_text[place_at] = False
    labelled = is_text & (label_ids >= 0)

    segments, codes, mel_at, audio_at, label_at, labels, first = [], [], [], [], [], [], 0
    for token, segment_frames, mels in zip(place_at.tolist(), frames.tolist(), before, strict=True):
        raw_KT = sample.codes_KT[:, first : first + segment_frames]
        first += segment_frames
        start, width = int(starts[token]) + mels, int(widths[token]) - mels
        mel_at.append(np.arange(start - mels, start))
        segments.append((start, width, bool(is_out[token])))
        codes.append(delay(raw_KT, ids))
        audio_at.append(np.arange(start, start + width))
        if is_out[token] and label_ids[token] >= 0:
            label_at.append(np.arange(start, start + width - 1))
            labels.append(delayed_labels(raw_KT, ids))
    return Expanded(
        length=int(ends[-1]) if len(ends) else 0,
        text_at=starts[is_text],
        text_ids=input_ids[is_text],
        mel_at=_join(mel_at, np.zeros(0, np.int64)),
        audio_at=_join(audio_at, np.zeros(0, np.int64)),
        codes_KA=_join(codes, np.zeros((ids.codebooks, 0), np.int32)),
        text_label_at=starts[labelled] - 1,
        text_labels=label_ids[labelled],
        audio_label_at=_join(label_at, np.zeros(0, np.int64)),
        audio_labels_KB=_join(labels, np.zeros((ids.codebooks, 0), np.int32)),
        segments=segments,
    )


def _join(parts: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, axis=-1) if parts else empty


def _check(sample: Sample, ids: SpecialIds, placeholders: int, segments: int) -> None:
    where = f"sample {sample.key}"
    if placeholders != segments:
        raise ShardError("audio placeholders and segments differ", where=where, expected=segments, got=placeholders)
    if len(sample.codes_KT) != ids.codebooks:
        raise ShardError("wrong number of codebooks", where=where, expected=ids.codebooks, got=len(sample.codes_KT))
    if len(sample.tokens_2L[1]) and sample.tokens_2L[1, 0] >= 0:
        raise ShardError("the first position has a label, and nothing predicts it", where=where)


def label_counts(sample: Sample, ids: SpecialIds) -> tuple[int, int]:
    """(supervised text predictions, supervised audio predictions of one codebook) of a sample."""
    expanded = expand(sample, ids)
    return len(expanded.text_labels), int((expanded.audio_labels_KB[0] >= 0).sum())

"""From stored samples to the sequence that the model sees: placeholders expanded, delay pattern, shifted labels.

In: the samples of a pack (or one sample) and the checkpoint's special ids. Out: an `Expanded`: the positions of text
and of audio frames, the delayed codes, and position and target of every supervised prediction; no padding.

Shapes: N positions, P text positions, M positions of Whisper features, A audio positions (input and output segments),
K codebooks, T frames of a segment. A segment takes W = T + 2 + K - 1 positions: T frames, a BOS and an EOS column, and
the shift of the last codebook. If the model takes Whisper features, those of an input segment stand before its codes.
The delay pattern is that of MusicGen (https://arxiv.org/abs/2306.05284, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, overload

import numpy as np
from higgs_tune.shards.errors import ShardError

IGNORE = -100
MEL_WINDOW = 3000  # mel frames of the 30 s that Whisper's tower takes


class Stored(Protocol):
    """A sample that can be expanded: `format.Sample`, or `format.Arrays` (without metadata)."""

    @property
    def key(self) -> str: ...
    @property
    def tokens_2L(self) -> np.ndarray: ...
    @property
    def codes_KT(self) -> np.ndarray: ...
    @property
    def segment_frames(self) -> list[int]: ...


class Described(Stored, Protocol):
    """A sample with its metadata: `format.Sample`."""

    @property
    def meta(self) -> dict[str, Any]: ...
    @property
    def mel_frames(self) -> list[int]: ...


@dataclass(frozen=True)
class SpecialIds:
    """Special ids and number of codebooks, from a checkpoint's config."""

    audio_in: int
    audio_out: int
    stream_bos: int
    stream_eos: int
    codebooks: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Expanded:
    """Samples as the model sees them, one after another. Positions count from the start of the first sample.

    A prediction at position p has its target at p + 1: `text_label_at` and `audio_label_at` hold p.

    Attributes:
        lengths: int64 [samples], positions of each sample.
        text_at: int64 [P], positions of text tokens; text_ids: int32 [P].
        mel_at: int64 [M], positions of Whisper features, segment after segment.
        audio_at: int64 [A], positions of audio frames; codes_KA: int16 [K, A], delayed, with BOS and EOS.
        text_label_at: int64 [labels], ascending; text_labels: int32 [labels].
        audio_label_at: int64 [B], positions of frames that predict codes;
        audio_labels_KB: int16 [K, B], -100 where a codebook has no label.
        segment_at, segment_width: int64 [segments], first position and positions of each audio segment's codes;
        segment_is_out, segment_is_trained: bool [segments].
    """

    lengths: np.ndarray
    text_at: np.ndarray
    text_ids: np.ndarray
    mel_at: np.ndarray
    audio_at: np.ndarray
    codes_KA: np.ndarray
    text_label_at: np.ndarray
    text_labels: np.ndarray
    audio_label_at: np.ndarray
    audio_labels_KB: np.ndarray
    segment_at: np.ndarray
    segment_width: np.ndarray
    segment_is_out: np.ndarray
    segment_is_trained: np.ndarray

    @property
    def length(self) -> int:
        """N."""
        return int(self.lengths.sum())

    @property
    def segments(self) -> list[tuple[int, int, bool]]:
        """(first position, positions, is output) of each audio segment's codes."""
        return list(
            zip(self.segment_at.tolist(), self.segment_width.tolist(), self.segment_is_out.tolist(), strict=True)
        )


@overload
def segment_positions(frames: int, codebooks: int) -> int: ...
@overload
def segment_positions(frames: np.ndarray, codebooks: int) -> np.ndarray: ...
def segment_positions(frames: int | np.ndarray, codebooks: int) -> int | np.ndarray:
    """Positions of a segment of `frames` frames: BOS, frames, EOS, and the delay."""
    return frames + 2 + codebooks - 1


def tower_frames(mel_frames: int) -> int:
    """Output frames of Whisper's tower for a number of mel frames: a convolution of stride 2, then pooling by 2."""
    return ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1 if mel_frames else 0


def mel_window(mel_CF: np.ndarray) -> np.ndarray:
    """Pad stored log-mel [C, F] to the 30 s that the tower takes: [C, MEL_WINDOW], of the same type.

    The padding is the value that `WhisperFeatureExtractor` gives silence: log10 of 1e-10, but at least the maximum
    minus 8, scaled by (x + 4) / 4.
    """
    window = np.full((len(mel_CF), MEL_WINDOW), max(float(mel_CF.max()) - 2.0, -1.5), mel_CF.dtype)
    window[:, : mel_CF.shape[1]] = mel_CF
    return window


def mel_positions(sample: Described, features: str) -> list[int]:
    """Positions of Whisper features before each segment's codes.

    Args:
        features: `none`, `mel` (the tower runs in the model) or `encoder` (its output is stored). Only input
            segments have such positions; features of an output segment are not used.
    """
    if features == "none":
        return [0] * len(sample.segment_frames)
    count = tower_frames if features == "mel" else int
    roles = [segment["role"] for segment in sample.meta["segments"]]
    return [count(frames) if role != "assistant" else 0 for frames, role in zip(sample.mel_frames, roles, strict=True)]


def packed_length(token_count: int, segment_frames: list[int], codebooks: int) -> int:
    """Positions of a sample: `token_count` text tokens, of which each segment replaces its placeholder."""
    return token_count + sum(segment_positions(frames, codebooks) - 1 for frames in segment_frames)


def _diagonal_view(buffer_KW: np.ndarray, first: int, width: int) -> np.ndarray:
    """A writable view [K, width] whose row k starts at column `first + k` of the buffer."""
    row, column = buffer_KW.strides
    return np.ndarray((len(buffer_KW), width), buffer_KW.dtype, buffer_KW, first * column, (row + column, column))


def delay(codes_KT: np.ndarray, ids: SpecialIds) -> np.ndarray:
    """int16 [K, W]: codebook k shifted right by k between BOS columns (1024) and EOS columns (1025)."""
    return _delayed([codes_KT], segment_positions(np.array([codes_KT.shape[1]]), ids.codebooks), ids)


def undelay(delayed_KW: np.ndarray) -> np.ndarray:
    """Inverse of `delay`: the raw codes [K, T], without BOS and EOS."""
    codebooks, width = delayed_KW.shape
    return _diagonal_view(np.ascontiguousarray(delayed_KW), 1, width - 1 - codebooks).copy()


def _delayed(codes: list[np.ndarray], widths: np.ndarray, ids: SpecialIds) -> np.ndarray:
    """The delayed codes of several segments, one after another: int16 [K, A]."""
    out_KA = np.full((ids.codebooks, int(widths.sum())), ids.stream_eos, np.int16)
    begins = np.tri(ids.codebooks, dtype=bool)
    start = 0
    for codes_KT, width in zip(codes, widths.tolist(), strict=True):
        np.copyto(out_KA[:, start : start + ids.codebooks], ids.stream_bos, where=begins)
        _diagonal_view(out_KA, start + 1, codes_KT.shape[1])[:] = codes_KT
        start += width
    return out_KA


def _delayed_labels(codes: list[np.ndarray], ids: SpecialIds) -> np.ndarray:
    """Labels of several segments, one after another, without each segment's last position: int16 [K, B].

    Column j of a segment is its delayed column j + 1, with -100 in place of fillers; each codebook's EOS is a label
    once.
    """
    widths = [segment_positions(codes_KT.shape[1], ids.codebooks) - 1 for codes_KT in codes]
    out_KB = np.full((ids.codebooks, sum(widths)), IGNORE, np.int16)
    start = 0
    for codes_KT, width in zip(codes, widths, strict=True):
        labels = _diagonal_view(out_KB, start, codes_KT.shape[1] + 1)
        labels[:, :-1] = codes_KT
        labels[:, -1] = ids.stream_eos
        start += width
    return out_KB


def _ranges(starts: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The numbers start to start + width - 1 of every range, one range after another."""
    ends = np.cumsum(widths)
    return np.repeat(starts - (ends - widths), widths) + np.arange(int(ends[-1]) if len(ends) else 0)


def expand(
    samples: Sequence[Stored],
    ids: SpecialIds,
    before: Sequence[Sequence[int]] | None = None,
    *,
    train_inputs: bool = False,
) -> Expanded:
    """Expand samples, one after another.

    Args:
        before: `mel_positions` of each sample; None if the model takes no Whisper features.
        train_inputs: label the codes of input segments (reference audio) too.

    Raises:
        ShardError: a sample's placeholders and segments differ in number, its codebooks are not the checkpoint's, or
            its first position has a label.
    """
    nothing = np.zeros((2, 0), np.int32)
    input_ids, label_ids = np.concatenate([nothing, *[sample.tokens_2L for sample in samples]], axis=1)
    counts = np.array([sample.tokens_2L.shape[1] for sample in samples], np.int64)
    frames = [count for sample in samples for count in sample.segment_frames]
    is_out = input_ids == ids.audio_out
    place_at = np.flatnonzero(is_out | (input_ids == ids.audio_in))
    _check(samples, ids, counts, place_at, label_ids)

    segment_width = segment_positions(np.array(frames, np.int64), ids.codebooks)
    mel_width = np.array([m for sample in before for m in sample], np.int64) if before else np.zeros_like(segment_width)
    widths = np.ones(len(input_ids), np.int64)
    widths[place_at] = segment_width + mel_width
    ends = np.cumsum(widths)
    starts = ends - widths
    segment_at = starts[place_at] + mel_width
    is_text = np.ones(len(input_ids), bool)
    is_text[place_at] = False
    labelled = is_text & (label_ids >= 0)
    codes = _segments(samples)
    segment_is_out = is_out[place_at]
    trained = np.where(segment_is_out, label_ids[place_at] >= 0, train_inputs)
    return Expanded(
        lengths=np.diff(ends[np.cumsum(counts) - 1], prepend=0) if len(counts) else counts,
        text_at=starts[is_text],
        text_ids=input_ids[is_text],
        mel_at=_ranges(starts[place_at], mel_width),
        audio_at=_ranges(segment_at, segment_width),
        codes_KA=_delayed(codes, segment_width, ids),
        text_label_at=starts[labelled] - 1,
        text_labels=label_ids[labelled],
        audio_label_at=_ranges(segment_at[trained], segment_width[trained] - 1),
        audio_labels_KB=_delayed_labels([codes[i] for i in np.flatnonzero(trained)], ids),
        segment_at=segment_at,
        segment_width=segment_width,
        segment_is_out=segment_is_out,
        segment_is_trained=trained,
    )


def _segments(samples: Sequence[Stored]) -> list[np.ndarray]:
    """The raw codes [K, T] of every segment of every sample."""
    segments = []
    for sample in samples:
        start = 0
        for frames in sample.segment_frames:
            segments.append(sample.codes_KT[:, start : start + frames])
            start += frames
    return segments


def _check(
    samples: Sequence[Stored], ids: SpecialIds, counts: np.ndarray, place_at: np.ndarray, label_ids: np.ndarray
) -> None:
    """Raise ShardError for the first sample that breaks a rule of `expand`."""
    ends = np.cumsum(counts)
    placeholders = np.diff(np.searchsorted(place_at, ends), prepend=0)
    segments = [len(sample.segment_frames) for sample in samples]
    for number in np.flatnonzero(placeholders != segments).tolist():
        where, got = f"sample {samples[number].key}", int(placeholders[number])
        raise ShardError(
            "audio placeholders and segments differ in number", where=where, expected=segments[number], got=got
        )
    for number in np.flatnonzero(label_ids[(ends - counts)[counts > 0]] >= 0):
        raise ShardError(
            "the first position has a label, but no position predicts it", where=f"sample {number} of a pack"
        )
    for sample in samples:
        if len(sample.codes_KT) != ids.codebooks:
            where, got = f"sample {sample.key}", len(sample.codes_KT)
            raise ShardError("wrong number of codebooks", where=where, expected=ids.codebooks, got=got)


def label_counts(sample: Stored, ids: SpecialIds) -> tuple[int, int]:
    """(supervised text predictions, supervised audio predictions of one codebook) of a sample."""
    expanded = expand([sample], ids)
    return len(expanded.text_labels), int((expanded.audio_labels_KB[0] >= 0).sum())

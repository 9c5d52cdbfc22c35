"""One pack as tensors: from stored samples to the `Batch` that a training step takes.

In: the samples of a pack. Out: a `Batch`: all integers in one flat tensor, with every index that forward and loss need,
so that the step computes nothing on the host. No padding, no boolean masks.

The rows of the residual stream are sorted by modality: first text rows, in order of position, then audio rows. So each
FFN of the model works on a slice. Whisper features take the text FFN, so their rows are text rows. `to_sequence` and
`to_sorted` reorder rows for the attention.

Shapes: N positions (P text rows, then A audio rows), of the text rows M Whisper frames; K codebooks, Lt text labels,
La audio label rows, S segments with Whisper features, C mel bins or tower channels, B samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import (
    MEL_WINDOW,
    Expanded,
    SpecialIds,
    Stored,
    expand,
    mel_positions,
    mel_window,
    tower_frames,
)

Layout = dict[str, tuple[int, tuple[int, ...]]]


@dataclass(frozen=True)
class RowOrder:
    """Rows sorted by modality, and back.

    Attributes:
        to_sorted: [N], the position of each row. to_sequence: [N], the row of each position.
        positions: [N], each row's position in its own sample.
        cu_all, cu_text, cu_audio: [B + 1], where each sample's positions, text rows and audio rows begin.
    """

    to_sorted: np.ndarray
    to_sequence: np.ndarray
    positions: np.ndarray
    cu_all: np.ndarray
    cu_text: np.ndarray
    cu_audio: np.ndarray


@dataclass(frozen=True)
class Labels:
    """Targets, and the rows that predict them.

    Attributes:
        text_rows, text_labels: [Lt]. audio_rows: [La]; audio_labels_KL: [K, La], -100: none.
        label_rows: every row with a label, ascending.
        text_in_labels: [Lt], audio_in_labels: [La], where text_rows and audio_rows stand in label_rows.
        label_counts: [1 + K], text labels, then audio labels of each codebook.
    """

    text_rows: np.ndarray
    text_labels: np.ndarray
    audio_rows: np.ndarray
    audio_labels_KL: np.ndarray
    label_rows: np.ndarray
    text_in_labels: np.ndarray
    audio_in_labels: np.ndarray
    label_counts: np.ndarray


@dataclass(frozen=True)
class WhisperRows:
    """Rows of text tokens and of Whisper features, where the model takes features.

    Attributes:
        token_rows: [P - M], the row of each text token. mel_rows: [M], the row of each Whisper frame.
        mel_frames: [S], log-mel frames of each segment. mel_source: [M], each Whisper frame's number in the tower's
            output, over all windows. Both are empty for features of kind `encoder`.
    """

    token_rows: np.ndarray
    mel_rows: np.ndarray
    mel_frames: np.ndarray
    mel_source: np.ndarray


@dataclass(frozen=True)
class Voices:
    """Inputs of the contrastive loss.

    Attributes:
        owners: [A], 2 * sample of each audio row, plus 1 in a target segment. speakers: [B].
        pairs: [1], samples with both a reference and a target.
    """

    owners: np.ndarray
    speakers: np.ndarray
    pairs: np.ndarray


@dataclass
class Batch:
    """A pack. `batch["name"]` is a view into `flat`: text_ids [P - M], codes_KA [K, A], pairs [1], and the fields of
    `RowOrder`, `Labels`, and where they are needed `WhisperRows` and `Voices`.

    Attributes:
        flat: int32, all these arrays; on the device after `to`.
        layout: offset in `flat` and shape of each array.
        lengths, text_lengths, audio_lengths: positions, text rows and audio rows of each sample (host).
        keys: the samples' keys.
        seconds: audio of the samples.
        mels: float16; features of kind `mel`: [S, C, 3000], each segment's padded 30 s window; `encoder`: [M, C].
        weight: 1; 0 for a pack that only keeps the ranks in step at the end of an epoch.
        label_text_rows: number of text rows in label_rows (host).
        trained_segments: audio segments that are trained on.
        damaged: error messages of samples that are left out of the pack.
        reference: arguments of boson's own forward (`--forward reference`).
    """

    flat: torch.Tensor
    layout: Layout
    lengths: list[int]
    text_lengths: list[int]
    audio_lengths: list[int]
    keys: list[str]
    seconds: float
    mels: torch.Tensor | None = None
    weight: int = 1
    label_text_rows: int = 0
    trained_segments: int = 0
    damaged: list[str] = field(default_factory=list)
    reference: dict[str, Any] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        offset, shape = self.layout[name]
        return self.flat[offset : offset + math.prod(shape)].view(shape)

    def __getstate__(self) -> dict[str, Any]:
        """For pickling. An array goes from a loader process to the trainer through a pipe; a tensor would go through a
        shared-memory file and a socket of the loader process, which takes longer for this many bytes."""
        return vars(self) | {"flat": self.flat.numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"flat": torch.from_numpy(state["flat"])})

    @property
    def positions(self) -> int:
        """N."""
        return sum(self.lengths)

    @property
    def windows(self) -> int:
        """Windows of log-mel that the Whisper tower takes."""
        return 0 if self.mels is None or self.mels.ndim == 2 else len(self.mels)

    def describe(self) -> tuple[str, list[str]]:
        """The size of the pack in words, and the keys of its samples, for messages."""
        size = (
            f"a pack of {self.positions} positions in {len(self.lengths)} samples, the longest "
            f"{max(self.lengths, default=0)}, {len(self['text_labels'])} text labels, "
            f"{self['audio_labels_KL'].shape[1]} labelled frames"
        )
        return size, self.keys

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; copies from pinned memory do not block."""
        self.flat = self.flat.to(device, non_blocking=True)
        self.mels = self.mels.to(device, non_blocking=True) if self.mels is not None else None
        for name, value in (self.reference or {}).items():
            if isinstance(value, torch.Tensor):
                (self.reference or {})[name] = value.to(device)
        return self

    def pin_memory(self) -> Batch:
        """Called by the DataLoader."""
        self.flat = self.flat.pin_memory()
        self.mels = self.mels.pin_memory() if self.mels is not None else None
        return self


def collate(
    samples: Sequence[Stored],
    seconds: float,
    ids: SpecialIds,
    *,
    weight: int = 1,
    features: str = "none",
    train_inputs: bool = False,
    speakers: Sequence[int] | None = None,
    damaged: list[str] | None = None,
) -> Batch:
    """Make the batch of one pack: row order, labels, features.

    Args:
        samples: the pack's samples, in order; `format.Sample` where the model takes Whisper features.
        seconds: audio of the samples.
        ids: the checkpoint's special ids.
        weight: 0 leaves every label out.
        features: Whisper features that the model takes.
        train_inputs: label reference audio too.
        speakers: number of each sample's speaker, for the contrastive loss.
        damaged: error messages of samples that could not be read.
    """
    described = [sample for sample in samples if isinstance(sample, Sample)] if features != "none" else []
    before = [mel_positions(sample, features) for sample in described] or None
    expanded = expand(samples, ids, before, train_inputs=train_inputs)
    order = _row_order(expanded)
    labels = _labels(expanded, order, weight)
    arrays: dict[str, np.ndarray] = {"text_ids": expanded.text_ids, "codes_KA": expanded.codes_KA}
    arrays |= vars(order) | vars(labels) | {"pairs": np.zeros(1, np.int32)}
    mels = None
    if before:
        whisper, mels = _whisper(described, expanded, order, features)
        arrays |= vars(whisper)
    if speakers is not None:
        arrays |= vars(_voices(expanded, order, speakers, weight))
    flat, layout = _flatten(arrays)
    return Batch(
        flat=flat,
        layout=layout,
        lengths=expanded.lengths.tolist(),
        text_lengths=np.diff(order.cu_text).tolist(),
        audio_lengths=np.diff(order.cu_audio).tolist(),
        keys=[sample.key for sample in samples],
        seconds=seconds,
        mels=mels,
        weight=weight,
        label_text_rows=int(np.searchsorted(labels.label_rows, order.cu_text[-1])),
        trained_segments=int(expanded.segment_is_trained.sum()) * weight,
        damaged=damaged or [],
    )


def _row_order(expanded: Expanded) -> RowOrder:
    text_at, audio_at, ends = expanded.text_at, expanded.audio_at, np.cumsum(expanded.lengths)
    if len(expanded.mel_at):
        text_at = np.sort(np.concatenate([text_at, expanded.mel_at]))
    to_sorted = np.concatenate([text_at, audio_at])
    to_sequence = np.empty_like(to_sorted)
    to_sequence[to_sorted] = np.arange(len(to_sorted))
    starts = np.repeat(ends - expanded.lengths, expanded.lengths)
    return RowOrder(
        to_sorted=to_sorted,
        to_sequence=to_sequence,
        positions=to_sorted - starts[to_sorted],
        cu_all=np.concatenate([[0], ends]),
        cu_text=np.concatenate([[0], np.searchsorted(text_at, ends)]),
        cu_audio=np.concatenate([[0], np.searchsorted(audio_at, ends)]),
    )


def _labels(expanded: Expanded, order: RowOrder, weight: int) -> Labels:
    kept = slice(None) if weight else slice(0)
    text_rows = order.to_sequence[expanded.text_label_at[kept]]
    audio_rows = order.to_sequence[expanded.audio_label_at[kept]]
    audio_labels_KL = expanded.audio_labels_KB[:, kept]
    has_label = np.zeros(len(order.to_sorted), np.bool_)
    has_label[text_rows] = has_label[audio_rows] = True
    number_of_row = np.cumsum(has_label) - 1
    return Labels(
        text_rows=text_rows,
        text_labels=expanded.text_labels[kept],
        audio_rows=audio_rows,
        audio_labels_KL=audio_labels_KL,
        label_rows=np.flatnonzero(has_label),
        text_in_labels=number_of_row[text_rows],
        audio_in_labels=number_of_row[audio_rows],
        label_counts=np.concatenate([[len(text_rows)], (audio_labels_KL >= 0).sum(1)]),
    )


def _whisper(
    samples: list[Sample], expanded: Expanded, order: RowOrder, features: str
) -> tuple[WhisperRows, torch.Tensor | None]:
    """Rows and values of the Whisper features of all input segments; None if there are none."""
    token_rows, mel_rows = order.to_sequence[expanded.text_at], order.to_sequence[expanded.mel_at]
    frames, mels = [], []
    for sample in samples:
        featured = [segment for segment in sample.meta["segments"] if segment.get("mel_frames")]
        for mel_CF, segment in zip(sample.mels, featured, strict=True):
            if segment["role"] != "assistant":
                frames.append(segment["mel_frames"])
                mels.append(mel_window(mel_CF) if features == "mel" else mel_CF[:, : frames[-1]].T)
    if features != "mel":
        nothing = np.zeros(0, np.int32)
        stacked = torch.from_numpy(np.concatenate(mels)) if mels else None
        return WhisperRows(token_rows, mel_rows, nothing, nothing), stacked
    stacked = torch.from_numpy(np.stack(mels)) if mels else None
    return WhisperRows(token_rows, mel_rows, np.array(frames, np.int32), _tower_rows(frames)), stacked


def _tower_rows(mel_frames: list[int]) -> np.ndarray:
    """Numbers of the real frames in the tower's output, which has 750 frames for each window."""
    counts = [tower_frames(frames) for frames in mel_frames]
    rows = [np.arange(count) + number * (MEL_WINDOW // 4) for number, count in enumerate(counts)]
    return np.concatenate([np.zeros(0, np.int64), *rows])


def _voices(expanded: Expanded, order: RowOrder, speakers: Sequence[int], weight: int) -> Voices:
    sample = np.repeat(np.arange(len(speakers)), np.diff(order.cu_audio))
    is_target = expanded.segment_is_out & expanded.segment_is_trained  # else a reference, of either prompt layout
    owners = 2 * sample + np.repeat(is_target, expanded.segment_width)
    both = np.bincount(owners, minlength=2 * len(speakers)).reshape(-1, 2).all(1)
    return Voices(owners, np.array(speakers, np.int64), np.array([both.sum() * weight]))


def _flatten(arrays: dict[str, np.ndarray]) -> tuple[torch.Tensor, Layout]:
    layout: Layout = {}
    offset = 0
    for name, array in arrays.items():
        layout[name] = (offset, array.shape)
        offset += array.size
    flat = torch.empty(offset, dtype=torch.int32)
    np.concatenate([array.ravel() for array in arrays.values()], out=flat.numpy(), casting="same_kind")
    return flat, layout

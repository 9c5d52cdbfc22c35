"""One pack as tensors: what the loader's worker hands to the step.

In: the stored samples of a pack. Out: a `Batch`, all integers in one flat tensor, with every index that the forward
and the loss need. Never: padding, boolean masks, anything that the step would have to compute on the host.

The residual stream is kept sorted by modality: text rows first, in order of position, then audio rows, so that each
FFN works on a plain slice. Whisper features take the text path, so their rows are text rows. `to_sequence` and
`to_sorted` lead from one order to the other for the attention.

Shapes: N positions (P text rows, then A audio rows), of the text rows M Whisper frames; K codebooks, Lt text labels,
La audio label rows, S segments with Whisper features, C mel bins or tower channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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

SHORT = ("codes_KA", "audio_labels_KL")  # arrays kept as int16: most of the bytes
Layout = dict[str, tuple[int, tuple[int, ...], bool]]


@dataclass
class Batch:
    """A pack. `batch["name"]` is a view into `flat`.

    text_ids [P - M]; with Whisper features token_rows [P - M] and mel_rows [M] (which text rows they fill), and with
    `mel` features mel_source [M] (frame of the tower's output, over all windows);
    codes_KA [K, A]; positions [N] (in each sample, sorted order); to_sequence [N], to_sorted [N];
    text_rows [Lt], text_labels [Lt]; audio_rows [La], audio_labels_KL [K, La] (rows of the sorted order, -100: none);
    label_rows [Lt + La or less] (every row with a label, ascending); text_in_labels [Lt], audio_in_labels [La] (where
    in label_rows the rows of the labels stand);
    label_counts [1 + K]: text labels, then audio labels of each codebook; pairs [1]: samples with reference and target;
    cu_all, cu_text, cu_audio [samples + 1]: where each sample's positions, text rows and audio rows begin;
    for the contrastive loss owners [A] (2 * sample, and 1 more for a target) and speakers [samples].

    Attributes:
        flat: int32, everything above (codes and audio labels as pairs of int16); on the device after `to`.
        layout: offset in `flat` and shape of each array, and whether it is int16.
        lengths, text_lengths, audio_lengths: positions, text rows and audio rows of each sample (host).
        label_text_rows: how many of label_rows are text rows (host).
        keys: the samples' keys.
        seconds: audio of its samples.
        mels: float16; with `mel` features [S, C, 3000], each segment's padded 30 s window; with `encoder` [M, C].
        weight: 0 for a pack that only keeps the ranks in step at the end of an epoch, else 1.
        trained_segments: audio segments that are trained on.
        damaged: what was wrong with samples that are left out of the pack.
        reference: arguments of boson's own forward, where that is to be used instead.
        in_slot: length of `flat`, while it waits in shared memory between two processes.
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
    in_slot: int = 0
    reference: dict[str, Any] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        offset, shape, short = self.layout[name]
        size = math.prod(shape)
        words = self.flat[offset : offset + _words(size, short)]
        return (words.view(torch.int16)[:size] if short else words).view(shape)

    @property
    def positions(self) -> int:
        """N."""
        return sum(self.lengths)

    def describe(self) -> tuple[str, list[str]]:
        """The pack's size in words, and its samples' keys, for messages."""
        size = (
            f"a pack of {self.positions} positions in {len(self.lengths)} samples, the longest "
            f"{max(self.lengths, default=0)}, {len(self['text_labels'])} text labels, "
            f"{self['audio_labels_KL'].shape[1]} labelled frames"
        )
        return size, self.keys

    def to(self, device: torch.device) -> Batch:
        """The same batch, its tensors on `device`; the copy does not wait where the host memory is pinned."""
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
    room: Callable[[int], torch.Tensor | None] | None = None,
) -> Batch:
    """Make the batch of one pack.

    Args:
        samples: the pack's samples, in order; `format.Sample` where the model takes Whisper features.
        seconds: audio in it.
        ids: the checkpoint's special ids.
        weight: 0 leaves every label out.
        features: Whisper features that the model takes.
        train_inputs: label reference audio too.
        speakers: a number for each sample's speaker; adds what the contrastive loss needs.
        damaged: messages about samples that could not be read.
        room: gives memory for `flat` of a wanted size, or None for new memory.
    """
    described = [sample for sample in samples if isinstance(sample, Sample)] if features != "none" else []
    before = [mel_positions(sample, features) for sample in described] or None
    seen = expand(samples, ids, before, train_inputs=train_inputs)
    text_at = np.sort(np.concatenate([seen.text_at, seen.mel_at])) if before else seen.text_at
    to_sorted = np.concatenate([text_at, seen.audio_at])
    to_sequence = np.empty_like(to_sorted)
    to_sequence[to_sorted] = np.arange(len(to_sorted))
    ends = np.cumsum(seen.lengths)
    labels = slice(None) if weight else slice(0)
    audio_labels_KL = seen.audio_labels_KB[:, labels]
    text_label_rows, audio_label_rows = (
        to_sequence[seen.text_label_at[labels]],
        to_sequence[seen.audio_label_at[labels]],
    )
    has_label = np.zeros(len(to_sorted), np.bool_)
    has_label[text_label_rows] = has_label[audio_label_rows] = True
    label_rows, number_of = np.flatnonzero(has_label), np.cumsum(has_label) - 1
    arrays = {
        "text_ids": seen.text_ids,
        "codes_KA": seen.codes_KA,
        "positions": to_sorted - np.repeat(ends - seen.lengths, seen.lengths)[to_sorted],
        "to_sequence": to_sequence,
        "to_sorted": to_sorted,
        "text_rows": text_label_rows,
        "text_labels": seen.text_labels[labels],
        "audio_rows": audio_label_rows,
        "audio_labels_KL": audio_labels_KL,
        "label_rows": label_rows,
        "text_in_labels": number_of[text_label_rows],
        "audio_in_labels": number_of[audio_label_rows],
        "pairs": np.zeros(1, np.int32),
        "label_counts": np.concatenate([[len(seen.text_labels[labels])], (audio_labels_KL >= 0).sum(1)]),
    }
    text_lengths, audio_lengths = _counts(text_at, ends), _counts(seen.audio_at, ends)
    for name, lengths in (("cu_all", seen.lengths), ("cu_text", text_lengths), ("cu_audio", audio_lengths)):
        arrays[name] = np.concatenate([[0], np.cumsum(lengths)])
    mels, mel_frames = _mels(described, features)
    if before:
        arrays |= {"token_rows": to_sequence[seen.text_at], "mel_rows": to_sequence[seen.mel_at]}
    if speakers is not None:
        arrays |= _pooling(seen, audio_lengths, speakers, weight)
    if features == "mel":
        arrays |= {"mel_source": _tower_rows(mel_frames), "mel_frames": np.array(mel_frames, np.int32)}
    flat, layout = _flatten(arrays, room)
    return Batch(
        flat=flat,
        layout=layout,
        lengths=seen.lengths.tolist(),
        text_lengths=text_lengths,
        audio_lengths=audio_lengths,
        label_text_rows=int(has_label[: len(text_at)].sum()),
        keys=[sample.key for sample in samples],
        seconds=seconds,
        mels=mels,
        weight=weight,
        trained_segments=int(seen.segment_is_trained.sum()) * weight,
        damaged=damaged or [],
    )


def _pooling(seen: Expanded, audio_lengths: list[int], speakers: Sequence[int], weight: int) -> dict[str, np.ndarray]:
    """Which sample and role each audio row belongs to; with weight 0 no sample has a pair."""
    sample = np.repeat(np.arange(len(speakers)), audio_lengths)
    owners = 2 * sample + np.repeat(seen.segment_is_out, seen.segment_width)
    both = np.bincount(owners, minlength=2 * len(speakers)).reshape(-1, 2).all(1)
    return {"owners": owners, "speakers": np.array(speakers), "pairs": np.array([both.sum() * weight])}


def _counts(at: np.ndarray, ends: np.ndarray) -> list[int]:
    """How many of the ascending positions fall into each sample."""
    return np.diff(np.searchsorted(at, ends), prepend=0).tolist()


def _mels(samples: list[Sample], features: str) -> tuple[torch.Tensor | None, list[int]]:
    """Whisper features of all input segments, and the true frames of each."""
    found = [
        (mel, segment["mel_frames"])
        for sample in samples
        for mel, segment in zip(sample.mels, (s for s in sample.meta["segments"] if s.get("mel_frames")), strict=True)
        if segment["role"] != "assistant"
    ]
    if not found:
        return None, []
    if features == "mel":
        stacked = np.stack([mel_window(mel_CF) for mel_CF, _ in found])
    else:
        stacked = np.concatenate([mel_CF[:, :frames].T for mel_CF, frames in found])
    return torch.from_numpy(stacked), [frames for _, frames in found]


def _tower_rows(mel_frames: list[int]) -> np.ndarray:
    """Which frames of the tower's output, 750 a window, are real."""
    counts = [tower_frames(frames) for frames in mel_frames]
    rows = [np.arange(count) + number * (MEL_WINDOW // 4) for number, count in enumerate(counts)]
    return np.concatenate([np.zeros(0, np.int64), *rows])


def _flatten(
    arrays: dict[str, np.ndarray], room: Callable[[int], torch.Tensor | None] | None
) -> tuple[torch.Tensor, Layout]:
    layout: Layout = {}
    offset = 0
    for name, array in arrays.items():
        short = name in SHORT
        layout[name] = (offset, array.shape, short)
        offset += _words(array.size, short)
    flat = room(offset) if room else None
    flat = torch.empty(offset, dtype=torch.int32) if flat is None else flat
    host = flat.numpy()
    for name, array in arrays.items():
        start, shape, short = layout[name]
        words = host[start : start + _words(array.size, short)]
        (words.view(np.int16)[: array.size] if short else words).reshape(shape)[...] = array
    return flat, layout


def _words(size: int, short: bool) -> int:
    """int32 words that an array takes."""
    return -(-size // 2) if short else size

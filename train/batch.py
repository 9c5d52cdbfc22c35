"""One pack as tensors: what the loader's worker hands to the step.

In: the stored samples of a pack. Out: a `Batch`, all integers in one flat tensor, with every index that the forward
and the loss need. Never: padding, boolean masks, anything that the step would have to compute on the host.

The residual stream is kept sorted by modality: text rows first, in order of position, then audio rows, so that each
FFN works on a plain slice. `to_sequence` and `to_sorted` lead from one order to the other for the attention.

Shapes: N positions (P text, then A audio), K codebooks, Lt text labels, La audio label rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from ..shards.format import Sample
from ..shards.sequence import Expanded, SpecialIds, expand

Layout = dict[str, tuple[int, tuple[int, ...]]]


@dataclass
class Batch:
    """A pack. `batch["name"]` is a view into `flat`.

    text_ids [P]; codes_KA [K, A]; positions [N] (in each sample, sorted order); to_sequence [N], to_sorted [N];
    text_rows [Lt], text_labels [Lt]; audio_rows [La], audio_labels [La, K] (rows of the sorted order, -100: none);
    label_counts [1 + K]: text labels, then audio labels of each codebook.

    Attributes:
        flat: int32, everything above; on the device after `to`.
        layout: offset and shape of each array in `flat`.
        lengths, text_lengths, audio_lengths: positions, text rows and audio rows of each sample (host).
        keys: the samples' keys.
        seconds: audio of its samples.
        weight: 0 for a pack that only keeps the ranks in step at the end of an epoch, else 1.
        damaged: what was wrong with samples that are left out of the pack.
    """

    flat: torch.Tensor
    layout: Layout
    lengths: list[int]
    text_lengths: list[int]
    audio_lengths: list[int]
    keys: list[str]
    seconds: float
    weight: int = 1
    damaged: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> torch.Tensor:
        offset, shape = self.layout[name]
        return self.flat[offset : offset + int(np.prod(shape, dtype=np.int64))].view(shape)

    @property
    def positions(self) -> int:
        """N."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> Batch:
        """The same batch, its flat tensor on `device`; the copy does not wait where the host memory is pinned."""
        self.flat = self.flat.to(device, non_blocking=True)
        return self

    def pin_memory(self) -> Batch:
        """Called by the DataLoader."""
        self.flat = self.flat.pin_memory()
        return self


def collate(
    samples: list[Sample],
    seconds: float,
    ids: SpecialIds,
    *,
    weight: int = 1,
    features: str = "none",
    damaged: list[str] | None = None,
) -> Batch:
    """Make the batch of one pack.

    Args:
        samples: the pack's samples, in order.
        seconds: audio in it.
        ids: the checkpoint's special ids.
        weight: 0 leaves every label out.
        features: Whisper features that the model takes.
        damaged: messages about samples that could not be read.
    """
    parts = [expand(sample, ids, features) for sample in samples]
    starts = np.cumsum([0] + [part.length for part in parts])
    text_at = _shifted([part.text_at for part in parts], starts)
    audio_at = _shifted([part.audio_at for part in parts], starts)
    to_sorted = np.concatenate([text_at, audio_at])
    to_sequence = np.empty_like(to_sorted)
    to_sequence[to_sorted] = np.arange(len(to_sorted))
    labelled: list[Expanded] = parts if weight else []
    text_rows = to_sequence[_shifted([part.text_label_at for part in labelled], starts)]
    audio_rows = to_sequence[_shifted([part.audio_label_at for part in labelled], starts)]
    audio_labels = [part.audio_labels_KB for part in labelled]
    audio_labels_KB = np.concatenate([np.zeros((ids.codebooks, 0), np.int32), *audio_labels], axis=1)
    text_labels = np.concatenate([np.zeros(0, np.int32), *[part.text_labels for part in labelled]])
    arrays = {
        "text_ids": np.concatenate([part.text_ids for part in parts]),
        "codes_KA": np.concatenate([part.codes_KA for part in parts], axis=1),
        "positions": np.concatenate([np.arange(part.length) for part in parts])[to_sorted],
        "to_sequence": to_sequence,
        "to_sorted": to_sorted,
        "text_rows": text_rows,
        "text_labels": text_labels,
        "audio_rows": audio_rows,
        "audio_labels": audio_labels_KB.T,
        "label_counts": np.array([len(text_labels), *(audio_labels_KB >= 0).sum(1)], np.int64),
    }
    flat, layout = _flatten(arrays)
    return Batch(
        flat=flat,
        layout=layout,
        lengths=[part.length for part in parts],
        text_lengths=[len(part.text_at) for part in parts],
        audio_lengths=[len(part.audio_at) for part in parts],
        keys=[sample.key for sample in samples],
        seconds=seconds,
        weight=weight,
        damaged=damaged or [],
    )


def _shifted(positions: list[np.ndarray], starts: np.ndarray) -> np.ndarray:
    """Positions within each sample as positions within the pack."""
    return np.concatenate([np.zeros(0, np.int64), *[at + start for at, start in zip(positions, starts, strict=False)]])


def _flatten(arrays: dict[str, np.ndarray]) -> tuple[torch.Tensor, Layout]:
    layout: Layout = {}
    offset = 0
    for name, array in arrays.items():
        layout[name] = (offset, array.shape)
        offset += array.size
    flat = torch.empty(offset, dtype=torch.int32)
    host = flat.numpy()
    for name, array in arrays.items():
        start = layout[name][0]
        host[start : start + array.size] = array.reshape(-1)
    return flat, layout

"""What is generated, how tokens are chosen, and what comes back.

Shapes: K codebooks, T frames, W delayed columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import SpecialIds, segment_positions, undelay
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Said:
    """What was generated.

    tokens: new text tokens, special ones included. codes_KT: raw codes int64 [K, T] of the first audio, without BOS
    and EOS; None if there was none. reached_eos: a codebook gave its end of stream, and all the others followed.
    """

    tokens: list[int]
    codes_KT: np.ndarray | None
    reached_eos: bool


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temperature: 0 takes the likeliest. top_k, top_p: as transformers' logits warpers; None and 1.0 for off.
    ras_window, ras_repeats: repetition-aware sampling (https://arxiv.org/abs/2406.05370): a code that occurred
    `ras_repeats` times in the last `ras_window` frames of its codebook is drawn again from the bare softmax.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int | None = 50
    ras_window: int | None = None
    ras_repeats: int = 2

    def warpers(self) -> LogitsProcessorList:
        """Transformers' warpers, in its order."""
        warpers = LogitsProcessorList()
        if self.temperature not in (0.0, 1.0):
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers if self.temperature else LogitsProcessorList()


@dataclass(frozen=True)
class Request:
    """A prompt, and when to stop.

    prompt: without labels; if it ends with the token that opens audio, audio begins at once. stop_token: the text token
    that ends it. max_frames: frames after which audio is cut off; max_tokens: the same for text tokens.
    """

    prompt: Sample
    stop_token: int
    max_frames: int
    max_tokens: int
    seed: int = 0


def said(tokens: list[int], columns: list[np.ndarray] | None, ids: SpecialIds) -> Said:
    """The result of a request from its tokens and its first audio's delayed columns."""
    if not columns:
        return Said(tokens, None, reached_eos=False)
    delayed_KW = np.stack(columns, 1)
    ended = bool((delayed_KW[:-1, -1] == ids.stream_eos).all())  # the last codebook's is the only one that is not set
    if delayed_KW.shape[1] <= segment_positions(0, ids.codebooks):
        return Said(tokens, np.zeros((ids.codebooks, 0), np.int64), ended)
    if not ended:  # cut off: make whole columns of what there is
        delayed_KW = np.concatenate([delayed_KW, np.full((ids.codebooks, 1), ids.stream_eos)], axis=1)
    return Said(tokens, undelay(delayed_KW), ended)


def request_of(sample: Sample, ids: SpecialIds, *, speak: bool, max_frames: int, seed: int = 0) -> Request:
    """A request for the answer of the sample's last assistant turn with audio.

    Args:
        speak: begin after the token that opens the target's audio, so that only audio is generated, up to the token
            that closes it; else begin after the header of the turn, and go on to its end.

    Raises:
        ValueError: the sample has no assistant audio.
    """
    input_ids, label_ids = sample.tokens_2L
    outputs = np.flatnonzero(input_ids == ids.audio_out)
    if not len(outputs):
        raise ValueError(f"sample {sample.key} has no assistant audio")
    end = target = int(outputs[-1])
    while not speak and end and label_ids[end - 1] >= 0:
        end -= 1
    segments = sample.meta["segments"][: int(np.isin(input_ids[:end], (ids.audio_in, ids.audio_out)).sum())]
    featured = sum(bool(segment.get("mel_frames")) for segment in segments)
    frames = sum(segment["frames"] for segment in segments)
    tokens_2L = np.stack([input_ids[:end], np.full(end, -100, np.int32)])
    meta, codes_KT = sample.meta | {"segments": segments}, sample.codes_KT[:, :frames]
    prompt = Sample(sample.key, meta, tokens_2L, codes_KT, sample.mels[:featured])
    stop_token = int(input_ids[target + 1 if speak else -1])
    return Request(prompt, stop_token, max_frames, 4 + (0 if speak else len(input_ids)), seed)

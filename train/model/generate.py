"""Speech from the model, by boson's own `generate`, so that training's samples sound as inference does.

In: a model (with or without adapters) and a stored sample. Out: the text and codes that it generates after the
sample's last user turn.

Shapes: K codebooks, T frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import SpecialIds, segment_positions, undelay
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.reference import boson_inputs
from transformers import LogitsProcessor, LogitsProcessorList


@dataclass(frozen=True)
class Said:
    """What was generated.

    tokens: new text tokens, special ones included. codes_KT: raw codes int64 [K, T] of the first audio, without BOS
    and EOS; None if there was none. reached_eos: every codebook came to its end of stream.
    """

    tokens: list[int]
    codes_KT: np.ndarray | None
    reached_eos: bool


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temperature: 0 takes the likeliest. speak: begin with the target's text, so that only its audio is generated.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    speak: bool = True


@torch.no_grad()
def generate(model: Any, sample: Sample, ids: SpecialIds, sampling: Sampling, *, max_frames: int) -> Said:
    """Generate the answer of the sample's last audio-bearing assistant turn.

    Args:
        model: `HiggsAudioModel`, or a `PeftModel` around it.
        max_frames: frames after which it is stopped.

    Raises:
        ValueError: the sample has no assistant audio.
    """
    core: HiggsAudioModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    prompt = prompt_of(sample, ids, core, speak=sampling.speak)
    inputs = boson_inputs([prompt], ids, core.config.pad_token_id, mel=bool(prompt.mels))
    weight = core.embed_tokens.weight
    assert isinstance(weight, torch.Tensor)
    device = weight.device
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items() if "label" not in k}
    length = prompt.tokens_2L.shape[1]
    inputs |= {"input_ids": inputs["input_ids"][:, :length], "attention_mask": inputs["attention_mask"][:, :length]}
    if not inputs["audio_out_ids"].numel():
        inputs |= {"audio_out_ids": None, "audio_out_ids_start": None}
    inputs.pop("audio_out_ids_start_group_loc")
    choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
    if not sampling.temperature:
        choice = {"do_sample": False, "temperature": None, "top_p": None}
    limit = segment_positions(max_frames, ids.codebooks) + 4 + (0 if sampling.speak else sample.tokens_2L.shape[1])
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        tokens, audios = core.generate(
            **inputs,
            **choice,
            max_new_tokens=limit,
            use_cache=True,
            logits_processor=LogitsProcessorList([_NoPlaceholder(core.vocab_size, ids)]),
            pad_token_id=core.config.pad_token_id,
            eos_token_id=core.config.audio_eos_token_id if sampling.speak else _end_of_turn(sample),
        )
    earlier = int((prompt.tokens_2L[0] == ids.audio_out).sum())
    new = list(audios)[earlier:] or list(audios)
    return _said(tokens[0, length:].tolist(), new, ids)


class _NoPlaceholder(LogitsProcessor):
    """As sampled text a placeholder of audio would break boson's loop, which sets it by itself."""

    def __init__(self, vocabulary: int, ids: SpecialIds) -> None:
        self.vocabulary, self.placeholders = vocabulary, [ids.audio_in, ids.audio_out]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if scores.shape[-1] == self.vocabulary:  # text, not a codebook
            scores[..., self.placeholders] = -torch.inf
        return scores


def _said(tokens: list[int], audios: list[torch.Tensor], ids: SpecialIds) -> Said:
    if not audios:
        return Said(tokens, None, reached_eos=False)
    delayed_KW = audios[0].cpu().numpy()
    ended = bool((delayed_KW[:, -1] == ids.stream_eos).all())
    if delayed_KW.shape[1] <= segment_positions(0, ids.codebooks):
        return Said(tokens, np.zeros((ids.codebooks, 0), np.int64), ended)
    if not ended:  # cut off: one column of EOS completes the delay pattern
        delayed_KW = np.concatenate([delayed_KW, np.full((ids.codebooks, 1), ids.stream_eos)], axis=1)
    return Said(tokens, undelay(delayed_KW), ended)


def prompt_of(sample: Sample, ids: SpecialIds, model: HiggsAudioModel, *, speak: bool) -> Sample:
    """The sample up to where generation begins: its segments before, and no labels.

    Args:
        speak: end after the token that opens the target's audio; else after the header of the assistant's turn.
    """
    input_ids, label_ids = sample.tokens_2L
    outputs = np.flatnonzero(input_ids == ids.audio_out)
    if not len(outputs):
        raise ValueError(f"sample {sample.key} has no assistant audio")
    end = int(outputs[-1])
    if not speak:
        while end and label_ids[end - 1] >= 0:
            end -= 1
    segments = sample.meta["segments"][: int(np.isin(input_ids[:end], (ids.audio_in, ids.audio_out)).sum())]
    featured = sum(bool(segment.get("mel_frames")) for segment in segments)
    frames = sum(segment["frames"] for segment in segments)
    tokens_2L = np.stack([input_ids[:end], np.full(end, -100, np.int32)])
    return Sample(sample.key, sample.meta | {"segments": segments}, tokens_2L, sample.codes_KT[:, :frames],
                  sample.mels[:featured])  # fmt: skip


def _end_of_turn(sample: Sample) -> int:
    """The id that ends the sample's last turn."""
    return int(sample.tokens_2L[0, -1])

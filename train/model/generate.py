"""Boson's own `generate` on a request: the reference for `decoding.generate_batch`, one sequence at a time."""

from __future__ import annotations

from typing import Any

import torch
from higgs_tune.shards.sequence import SpecialIds, segment_positions
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.reference import boson_inputs
from higgs_tune.train.model.sampling import Request, Said, Sampling, said
from transformers import LogitsProcessor, LogitsProcessorList


@torch.no_grad()
def boson_generate(model: Any, request: Request, ids: SpecialIds, sampling: Sampling) -> Said:
    """Generate one request.

    Args:
        model: `HiggsAudioModel`, or a `PeftModel` around it.
    """
    core: HiggsAudioModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    prompt = request.prompt
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
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature:
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        choice |= {"top_k": sampling.top_k or 0, "seed": request.seed}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        tokens, audios = core.generate(
            **inputs,
            **choice,
            max_new_tokens=segment_positions(request.max_frames, ids.codebooks) + request.max_tokens,
            use_cache=True,
            ras_win_len=sampling.ras_window,
            ras_win_max_num_repeat=sampling.ras_repeats,
            logits_processor=LogitsProcessorList([_NoPlaceholder(core.vocab_size, ids)]),
            pad_token_id=core.config.pad_token_id,
            eos_token_id=request.stop_token,
        )
    columns = list(audios[0].cpu().numpy().T) if audios else None
    return said(tokens[0, length:].tolist(), columns, ids)


class _NoPlaceholder(LogitsProcessor):
    """Never sample a placeholder of audio as text: boson's loop sets it by itself."""

    def __init__(self, vocabulary: int, ids: SpecialIds) -> None:
        self.vocabulary, self.placeholders = vocabulary, [ids.audio_in, ids.audio_out]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if scores.shape[-1] == self.vocabulary:  # text, not a codebook
            scores[..., self.placeholders] = -torch.inf
        return scores

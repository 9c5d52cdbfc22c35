"""Models of a named size with random weights, LoRA on them, and synthetic samples of a stated length distribution.

`tiny` and `small` keep the released vocabulary and codebooks, so that real shard sets run on them; `3b` has the
released checkpoint's sizes.

Lengths: two clips (reference, target) of log-normal length (median 5.5 s, sigma 0.5, cut to 1 to 20 s) at 25 frames/s,
and 80 to 250 text tokens: 45 of the chat template, the reference's text, and twice the target's text, as long; of
these the last third, the answer, is labelled (a quarter of the text, as in examples/arabic).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from higgs_tune.shards.format import Arrays
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.train.model.load import HiggsAudioConfig, HiggsAudioModel, make_buffers
from higgs_tune.train.presets import PRESETS
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

IDS = SpecialIds(audio_in=128015, audio_out=128016, stream_bos=1024, stream_eos=1025, codebooks=8)
VOCABULARY = 128_256
TEMPLATE = 45  # text tokens that every sample has
FRAMES_A_SECOND = 25
SizeName = Literal["tiny", "small", "3b"]


@dataclass(frozen=True)
class Size:
    """Sizes of a model; text and audio FFN are alike, and every layer has both."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


SIZES: dict[str, Size] = {
    "tiny": Size(hidden=128, layers=3, heads=4, kv_heads=2, head_dim=32, ffn=256),
    "small": Size(hidden=768, layers=8, heads=12, kv_heads=4, head_dim=64, ffn=2048),  # 298 M parameters
    "3b": Size(hidden=3072, layers=28, heads=24, kv_heads=8, head_dim=128, ffn=8192),  # 5.8 B, 3.6 B without audio
}


def config_of(size: Size, vocabulary: int = VOCABULARY, ids: SpecialIds = IDS) -> HiggsAudioConfig:
    """The released checkpoint's config with the given sizes."""
    text: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    }  # fmt: skip
    config = HiggsAudioConfig(
        text_config=text,
        audio_adapter_type="dual_ffn_fast_forward",
        audio_dual_ffn_layers=list(range(size.layers)),
        audio_ffn_hidden_size=size.hidden,
        audio_ffn_intermediate_size=size.ffn,
        encode_whisper_embed=False,
        encode_audio_in_tokens=True,
        use_delay_pattern=True,
        skip_audio_tower=True,
        use_audio_out_self_attention=False,
        audio_num_codebooks=ids.codebooks,
        audio_codebook_size=1024,
        audio_stream_bos_id=ids.stream_bos,
        audio_stream_eos_id=ids.stream_eos,
        audio_in_token_idx=ids.audio_in,
        audio_out_token_idx=ids.audio_out,
        pad_token_id=vocabulary - 1,
    )
    config._attn_implementation = "sdpa"
    return config


def make_model(config: HiggsAudioConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> HiggsAudioModel:
    """Random weights, made on the device; frozen, in evaluation mode."""
    with torch.device("meta"):
        model = HiggsAudioModel(config)
    nn.Module.to(model, dtype=dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.ones_(parameter)
    make_buffers(model, config, device)
    return model.requires_grad_(False).eval()


def with_lora(model: HiggsAudioModel, rank: int = 16, seed: int = 0) -> PeftModel:
    """LoRA of the `comprehensive` preset, its B matrices random, so that every gradient is of the size it has later."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PRESETS["comprehensive"].pattern)
    peft_model = get_peft_model(model, config)  # pyright: ignore
    assert isinstance(peft_model, PeftModel)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.01)
    return peft_model


def synthetic_sample(number: int, *, frames: tuple[int, int] | None = None, text: int | None = None) -> Arrays:
    """One sample, made from its number alone: of the stated distribution, or of given lengths."""
    rng = np.random.default_rng(number)
    seconds = rng.lognormal(1.7, 0.5, 2).clip(1, 20)
    lengths = list(frames or (seconds * FRAMES_A_SECOND).astype(int).tolist())
    count = text or int(rng.integers(80, 250))
    tokens_2L = rng.integers(0, 128_000, (2, count)).astype(np.int32)
    tokens_2L[1, : count - (count - TEMPLATE) // 3] = -100
    for place, token, label in ((count // 4, IDS.audio_in, -100), (count - 3, IDS.audio_out, IDS.audio_out)):
        tokens_2L[:, place] = token, label
    tokens_2L[0, place - 1], tokens_2L[0, place + 1] = 128_013, 128_012
    codes_KT = rng.integers(0, 1024, (IDS.codebooks, sum(lengths))).astype(np.uint16)
    return Arrays(f"{number:09d}", tokens_2L, codes_KT, lengths)


def position_count(sample: Arrays) -> int:
    """Positions of a sample: text, and 9 more than its frames for each segment, in place of the placeholder."""
    return sample.tokens_2L.shape[1] + sum(frames + 9 - 1 for frames in sample.segment_frames)


def long_sample(number: int) -> Arrays:
    """A long-form sample, made from its number alone: a reference of 8 to 15 s, a target of 30 to 65 s, text."""
    rng = np.random.default_rng(number)
    seconds = int(rng.integers(8, 15)), int(rng.integers(30, 65))
    frames = seconds[0] * FRAMES_A_SECOND, seconds[1] * FRAMES_A_SECOND
    return synthetic_sample(number, frames=frames, text=TEMPLATE + 4 * seconds[0] + 8 * seconds[1])


def samples_of(count: int, shards: str | None, seed: int = 0, *, long: bool = False) -> tuple[list[Arrays], SpecialIds]:
    """The first samples of a shard set, or synthetic ones, and the special ids they were made with."""
    if shards is None:
        return [(long_sample if long else synthetic_sample)(seed + number) for number in range(count)], IDS
    opened = ShardSet(shards)
    found = list(opened.read_arrays(range(min(count, len(opened)))))
    return [sample for sample in found if isinstance(sample, Arrays)], opened.special_ids


def narrow(samples: list[Arrays], ids: SpecialIds, vocabulary: int) -> tuple[list[Arrays], SpecialIds]:
    """The same samples over a smaller vocabulary, whose last two ids stand for audio."""
    audio_in, audio_out = vocabulary - 3, vocabulary - 2
    changed = []
    for sample in samples:
        tokens_2L = sample.tokens_2L.copy()
        text = tokens_2L % (vocabulary - 3)
        tokens_2L[tokens_2L >= 0] = text[tokens_2L >= 0]
        tokens_2L[0][sample.tokens_2L[0] == ids.audio_in] = audio_in
        tokens_2L[0][sample.tokens_2L[0] == ids.audio_out] = audio_out
        changed.append(Arrays(sample.key, tokens_2L, sample.codes_KT, sample.segment_frames))
    return changed, SpecialIds(**asdict(ids) | {"audio_in": audio_in, "audio_out": audio_out})


def packs_of(samples: list[Arrays], budget: int) -> list[list[Arrays]]:
    """Samples in order, as many to a pack as fit; near enough to the plan for a handful of them."""
    packs: list[list[Arrays]] = []
    room = 0
    for sample in samples:
        length = position_count(sample)
        if length > room:
            packs.append([])
            room = budget
        packs[-1].append(sample)
        room -= length
    return packs


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

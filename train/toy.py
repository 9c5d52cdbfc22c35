"""Toy checkpoints: the real architectures at tiny sizes, random weights, fixed seeds, in Boson's original layout.

    python -m higgs_tune.train.toy --chatml examples/arabic/chatml.json --out runs/toy [--tower]

In: example texts, for the tokenizer. Out: `OUT/model` (config, safetensors, byte-level BPE with every special token of
Llama 3 and Higgs), `OUT/codec` (config, `model.pth` with HuBERT inside) and `OUT/whisper`. They go through the same
code as the real ones; their speech is noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from higgs_tune.preprocess.codec.checkpoint import boson_name, fold_position_conv
from higgs_tune.preprocess.codec.codec import CodecConfig, HiggsCodec
from higgs_tune.shards.durable import write_bytes
from higgs_tune.shards.errors import run_command
from higgs_tune.train.model.load import HiggsAudioConfig, HiggsAudioModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    DacConfig,
    HubertConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

# the 256 special tokens of the released tokenizer, in its order (ids 128000 to 128255 there)
_NAMED_SPECIALS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
    11: "<|audio_bos|>",
    12: "<|audio_eos|>",
    13: "<|audio_out_bos|>",
    15: "<|AUDIO|>",
    16: "<|AUDIO_OUT|>",
    17: "<|recipient|>",
    18: "<|scene_desc_start|>",
    19: "<|scene_desc_end|>",
    20: "<|generation_instruction_start|>",
    21: "<|generation_instruction_end|>",
    22: "<SE>",
    23: "</SE>",
    24: "<SE_s>",
    25: "</SE_s>",
    26: "<SE_e>",
    27: "</SE_e>",
}
_LLAMA_NAMED = (0, 1, 4, 6, 7, 8, 9, 10)  # Llama numbers the others; Higgs gave names to some of them
_UNNAMED = [i for i in range(256) if i not in _LLAMA_NAMED]
SPECIALS = [_NAMED_SPECIALS.get(i) or f"<|reserved_special_token_{_UNNAMED.index(i)}|>" for i in range(256)]


@dataclass(frozen=True)
class ToyConfig:
    """Make the toy checkpoints."""

    out: Path
    """Folder that receives `model`, `codec` and `whisper`."""
    chatml: Path = Path("examples/arabic/chatml.json")
    """ChatML file whose texts the tokenizer is trained on."""
    tower: bool = False
    """Give the model a Whisper tower, so that it takes Whisper features."""
    seed: int = 0
    """Seed of all weights."""


def texts_of(chatml: Path) -> Iterator[str]:
    """Every text of a ChatML array file."""
    for sample in json.loads(chatml.read_text()):
        for message in sample["messages"]:
            content = message["content"]
            yield message["role"]
            for part in [{"text": content}] if isinstance(content, str) else content:
                if "text" in part:
                    yield part["text"]


def make_tokenizer(texts: Iterable[str], vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` merges and bytes, then the 256 special tokens."""
    tokenizer = byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": vocabulary, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(**options)
    tokenizer.train_from_iterator(texts, trainer)
    return with_specials(tokenizer)


def byte_level(model: models.BPE) -> Tokenizer:
    """A tokenizer of bytes, as Llama's."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def with_specials(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """With the 256 special tokens, behind the others."""
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIALS[0], eos_token=SPECIALS[1], pad_token=SPECIALS[1]
    )


def model_config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> HiggsAudioConfig:
    """The released config with every size made small; `changes` overrides any of its fields."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "bos_token_id": token(SPECIALS[0]),
        "eos_token_id": token(SPECIALS[1]),
    }
    fields: dict[str, Any] = {
        "audio_adapter_type": "dual_ffn_fast_forward",
        "audio_dual_ffn_layers": list(range(3)),
        "audio_ffn_hidden_size": 256,
        "audio_ffn_intermediate_size": 512,
        "encode_whisper_embed": False,
        "encode_audio_in_tokens": True,
        "use_delay_pattern": True,
        "skip_audio_tower": True,
        "use_audio_out_self_attention": False,
        "audio_num_codebooks": 8,
        "audio_codebook_size": 1024,
        "audio_stream_bos_id": 1024,
        "audio_stream_eos_id": 1025,
        "audio_in_token_idx": token("<|AUDIO|>"),
        "audio_out_token_idx": token("<|AUDIO_OUT|>"),
        "audio_out_bos_token_id": token("<|audio_out_bos|>"),
        "audio_eos_token_id": token("<|audio_eos|>"),
        "pad_token_id": token(SPECIALS[1]),
        "torch_dtype": "float32",
    }
    return HiggsAudioConfig(text_config=text, **(fields | changes))


def tower_changes() -> dict[str, Any]:
    """Changes of `model_config` that add a Whisper tower; it takes the 128 mel bins of whisper-large-v3."""
    sizes = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128}
    tower = {"num_mel_bins": 128, "max_source_positions": 1500, **sizes}
    return {"skip_audio_tower": False, "encode_whisper_embed": True, "audio_encoder_config": tower}


def make_model(config: HiggsAudioConfig, seed: int) -> HiggsAudioModel:
    """Random weights; the heads are wide enough that LoRA under them can learn, and logits start near uniform."""
    torch.manual_seed(seed)
    model = HiggsAudioModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    return model


def write_whisper(folder: Path, seed: int) -> None:
    """A Whisper with random weights, to be attached to a model without a tower; it takes 128 mel bins, as large-v3."""
    torch.manual_seed(seed)
    sizes = {"num_mel_bins": 128, "d_model": 64, "vocab_size": 64, "decoder_layers": 1, "encoder_layers": 2}
    sizes |= {f"{part}_{what}": size for part in ("encoder", "decoder")
              for what, size in (("attention_heads", 2), ("ffn_dim", 128))}  # fmt: skip
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens)).save_pretrained(folder)


def codec_config() -> CodecConfig:
    """The released codec's shape, every width made small; frame rate and code space stay the real ones."""
    acoustic = DacConfig(encoder_hidden_size=4, downsampling_ratios=[8, 5, 4, 2, 3], decoder_hidden_size=64)
    acoustic.upsampling_ratios = acoustic.downsampling_ratios
    acoustic.hidden_size = 32
    return CodecConfig(24_000, 16_000, 8, 1024, 8, small_hubert(), acoustic)


def small_hubert() -> HubertConfig:
    """HuBERT at a small size, for codecs whose semantic features are random."""
    return HubertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=128,
        conv_dim=[32] * 7,
        mask_time_prob=0.0,
    )


def write_codec(folder: Path, seed: int) -> None:
    """A codec with random weights under Boson's names."""
    torch.manual_seed(seed)
    config = codec_config()
    codec = HiggsCodec(config).eval()
    for codebook in codec.quantizers:
        nn.init.normal_(codebook.get_buffer("embed"), std=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    fold_position_conv(codec)
    torch.save({boson_name(name): value for name, value in codec.state_dict().items()}, folder / "model.pth")
    write_bytes(folder / "config.json", json.dumps(boson_codec_config(config), indent=1).encode())


def boson_codec_config(config: CodecConfig) -> dict[str, object]:
    """The config of a codec as Boson's layout has it."""
    return {
        "n_filters": 32,
        "D": config.acoustic.hidden_size,
        "codebook_dim": config.codebook_dim,
        "target_bandwidths": [0.5, 1, 1.5, 2, 4],
        "ratios": config.acoustic.downsampling_ratios,
        "sample_rate": config.sample_rate_hz,
        "bins": config.codebook_size,
        "n_q": config.codebooks,
        "semantic_techer": "hubert_base_general",
    }


def make_toy(config: ToyConfig) -> None:
    """Write `OUT/model`, `OUT/codec` and `OUT/whisper`."""
    tokenizer = make_tokenizer(texts_of(config.chatml))
    model = make_model(model_config(tokenizer, **(tower_changes() if config.tower else {})), config.seed)
    model.save_pretrained(config.out / "model")
    tokenizer.save_pretrained(config.out / "model")
    write_codec(config.out / "codec", config.seed)
    write_whisper(config.out / "whisper", config.seed)
    parameters = sum(p.numel() for p in model.parameters())
    tower = "with a Whisper tower, " if config.tower else ""
    made = f"toy model ({tower}{parameters / 1e6:.1f} M parameters, {len(tokenizer)} tokens), codec and Whisper"
    print(f"{made} in {config.out}")


def main() -> None:
    run_command(lambda: make_toy(tyro.cli(ToyConfig)))


if __name__ == "__main__":
    main()

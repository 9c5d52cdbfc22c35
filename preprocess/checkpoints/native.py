"""The transformers-native layout of a language-model checkpoint, translated to Boson's terms.

In: the config of `model_type: higgs_audio_v2` (transformers 5.3 and later), its tokenizer, the names of its weights.
Out: the config that Boson's layout would have, and Boson's names for its weights. Ids of audio tokens come from the
tokenizer. Shared by preprocess, train and inspect.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError

NATIVE_TYPE, NATIVE_TOKENIZER = "higgs_audio_v2", "TokenizersBackend"
# Boson's field for an id, and the token with that id
_TOKENS = {
    "audio_in_token_idx": "<|AUDIO|>",
    "audio_out_token_idx": "<|AUDIO_OUT|>",
    "audio_out_bos_token_id": "<|audio_out_bos|>",
    "audio_eos_token_id": "<|audio_eos|>",
}
_TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("attention_bias", "attention_dropout", "mlp_bias", "bos_token_id"),
)
_NAMES = (
    (r"^model\.embed_audio_tokens\.embed_audio_tokens\.", "audio_codebook_embeddings."),
    (r"^(text|audio)_lm_head\.", r"audio_decoder_proj.\1_lm_head."),
    (r"^model\.", ""),
)
NOT_WEIGHTS = re.compile(
    r"(audio_tokens_offsets|audio_codebook_weights|rotary_emb\.(original_)?inv_freq)$"
)  # constants


def boson_config(native: dict[str, Any], folder: Path, *, with_ids: bool = True) -> dict[str, Any]:
    """Boson's config of a native checkpoint.

    Args:
        with_ids: with the ids of audio tokens, from the tokenizer.

    Raises:
        UserError: a size or the tokenizer is missing, or the tokenizer lacks an audio token.
    """
    try:
        hidden, layers = native["hidden_size"], native["num_hidden_layers"]
        codebooks, stream_bos = native["num_codebooks"], native.get("audio_stream_bos_id", 1024)
        rope = dict(native.get("rope_parameters") or native["rope_scaling"])
        text = {name: native[name] for name in _TEXT_FIELDS if native.get(name) is not None}
    except KeyError as error:
        raise UserError(f"the checkpoint's config lacks {error}", where=folder / "config.json") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's config is not usable: {error}", where=folder / "config.json") from error
    text |= {"model_type": "llama", "rope_theta": rope.pop("rope_theta", native.get("rope_theta", 500000.0))}
    if rope.get("rope_type", "default") != "default":
        text["rope_scaling"] = rope
    stream_eos = native.get("audio_stream_eos_id", stream_bos + 1)
    if native.get("codebook_size", stream_bos + 2) != stream_bos + 2 or stream_eos != stream_bos + 1:
        raise UserError(
            "codebook_size does not end with the two ids of the stream",
            where=folder / "config.json",
            expected=f"{stream_bos + 2}, with ids {stream_bos} and {stream_bos + 1}",
            got=f"{native.get('codebook_size')}, with ids {stream_bos} and {stream_eos}",
        )
    return {
        "model_type": "higgs_audio",
        "text_config": text,
        "audio_adapter_type": "dual_ffn_fast_forward",
        "audio_dual_ffn_layers": list(range(layers)),
        "audio_ffn_hidden_size": hidden,
        "audio_ffn_intermediate_size": native["intermediate_size"],
        "audio_num_codebooks": codebooks,
        "audio_codebook_size": stream_bos,  # codes are below the two ids of the stream
        "audio_stream_bos_id": stream_bos,
        "audio_stream_eos_id": stream_eos,
        "encode_whisper_embed": False,
        "encode_audio_in_tokens": True,
        "skip_audio_tower": True,
        "use_delay_pattern": True,
        "pad_token_id": native.get("pad_token_id"),
        "torch_dtype": native.get("dtype") or native.get("torch_dtype"),
        **(_token_ids(folder) if with_ids else {}),
    }


def _token_ids(folder: Path) -> dict[str, int]:
    file = folder / "tokenizer.json"
    try:
        added = {token["content"]: token["id"] for token in json.loads(file.read_text())["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("the checkpoint has no tokenizer that names its audio tokens", where=file) from error
    missing = [token for token in _TOKENS.values() if token not in added]
    if missing:
        raise UserError("the tokenizer lacks audio tokens", where=file, expected=", ".join(missing))
    return {field: added[token] for field, token in _TOKENS.items()}


def is_native(folder: Path) -> bool:
    """Whether a checkpoint folder has the native layout.

    Raises:
        UserError: config.json is missing, or is not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError("no checkpoint here", where=folder, expected="config.json")
    return durable.from_json(file.read_bytes(), "the checkpoint's config", file).get("model_type") == NATIVE_TYPE


def native_weight_name(name: str) -> str:
    """The native name of a weight or module with one of Boson's names."""
    if name.startswith("audio_decoder_proj."):
        return name.removeprefix("audio_decoder_proj.")
    if name == "audio_codebook_embeddings" or name.startswith("audio_codebook_embeddings."):
        return name.replace("audio_codebook_embeddings", "model.embed_audio_tokens.embed_audio_tokens", 1)
    return f"model.{name}"


def boson_weight_name(name: str) -> str:
    """Boson's name of a native weight; one of Boson's names is returned unchanged."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name

"""The files of a checkpoint in the transformers-native layout, beside its weights.

In: the config of the result in Boson's terms, and the base checkpoint. Out: the bytes of config.json,
generation_config.json, processor_config.json, chat_template.jinja and the tokenizer's files. What this layout cannot
hold is refused by name. Source: transformers' `HiggsAudioV2Config` and `HiggsAudioV2Processor` (5.3 and later).
Guarantees (tests/native): transformers' own classes load the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from higgs_tune.preprocess.checkpoints.checkpoint import read_config
from higgs_tune.preprocess.checkpoints.native import NATIVE_TOKENIZER, NATIVE_TYPE, is_native
from higgs_tune.preprocess.codec.native_files import FEATURES
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from higgs_tune.train.export.codec import codec_layout
from higgs_tune.train.model.load import HiggsAudioConfig, without_marks

CODEC = "bosonai/higgs-audio-v2-tokenizer"
PROCESSOR, CHAT_TEMPLATE = "processor_config.json", "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("attention_bias", "attention_dropout", "mlp_bias", "initializer_range"),
)
# Positions of the last codebooks' delayed ends hold this token; Llama's tokenizer has it behind <|audio_out_bos|>.
_DELAY, _RESERVED = "<|reserved_special_token_6|>", "<|reserved_special_token_"
RAS = {"ras_win_len": 7, "ras_win_max_num_repeat": 2}  # of the released checkpoint

# A system turn; perhaps a scene within it; then turns in order. An assistant's turn is one recording. The end is
# where speech begins.
TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content | trim }}
{%- else -%}{%- for part in content if part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set speech = '<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>' -%}
{%- if not messages or messages[0]['role'] != 'system' -%}
{{- raise_exception('the first message must be of the system') -}}
{%- endif -%}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' + text(messages[0]['content']) -}}
{%- set turns = messages[1:] -%}
{%- if turns and turns[0]['role'] == 'scene' -%}
{{- '\\n\\n<|scene_desc_start|>\\n' -}}
{%- set content = turns[0]['content'] -%}
{%- if content is string -%}{{- content | trim -}}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] | trim -}}
{%- if not loop.last -%}
{%- if loop.first -%}{{- '\\n\\n' -}}
{%- elif content[loop.index]['type'] != 'audio' -%}{{- '\\n' -}}{%- endif -%}
{%- endif -%}
{%- elif part['type'] == 'audio' -%}
{{- ' ' + speech -}}{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '\\n<|scene_desc_end|>' -}}
{%- set turns = turns[1:] -%}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- for turn in turns -%}
{{- '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\\n\\n' -}}
{%- if turn['role'] != 'assistant' -%}{{- text(turn['content']) -}}
{%- elif turn['content'] is string or turn['content'][0]['type'] != 'audio' -%}
{{- raise_exception('a message of the assistant must be audio') -}}
{%- else -%}{{- speech -}}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n<|audio_out_bos|>' -}}
{%- endif -%}
"""


def refuse_what_native_lacks(config: HiggsAudioConfig, where: Path) -> None:
    """Make sure that the native layout can hold a model.

    Raises:
        UserError: names the parts that it cannot hold.
    """
    text, layers = config.text_config, list(range(config.text_config.num_hidden_layers))
    sizes = (config.audio_ffn_hidden_size, config.audio_ffn_intermediate_size)
    lacking = {
        "a Whisper tower and its projector (audio_tower, audio_encoder_proj)": not config.skip_audio_tower,
        "audio self-attention (audio_attn, audio_post_audio_attn_layer_norm)": config.use_audio_out_self_attention,
        "a projector of audio embeddings (audio_out_embed_projector)": config.use_audio_out_embed_projector,
        "layers without an audio FFN (audio_dual_ffn_layers)": sorted(config.audio_dual_ffn_layers or ()) != layers,
        "an audio FFN of other sizes than the text FFN": sizes != (text.hidden_size, text.intermediate_size),
    }
    got = [name for name, present in lacking.items() if present]
    if got:
        raise UserError(f"--layout native has no place for {'; '.join(got)}", where=where,
                        hint="--layout original holds it.")  # fmt: skip


class NativeFiles:
    """The files of one checkpoint.

    Raises:
        UserError: the base has no tokenizer, or the tokenizer lacks a token that the layout needs.
    """

    def __init__(self, config: HiggsAudioConfig, base: Path, codec: str | None) -> None:
        """codec: Hub name or folder of the audio tokenizer; None for the base's own, or Boson's."""
        self.config, self.base = config, base
        raw = durable.from_json((base / "config.json").read_bytes(), "the checkpoint's config", base / "config.json")
        self.native = raw if raw.get("model_type") == NATIVE_TYPE else {}
        self.ids = token_ids(base)
        given = (
            codec
            or self.native.get("audio_tokenizer_id")
            or self._base_processor().get("audio_tokenizer", {}).get("audio_tokenizer_name_or_path")
        )
        self.codec = str(given or CODEC)
        if codec_layout(Path(self.codec)) == "original":
            hint = f"higgs-export {self.codec} --out FOLDER --layout native converts it."
            raise UserError("--audio_tokenizer_path: transformers reads audio tokenizers in the native layout alone",
                            where=self.codec, hint=hint)  # fmt: skip
        self.delay = self._delay_token()

    def _base_processor(self) -> dict[str, Any]:
        file = self.base / PROCESSOR
        has = bool(self.native) and file.is_file()
        return durable.from_json(file.read_bytes(), "the processor's config", file) if has else {}

    def _delay_token(self) -> str:
        """The token of the positions at which codebooks end one after the other."""
        by_id = {number: token for token, number in self.ids.items()}
        told = self.native.get("audio_delay_token_id")
        token = by_id.get(told) if told is not None else _DELAY if _DELAY in self.ids else None
        token = token or by_id.get(self._id("<|audio_out_bos|>") + 1, "")
        if told is None and not token.startswith(_RESERVED):
            raise UserError("the tokenizer has no token for the delayed ends of codebooks", where=self.base,
                            expected=_DELAY, got=token or None)  # fmt: skip
        return token

    def _id(self, token: str) -> int:
        if token not in self.ids:
            raise UserError("the tokenizer lacks a token", where=self.base / "tokenizer.json", expected=token)
        return self.ids[token]

    def to_bytes(self, dtype: torch.dtype) -> dict[str, bytes]:
        """The content of each file, by name. dtype: of the weights."""
        processor = durable.to_json(self._base_processor() | self._processor(), indent=2) + b"\n"
        files = {"config.json": self._config(dtype), "generation_config.json": self._generation(), PROCESSOR: processor}
        own_template = self.base / CHAT_TEMPLATE
        kept = bool(self.native) and own_template.is_file()
        files[CHAT_TEMPLATE] = own_template.read_bytes() if kept else TEMPLATE.encode()
        return files | tokenizer_files(self.base, drop=("chat_template",), pad=self.config.pad_token_id)

    def _config(self, dtype: torch.dtype) -> bytes:
        text = self.config.text_config
        rope = dict(text.rope_scaling or {"rope_type": "default"}) | {"rope_theta": text.rope_theta}
        rope.setdefault("rope_type", rope.pop("type", "default"))
        made = {name: getattr(text, name) for name in _SAME if getattr(text, name, None) is not None}
        made |= {
            "architectures": ["HiggsAudioV2ForConditionalGeneration"],
            "model_type": NATIVE_TYPE,
            "dtype": str(dtype).removeprefix("torch."),
            "rope_parameters": rope,
            "tie_word_embeddings": False,
            "use_cache": True,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": self._id("<|eot_id|>"),
            "pad_token_id": self.config.pad_token_id,
            "num_codebooks": self.config.audio_num_codebooks,
            "codebook_size": self.config.audio_codebook_size + 2,
            "audio_token_id": self.config.audio_out_token_idx,
            "audio_bos_token_id": self._id("<|audio_out_bos|>"),
            "audio_eos_token_id": self._id("<|audio_eos|>"),
            "audio_delay_token_id": self._id(self.delay),
            "audio_stream_bos_id": self.config.audio_stream_bos_id,
            "audio_stream_eos_id": self.config.audio_stream_eos_id,
            "audio_tokenizer_id": self.codec,
        }
        kept = {name: value for name, value in self.native.items() if name != "torch_dtype"}
        ours = {name: made[name] for name in ("architectures", "dtype", "audio_tokenizer_id")}
        return durable.to_json(made | kept | ours, indent=2) + b"\n"

    def _generation(self) -> bytes:
        file = self.base / "generation_config.json"
        if self.native and file.is_file():
            return file.read_bytes()
        made = {"bos_token_id": self.config.text_config.bos_token_id, "eos_token_id": self._id("<|eot_id|>")}
        made |= {"pad_token_id": self.config.pad_token_id, "use_text_head": True, **RAS}
        return durable.to_json(made, indent=2) + b"\n"

    def _processor(self) -> dict[str, Any]:
        codec = {"audio_tokenizer_class": "HiggsAudioV2TokenizerModel", "audio_tokenizer_name_or_path": self.codec}
        return {
            "processor_class": "HiggsAudioV2Processor",
            "audio_tokenizer": codec,
            "feature_extractor": FEATURES,
            "audio_token": "<|AUDIO_OUT|>",
            "audio_bos_token": "<|audio_out_bos|>",
            "audio_eos_token": "<|audio_eos|>",
            "audio_delay_token": self.delay,
            "audio_stream_bos_id": self.config.audio_stream_bos_id,
            "audio_stream_eos_id": self.config.audio_stream_eos_id,
        }


def token_ids(base: Path) -> dict[str, int]:
    """Ids of a tokenizer's added tokens.

    Raises:
        UserError: there is no tokenizer.
    """
    file = base / "tokenizer.json"
    try:
        return {token["content"]: token["id"] for token in json.loads(file.read_text("utf-8"))["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("the base checkpoint has no tokenizer", where=file) from error


def tokenizer_files(base: Path, *, drop: tuple[str, ...] = (), pad: int | None = None) -> dict[str, bytes]:
    """The tokenizer's files.

    Args:
        drop: fields of tokenizer_config.json that are left out.
        pad: id of the padding token to name, where the tokenizer names none.

    Raises:
        UserError: a file is missing or damaged.
    """
    files = {name: (base / name).read_bytes() for name in TOKENIZER_FILES if (base / name).is_file()}
    for name in TOKENIZER_FILES[:2]:
        if name not in files:
            raise UserError("the base checkpoint has no tokenizer", where=base, expected=name)
    config = durable.from_json(files["tokenizer_config.json"], "the tokenizer's config", base / "tokenizer_config.json")
    changed = {name: value for name, value in config.items() if name not in drop}
    if config.get("tokenizer_class") == NATIVE_TOKENIZER:  # older transformers do not know it
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokens = {number: token for token, number in token_ids(base).items()}
    if not config.get("pad_token") and pad in tokens:
        changed["pad_token"] = tokens[pad]
    if changed != config:
        files["tokenizer_config.json"] = durable.to_json(changed, indent=2) + b"\n"
    return files


def original_files(config: HiggsAudioConfig, base: Path, dtype: torch.dtype) -> dict[str, bytes]:
    """config.json, generation_config.json and the tokenizer's files in Boson's layout."""
    switches = ("use_audio_out_self_attention", "skip_audio_tower", "encode_whisper_embed")
    told = read_config(base) | {name: getattr(config, name) for name in switches}
    told |= {"architectures": ["HiggsAudioModel"], "torch_dtype": str(dtype).removeprefix("torch.")}
    if not config.skip_audio_tower:
        told["audio_encoder_config"] = json.loads(config.audio_encoder_config.to_json_string())
    files = {"config.json": durable.to_json(without_marks(told), indent=2) + b"\n", **tokenizer_files(base)}
    generation, chat = base / "generation_config.json", base / CHAT_TEMPLATE
    from_native = is_native(base)
    if generation.is_file():
        raw = durable.from_json(generation.read_bytes(), "the generation config", generation)
        kept = {name: value for name, value in raw.items() if name not in (*RAS, "use_text_head")}
        files["generation_config.json"] = (
            durable.to_json(kept, indent=2) + b"\n" if from_native else generation.read_bytes()
        )
    if chat.is_file() and not from_native:
        files[CHAT_TEMPLATE] = chat.read_bytes()
    return files

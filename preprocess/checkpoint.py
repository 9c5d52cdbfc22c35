"""What preprocessing and training need of a language-model checkpoint besides its weights: config and tokenizer.

In: a checkpoint folder. Out: its config as a dict, its special ids, its tokenizer, and hashes that name them in the
provenance. Never: weights, remote code, constants for ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..shards.errors import UserError
from ..shards.sequence import SpecialIds
from ..shards.writer import file_sha256
from .native import NATIVE_TYPE, boson_config

_ID_FIELDS = {
    "audio_in": "audio_in_token_idx",
    "audio_out": "audio_out_token_idx",
    "stream_bos": "audio_stream_bos_id",
    "stream_eos": "audio_stream_eos_id",
    "codebooks": "audio_num_codebooks",
}


def read_config(path: Path) -> dict[str, Any]:
    """A checkpoint's config, in Boson's terms, whichever layout it has.

    Raises:
        UserError: it is missing, no JSON, or another model's.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UserError("no checkpoint here", where=path, expected="config.json")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"the checkpoint's config is not JSON: {error}", where=file) from error
    if config.get("model_type") == NATIVE_TYPE:
        return boson_config(config, path)
    if config.get("model_type") != "higgs_audio":
        raise UserError(
            "not a Higgs Audio v2 checkpoint",
            where=file,
            expected="model_type higgs_audio or higgs_audio_v2",
            got=config.get("model_type"),
        )
    return config


def special_ids(config: dict[str, Any], where: Path) -> SpecialIds:
    """The ids that expansion and loss need.

    Raises:
        UserError: the config does not name one of them.
    """
    missing = [field for field in _ID_FIELDS.values() if not isinstance(config.get(field), int)]
    if missing:
        raise UserError("the checkpoint's config lacks ids", where=where, expected=", ".join(missing))
    return SpecialIds(**{name: config[field] for name, field in _ID_FIELDS.items()})


def load_tokenizer(path: Path, ids: SpecialIds) -> PreTrainedTokenizerBase:
    """The text tokenizer of a checkpoint folder.

    Raises:
        UserError: no tokenizer files, or its audio placeholders are not the config's.
    """
    if not (path / "tokenizer.json").is_file():
        raise UserError("the checkpoint has no tokenizer", where=path, expected="tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    for token, expected in (("<|AUDIO|>", ids.audio_in), ("<|AUDIO_OUT|>", ids.audio_out)):
        got = tokenizer.convert_tokens_to_ids(token)
        if got != expected:
            raise UserError(f"tokenizer and config disagree on {token}", where=path, expected=expected, got=got)
    return tokenizer


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """What the provenance says of a language model: equal for a base model and what was fine-tuned from it."""
    config = read_config(path)
    tokenizer = path / "tokenizer.json"
    return {
        "name": path.resolve().name,
        "special_ids": special_ids(config, path / "config.json").to_dict(),
        "tokenizer_sha256": file_sha256(tokenizer) if tokenizer.is_file() else "",
        "codebook_size": config.get("audio_codebook_size"),
        "text_vocabulary": config.get("text_config", {}).get("vocab_size"),
    }

"""Config and tokenizer of a language-model checkpoint. Shared by preprocess, train, inspect and evaluate.

In: a checkpoint folder in either layout. Out: its config in Boson's terms, its special ids, its tokenizer, and the
description that provenance stores. Ids come from the config, never from constants; no remote code is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from higgs_tune.preprocess.checkpoints.native import NATIVE_TOKENIZER, NATIVE_TYPE, boson_config
from higgs_tune.preprocess.filetype import refuse_pointer
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError, few, first_line
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.shards.writer import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # takes seconds to import: `verify` reads configs without it

_ID_FIELDS = {
    "audio_in": "audio_in_token_idx",
    "audio_out": "audio_out_token_idx",
    "stream_bos": "audio_stream_bos_id",
    "stream_eos": "audio_stream_eos_id",
    "codebooks": "audio_num_codebooks",
}


def read_config(path: Path, *, with_ids: bool = True) -> dict[str, Any]:
    """A checkpoint's config in Boson's terms, from either layout.

    Args:
        with_ids: with the ids of audio tokens, which the native layout has in its tokenizer alone.

    Raises:
        UserError: config.json is missing, is not JSON, or describes another model.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UserError("no checkpoint here", where=path, expected="config.json")
    refuse_pointer(file, "the checkpoint's config")
    config = durable.from_json(file.read_bytes(), "the checkpoint's config", file)
    if config.get("model_type") == NATIVE_TYPE:
        return boson_config(config, path, with_ids=with_ids)
    for name, good, expected in (
        ("model_type", config.get("model_type") == "higgs_audio", "higgs_audio or higgs_audio_v2"),
        ("text_config", isinstance(config.get("text_config"), dict), "an object"),
    ):
        if not good:
            got = f"{config.get(name)!r:.40}"
            raise UserError("not a Higgs Audio v2 checkpoint", where=file, expected=f"{name}: {expected}", got=got)
    return config


def special_ids(config: dict[str, Any], where: Path) -> SpecialIds:
    """The ids that expansion and loss need.

    Raises:
        UserError: the config lacks one of them.
    """
    missing = [field for field in _ID_FIELDS.values() if not isinstance(config.get(field), int)]
    if missing:
        raise UserError("the checkpoint's config lacks ids", where=where, expected=", ".join(missing))
    return SpecialIds(**{name: config[field] for name, field in _ID_FIELDS.items()})


def load_tokenizer(path: Path, ids: SpecialIds) -> PreTrainedTokenizerBase:
    """The text tokenizer of a checkpoint folder.

    Raises:
        UserError: the tokenizer files are missing or unreadable, disagree with the config on an audio placeholder, or
            hold tokens that the model has no embedding for.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    missing = [name for name in ("tokenizer.json", "tokenizer_config.json") if not (path / name).is_file()]
    if missing:
        raise UserError("the checkpoint has no tokenizer", where=path, expected=" and ".join(missing))
    refuse_pointer(path / "tokenizer.json", "the checkpoint's tokenizer")
    file = path / "tokenizer_config.json"
    told = durable.from_json(file.read_bytes(), "the tokenizer's config", file)
    # transformers 5 writes this class, which 4.46 does not know; it is read from tokenizer.json alone
    loader = PreTrainedTokenizerFast if told.get("tokenizer_class") == NATIVE_TOKENIZER else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises plain ones
        raise UserError(f"cannot read the checkpoint's tokenizer: {first_line(error)}", where=path) from error
    for token, expected in (("<|AUDIO|>", ids.audio_in), ("<|AUDIO_OUT|>", ids.audio_out)):
        got = tokenizer.convert_tokens_to_ids(token)
        if got != expected:
            raise UserError(f"tokenizer and config disagree on {token}", where=path, expected=expected, got=got)
    _refuse_tokens_beyond(tokenizer.get_vocab(), path)
    return tokenizer


def _refuse_tokens_beyond(token_ids: dict[str, int], path: Path) -> None:
    """Make sure that the model has an embedding for every token, added ones too.

    Raises:
        UserError: names the tokens without one.
    """
    size = read_config(path)["text_config"].get("vocab_size")
    beyond = sorted((number, token) for token, number in token_ids.items() if isinstance(size, int) and number >= size)
    if beyond:
        got = f"{len(beyond)} tokens beyond it: {few([f'{token} ({number})' for number, token in beyond])}"
        hint = "Resize the model's embedding (resize_token_embeddings), or take the tokenizer that the model came with."
        raise UserError("the tokenizer does not fit the model's embedding", where=path, expected=f"ids below {size}",
                        got=got, hint=hint)  # fmt: skip


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """A language model's entry in the provenance; equal for a base model and the models tuned from it."""
    config = read_config(path)
    tokenizer = path / "tokenizer.json"
    return {
        "name": path.resolve().name,
        "special_ids": special_ids(config, path / "config.json").to_dict(),
        "tokenizer_sha256": file_sha256(tokenizer) if tokenizer.is_file() else "",
        "codebook_size": config.get("audio_codebook_size"),
        "text_vocabulary": config.get("text_config", {}).get("vocab_size"),
    }

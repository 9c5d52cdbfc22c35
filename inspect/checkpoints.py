"""Tokenizer and codec of a shard set, loaded when first needed, since they import transformers and torch.

In: the set, and the checkpoints named on the command line. Out: the tokenizer, token texts, the codec.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.checkpoints.hub import local_checkpoint
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.sequence import SpecialIds

REPLACEMENT = "\ufffd"  # decoding gives it for bytes that are no whole character


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a set: those that the user named, else those named in the manifest.

    Attributes:
        provenance: of the set.
        model_path, audio_tokenizer_path: named on the command line, or None.
        device: where the codec runs; `auto`: a GPU if there is one.
    """

    provenance: dict[str, Any]
    model_path: Path | None = None
    audio_tokenizer_path: Path | None = None
    device: str = "auto"
    _texts: dict[int, str] = field(default_factory=dict, repr=False)

    def model_folder(self) -> Path:
        """The language model's folder.

        Raises:
            UserError: it is missing.
        """
        return self._folder(self.model_path, "model", "--model_path", weights=False)

    def codec_folder(self) -> Path:
        """The codec's folder.

        Raises:
            UserError: it is missing.
        """
        return self._folder(self.audio_tokenizer_path, "codec", "--audio_tokenizer_path")

    def _folder(self, given: Path | None, name: str, flag: str, *, weights: bool = True) -> Path:
        in_manifest = self.provenance.get("paths", {}).get(name)
        path = local_checkpoint(given, weights=weights) if given else Path(in_manifest) if in_manifest else None
        if path is None or not (path / "config.json").is_file():
            raise UserError(f"the {name} that made this set is not here", where=path, hint=f"Name it with {flag}.")
        return path

    @cached_property
    def tokenizer(self) -> Any:
        """The text tokenizer."""
        from higgs_tune.preprocess.checkpoints.checkpoint import load_tokenizer

        return load_tokenizer(self.model_folder(), SpecialIds(**self.provenance["model"]["special_ids"]))

    @cached_property
    def codec(self) -> Any:
        """The audio tokenizer."""
        import torch
        from higgs_tune.preprocess.codec.checkpoint import load_codec

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_codec(self.codec_folder(), device)

    def token_text(self, token: int) -> str:
        """The text of one token; bytes that are no whole character as hexadecimal digits, `<d8>`."""
        if token not in self._texts:
            self._texts[token] = self._decode(token)
        return self._texts[token]

    def _decode(self, token: int) -> str:
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if REPLACEMENT not in text:
            return text
        from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if any(character not in byte_of for character in piece):
            return text
        return "<" + " ".join(f"{byte_of[character]:02x}" for character in piece) + ">"

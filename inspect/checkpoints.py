"""Tokenizer and codec of a shard set, loaded when they are first needed: they import transformers and torch.

In: the set, and what the user named on the command line. Out: the tokenizer, token texts, the codec. Never: a
checkpoint that is neither named by the user nor remembered by the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from higgs_tune.shards.errors import UserError
from higgs_tune.shards.sequence import SpecialIds

REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are no whole character


@dataclass(frozen=True)
class Checkpoints:
    """Where tokenizer and codec of a set are: what the user gave, else what the manifest remembers.

    Attributes:
        provenance: of the set.
        model_path, audio_tokenizer_path: given on the command line, or None.
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
            UserError: it is not there.
        """
        return self._find(self.model_path, "model", "--model_path")

    def codec_folder(self) -> Path:
        """The codec's folder.

        Raises:
            UserError: it is not there.
        """
        return self._find(self.audio_tokenizer_path, "codec", "--audio_tokenizer_path")

    def _find(self, given: Path | None, name: str, flag: str) -> Path:
        remembered = self.provenance.get("paths", {}).get(name)
        path = given or (Path(remembered) if remembered else None)
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
        """The text of one token; bytes that are no whole character come as hexadecimal digits, `<d8>`."""
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

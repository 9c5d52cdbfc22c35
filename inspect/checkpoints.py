"""Tokenizer and codec of a shard set, loaded when first needed, since they import transformers and torch.

In: the set, and the checkpoints named on the command line. Out: the tokenizer, token texts, the codec.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.checkpoints.hub import CHECKPOINT_FILES, CONFIG_FILES, local_checkpoint
from higgs_tune.preprocess.codec.weights import weights_sha256
from higgs_tune.shards.errors import UserError, first_line
from higgs_tune.shards.sequence import SpecialIds

DEVICE = re.compile(r"cpu|(cuda|mps|xpu)(:\d+)?")
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
        """The language model's folder: config and tokenizer.

        Raises:
            UserError: it is missing, or cannot be downloaded.
        """
        return self._folder(self.model_path, "model", "--model_path", CONFIG_FILES)

    def codec_folder(self) -> Path:
        """The codec's folder.

        Raises:
            UserError: it is missing, or cannot be downloaded.
        """
        return self._folder(self.audio_tokenizer_path, "codec", "--audio_tokenizer_path")

    def check(self, *, audio: bool) -> None:
        """Make sure, before any work, that the tokenizer is there, and the codec where audio is wanted.

        Raises:
            UserError: one is missing, or the device of the codec is not there.
        """
        self.model_folder()
        if audio:
            self.check_codec()

    def check_codec(self) -> None:
        """Make sure, before any work, that the codec can be loaded; warn on stderr where it did not encode this set.

        Raises:
            UserError: the codec is missing, or the device is not there.
        """
        folder = self.codec_folder()
        self.torch_device()
        encoded_by = self.provenance.get("codec", {}).get("weights_sha256")
        if encoded_by and encoded_by != weights_sha256(folder):
            print(f"warning: {folder} has other weights than the codec that encoded this set", file=sys.stderr)

    def torch_device(self) -> str:
        """The device of the codec, as PyTorch names it.

        Raises:
            UserError: the name is unknown, or the device is not there.
        """
        import torch

        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if not DEVICE.fullmatch(self.device):
            raise UserError("--device is unknown", expected="auto, cpu, cuda or cuda:1", got=self.device)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            hint = f"{first_line(error)}. --device cpu works everywhere."
            raise UserError(
                "--device is not there", expected="auto, cpu or cuda", got=self.device, hint=hint
            ) from error
        return self.device

    def _folder(self, given: Path | None, name: str, flag: str, files: tuple[str, ...] = CHECKPOINT_FILES) -> Path:
        in_manifest = self.provenance.get("paths", {}).get(name)
        path = local_checkpoint(given, files) if given else Path(in_manifest) if in_manifest else None
        if given and path and not (path / "config.json").is_file():
            raise UserError(f"the {name} is not here", where=path, expected="a checkpoint folder with config.json")
        if path is None or not (path / "config.json").is_file():
            made_with = self.provenance.get(name, {})
            known = f" {made_with['name']}@{made_with['revision']}" if "revision" in made_with else ""
            hint = f"Name a folder, or owner/name of a Hub repository, with {flag}{known}."
            raise UserError(f"the {name} that made this set is not here", where=path, hint=hint)
        return path

    @cached_property
    def tokenizer(self) -> Any:
        """The text tokenizer."""
        from higgs_tune.preprocess.checkpoints.checkpoint import load_tokenizer

        return load_tokenizer(self.model_folder(), SpecialIds(**self.provenance["model"]["special_ids"]))

    @cached_property
    def codec(self) -> Any:
        """The audio tokenizer."""
        from higgs_tune.preprocess.codec.checkpoint import load_codec

        return load_codec(self.codec_folder(), self.torch_device())

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

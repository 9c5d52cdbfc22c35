"""CTC recognisers of transformers: wav2vec2, HuBERT, WavLM, MMS (with an adapter a language). Greedy decoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from higgs_tune.preprocess.judges.device import torch_device
from higgs_tune.preprocess.judges.fetch import locate
from higgs_tune.preprocess.judges.interface import SAMPLE_RATE_HZ
from higgs_tune.shards.errors import UserError, first_line


class CtcRecogniser:
    """The likeliest symbol a frame, repeats and blanks removed.

    A checkpoint with adapters (MMS) loads the language's, named as its files are (`ara`); others ignore the language.

    Raises:
        UserError: the checkpoint cannot be loaded.
    """

    def __init__(self, folder: Path, name: str, revision: str, device: str) -> None:
        from transformers import AutoModelForCTC, AutoProcessor

        self.name, self.revision, self.device, self._language = name, revision, torch_device(device), ""
        self._folder = folder
        try:
            self._processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            model: Any = AutoModelForCTC.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"cannot load the recogniser: {first_line(error)}", where=folder) from error
        self._model = model.to(self.device).eval()

    def transcribe(self, waves_S: Sequence[np.ndarray], language: str) -> list[str]:
        """One transcript a clip.

        Raises:
            UserError: there is no adapter for the language.
        """
        rows = self._logits(waves_S, language)
        return [self._processor.decode(row_TV.argmax(-1)) for row_TV in rows]

    def log_probs(self, waves_S: Sequence[np.ndarray], language: str) -> list[np.ndarray]:
        """float32 [T, V]: log probabilities of the symbols of each clip's frames.

        Raises:
            UserError: there is no adapter for the language.
        """
        return [row_TV.float().log_softmax(-1).numpy() for row_TV in self._logits(waves_S, language)]

    def symbols(self, word: str) -> list[int]:
        """Numbers of a word's symbols, without those that the recogniser does not know."""
        tokenizer = self._processor.tokenizer
        return [int(number) for number in tokenizer(word).input_ids if number != tokenizer.unk_token_id]

    @property
    def blank(self) -> int:
        """Number of the blank symbol."""
        return int(self._processor.tokenizer.pad_token_id)

    @property
    def between(self) -> int | None:
        """Number of the symbol between words; None where there is none."""
        return getattr(self._processor.tokenizer, "word_delimiter_token_id", None)

    def _logits(self, waves_S: Sequence[np.ndarray], language: str) -> list[torch.Tensor]:
        """[T, V] of each clip, on the CPU."""
        self._take_adapter(language)
        least = self._shortest()
        waves_S = [np.pad(wave_S, (0, max(0, least - len(wave_S)))) for wave_S in waves_S]
        inputs = self._processor(
            waves_S, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt", padding=True, return_attention_mask=True
        ).to(self.device)
        with torch.inference_mode():
            logits = self._model(**inputs).logits
        frames = self._model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1)).tolist()
        return [row_TV[:count] for row_TV, count in zip(logits.cpu(), frames, strict=True)]

    def _shortest(self) -> int:
        """Samples that give one frame."""
        config, least = self._model.config, 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            least = (least - 1) * stride + kernel
        return least

    def _take_adapter(self, language: str) -> None:
        if not language or language == self._language or not getattr(self._model.config, "adapter_attn_dim", None):
            return
        try:
            self._processor.tokenizer.set_target_lang(language)
            adapter = f"adapter.{language}.safetensors"  # of thousands of languages; only this one is fetched
            if not (self._folder / adapter).is_file() and not Path(self.name).exists():
                locate(self.name, (adapter,))
            self._model.load_adapter(language, use_safetensors=True)
        except (OSError, ValueError) as error:
            hint = "Give --asr_language as the checkpoint's adapters are named, such as ara."
            raise UserError(f"no adapter: {first_line(error)}", where=self.name, got=language, hint=hint) from error
        self._language = language

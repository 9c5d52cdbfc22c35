"""Runs in the environment with mlx-audio that loaders.py makes: a merged checkpoint, loaded and spoken with.

    python native_mlx.py FOLDER

In: FOLDER/merged, FOLDER/reference.safetensors, FOLDER/said.json. Out: FOLDER/mlx.safetensors, greedy codes [8, T].
mlx-audio would fetch its own codec; a stand-in gives the reference's codes.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import load_file, save_file

mx: Any = importlib.import_module("mlx.core")
library: Any = importlib.import_module("mlx_audio.tts.models.higgs_audio.model")
utils: Any = importlib.import_module("mlx_audio.tts.utils")
transformers: Any = importlib.import_module("transformers")


class Codec:
    """A codec that gives one reference's codes."""

    def __init__(self, codes_KT: np.ndarray) -> None:
        self.codes_1TK = mx.array(codes_KT.T[None].astype(np.int32))

    def encode(self, _: Any) -> Any:
        return self.codes_1TK


def main(folder: Path) -> None:
    told = json.loads((folder / "said.json").read_text())
    with mock.patch.object(library.Model, "post_load_hook", classmethod(lambda _, model, __: model)):
        model = utils.load(folder / "merged", strict=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "merged")
    embeds, is_audio, _ = library.build_prompt(
        told["text"],
        ref_text=told["ref_text"],
        ref_audio_24k=np.zeros(24_000, np.float32),
        config=model.config,
        tokenizer=tokenizer,
        codec=Codec(load_file(folder / "reference.safetensors")["codes"]),
        embed_tokens=model.embed_tokens,
        audio_codebook_embeddings=model.audio_codebook_embeddings,
    )
    greedy = {"temperature": 0.0, "top_p": None, "top_k": None, "ras_win_len": None}
    codes, _ = library.HiggsAudioModel.generate(
        model, embeds, is_audio, max_new_frames=told["max_frames"] + 8, **greedy
    )
    save_file({"codes": np.array(codes)}, folder / "mlx.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Runs in the environment that compare.py makes: the prompts that vllm-omni sends, by its own code.

    python omni_prompt.py FOLDER FILE

In: FOLDER as native_exports.py leaves it (merged, codec, said.json); FILE of vllm-omni's module of prompts, which is
loaded by itself, with a stand-in for its package's choice of a device. Out: FOLDER/omni.json, prompts with and without
a reference, and the reference's delayed codes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers


def load(file: Path) -> Any:
    """vllm-omni's module of prompts."""
    platform = types.SimpleNamespace(get_torch_device=lambda: torch.device("cpu"))
    sys.modules["vllm_omni"] = types.ModuleType("vllm_omni")
    sys.modules["vllm_omni.platforms"] = types.ModuleType("vllm_omni.platforms")
    vars(sys.modules["vllm_omni.platforms"])["current_omni_platform"] = platform
    spec = importlib.util.spec_from_file_location("omni_tokenizer", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folder: Path, file: Path) -> None:
    os.environ["HIGGS_AUDIO_V2_TOKENIZER_PATH"] = str((folder / "codec").resolve())
    omni, said = load(file), json.loads((folder / "said.json").read_text())
    auto: Any = transformers  # this environment's is 5.3 or later
    processor = auto.AutoProcessor.from_pretrained(folder / "merged")
    wave_S = np.sin(np.arange(24_000) * 0.05).astype(np.float32)
    cloned = omni.build_voice_clone_prompt(processor, said["text"], wave_S, 24_000, said["ref_text"])
    plain = omni.input_ids_to_python_list(omni.build_plain_text_prompt(processor, said["text"]))
    result = {"plain": plain, "cloned": cloned["prompt_token_ids"], "codes": cloned["audio_input_ids"].tolist()}
    (folder / "omni.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

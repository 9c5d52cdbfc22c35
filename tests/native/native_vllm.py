"""Runs in the environment that compare.py makes: vllm-omni's own config class, loader and prompts on a native export.

    python native_vllm.py FOLDER PACKAGE

In: FOLDER/native, FOLDER/reference.safetensors, FOLDER/said.json; PACKAGE, the folder that holds vllm_omni. Out:
FOLDER/vllm.json, the tokens of its prompts. vLLM itself needs a GPU: stand-ins are there for what is imported of it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

ROOM = "vllm_omni.model_executor.models"


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes vLLM's modules: every class in them is an empty module, everything else does nothing."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        ours = fullname in ("vllm_omni.platforms", f"{ROOM}.output_templates")
        known = ours or fullname.split(".", maxsplit=1)[0] == "vllm"
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (nn.Module,), {}) if name[0].isupper() else mock.MagicMock()

        module.__dict__["__getattr__"] = attribute
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def open_package(package: Path) -> None:
    """Make vllm_omni's own modules importable without running the package's own start."""
    sys.meta_path.insert(0, StandIns())
    parts = f"{ROOM}.higgs_audio_v2".split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        module = types.ModuleType(name)
        module.__path__ = [str(package.joinpath(*parts[:count]))]
        sys.modules[name] = module


def parameters_of(config: Any) -> dict[str, nn.Parameter]:
    """The talker's parameters, by the sizes that its modules have in vLLM, filled with NaN."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    audio = config.num_codebooks * config.codebook_size
    shapes = {"embed_tokens": (config.vocab_size, hidden), "lm_head": (config.vocab_size, hidden), "norm": (hidden,)}
    shapes |= {"audio_lm_head": (audio, hidden), "audio_codebook_embeddings": (audio, hidden)}
    for layer in range(config.num_hidden_layers):
        own: dict[str, tuple[int, ...]] = {"self_attn.qkv_proj": (queries + 2 * keys, hidden)}
        own["self_attn.o_proj"] = (hidden, queries)
        for ffn in ("mlp", "audio_mlp"):
            own |= {f"{ffn}.gate_up_proj": (2 * inner, hidden), f"{ffn}.down_proj": (hidden, inner)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            own |= {norm: (hidden,), f"audio_{norm}": (hidden,)}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in own.items()}
    return {f"{name}.weight": nn.Parameter(torch.full(shape, torch.nan)) for name, shape in shapes.items()}


def check_weights(folder: Path, talker: Any, config: Any) -> None:
    """Its loader fills every parameter from the export."""
    cls, parameters = talker.HiggsAudioV2TalkerForConditionalGeneration, parameters_of(config)
    own = {name: cls.__dict__[name] for name in ("load_weights", "_map_simple_name", "_consume_fused_audio_head")}
    model: Any = type("Talker", (), own | {"config": config, "named_parameters": lambda _: parameters.items()})()
    loaded = model.load_weights(load_file(folder / "model.safetensors").items())
    assert loaded == parameters.keys(), sorted(parameters.keys() - loaded)
    assert not [name for name, value in parameters.items() if value.isnan().any()]


def main(folder: Path, package: Path) -> None:
    open_package(package)
    configuration, talker, prompts = (
        importlib.import_module(f"{ROOM}.higgs_audio_v2.{name}")
        for name in ("configuration_higgs_audio_v2", "higgs_audio_v2_talker", "higgs_audio_v2_tokenizer")
    )
    native, told = folder / "native", json.loads((folder / "said.json").read_text())
    given = transformers.AutoConfig.from_pretrained(native).to_dict()
    config: Any = configuration.HiggsAudioV2Config(**given)
    assert (config.audio_tokenizer_id, config.codebook_size) == (given["audio_tokenizer_id"], 1026)
    check_weights(native, talker, config)
    processor: Any = mock.MagicMock(tokenizer=transformers.AutoTokenizer.from_pretrained(native))
    codes = load_file(folder / "reference.safetensors")["codes"]
    with mock.patch.object(prompts, "_encode_ref_audio_codes", return_value=codes):
        cloned = prompts.build_voice_clone_prompt(processor, told["text"], np.zeros(9), 24_000, told["ref_text"])
    conversation = prompts.build_plain_text_conversation(told["text"])
    plain = processor.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert cloned["audio_input_ids"].shape == (codes.shape[1] + 9, 8)
    (folder / "vllm.json").write_text(json.dumps({"cloned": cloned["prompt_token_ids"], "plain": plain}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

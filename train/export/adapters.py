"""An adapter alone, in the names of boson's class or of transformers' native one.

In: an adapter of either, and its base. Out: adapter_config.json and the tensors. Guarantees (test_export.py,
tests/native): plain PEFT adapts exactly the trained modules of the class, and gives the same logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from higgs_tune.preprocess.checkpoints.hub import PINNED
from higgs_tune.preprocess.checkpoints.native import native_weight_name
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError, few
from higgs_tune.train.export.plan import AdapterOnMeta
from higgs_tune.train.export.tensors import Source
from higgs_tune.train.model.base import base_reference
from higgs_tune.train.model.module_names import LAST_NORM, NATIVE_CONTAINERS, PREFIX, exact_ends, exact_pattern

Layout = Literal["original", "native"]
AUTO_MAPPING = {
    "original": {
        "base_model_class": "HiggsAudioModel",
        "parent_library": "boson_multimodal.model.higgs_audio.modeling_higgs_audio",
    },
    "native": {
        "base_model_class": "HiggsAudioV2ForConditionalGeneration",
        "parent_library": "transformers.models.higgs_audio_v2.modeling_higgs_audio_v2",
    },
}
_OF_BOSON = ("audio_tower", "audio_encoder_proj", "audio_out_embed_projector", "audio_attn", "audio_post_audio_attn")


def adapter_tensors(adapter: AdapterOnMeta, layout: Layout) -> dict[str, Source]:
    """The adapter's tensors by PEFT's names on the layout's class.

    Raises:
        UserError: it adapts modules that the native layout cannot hold; names them.
    """
    if layout == "original":
        return dict(adapter.stored)
    names = [*adapter.lora_layers(), *adapter.full_modules()]
    if held := [name for name in names if any(part.startswith(_OF_BOSON) for part in name.split("."))]:
        raise UserError("the native layout cannot hold modules that the adapter trains", where=adapter.adapter.folder,
                        got=few(held), hint="--layout original holds them.")  # fmt: skip
    return {PREFIX + native_weight_name(name.removeprefix(PREFIX)): tensor for name, tensor in adapter.stored.items()}


def adapter_config(adapter: AdapterOnMeta, layout: Layout, base: Path, out: Path) -> bytes:
    """adapter_config.json for the layout's class.

    Args:
        base: the base checkpoint that it names. out: the folder that it is written to.
    """
    native = layout == "native"
    told: Callable[[str], str] = native_weight_name if native else str
    config: dict[str, Any] = dict(adapter.adapter.config)
    every = [told(name) for name in _module_names(adapter) if name] + list(NATIVE_CONTAINERS if native else ())
    layers, full = adapter.lora_layers(), adapter.full_modules()
    saved = [told(name) for name in full if native or name != LAST_NORM]
    config |= {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "auto_mapping": AUTO_MAPPING[layout],
        "target_modules": exact_pattern(told(name) for name in layers),
        "modules_to_save": exact_ends(saved, every) if saved else None,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        "rank_pattern": {
            told(name): layer.r["default"] for name, layer in layers.items() if layer.r["default"] != config["r"]
        },
        "alpha_pattern": {
            told(name): layer.lora_alpha["default"]
            for name, layer in layers.items()
            if layer.lora_alpha["default"] != config["lora_alpha"]
        },
    }
    name, revision = base_reference(base, out)
    if native and PINNED.get(name) == revision:  # the Hub's newest revision has the native layout
        revision = None
    return durable.to_json(config | {"base_model_name_or_path": name, "revision": revision}, indent=2) + b"\n"


def _module_names(adapter: AdapterOnMeta) -> list[str]:
    """Names of the modules of boson's class, without PEFT's."""
    names: dict[str, None] = {}
    for name, _ in adapter.model.get_base_model().named_modules():
        names[name.partition(".lora_")[0].partition(".base_layer")[0].partition(".original_module")[0]
              .partition(".modules_to_save")[0]] = None  # fmt: skip
    return list(names)

"""The names of modules in an adapter's config, as PEFT matches them.

In: names of modules of a model. Out: patterns that match these and no others. PEFT matches a list of targets, and
`modules_to_save`, as ends of names: `layers.0.self_attn.q_proj` also adapts `audio_tower.layers.0.self_attn.q_proj`.
Guarantees (test_adapters.py): nothing else matches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from higgs_tune.preprocess.checkpoints.native import native_weight_name
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

PREFIX = "base_model.model."
LAST_NORM = "norm"  # every norm's name ends in it, so `modules_to_save` cannot mean this one
NATIVE_CONTAINERS = ("model.embed_audio_tokens",)  # in the native class, around the one module that it holds


def exact_pattern(names: Iterable[str]) -> str:
    """A regular expression that matches these module names and no others, as short as layers allow."""
    numbers: dict[tuple[str, str], list[str]] = {}  # by (before, after) the number of the layer
    for name in names:
        match = re.fullmatch(r"(.*?layers)\.(\d+)\.(.*)", name)
        numbers.setdefault((match[1], match[3]) if match else ("", name), []).append(match[2] if match else "")
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (before, after), layers in numbers.items():
        alike.setdefault((before, tuple(layers)), []).append(re.escape(after))
    parts = [
        rf"{re.escape(before)}\.({'|'.join(layers)})\.({'|'.join(afters)})" if before else "|".join(afters)
        for (before, layers), afters in alike.items()
    ]
    return "|".join(parts)


def exact_ends(names: Collection[str], every: Iterable[str]) -> list[str]:
    """Ends of names that match these module names and no others, as short as they can be.

    Args:
        every: names of all modules of the model.
    """
    others = [PREFIX + name for name in every if name not in names]
    ends: list[str] = []
    for name in names:
        whole = PREFIX + name
        if any(whole.endswith(end) for end in ends):
            continue
        parts = name.split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        candidates = [end for tail in tails for end in (tail, f".{tail}") if whole.endswith(end)]
        ends.append(next(end for end in candidates if not any(other.endswith(end) for other in others)))
    return ends


def names_in_native(config: LoraConfig, leaves: Iterable[str]) -> list[str]:
    """The modules of boson's class that a config made on transformers' native class adapts.

    Args:
        leaves: linear layers and embeddings of boson's class.
    """
    return [name for name in leaves if check_target_module_exists(config, native_weight_name(name))]


def from_native(config: LoraConfig, adapted: list[str], every: list[str]) -> dict[str, Any]:
    """The options of a config made on the native class, told in names of boson's class.

    Args:
        adapted: the modules with LoRA. every: all modules of boson's class.
    """
    entries = tuple(config.modules_to_save or ())

    def is_saved(name: str) -> bool:
        native = PREFIX + native_weight_name(name)
        around = [PREFIX + box for box in NATIVE_CONTAINERS if native.startswith(f"{PREFIX}{box}.")]
        return any(place.endswith(entries) for place in (native, *around))

    of_boson = ("audio_tower", "audio_encoder_proj")
    saved = [n for n in every if n not in ("", LAST_NORM) and not n.startswith(of_boson) and is_saved(n)]
    patterns = {
        field: pattern_by_names(getattr(config, field) or {}, adapted, native_weight_name)
        for field in ("rank_pattern", "alpha_pattern")
    }
    unset = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    saved = exact_ends(saved, every) if saved else None
    return {"target_modules": exact_pattern(adapted), "modules_to_save": saved, **patterns, **unset}


def pattern_by_names(pattern: dict[str, Any], names: Iterable[str], told: Callable[[str], str]) -> dict[str, Any]:
    """A `rank_pattern` or `alpha_pattern` with one entry a module.

    Args:
        told: the name that the pattern was written for, of each of `names`.
    """
    keys = {name: get_pattern_key(list(pattern), told(name)) for name in names}
    return {name: pattern[key] for name, key in keys.items() if key in pattern}

"""Which way each kind of layer runs, for people: fused, compiled, or by PEFT's or boson's own forward.

`triton` is fused, with Triton's kernels beside the products. Guarantees (test_lora_paths.py): for every combination of
LoRA's options the lines say what runs, those of a Whisper tower with LoRA among them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from higgs_tune.train.model.attention import attention_kernel
from higgs_tune.train.model.embed import stream_dtype
from higgs_tune.train.model.forward import ExecOptions
from higgs_tune.train.model.fused_linear import fusible
from higgs_tune.train.model.kernel_choice import KernelName
from higgs_tune.train.model.linear import Layer, layers_of, may_compile
from higgs_tune.train.model.load import HiggsAudioModel
from peft.tuners.lora import LoraLayer
from torch import nn

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_FFN = ("gate_proj", "up_proj", "down_proj")
_TOWER = (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "fc1", "fc2")
_COMPILED_WITH = {("o_proj",): (), ("gate_proj", "up_proj"): _FFN, ("down_proj",): _FFN}
BY_PEFT, BY_BOSON = "PEFT's forward", "boson's forward"


def describe_paths(model: HiggsAudioModel, exec_options: ExecOptions, *, reference: bool = False) -> list[str]:
    """A line for each kind of layer: its name, its path, what trains in it, and how many there are.

    Args:
        reference: boson's forward runs everything.
    """
    counts: Counter[tuple[str, str, str]] = Counter()
    for kind, modules, part in _kinds(model):
        path = BY_BOSON if reference else _path(modules, part, exec_options.kernels)
        counts[kind, path, _what_trains(modules)] += 1
    for kind, module in _tower_layers(model):
        path = BY_PEFT if isinstance(module, LoraLayer) and not reference else BY_BOSON
        counts[kind, path, _what_trains([module])] += 1
    rows = [(kind, path, trains, f"x{count}") for (kind, path, trains), count in counts.items()]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return [
        "  " + "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]


def describe_kernels(model: HiggsAudioModel, exec_options: ExecOptions) -> list[str]:
    """Lines on what runs beside the linear layers, where boson's forward does not run everything."""
    lines = [f"  attention: {attention_kernel(next(model.parameters()).device, stream_dtype(model))}"]
    trained = [name for name, value in model.layers.named_parameters() if "norm" in name and value.requires_grad]
    if exec_options.kernels == "triton" and trained:
        lines.append("  norms that train: triton forward, eager backward")
    return lines


def _kinds(model: HiggsAudioModel) -> Iterator[tuple[str, list[nn.Module], list[nn.Module]]]:
    """Groups of linear layers that run together: name, modules, those that are compiled together with them."""
    layers: Any = model.layers
    for layer in layers:
        for block in ("audio_attn", "self_attn", "mlp", "audio_mlp"):
            inside: Any = getattr(layer, block, None)
            for names in _GROUPS:
                if all(hasattr(inside, name) for name in names):
                    together = [getattr(inside, name) for name in _COMPILED_WITH.get(names, names)]
                    yield f"{block} {', '.join(names)}", [getattr(inside, name) for name in names], together
    heads = model.audio_decoder_proj
    projectors: dict[str, Any] = {
        "text_lm_head": heads.text_lm_head,
        "audio_lm_head": heads.audio_lm_head,
        "audio_out_embed_projector": getattr(model, "audio_out_embed_projector", None),
        "audio_encoder_proj": getattr(getattr(model, "audio_encoder_proj", None), "linear", None),
    }
    for name, module in projectors.items():
        if module is not None:
            yield name, [module], []


def _tower_layers(model: HiggsAudioModel) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a Whisper tower that trains, by name; each runs by its own forward."""
    tower: Any = model.audio_tower
    if tower is not None and any(parameter.requires_grad for parameter in tower.parameters()):
        for layer in tower.layers:
            for name in _TOWER:
                yield f"audio_tower {name.rpartition('.')[2]}", layer.get_submodule(name)


def _path(modules: Sequence[nn.Module], part: Sequence[nn.Module], kernels: KernelName) -> str:
    """How the modules run. part: those that are compiled together with them, if any are.

    Triton's kernels make the inputs of the same layers; the others (`o_proj`) read rows as they are.
    """
    layers = fusible(layers_of(*modules))
    if layers is None:
        return BY_PEFT
    if kernels == "compiled" and part and may_compile(layers_of(*part)):
        return "compiled"
    return "triton" if kernels == "triton" and part else "fused"


def _what_trains(modules: Sequence[nn.Module]) -> str:
    """LoRA's rank and kind, "in full", or "frozen"."""
    found: list[str] = []
    for module, layer in zip(modules, layers_of(*modules), strict=True):
        trains = any(parameter.requires_grad for parameter in module.parameters())
        if not isinstance(layer, Layer):
            found.append("LoRA of another kind")
        elif layer.rank and isinstance(module, LoraLayer):
            kind = "DoRA" if layer.magnitude_O is not None else "LoRA"
            dropout = f" dropout {layer.dropout:g}" if layer.dropout else ""
            found.append(f"{kind} r {layer.rank}{dropout}" + ("" if trains else " frozen"))
        else:
            found.append("in full" if trains else "frozen")
    return found[0] if len(set(found)) == 1 else ", ".join(found)

"""Presets of LoRA: which linear layers of a decoder layer are adapted.

To add one, add an entry to `PRESETS`: the choices of `--lora_preset`, its help, and what the model adapts follow from
it; tests/test_lora.py demands a line in the table of docs/training_signal.md and a list of its modules. No torch here:
the command line reads this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

_ATTENTION = r"self_attn\.[qkvo]_proj"
_TEXT_FFN = r"mlp\.(gate|up|down)_proj"
_AUDIO_FFN = r"audio_mlp\.(gate|up|down)_proj"


@dataclass(frozen=True)
class Preset:
    """summary: the adapted layers in words. modules: regular expressions over names within a decoder layer."""

    summary: str
    modules: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """A regular expression over whole module names."""
        return rf"layers\.\d+\.({'|'.join(self.modules)})"


PRESETS: dict[str, Preset] = {
    "comprehensive": Preset("attention, text FFN, audio FFN", (_ATTENTION, _TEXT_FFN, _AUDIO_FFN)),
    "text_only": Preset("attention, text FFN", (_ATTENTION, _TEXT_FFN)),
    "audio_focused": Preset("attention, audio FFN", (_ATTENTION, _AUDIO_FFN)),
    "attention_only": Preset("attention", (_ATTENTION,)),
}
# layers outside of the decoder layers, for --lora_extra
LORA_EXTRAS = {
    "heads": ("audio_decoder_proj.text_lm_head", "audio_decoder_proj.audio_lm_head"),
    "projector": ("audio_encoder_proj.linear", "audio_out_embed_projector"),
}
DEFAULT_PRESET = {"stage1": "text_only", "stage2": "comprehensive", "single": "comprehensive"}

if TYPE_CHECKING:
    PresetName = str
else:  # the command line takes its choices from it
    PresetName = Literal[tuple(PRESETS)]


def preset_help() -> str:
    """The help of `--lora_preset`."""
    listed = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    default = ", ".join(f"{preset} in {stage}" for stage, preset in DEFAULT_PRESET.items())
    return f"Linear layers that LoRA adapts. {listed}. By default {default}."

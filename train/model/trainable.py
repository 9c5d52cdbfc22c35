"""What trains: the names of modules trained in full and of LoRA's extras, by stage, and groups of learning rates.

In: the options of a run. Out: names as PEFT takes them. Guarantees (test_trained_modules.py): each name stands for the
modules that it says and for no others, on boson's class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from higgs_tune.shards.errors import UserError, few
from higgs_tune.train.presets import LORA_EXTRAS

Stage = Literal["stage1", "stage2", "single"]

# every parameter that only audio positions use; stage 1 keeps all of them as they are
AUDIO_PARAMETER = re.compile(
    r"(^|\.)(audio_mlp|audio_attn|audio_input_layernorm|audio_post_attention_layernorm|audio_post_audio_attn_layer_norm"
    r"|audio_codebook_embeddings|audio_out_embed_projector|audio_lm_head|audio_tower|audio_encoder_proj)(\.|$)"
)
TEXT_HEAD, AUDIO_HEAD = "audio_decoder_proj.text_lm_head", "audio_decoder_proj.audio_lm_head"
AUDIO_ATTENTION = ("audio_attn", "audio_post_audio_attn_layer_norm")
# ends of names; the dot keeps the text norms apart from `audio_input_layernorm`. The last norm: `wrap_last_norm`
TEXT_NORMS = (".input_layernorm", ".post_attention_layernorm")
AUDIO_NORMS = (".audio_input_layernorm", ".audio_post_attention_layernorm")
_NEW = re.compile(r"(^|\.)(audio_attn|audio_post_audio_attn_layer_norm|audio_tower)\.")


@dataclass(frozen=True)
class TrainableOptions:
    """Which modules train, by LoRA or in full.

    Attributes:
        r, alpha, dropout: rank of LoRA, its scaling (alpha / r), dropout of its input.
        preset: which linear layers get LoRA; or `pattern`, a regular expression over module names.
        rslora, dora: variants of LoRA.
        heads, text_head, audio_head, norms, text_embeddings, audio_embeddings, audio_attention, audio_tower,
            audio_encoder_proj: trained in full. extra: LoRA on more than the preset's layers, see `LORA_EXTRAS`.
        text_loss: whether the run has a text loss. features: its Whisper features: none, mel or encoder.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    preset: str = "comprehensive"
    pattern: str | None = None
    rslora: bool = False
    dora: bool = False
    extra: tuple[str, ...] = ()
    heads: bool = False
    text_head: bool = False
    audio_head: bool = False
    norms: bool = False
    text_embeddings: bool = False
    audio_embeddings: bool = False
    audio_attention: bool = False
    audio_tower: bool = False
    audio_encoder_proj: bool = False
    text_loss: bool = True
    features: str = "none"

    def full_modules(self, stage: Stage) -> list[str]:
        """Names (or ends of names) of modules trained in full; `norms` trains the last norm besides.

        Raises:
            UserError: an audio module is asked for in stage 1, the text head without a text loss, or a module that
                `extra` adapts by LoRA.
        """
        audio = {
            "--train_audio_head": (self.audio_head, (AUDIO_HEAD,)),
            "--train_audio_embeddings": (self.audio_embeddings, ("audio_codebook_embeddings",)),
            "--use_audio_out_self_attention": (self.audio_attention, AUDIO_ATTENTION),
            "--train_audio_tower": (self.audio_tower, ("audio_tower",)),
            "--train_audio_encoder_proj": (self.audio_encoder_proj, ("audio_encoder_proj",)),
            "--lora_extra projector": ("projector" in self.extra, ()),
        }
        asked = [flag for flag, (wanted, _) in audio.items() if wanted]
        if stage == "stage1" and asked:
            raise UserError(f"{', '.join(asked)} cannot train in stage1, which freezes every audio parameter")
        if self.text_head and not self.text_loss:
            raise UserError("--train_text_head: no loss of this run reaches the text head", expected="a text loss",
                            got="--text_loss_weight 0")  # fmt: skip
        names = [TEXT_HEAD] if (self.heads or self.text_head) and self.text_loss else []
        names += [AUDIO_HEAD] if self.heads and stage != "stage1" else []
        names += [*TEXT_NORMS, *(AUDIO_NORMS if stage != "stage1" else ())] if self.norms else []
        names += ["embed_tokens"] if self.text_embeddings else []
        names += [name for wanted, of_flag in audio.values() if wanted for name in of_flag]
        for extra in self.extra:
            if twice := [name for name in names if any(target.startswith(name) for target in LORA_EXTRAS[extra])]:
                hint = "--whisper_path makes a new projector, which trains in full." if extra == "projector" else ""
                raise UserError(f"--lora_extra {extra} names modules that this run trains in full", got=few(twice),
                                expected="LoRA or in full", hint=hint)  # fmt: skip
        return list(dict.fromkeys(names))

    def extra_modules(self, linear_layers: Sequence[str], stage: Stage) -> list[str]:
        """Names of the layers that `extra` adds to those with LoRA.

        Args:
            linear_layers: of the model.

        Raises:
            UserError: the model has none of them that a loss reaches.
        """
        every = []
        for extra in self.extra:
            names = [name for name in LORA_EXTRAS[extra] if name in linear_layers and self.reaches(name)]
            if stage == "stage1":
                names = [name for name in names if not AUDIO_PARAMETER.search(name)]
            if not names:
                raise UserError(f"--lora_extra {extra}: no such layer of the model is reached by a loss of {stage}",
                                expected=" or ".join(LORA_EXTRAS[extra]))  # fmt: skip
            every += names
        return every

    def reaches(self, module: str) -> bool:
        """Whether a loss of the run depends on a module. Stored encoder features bypass the Whisper tower."""
        if module.startswith("audio_tower"):
            return self.features == "mel"
        if module.startswith("audio_encoder_proj"):
            return self.features != "none"
        return self.text_loss or not module.startswith(TEXT_HEAD)


def parameter_group(name: str) -> str:
    """lora, head, projector or new: parameters with learning rates of their own.

    `head` is what the checkpoint had already, `projector` that of Whisper features.
    """
    if ".lora_" in name:
        return "lora"
    if "audio_encoder_proj" in name:
        return "projector"
    kept = "lm_head" in name or "embeddings" in name or ".modules_to_save." in name
    return "head" if kept and not _NEW.search(name) else "new"

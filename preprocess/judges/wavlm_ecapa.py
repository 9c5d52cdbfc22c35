"""Speaker embeddings of Seed-TTS-eval: WavLM-large tuned for speaker verification, with an ECAPA-TDNN head.

In: the published state dict, `wavlm_large_finetune.pth`, read as weights only. Out: embeddings whose cosines are the
`SIM` of published tables. transformers' WavLM runs the encoder; `ecapa.py` runs the head.

Source: https://github.com/BytedanceSpeech/seed-tts-eval (thirdparty/UniSpeech); names of tensors as in microsoft/unilm.
"""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises for what weights_only forbids
from typing import Any

import numpy as np
import torch
from higgs_tune.preprocess.filetype import refuse_pointer
from higgs_tune.preprocess.judges import ecapa
from higgs_tune.preprocess.judges.device import torch_device
from higgs_tune.preprocess.judges.interface import SAMPLE_RATE_HZ, voice_part
from higgs_tune.shards.errors import UserError, first_line
from torch import Tensor
from torch.nn import functional

ENCODER = "feature_extract.model."
UNUSED = ("mask_emb", "final_proj.", "label_embs_concat")  # of the encoder's training
STRIDES = (5, 2, 2, 2, 2, 2, 2)  # WavLM's convolutions; not in the tensors' shapes
LONGEST_DISTANCE = 800  # frames that the position bias tells apart
RENAMED = (  # WavLM's own names of tensors, and those of transformers
    (r"^layer_norm\.", "feature_projection.layer_norm."),
    (r"^post_extract_proj\.", "feature_projection.projection."),
    (r"^(feature_extractor\.conv_layers\.\d+)\.0\.", r"\1.conv."),
    (r"^(feature_extractor\.conv_layers\.\d+)\.2\.1\.", r"\1.layer_norm."),
    (r"^encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
    (r"\.self_attn_layer_norm\.", ".layer_norm."),
    (r"\.self_attn\.grep_linear\.", ".attention.gru_rel_pos_linear."),
    (r"\.self_attn\.grep_a$", ".attention.gru_rel_pos_const"),
    (r"\.self_attn\.relative_attention_bias\.", ".attention.rel_attn_embed."),
    (r"\.self_attn\.", ".attention."),
    (r"\.fc1\.", ".feed_forward.intermediate_dense."),
    (r"\.fc2\.", ".feed_forward.output_dense."),
)


class WavlmEcapaEncoder:
    """Raises UserError where the file is no such state dict."""

    def __init__(self, file: Path, name: str, revision: str, device: str) -> None:
        self.name, self.revision, self.device = name, revision, torch_device(device)
        tensors = _read(file)
        try:
            self._wavlm = _wavlm(tensors).to(self.device).eval()
            head = {name: value for name, value in tensors.items() if not name.startswith(ENCODER)}
            self._head = {name: value.float().to(self.device) for name, value in head.items()}
            self.embed(np.zeros(SAMPLE_RATE_HZ, np.float32))
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            why = f"no tensor {error}" if isinstance(error, KeyError) else first_line(error)
            expected = "the state dict of WavLM-large with an ECAPA-TDNN head (wavlm_large_finetune.pth)"
            raise UserError(f"cannot load the speaker encoder: {why}", where=file, expected=expected) from error

    def embed(self, wave_S: np.ndarray) -> np.ndarray:
        """float32 [256]; the clip is brought to mean 0 and variance 1 first."""
        wave_1S = torch.from_numpy(voice_part(wave_S)).to(self.device)[None]
        with torch.inference_mode():
            hidden = self._wavlm(functional.layer_norm(wave_1S, wave_1S.shape), output_hidden_states=True).hidden_states
            return ecapa.embed(self._head, torch.stack(hidden))[0].cpu().numpy()


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of the file, by name."""
    refuse_pointer(file, "the speaker encoder's weight file")
    try:
        given: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        why = "it holds more than weights" if isinstance(error, UnpicklingError) else first_line(error)
        raise UserError(f"cannot read the speaker encoder: {why}", where=file) from error
    given = given.get("model", given) if isinstance(given, dict) else {}
    return {str(name): value for name, value in given.items() if isinstance(value, Tensor)}


def _wavlm(tensors: dict[str, Tensor]) -> Any:
    """transformers' WavLM with the encoder's tensors, of the size that they have."""
    from transformers import WavLMConfig, WavLMModel

    own = {name.removeprefix(ENCODER): value for name, value in tensors.items() if name.startswith(ENCODER)}
    own = {name: value for name, value in own.items() if not name.startswith(UNUSED)}
    kernels = [own[f"feature_extractor.conv_layers.{number}.0.weight"].shape for number in range(len(STRIDES))]
    buckets, heads = own["encoder.layers.0.self_attn.relative_attention_bias.weight"].shape
    inner, hidden = own["encoder.layers.0.fc1.weight"].shape
    positions = own["encoder.pos_conv.0.weight_v"].shape
    config = WavLMConfig(
        hidden_size=hidden, num_attention_heads=heads, intermediate_size=inner, num_buckets=buckets,
        num_hidden_layers=len({name.split(".")[2] for name in own if name.startswith("encoder.layers.")}),
        conv_dim=[shape[0] for shape in kernels], conv_kernel=[shape[2] for shape in kernels],
        conv_stride=STRIDES, num_feat_extract_layers=len(STRIDES), conv_bias=False, feat_extract_norm="layer",
        do_stable_layer_norm=True, num_conv_pos_embeddings=positions[2],
        num_conv_pos_embedding_groups=hidden // positions[1], max_bucket_distance=LONGEST_DISTANCE,
        mask_time_prob=0.0, mask_feature_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    model = WavLMModel(config)
    model.load_state_dict({_renamed(name): value for name, value in own.items()})
    return model


def _renamed(name: str) -> str:
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name

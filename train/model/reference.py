"""`--forward reference`: boson's own collator and padded forward, with plain cross entropy over its labels.

For anyone who doubts the packed forward: the same samples and the same weighting by label counts, but nothing of our
expansion, our layers or our loss. Several times slower. It takes log-mel features, not stored tower outputs: boson's
forward runs the tower itself.

Shapes: B samples, L padded positions, A audio-out positions, K codebooks, S input segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioSampleCollator
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import MEL_WINDOW, SpecialIds, Stored, mel_window
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.loss import IGNORE, LossOptions, LossParts, LossSums

Inputs = dict[str, Any]


def boson_inputs(samples: Sequence[Stored], ids: SpecialIds, pad_token_id: int, *, mel: bool = False) -> Inputs:
    """Arguments of `HiggsAudioModel.forward`, from boson's collator, labels among them.

    Args:
        mel: add the log-mel features of samples that have them.
    """
    collator = HiggsAudioSampleCollator(
        whisper_processor=None,  # pyright: ignore[reportArgumentType]
        audio_in_token_id=ids.audio_in,
        audio_out_token_id=ids.audio_out,
        pad_token_id=pad_token_id,
        audio_stream_bos_id=ids.stream_bos,
        audio_stream_eos_id=ids.stream_eos,
        encode_whisper_embed=False,  # its features come from waveforms; ours are stored
        return_audio_in_tokens=True,
        use_delay_pattern=True,
        audio_num_codebooks=ids.codebooks,
    )
    batch = collator([_boson_sample(sample) for sample in samples])
    inputs = {name: value for name, value in vars(batch).items() if name != "reward"}
    return inputs | (_features(samples) if mel else {})


def _boson_sample(sample: Stored) -> ChatMLDatasetSample:
    starts = np.cumsum([0, *sample.segment_frames])[:-1]
    unused = ("audio_waveforms_concat", "audio_waveforms_start", "audio_sample_rate", "audio_speaker_indices")
    fields: dict[str, Any] = dict.fromkeys(unused, torch.zeros(0))
    fields |= {
        "input_ids": torch.from_numpy(sample.tokens_2L[0].astype(np.int64)),
        "label_ids": torch.from_numpy(sample.tokens_2L[1].astype(np.int64)),
        "audio_ids_concat": torch.from_numpy(sample.codes_KT.astype(np.int64)),
        "audio_ids_start": torch.from_numpy(starts),
    }
    return ChatMLDatasetSample(**fields)


def _features(samples: Sequence[Stored]) -> Inputs:
    """audio_features [S, C, 3000] and their mask, of the input segments in order."""
    windows, counts = [], []
    for sample in samples:
        assert isinstance(sample, Sample), "features come with metadata"
        featured = [segment for segment in sample.meta["segments"] if segment.get("mel_frames")]
        for mel_CF, segment in zip(sample.mels, featured, strict=True):
            if segment["role"] != "assistant":
                windows.append(mel_window(mel_CF).astype(np.float32))
                counts.append(segment["mel_frames"])
    mask = torch.arange(MEL_WINDOW) < torch.tensor(counts)[:, None]
    return {"audio_features": torch.from_numpy(np.stack(windows)), "audio_feature_attention_mask": mask.int()}


def reference_loss(
    model: HiggsAudioModel, inputs: Inputs, label_weights: torch.Tensor, options: LossOptions, *, weight: int = 1
) -> LossParts:
    """The same as `pack_loss(model, hidden_states(model, batch), …)`, by boson's forward.

    Args:
        inputs: from `boson_inputs`, on the model's device.
        label_weights: [2 + K], weight of one label in the total loss.
        weight: 0 leaves every label out.
    """
    out = model(**inputs)
    codebooks = model.config.audio_num_codebooks
    logits = [out.logits[:, :-1].flatten(0, 1), *(out.audio_logits[:-1, k] for k in range(codebooks))]
    labels = [out.expanded_labels[:, 1:].flatten(), *(inputs["label_audio_ids"][k, 1:] for k in range(codebooks))]
    wanted = [bool(weight) and options.with_text, *[bool(weight) and options.with_audio] * codebooks]
    labels = [y if use else torch.full_like(y, IGNORE) for y, use in zip(labels, wanted, strict=True)]
    smoothing = options.smoothing
    losses = [
        F.cross_entropy(x.float(), y, reduction="none", label_smoothing=smoothing)
        for x, y in zip(logits, labels, strict=True)
    ]
    cross_entropy = torch.stack([loss.sum() for loss in losses])
    eos = model.config.audio_stream_eos_id
    at_eos = [(loss[y == eos], y[y == eos]) for loss, y in zip(losses[1:], labels[1:], strict=True)]
    right_eos = [(x[y == eos].argmax(-1) == eos).sum() for x, y in zip(logits[1:], labels[1:], strict=True)]
    sums = LossSums(
        cross_entropy=cross_entropy.detach(),
        correct=torch.stack([(x.argmax(-1) == y).sum() for x, y in zip(logits, labels, strict=True)]).float(),
        labels=torch.stack([(y >= 0).sum() for y in labels]).float(),
        eos_cross_entropy=torch.stack([loss.sum() for loss, _ in at_eos]).detach(),
        eos_labels=torch.tensor([float(len(y)) for _, y in at_eos], device=cross_entropy.device),
        eos_correct=torch.stack(right_eos).float(),
        contrastive=cross_entropy.new_zeros(1),
        pairs=cross_entropy.new_zeros(1),
    )
    return LossParts((cross_entropy * label_weights[:-1]).sum(), sums)

"""Random samples that obey the format, and boson's own collator on them as the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioBatchInput, HiggsAudioSampleCollator
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from higgs_tune.preprocess.chatml import parse_entry, tokenize
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import SpecialIds
from transformers import PreTrainedTokenizerBase


def random_entry(rng: np.random.Generator, *, turns: int = 1, start_index: int | None = None) -> dict[str, Any]:
    """A ChatML entry with `turns` pairs of user and assistant messages, one to two reference clips each."""

    def words(count: int) -> str:
        return " ".join(rng.choice(["سَلَامٌ", "بَيْتٌ", "word", "نَهْر"], count))

    def audio() -> dict[str, str]:
        return {"type": "audio", "audio_url": f"{rng.integers(1 << 40)}.wav"}

    messages: list[dict[str, Any]] = [{"role": "system", "content": words(3)}]
    for _ in range(turns):
        user: list[dict[str, str]] = [{"type": "text", "text": words(4)}]
        user += [audio() for _ in range(rng.integers(1, 3))]
        user += [{"type": "text", "text": words(2)}]
        answer: list[dict[str, str]] = [{"type": "text", "text": words(int(rng.integers(1, 6)))}, audio()]
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "start_index": start_index, "speaker": "s"}


def random_sample(
    key: str,
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerBase,
    ids: SpecialIds,
    *,
    frames: tuple[int, int] = (3, 30),
    **entry_options: Any,
) -> Sample:
    """A sample with random texts and random codes."""
    chat = parse_entry(random_entry(rng, **entry_options), 0, Path())
    lengths = rng.integers(*frames, len(chat.clips)).tolist()
    segments = [
        {"role": role, "frames": length, "seconds": length / 25, "source": clip.source, "sha256": ""}
        for role, clip, length in zip(chat.roles, chat.clips, lengths, strict=True)
    ]
    codes_KT = rng.integers(0, 1024, (ids.codebooks, sum(lengths))).astype(np.uint16)
    meta = {"messages": [], "start_index": chat.chat.start_index, "speaker": "s", "misc": None, "segments": segments}
    return Sample(key, meta, tokenize(chat, tokenizer, ids), codes_KT)


def boson_collate(samples: list[Sample], ids: SpecialIds, pad_token_id: int, **options: Any) -> HiggsAudioBatchInput:
    """Boson's collator on the same samples."""
    collator = HiggsAudioSampleCollator(
        whisper_processor=None,  # pyright: ignore[reportArgumentType]
        audio_in_token_id=ids.audio_in,
        audio_out_token_id=ids.audio_out,
        pad_token_id=pad_token_id,
        audio_stream_bos_id=ids.stream_bos,
        audio_stream_eos_id=ids.stream_eos,
        encode_whisper_embed=False,
        return_audio_in_tokens=True,
        use_delay_pattern=True,
        audio_num_codebooks=ids.codebooks,
        **options,
    )
    return collator([_boson_sample(sample) for sample in samples])


def _boson_sample(sample: Sample) -> ChatMLDatasetSample:
    starts = np.cumsum([0, *sample.segment_frames])[:-1]
    nothing: Any = torch.zeros(0)
    return ChatMLDatasetSample(
        input_ids=torch.from_numpy(sample.tokens_2L[0].astype(np.int64)),  # pyright: ignore[reportArgumentType]
        label_ids=torch.from_numpy(sample.tokens_2L[1].astype(np.int64)),  # pyright: ignore[reportArgumentType]
        audio_ids_concat=torch.from_numpy(sample.codes_KT.astype(np.int64)),  # pyright: ignore[reportArgumentType]
        audio_ids_start=torch.from_numpy(starts),  # pyright: ignore[reportArgumentType]
        audio_waveforms_concat=nothing,
        audio_waveforms_start=nothing,
        audio_sample_rate=nothing,
        audio_speaker_indices=nothing,
    )


def boson_inputs(batch: HiggsAudioBatchInput) -> dict[str, Any]:
    """Arguments of `HiggsAudioModel.forward` for a collated batch."""
    return {name: value for name, value in vars(batch).items() if name != "reward"}

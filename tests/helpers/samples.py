"""Random samples that obey the format."""

from __future__ import annotations

from typing import Any

import numpy as np
from higgs_tune.preprocess.input.chatml import parse_entry, tokenize
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


def serve_entry(rng: np.random.Generator) -> dict[str, Any]:
    """A ChatML entry as serving engines send it: the reference is an earlier answer, and the answer is audio alone."""
    texts = [" ".join(rng.choice(["سَلَامٌ", "بَيْتٌ", "word", "نَهْر"], 4)) for _ in range(2)]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Generate audio following instruction."}]
    for text in texts:
        audio = {"type": "audio", "audio_url": f"{rng.integers(1 << 40)}.wav"}
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": [audio]}]
    return {"messages": messages, "start_index": len(messages) - 1, "speaker": "s"}


def random_sample(
    key: str,
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerBase,
    ids: SpecialIds,
    *,
    frames: tuple[int, int] = (3, 30),
    mel_bins: int = 0,
    entry: dict[str, Any] | None = None,
    **entry_options: Any,
) -> Sample:
    """A sample with random texts and random codes, and with log-mel features of its input segments if wanted.

    Args:
        entry: its ChatML, in place of a random one.
    """
    chat = parse_entry(entry or random_entry(rng, **entry_options), 0)
    lengths = rng.integers(*frames, len(chat.clips)).tolist()
    segments: list[dict[str, Any]] = [
        {"role": role, "frames": length, "seconds": length / 25, "source": clip.source, "sha256": ""}
        for role, clip, length in zip(chat.roles, chat.clips, lengths, strict=True)
    ]
    mels = []
    for segment in segments:
        if mel_bins and segment["role"] != "assistant":
            segment["mel_frames"] = 4 * segment["frames"] + int(rng.integers(0, 4))
            mels.append(rng.uniform(-1, 1, (mel_bins, segment["mel_frames"])).astype(np.float16))
    codes_KT = rng.integers(0, 1024, (ids.codebooks, sum(lengths))).astype(np.uint16)
    meta = {"messages": [], "start_index": chat.chat.start_index, "speaker": "s", "misc": None, "segments": segments}
    return Sample(key, meta, tokenize(chat, tokenizer, ids), codes_KT, tuple(mels))

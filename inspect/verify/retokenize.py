"""Comparison of stored tokens with a fresh tokenization of the messages: `verify --deep`.

In: a stored sample and the checkpoint's tokenizer. Out: the first difference in tokens or labels, in words.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent
from higgs_tune.preprocess.audio.clip import Clip
from higgs_tune.preprocess.checkpoints.checkpoint import load_tokenizer
from higgs_tune.preprocess.input.chatml import ChatSample, tokenize
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import SpecialIds
from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=1)
def _tokenizer(folder: Path, ids: SpecialIds) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder, ids)


def tokens_differ(sample: Sample, tokenizer: Path, ids: SpecialIds) -> str:
    """The difference between the stored tokens and those of the messages, in words; empty where they are equal."""
    try:
        made_2L = tokenize(_chat(sample), _tokenizer(tokenizer, ids), ids)
    except Reject as reject:
        return f"the messages cannot be tokenized: {reject}"
    stored_2L = sample.tokens_2L
    if made_2L.shape != stored_2L.shape:
        return f"the messages give {made_2L.shape[1]} tokens, got {stored_2L.shape[1]}"
    for name, made, stored in zip(("token", "label"), made_2L, stored_2L, strict=True):
        differs = np.flatnonzero(made != stored)
        if len(differs):
            at = int(differs[0])
            return f"{len(differs)} {name}s differ, the first at {at}: expected {made[at]}, got {stored[at]}"
    return ""


def _chat(sample: Sample) -> ChatSample:
    messages = [
        Message(
            role=message["role"],
            content=[_part(part) for part in message["content"]],
            recipient=message.get("recipient"),
        )
        for message in sample.meta["messages"]
    ]
    meta = sample.meta
    chat = ChatMLSample(messages=messages, start_index=meta["start_index"], misc=None, speaker=meta["speaker"])
    clips = tuple(Clip(segment["source"], "") for segment in meta["segments"])
    return ChatSample(sample.key, chat, clips, tuple(segment["role"] for segment in meta["segments"]))


def _part(part: dict[str, Any]) -> TextContent | AudioContent:
    return (
        TextContent(text=part["text"]) if part["type"] == "text" else AudioContent(audio_url=part.get("audio_url", ""))
    )

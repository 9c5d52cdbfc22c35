"""Step 3: makes the samples of one shard (tokens, labels, codes, features) and writes its files.

In: a shard's number. Out: its committed files.
Guarantees: a sample with a rejected clip is a reject, never replaced (tests/test_bad_input.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from higgs_tune.preprocess.checkpoints.checkpoint import read_config, special_ids
from higgs_tune.preprocess.config import Job
from higgs_tune.preprocess.input.chatml import ChatSample, parse_entry, stored_messages, tokenize
from higgs_tune.preprocess.input.manifest import DISTINCT
from higgs_tune.preprocess.reject import Reject
from higgs_tune.preprocess.text_tokens import cached_tokenizer
from higgs_tune.preprocess.workdir import Encoded, Features, WorkFolder
from higgs_tune.shards.format import FRAME_RATE_HZ, Sample
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.shards.writer import SetWriter
from transformers import PreTrainedTokenizerBase

CHUNK_FRAMES = 30 * FRAME_RATE_HZ  # codes of the 30 s that a Whisper window covers


@dataclass(frozen=True)
class _Segment:
    """The audio of one placeholder."""

    meta: dict[str, Any]
    codes_KT: np.ndarray
    features: Features | None


def set_writer(job: Job) -> SetWriter:
    """The writer of the requested set."""
    config = job.config
    ids = special_ids(read_config(job.model), job.model)
    split = ValidationSplit(config.val_fraction, config.val_by)
    return SetWriter(job.out, ids, split, features=config.whisper_features, url=job.url)


def assemble_shard(job: Job, number: int) -> None:
    """Task: write the files of one shard and commit its index rows."""
    work, writer = WorkFolder(job.out), set_writer(job)
    tokenizer = cached_tokenizer(job.model, writer.ids)
    rejects: list[dict[str, Any]] = []

    def samples() -> Iterator[Sample]:
        for line in work.read_lines("samples", number):
            try:
                yield make_sample(line, job, work, tokenizer, writer.ids)
            except Reject as reject:
                rejects.append(reject.as_line(line["key"], line["position"]))

    writer.write(number, samples(), rejects)


def make_sample(
    line: dict[str, Any], job: Job, work: WorkFolder, tokenizer: PreTrainedTokenizerBase, ids: SpecialIds
) -> Sample:
    """One line of samples-*.jsonl as a stored sample. The lengths of its texts were checked when it was listed.

    Raises:
        Reject: the line is a reject, one of its clips was rejected, or its text or its pair of clips cannot be used.
    """
    if "reject" in line:
        raise Reject(*line["reject"])
    chat = parse_entry(line["entry"], line["position"], job.audio_paths, replace(job.texts, tokens=None))
    tokens_2L = tokenize(chat, tokenizer, ids)
    encoded = [
        _encoded(work, number, job.config.clips_per_unit, clip.source)
        for number, clip in zip(line["clips"], chat.clips, strict=True)
    ]
    if line["entry"].get(DISTINCT):
        refuse_same_audio([result.info for result in encoded], [clip.offset_s for clip in chat.clips])
    return sample_of(chat, tokens_2L, encoded, ids, job.wants_whisper)


def sample_of(
    chat: ChatSample,
    tokens_2L: np.ndarray,
    encoded: Sequence[Encoded],
    ids: SpecialIds,
    wants_whisper: Callable[[str], bool],
) -> Sample:
    """A conversation with its tokens and encoded clips.

    Args:
        wants_whisper: whether audio in a message of this role gets its Whisper features.

    Raises:
        Reject: a target with Whisper features is longer than 30 s.
    """
    segments = [
        _segments(role, result, whisper=wants_whisper(role)) for role, result in zip(chat.roles, encoded, strict=True)
    ]
    tokens_2L = repeat_placeholders(tokens_2L, [len(parts) for parts in segments], ids)
    flat = [segment for parts in segments for segment in parts]
    codes = [segment.codes_KT for segment in flat]
    return Sample(
        chat.key,
        _meta(chat, [segment.meta for segment in flat]),
        tokens_2L,
        np.concatenate(codes, axis=1) if codes else np.zeros((ids.codebooks, 0), np.uint16),
        tuple(np.ascontiguousarray(segment.features.values_CF) for segment in flat if segment.features),
    )


def _encoded(work: WorkFolder, clip: int, clips_per_unit: int, source: str) -> Encoded:
    """An encoded clip, its source named as in the sample; inline audio keeps its own name.

    Raises:
        Reject: the clip was rejected.
    """

    def own_name(name: str) -> str:
        return name if name.startswith("inline:") else source

    unit, at = divmod(clip, clips_per_unit)
    result = work.encoded(unit)[at]
    if isinstance(result, Reject):
        raise Reject(result.reason, result.detail, own_name(result.file))
    return replace(result, info=result.info | {"source": own_name(result.info["source"])})


def refuse_same_audio(infos: list[dict[str, Any]], offsets_s: list[float | None]) -> None:
    """Refuse a pair of clips with equal content under different names.

    Raises:
        Reject: two of the clips have the same content, and are not different pieces of it.
    """
    digests = [(info["sha256"], offset) for info, offset in zip(infos, offsets_s, strict=True)]
    if len(set(digests)) < len(digests):
        raise Reject("self_reference", f"{infos[0]['source']} and {infos[-1]['source']} are equal", infos[-1]["source"])


def _meta(chat: ChatSample, segments: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "messages": stored_messages(chat),
        "start_index": chat.chat.start_index,
        "speaker": chat.chat.speaker,
        "misc": chat.chat.misc,
        "segments": segments,
    }


def _segments(role: str, result: Encoded, *, whisper: bool) -> list[_Segment]:
    """The segments of a clip: one, or for a reference with Whisper features one for each chunk of 30 s.

    Raises:
        Reject: a target with Whisper features is longer than 30 s; it cannot be split.
    """
    features = result.features if whisper else ()
    if role == "assistant" and len(features) > 1:
        detail = f"Whisper features of a target: expected at most 30 s, got {result.info['seconds']:.3f} s"
        raise Reject("too_long_for_whisper", detail, result.info["source"])
    count = max(len(features), 1)
    pieces = np.split(result.codes_KT, [CHUNK_FRAMES * (i + 1) for i in range(count - 1)], axis=1)
    seconds = [min(result.info["seconds"] - 30 * i, 30.0) for i in range(count - 1)]
    seconds.append(result.info["seconds"] - sum(seconds))
    segments = []
    for i, codes_KT in enumerate(pieces):
        feature = features[i] if features and features[i].frames else None
        meta = result.info | {"role": role, "frames": codes_KT.shape[1], "seconds": round(seconds[i], 6)}
        segments.append(_Segment(meta | ({"mel_frames": feature.frames} if feature else {}), codes_KT, feature))
    return segments


def repeat_placeholders(tokens_2L: np.ndarray, counts: list[int], ids: SpecialIds) -> np.ndarray:
    """Repeat `<|audio_bos|><|AUDIO|><|audio_eos|>` for each chunk of long audio, labels with it, as boson's collator.

    Args:
        counts: of each placeholder, in order of appearance.
    """
    if all(count == 1 for count in counts):
        return tokens_2L
    parts, done = [], 0
    places = np.flatnonzero(np.isin(tokens_2L[0], (ids.audio_in, ids.audio_out)))
    for place, count in zip(places.tolist(), counts, strict=True):
        parts += [tokens_2L[:, done : place - 1], *[tokens_2L[:, place - 1 : place + 2]] * count]
        done = place + 2
    return np.concatenate([*parts, tokens_2L[:, done:]], axis=1)

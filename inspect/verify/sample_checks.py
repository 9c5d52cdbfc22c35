"""Rules for the content of a sample: codes, tokens, segments, turns, labels. Checksums cannot tell these.

In: a decoded sample. Out: (kind, detail) of each broken rule.

Shapes: K codebooks, T frames of a segment, W positions of a segment, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from higgs_tune.shards.errors import ShardError
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import IGNORE, SpecialIds, expand

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class SampleRules:
    """Bounds and ids from the provenance of a set, and the rules that use them.

    Attributes:
        ids: special ids.
        codebook_size: number of codes of a codebook.
        vocabulary: number of token ids; 0: unknown.
        header: the token that opens every message; None where the tokenizer is not at hand: then the second token of
            a sample is taken for it.
    """

    ids: SpecialIds
    codebook_size: int
    vocabulary: int
    header: int | None

    def check(self, sample: Sample) -> Iterator[tuple[str, str]]:
        """(kind, detail) of each broken rule."""
        basic = [*self._codes(sample), *self._tokens(sample), *self._segments(sample)]
        yield from basic
        if basic:  # the other rules rely on these
            return
        yield from self._turns(sample)
        yield from self._audio_labels(sample)

    def _codes(self, sample: Sample) -> Iterator[tuple[str, str]]:
        codes_KT = sample.codes_KT
        if len(codes_KT) != self.ids.codebooks:
            yield "code_range", f"expected {self.ids.codebooks} codebooks, got {len(codes_KT)}"
        for k, frame in np.argwhere(codes_KT >= self.codebook_size)[:1].tolist():
            count = int((codes_KT >= self.codebook_size).sum())
            where = f"codebook {k}, frame {frame}"
            yield (
                "code_range",
                f"expected less than {self.codebook_size}, got {codes_KT[k, frame]} ({where}; {count} such codes)",
            )

    def _tokens(self, sample: Sample) -> Iterator[tuple[str, str]]:
        input_ids, label_ids = sample.tokens_2L
        if not len(input_ids):
            yield "token_range", "expected tokens, got none"
            return
        outside = (input_ids < 0) | (input_ids >= self.vocabulary if self.vocabulary else False)
        if outside.any():
            at = int(outside.argmax())
            yield "token_range", f"expected 0 to {self.vocabulary - 1}, got {input_ids[at]} at token {at}"
        wrong = (label_ids != IGNORE) & (label_ids != input_ids)
        if wrong.any():
            at = int(wrong.argmax())
            yield "wrong_label", f"expected {IGNORE} or {input_ids[at]}, got {label_ids[at]} at token {at}"
        if label_ids[0] != IGNORE:
            yield "first_label", "the first token has a label, but no position predicts it"
        at = np.flatnonzero((input_ids == self.ids.audio_in) & (label_ids != IGNORE))
        if len(at):
            yield "labelled_input_audio", f"an input segment has a label at token {at[0]}"

    def _segments(self, sample: Sample) -> Iterator[tuple[str, str]]:
        segments, input_ids = sample.meta["segments"], sample.tokens_2L[0]
        places = input_ids[(input_ids == self.ids.audio_in) | (input_ids == self.ids.audio_out)]
        if len(places) != len(segments):
            yield "wrong_segments", f"expected a placeholder for each of {len(segments)} segments, got {len(places)}"
            return
        if sum(sample.segment_frames) != sample.codes_KT.shape[1]:
            yield "wrong_segments", f"expected {sum(sample.segment_frames)} frames, got {sample.codes_KT.shape[1]}"
        for number, (segment, token) in enumerate(zip(segments, places.tolist(), strict=True)):
            expected = "assistant" if token == self.ids.audio_out else "system or user"
            if segment["role"] not in expected.split(" or "):
                yield "wrong_segments", f"segment {number}: expected role {expected}, got {segment['role']}"
            if segment["frames"] < 1 or segment["seconds"] < 0:
                length = f"{segment['frames']} frames, {segment['seconds']} s"
                yield "wrong_segments", f"segment {number}: expected at least a frame, got {length}"

    def _turns(self, sample: Sample) -> Iterator[tuple[str, str]]:
        """No label outside of the assistant's turns, none before `start_index`."""
        messages, label_ids = sample.meta["messages"], sample.tokens_2L[1]
        starts = self._starts(sample)
        if len(starts) != len(messages):
            if self.header is not None and messages:
                yield "wrong_turns", f"expected {len(messages)} messages, got {len(starts)} in the tokens"
            return
        first = sample.meta.get("start_index") or 0
        ends = [*starts[1:].tolist(), len(label_ids)]
        for number, (message, start, end) in enumerate(zip(messages, starts.tolist(), ends, strict=True)):
            trained = message["role"] == "assistant" and number >= first
            labelled = np.flatnonzero(label_ids[start:end] != IGNORE)
            if len(labelled) and not trained:
                detail = f"message {number} of the {message['role']} has {len(labelled)} labels, the first at token "
                yield "labelled_turn", f"{detail}{start + labelled[0]}; expected none"

    def _starts(self, sample: Sample) -> np.ndarray:
        """Token positions at which the messages of a sample start."""
        input_ids = sample.tokens_2L[0]
        return np.flatnonzero(input_ids == (input_ids[1:2] if self.header is None else self.header))

    def turns_known(self, sample: Sample) -> bool:
        """Whether the tokens can be assigned to messages."""
        return len(self._starts(sample)) == len(sample.meta["messages"])

    def _audio_labels(self, sample: Sample) -> Iterator[tuple[str, str]]:
        """A trained segment: no label in its first column, one EOS per codebook. Other segments: no labels."""
        try:
            seen = expand([sample], self.ids)
        except ShardError as error:
            yield "wrong_segments", str(error)
            return
        labels_KN = np.full((self.ids.codebooks, seen.length), IGNORE, np.int32)
        labels_KN[:, seen.audio_label_at + 1] = seen.audio_labels_KB
        input_ids, label_ids = sample.tokens_2L
        places = (input_ids == self.ids.audio_in) | (input_ids == self.ids.audio_out)
        trained = (label_ids[places] != IGNORE).tolist()
        for number, ((start, width, _), said) in enumerate(zip(seen.segments, trained, strict=True)):
            labels_KW = labels_KN[:, start : start + width]
            eos = (labels_KW == self.ids.stream_eos).sum(axis=1)
            if said and ((labels_KW[:, 0] != IGNORE).any() or (eos != 1).any()):
                yield (
                    "wrong_audio_labels",
                    f"segment {number}: expected no label first and one EOS a codebook, got {eos}",
                )
            if not said and (labels_KW != IGNORE).any():
                yield "wrong_audio_labels", f"segment {number} is not trained on, but has labels"


def meta_problems(meta: Any) -> Iterator[str]:
    """Faults in the form of a sample's metadata. Later ones assume that there is no earlier one: take the first."""
    if not isinstance(meta, dict) or not {"messages", "start_index", "speaker", "segments"} <= meta.keys():
        yield "expected an object with messages, start_index, speaker, segments"
    if not isinstance(meta["messages"], list) or not isinstance(meta["segments"], list):
        yield "expected lists of messages and segments"
    if not isinstance(meta["start_index"], int | None):
        yield f"expected start_index to be a number or null, got {meta['start_index']!r}"
    if not all(_has(segment, role=str, frames=int, seconds=int | float, source=str) for segment in meta["segments"]):
        yield "expected role, frames, seconds and source of each segment"
    for message in meta["messages"]:
        if not _has(message, role=str, content=list) or message["role"] not in ROLES:
            yield f"expected content, and a role of {', '.join(ROLES)}, in each message"
        for part in message["content"]:
            if not _has(part, type=str) or (part["type"] == "text" and not _has(part, text=str)):
                yield "expected a type, and a text where it is text, in each part of a message"


def _has(value: Any, **types: Any) -> bool:
    """Whether a value is an object with these fields of these types."""
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in types.items())

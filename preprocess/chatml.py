"""ChatML samples: reading the file, checking each sample, and the text tokens with their labels.

In: a JSON array or JSONL of `{"messages": [...], "speaker", "misc", "start_index", "id"}`. Out: for each entry either
a `ChatSample` (boson's own dataclass, its clips, its key) or a `Reject`; tokens and labels as boson's
`prepare_chatml_sample` makes them. Never: a guess at what a malformed sample meant.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from transformers import PreTrainedTokenizerBase

from ..shards.durable import to_json
from ..shards.errors import UserError
from ..shards.sequence import SpecialIds
from .audio import Clip
from .reject import Reject

ROLES = ("system", "user", "assistant")
# tokens that the template itself sets; in a text they would forge turns or audio
TEMPLATE_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|audio_bos|>",
    "<|audio_out_bos|>",
    "<|audio_eos|>",
    "<|AUDIO|>",
    "<|AUDIO_OUT|>",
)
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")


@dataclass(frozen=True)
class ChatSample:
    """One checked sample.

    Attributes:
        key: unique, fit for a tar member's name.
        chat: boson's dataclass, audio contents included.
        clips: one for each audio content, in order of appearance; roles: the role of the message of each.
    """

    key: str
    chat: ChatMLSample
    clips: tuple[Clip, ...]
    roles: tuple[str, ...]


def read_entries(path: Path) -> Iterator[Any]:
    """The raw entries of a JSON array or JSONL file; a line that is no JSON comes as a Reject.

    Raises:
        UserError: the file cannot be read, or is neither.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            if first.lstrip().startswith("["):
                yield from _read_array(file.read(), path)
            elif first.lstrip().startswith("{"):
                yield from _read_lines(file)
            else:
                expected = "a JSON array, or one JSON object a line"
                raise UserError("not a ChatML file", where=path, expected=expected, got=first[:40].strip() or "nothing")
    except OSError as error:
        raise UserError(f"cannot read the data: {error.strerror}", where=path) from error
    except UnicodeDecodeError as error:
        raise UserError(f"the data is not UTF-8: {error}", where=path) from error


def _read_array(text: str, path: Path) -> list[Any]:
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the data is not JSON: {error}", where=path) from error


def _read_lines(lines: Iterator[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line, parse_constant=_no_number)
            except (ValueError, RecursionError) as error:
                yield Reject("invalid_json", f"line {number}: {error}")


def _no_number(_name: str) -> None:
    """NaN and infinities are no JSON; boson reads them as null, and so do we."""


def key_of(entry: Any, position: int) -> str:
    """The sample's key: its `id` (or misc.id) where it has one, made fit for a file name, else its position."""
    misc = entry.get("misc") if isinstance(entry, dict) else None
    given = entry.get("id") if isinstance(entry, dict) else None
    given = given if given is not None else (misc.get("id") if isinstance(misc, dict) else None)
    if given is None or isinstance(given, dict | list | bool) or not str(given):
        return f"{position:09d}"
    name = str(given)
    safe = _UNSAFE.sub("_", name)[:47]
    return safe if safe == name else f"{safe}-{xxhash.xxh3_64_hexdigest(name.encode('utf-8', 'replace'))}"


def parse_entry(entry: Any, position: int, folder: Path) -> ChatSample:
    """Check one raw entry.

    Args:
        entry: what `read_entries` gave.
        position: its place in the file, from 0.
        folder: what relative audio paths are relative to.

    Raises:
        Reject: malformed, unknown role, empty text, no assistant turn, a template token inside a text.
    """
    if isinstance(entry, Reject):
        raise entry
    if not isinstance(entry, dict) or not isinstance(entry.get("messages"), list) or not entry["messages"]:
        raise Reject("malformed_chatml", "expected an object with a non-empty list of messages")
    try:
        to_json(entry)
    except (ValueError, RecursionError) as error:  # a lone surrogate, a number beyond float64, nesting without end
        raise Reject("malformed_chatml", f"cannot be stored as JSON: {error}") from error
    messages = [_message(message, number) for number, message in enumerate(entry["messages"])]
    start_index = entry.get("start_index")
    if start_index is not None and (not isinstance(start_index, int) or isinstance(start_index, bool)):
        raise Reject("malformed_chatml", f"start_index: expected an integer, got {start_index!r}")
    misc = entry.get("misc")
    if misc is not None and not isinstance(misc, dict):
        raise Reject("malformed_chatml", f"misc: expected an object, got {misc!r}")
    speaker = entry.get("speaker") if entry.get("speaker") is not None else (misc or {}).get("speaker")
    if speaker is not None and not isinstance(speaker, str | int):
        raise Reject("malformed_chatml", f"speaker: expected a string, got {speaker!r}")
    name = None if speaker is None else str(speaker)
    chat = ChatMLSample(messages=messages, start_index=start_index, misc=misc, speaker=name)
    found = [
        (_clip(content, folder), message.role)
        for message in messages
        for content in _parts(message)
        if isinstance(content, AudioContent)
    ]
    clips, roles = tuple(clip for clip, _ in found), tuple(role for _, role in found)
    return ChatSample(key_of(entry, position), chat, clips, roles)


def _parts(message: Message) -> list[Any]:
    """The contents of a message that `_message` made."""
    assert isinstance(message.content, list)
    return message.content


def _message(message: Any, number: int) -> Message:
    where = f"message {number}"
    if not isinstance(message, dict):
        raise Reject("malformed_chatml", f"{where}: expected an object, got {message!r:.40}")
    role = message.get("role")
    if role not in ROLES:
        raise Reject("unknown_role", f"{where}: expected one of {', '.join(ROLES)}, got {role!r:.40}")
    raw = message.get("content")
    parts = raw if isinstance(raw, list) else [raw]
    if not parts:
        raise Reject("empty_text", f"{where}: no content")
    recipient = message.get("recipient")
    if recipient is not None and (not isinstance(recipient, str) or role != "assistant"):
        raise Reject("malformed_chatml", f"{where}: recipient: expected a string, of an assistant message")
    return Message(role=role, content=[_content(part, where) for part in parts], recipient=recipient)


def _content(part: Any, where: str) -> TextContent | AudioContent:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return TextContent(text=_text(part.get("text"), where))
    if kind != "audio":
        raise Reject("malformed_chatml", f"{where}: expected content of type text or audio, got {part!r:.60}")
    url, inline = part.get("audio_url"), part.get("raw_audio")
    if not (isinstance(url, str) and url) and not (isinstance(inline, str) and inline):
        raise Reject("malformed_chatml", f"{where}: audio without audio_url or raw_audio")
    cut = {name: part.get(name) for name in ("offset", "duration")}
    for name, value in cut.items():
        least = 0 if name == "offset" else 1e-9
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= least):
            raise Reject("malformed_chatml", f"{where}: {name}: expected seconds, got {value!r}")
    name = url if isinstance(url, str) else ""
    return AudioContent(audio_url=name, raw_audio=inline, offset=cut["offset"], duration=cut["duration"])


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise Reject("malformed_chatml", f"{where}: text: expected a string, got {text!r:.40}")
    if not text.strip():
        raise Reject("empty_text", f"{where}: text is empty")
    found = [token for token in TEMPLATE_TOKENS if token in text]
    if found:
        raise Reject("template_token_in_text", f"{where}: text holds {found[0]}")
    return text


def _clip(content: AudioContent, folder: Path) -> Clip:
    source, path, inline = content.audio_url, str(folder / content.audio_url), content.raw_audio or ""
    if inline:
        source, path = f"inline:{hashlib.sha256(inline.encode()).hexdigest()}", ""
    return Clip(source, path, inline, content.offset, content.duration)


def tokenize(sample: ChatSample, tokenizer: PreTrainedTokenizerBase, ids: SpecialIds) -> np.ndarray:
    """Text tokens and labels by boson's `prepare_chatml_sample`: int32 [2, L].

    Raises:
        Reject: boson refuses the sample, nothing in it has a label, or a text smuggles in an audio placeholder.
    """
    bare = [replace(m, content=[_without_audio_data(c) for c in _parts(m)]) for m in sample.chat.messages]
    input_ids, label_ids, contents, _ = prepare_chatml_sample(replace(sample.chat, messages=bare), tokenizer)
    if input_ids is None or label_ids is None:
        raise Reject("malformed_chatml", "prepare_chatml_sample refused it")
    tokens_2L = np.array([input_ids, label_ids], np.int32)
    placeholders = np.isin(tokens_2L[0], (ids.audio_in, ids.audio_out)).sum()
    if placeholders != len(sample.clips) or len(contents or ()) != len(sample.clips):
        raise Reject("template_token_in_text", f"{len(sample.clips)} audios, but {placeholders} placeholders")
    if (tokens_2L[1] < 0).all():
        raise Reject("nothing_to_train", "no assistant content at or after start_index")
    return tokens_2L


def _without_audio_data(content: Any) -> Any:
    return replace(content, raw_audio=None) if isinstance(content, AudioContent) else content


def stored_messages(sample: ChatSample) -> list[dict[str, Any]]:
    """The messages as KEY.json holds them: inline audio left out, everything else as given."""
    stored = []
    for message in sample.chat.messages:
        content: list[dict[str, Any]] = []
        for part in _parts(message):
            if isinstance(part, TextContent):
                content.append({"type": "text", "text": part.text})
            elif isinstance(part, AudioContent):
                cut = {k: v for k, v in (("offset", part.offset), ("duration", part.duration)) if v is not None}
                content.append({"type": "audio", "audio_url": part.audio_url, **cut})
        entry: dict[str, Any] = {"role": message.role, "content": content}
        if message.recipient:
            entry["recipient"] = message.recipient
        stored.append(entry)
    return stored

"""Conversations as other tools write them become our ChatML: their roles, parts, and lists of audio beside the texts.

In: one entry with `messages` (role, content) or ShareGPT's `conversations` (from, value). Audio stands in parts, in
`<audio>PATH</audio>`, or in a list beside the messages whose n-th file belongs to the n-th `<audio>` tag or part
without a path (ms-swift, LLaMA-Factory, chat templates of transformers). Out: `messages` whose audio parts hold
`audio_url` or `raw_audio`. Where tags and files do not match, or a file would be heard nowhere: a `Reject`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any

from higgs_tune.preprocess.input.audio_paths import looks_like_audio
from higgs_tune.preprocess.reject import Reject

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant"}
AUDIO_KEYS = {
    *("audio", "audio_file", "audio_path", "audio_filepath", "audio_url", "wav", "wav_path", "sound", "speech"),
    *("audios", "audio_files", "audio_paths", "audio_urls", "wavs", "sounds"),
}
OTHER_MEDIA = ("images", "image", "videos", "video")
PART_KEYS = ("audio_url", "audio", "path", "url", "audio_path", "audio_file", "input_audio")  # of an audio part
AUDIO_TYPES = ("audio", "audio_url", "input_audio")
_TAG = re.compile(r"<audio>([^<>]+)</audio>|<audio>")
_DATA_URL = re.compile(r"data:[\w/.+-]*;base64,")


def is_conversation(entry: Any) -> bool:
    """Whether a row is a conversation of any tool, and not a row of a manifest."""
    return isinstance(entry, dict) and ("messages" in entry or "conversations" in entry)


def as_chatml(entry: Any) -> Any:
    """The entry as our ChatML; what is no conversation is returned as it is.

    Raises:
        Reject: tags and files do not match, a file belongs nowhere, or a message is not to be trained on.
    """
    if not is_conversation(entry):
        return entry
    given = entry.get("messages")
    if given is None:
        given = entry["conversations"]
    elif entry.get("conversations") is not None:
        raise Reject("malformed_chatml", "expected messages or conversations, got both")
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        return entry
    messages = [_message(message, f"message {i}") for i, message in enumerate(given)]
    made = {name: value for name, value in entry.items() if name not in ("conversations", "system", *AUDIO_KEYS)}
    messages = _attach(messages, _files(entry), "the sample")
    _refuse_unheard(entry, messages)
    start = entry.get("start_index")
    if isinstance(entry.get("system"), str) and entry["system"]:
        if any(message.get("role") == "system" for message in messages):
            raise Reject("malformed_chatml", "expected a system message or a key system, got both")
        messages = [{"role": "system", "content": entry["system"]}, *messages]
        made |= {"start_index": start + 1} if isinstance(start, int) else {}
    return made | {"messages": messages}


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message under our names, its content as a list of parts where it holds audio."""
    role = message.get("role", message.get("from"))
    role = ROLES.get(role, role) if isinstance(role, str) else role
    content = message.get("content", message.get("value"))
    if role == "assistant" and any(message.get(name) in (0, False) and name in message for name in ("loss", "weight")):
        raise Reject("malformed_chatml", f"{where}: a message without loss: give start_index, or leave it out")
    parts = [piece for part in content for piece in _pieces(part)] if isinstance(content, list) else _pieces(content)
    made = {name: value for name, value in message.items() if name not in ("from", "value", *AUDIO_KEYS)}
    made |= {"role": role, "content": parts if isinstance(content, list) or len(parts) != 1 else parts[0]}
    if parts == [content]:
        made["content"] = content
    return _attach([made], _files(message), where)[0] if _files(message) else made


def _pieces(part: Any) -> list[Any]:
    """A part of a content as our parts: text split at its `<audio>` tags, audio under our names."""
    if isinstance(part, str):
        return _split(part) if "<audio>" in part else [part]
    if not isinstance(part, dict):
        return [part]
    kind = part.get("type")
    if (kind == "text" or (kind is None and "text" in part)) and isinstance(part.get("text"), str):
        if "<audio>" in part["text"]:
            return _split(part["text"])
        return [part] if kind else [{"type": "text", "text": part["text"]}]
    if kind in AUDIO_TYPES or (kind is None and part.keys() & set(PART_KEYS)):
        return [_audio_part(part)]
    return [part]


def _split(text: str) -> list[dict[str, Any]]:
    """The text and audio parts of a text with `<audio>` tags; spaces alone between tags are no text."""
    parts: list[dict[str, Any]] = []
    end = 0
    for tag in _TAG.finditer(text):
        parts += [{"type": "text", "text": text[end : tag.start()]}, _named(tag[1]) if tag[1] else {"type": "audio"}]
        end = tag.end()
    parts.append({"type": "text", "text": text[end:]})
    return [part for part in parts if part["type"] == "audio" or part["text"].strip()]


def _audio_part(part: dict[str, Any]) -> dict[str, Any]:
    """An audio part with `audio_url` or `raw_audio`; with neither where it names no file."""
    if part.get("type") == "audio" and (part.get("audio_url") or part.get("raw_audio")) and not part.get("audio"):
        url = part.get("audio_url")
        return part if not (isinstance(url, str) and _DATA_URL.match(url)) else part | _named(url)
    named = [part[name] for name in PART_KEYS if part.get(name)]
    if len(named) > 1 and any(other != named[0] for other in named):
        raise Reject("malformed_chatml", f"an audio part names several files: {named!r:.100}")
    cut = {name: part[name] for name in ("offset", "duration", "raw_audio") if part.get(name) is not None}
    return (_named(named[0]) if named else {"type": "audio"}) | cut


def _named(file: Any) -> dict[str, Any]:
    """An audio part for a file in any of the forms that tools have: a path, a data URL, bytes, an object of these."""
    if isinstance(file, dict):
        content = file.get("bytes") or file.get("data")
        if isinstance(content, bytes):
            return {"type": "audio", "audio_url": "", "raw_audio": base64.b64encode(content).decode()}
        if isinstance(content, str):
            return {"type": "audio", "audio_url": "", "raw_audio": content}
        file = file.get("path") or file.get("url") or file.get("audio")
    if isinstance(file, str) and (data := _DATA_URL.match(file)):
        return {"type": "audio", "audio_url": "", "raw_audio": file[data.end() :]}
    if not isinstance(file, str) or not file.strip():
        raise Reject("malformed_chatml", f"audio: expected a path, got {file!r:.60}")
    return {"type": "audio", "audio_url": file.strip()}


def _files(holder: dict[str, Any]) -> list[Any]:
    """The files that an entry or a message lists beside its texts."""
    lists = {name: value for name, value in holder.items() if name in AUDIO_KEYS and value not in (None, "", [])}
    if len(lists) > 1:
        raise Reject("malformed_chatml", f"expected one list of audio beside the messages, got {', '.join(lists)}")
    return [file for value in lists.values() for file in (value if isinstance(value, list) else [value])]


def _parts(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The audio parts of messages, in order."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, dict) and part.get("type") == "audio":
                yield part


def _attach(messages: list[dict[str, Any]], files: list[Any], where: str) -> list[dict[str, Any]]:
    """Messages whose n-th tag or part without a path has the n-th file.

    Raises:
        Reject: their numbers differ, or there are files, but no tags, and the parts name others.
    """
    nameless = [part for part in _parts(messages) if not part.get("audio_url") and not part.get("raw_audio")]
    made = [_named(file) for file in files]
    if not nameless:
        named = [part.get("audio_url") for part in _parts(messages)]
        if any(part["audio_url"] not in named for part in made):
            tag = "put <audio> where it is heard"
            raise Reject("malformed_chatml", f"{where}: {len(files)} audio files, but no <audio> tag: {tag}")
        return messages
    if len(nameless) != len(files):
        raise Reject("malformed_chatml", f"{where}: {len(nameless)} <audio> tags or parts without a path, but "
                                         f"{len(files)} audio files beside the messages")  # fmt: skip
    waiting = iter(made)
    return [message | {"content": _filled(message.get("content"), waiting)} for message in messages]


def _filled(content: Any, files: Iterator[dict[str, Any]]) -> Any:
    def fill(part: Any) -> Any:
        if not isinstance(part, dict) or part.get("type") != "audio" or part.get("audio_url") or part.get("raw_audio"):
            return part
        return part | next(files)

    return [fill(part) for part in content] if isinstance(content, list) else fill(content)


def _refuse_unheard(entry: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    """Refuse images and videos, and audio under a name that no tool uses, where no message holds audio."""
    media = [name for name in OTHER_MEDIA if entry.get(name)]
    if media:
        raise Reject("malformed_chatml", f"{media[0]}: the model takes text and audio only")
    if any(True for _ in _parts(messages)):
        return
    for name, value in entry.items():
        values = value if isinstance(value, list) else [value]
        if name not in ("messages", "conversations") and any(map(looks_like_audio, values)):
            raise Reject("malformed_chatml", f"{name} names audio that no message holds: name it audios, and put "
                                             "<audio> where each file is heard")  # fmt: skip

"""Checks one ChatML sample; makes its text tokens and labels.

In: one entry, `{"messages": [...], "speaker", "misc", "start_index", "id"}`, as `entries` reads it. Out: a
`ChatSample` (boson's own dataclass, its clips, its key) or a `Reject`; tokens and labels by boson's
`prepare_chatml_sample`.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from higgs_tune.preprocess.audio.clip import Clip
from higgs_tune.preprocess.input.audio_paths import AudioPaths, plain_path
from higgs_tune.preprocess.input.jsonable import plain
from higgs_tune.preprocess.reject import Reject
from higgs_tune.preprocess.text_normalization import TextOptions, normalize_text
from higgs_tune.shards.durable import to_json
from higgs_tune.shards.layout import TWIN
from higgs_tune.shards.sequence import SpecialIds
from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
# tokens of the chat template; in a text they would forge turns or audio
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
SAFE_CHARS = 47  # of an id that is used as it is; a longer one is cut and gets its hash
TWIN_KEY = "twin"  # marks the second entry of a row in both prompt layouts
NO_FOLDER, ANY_TEXT = AudioPaths(Path()), TextOptions()
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all control characters but tab and line ends
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class ChatSample:
    """One checked sample.

    Attributes:
        key: unique, fit for the name of a tar member.
        chat: boson's dataclass, audio contents included.
        clips: one for each audio content, in order of appearance.
        roles: for each clip, the role of its message.
    """

    key: str
    chat: ChatMLSample
    clips: tuple[Clip, ...]
    roles: tuple[str, ...]


def key_of(entry: Any, position: int) -> str:
    """The sample's key: its `id` (or misc.id), made fit for a file name; its position where it has none.

    An entry with `TWIN_KEY` speaks the text of the entry before it in another layout; its key is that one's and `TWIN`.
    A reject may know the key of the sample that it stands for.
    """
    if isinstance(entry, Reject) and entry.key:
        return entry.key
    if isinstance(entry, dict) and entry.get(TWIN_KEY):
        return key_of({name: value for name, value in entry.items() if name != TWIN_KEY}, position) + TWIN
    misc = entry.get("misc") if isinstance(entry, dict) else None
    given = entry.get("id") if isinstance(entry, dict) else None
    given = given if given is not None else (misc.get("id") if isinstance(misc, dict) else None)
    given = None if isinstance(given, dict | list | bool) else plain(given)
    if given is None or not str(given):
        return f"{position:09d}"
    name = str(given)
    safe = _UNSAFE.sub("_", name)[:SAFE_CHARS]
    return safe if safe == name else f"{safe}-{xxhash.xxh3_64_hexdigest(name.encode('utf-8', 'replace'))}"


def parse_entry(entry: Any, position: int, paths: AudioPaths = NO_FOLDER, texts: TextOptions = ANY_TEXT) -> ChatSample:
    """Check one raw entry.

    Args:
        entry: our ChatML (conversations), or a reject.
        position: its place in the data, from 0.
        paths: where audio is looked for.
        texts: which texts are taken, and their normalization.

    Raises:
        Reject: malformed, unknown role, a text that is empty, too long, or holds control characters or a template
            token.
    """
    if isinstance(entry, Reject):
        raise entry
    if not isinstance(entry, dict) or not isinstance(entry.get("messages"), list) or not entry["messages"]:
        raise Reject("malformed_chatml", "expected an object with a non-empty list of messages")
    check_storable(entry)
    messages = [_message(m, f"message {i}", texts) for i, m in enumerate(entry["messages"])]
    start_index = entry.get("start_index")
    if start_index is not None and (not _is(start_index, int) or start_index < 0):
        raise Reject("malformed_chatml", f"start_index: expected an integer of at least 0, got {start_index!r:.60}")
    misc = entry.get("misc")
    if misc is not None and not isinstance(misc, dict):
        raise Reject("malformed_chatml", f"misc: expected an object, got {misc!r:.60}")
    speaker = entry.get("speaker") if entry.get("speaker") is not None else (misc or {}).get("speaker")
    if speaker is not None and not _is(speaker, str | int):
        raise Reject("malformed_chatml", f"speaker: expected a string, got {speaker!r:.60}")
    name = None if speaker is None else str(speaker)
    chat = ChatMLSample(messages=messages, start_index=start_index, misc=misc, speaker=name)
    audios = [
        (part, message.role) for message in messages for part in _parts(message) if isinstance(part, AudioContent)
    ]
    clips, roles = tuple(_clip(part, paths) for part, _ in audios), tuple(role for _, role in audios)
    return ChatSample(key_of(entry, position), chat, clips, roles)


def check_storable(entry: dict[str, Any]) -> None:
    """Refuse a raw entry or row that cannot be stored as JSON.

    Raises:
        Reject: it holds invalid Unicode, or `plain` cannot make it JSON.
    """
    try:
        to_json(plain(entry))
    except UnicodeEncodeError as error:  # undecodable bytes of the file, or half of a surrogate pair
        raise Reject("invalid_unicode", f"{error}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, nesting without end
        raise Reject("malformed_chatml", f"cannot be stored as JSON: {error}") from error


def _is(value: Any, kind: Any) -> bool:
    """isinstance, but True and False are not integers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _parts(message: Message) -> list[Any]:
    """The contents of a message that `_message` made."""
    assert isinstance(message.content, list)
    return message.content


def _message(message: Any, where: str, texts: TextOptions) -> Message:
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
    if recipient:
        check_text(recipient, where, texts.max_chars)
    return Message(role=role, content=[_content(part, where, texts) for part in parts], recipient=recipient)


def _content(part: Any, where: str, texts: TextOptions) -> TextContent | AudioContent:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return TextContent(text=usable_text(part.get("text"), where, texts))
    if kind != "audio":
        raise Reject("malformed_chatml", f"{where}: expected content of type text or audio, got {part!r:.60}")
    url, inline = part.get("audio_url"), part.get("raw_audio")
    if not isinstance(url, str | None) or not isinstance(inline, str | None) or not (url or inline):
        raise Reject("malformed_chatml", f"{where}: audio without audio_url or raw_audio")
    if url and not inline:
        check_local(url, where)
    cut = {name: part.get(name) for name in ("offset", "duration")}
    for name, value in cut.items():
        least = 0 if name == "offset" else 1e-9
        if value is not None and not (_is(value, int | float) and least <= value < math.inf):
            raise Reject("malformed_chatml", f"{where}: {name}: expected seconds, got {value!r:.60}")
    return AudioContent(audio_url=url or "", raw_audio=inline, offset=cut["offset"], duration=cut["duration"])


def check_local(name: str, where: str) -> None:
    """Refuse audio that is not a local file.

    Raises:
        Reject: its name is a URL.
    """
    if _URL.match(plain_path(name)):
        raise Reject("remote_audio", f"{where}: audio is not fetched from a network: {name:.200}", name)


def usable_text(text: Any, where: str, texts: TextOptions) -> str:
    """The text after its normalization, if it can be used.

    Raises:
        Reject: see `check_text`; or it has too many tokens.
    """
    if isinstance(text, str) and len(text) <= texts.max_chars:
        text = normalize_text(text, texts.normalization)
    check_text(text, where, texts.max_chars)
    if texts.tokens:
        texts.tokens.check(text, where)
    return text


def check_text(text: Any, where: str, max_chars: int) -> None:
    """Refuse a text that cannot be used.

    Args:
        where: the text's place in the sample, for the message.

    Raises:
        Reject: it is not a string, has no visible character, is too long, or holds a control character or a template
            token.
    """
    if not isinstance(text, str):
        raise Reject("malformed_chatml", f"{where}: text: expected a string, got {text!r:.40}")
    if all(character.isspace() or unicodedata.category(character) == "Cf" for character in text):
        raise Reject("empty_text", f"{where}: text is empty")
    if len(text) > max_chars:
        raise Reject("text_too_long", f"{where}: expected at most {max_chars} characters, got {len(text)}")
    control = _CONTROL.search(text)
    if control:
        raise Reject("control_character", f"{where}: control character {control[0]!r} at character {control.start()}")
    token = next((token for token in TEMPLATE_TOKENS if token in text), None)
    if token:
        raise Reject("template_token_in_text", f"{where}: text holds {token}")


def _clip(content: AudioContent, paths: AudioPaths) -> Clip:
    source, inline = content.audio_url, content.raw_audio or ""
    if inline:
        return Clip(
            f"inline:{hashlib.sha256(inline.encode()).hexdigest()}", "", inline, content.offset, content.duration
        )
    return Clip(source, paths.locate(source), "", content.offset, content.duration)


def audio_targets(sample: ChatSample) -> int:
    """How many audios are trained on: those of assistant messages from `start_index` on."""
    messages = sample.chat.messages[sample.chat.start_index or 0 :]
    spoken = [part for message in messages if message.role == "assistant" for part in _parts(message)]
    return sum(isinstance(part, AudioContent) for part in spoken)


def tokenize(sample: ChatSample, tokenizer: PreTrainedTokenizerBase, ids: SpecialIds) -> np.ndarray:
    """Text tokens and labels by boson's `prepare_chatml_sample`: int32 [2, L].

    Raises:
        Reject: boson refuses the sample, no position has a label, or a text forms an audio placeholder.
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


def storable(entry: dict[str, Any], sample: ChatSample) -> dict[str, Any]:
    """The entry without its `raw_audio` bytes; an empty `audio_url` gets their name."""
    clips = iter(sample.clips)

    def part(given: Any) -> Any:
        if not isinstance(given, dict) or given.get("type") != "audio":
            return given
        clip = next(clips)
        return {**given, "raw_audio": None, "audio_url": given.get("audio_url") or clip.source}

    messages = []
    for message in entry["messages"]:
        content = message["content"]
        content = [part(given) for given in content] if isinstance(content, list) else part(content)
        messages.append({**message, "content": content})
    return plain({**entry, "messages": messages})


def _without_audio_data(content: Any) -> Any:
    return replace(content, raw_audio=None) if isinstance(content, AudioContent) else content


def stored_messages(sample: ChatSample) -> list[dict[str, Any]]:
    """The messages for KEY.json: as given, without inline audio."""
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

"""The prompt layout of a conversation: where the reference voice stands, and what the assistant says.

    chat    the user's turn holds the reference audio; the assistant says the text, then the audio
    serve   earlier assistant turns hold the reference audio; the assistant says the audio alone, after a user's turn
            with its text. Boson's serving engine and transformers' native class send this one
    other   every other conversation

In: the messages of a sample, as data or KEY.json hold them. Out: the name of their layout. Without a reference, the
last turn alone decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

Layout = Literal["chat", "serve", "other"]
TWIN = "-serve"  # after the key of the second sample of a row that stands in both layouts
LAYOUTS: tuple[str, ...] = get_args(Layout)


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message's content; a text is a part of type text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts if part]


def kinds_of(message: dict[str, Any]) -> tuple[str, ...]:
    """The types of a message's parts, in order."""
    return tuple(part.get("type", "") for part in parts_of(message))


def layout_of(messages: Sequence[dict[str, Any]]) -> Layout:
    """The layout of a sample."""
    if not messages or messages[-1].get("role") != "assistant":
        return "other"
    *before, last = messages
    reference_roles = {message.get("role") for message in before if "audio" in kinds_of(message)}
    answer = kinds_of(last)
    if len(answer) > 1 and answer[-1] == "audio" and set(answer[:-1]) == {"text"}:
        return "chat" if reference_roles <= {"user", "system"} else "other"
    spoken = bool(before) and before[-1].get("role") == "user" and set(kinds_of(before[-1])) == {"text"}
    return "serve" if answer == ("audio",) and spoken and reference_roles <= {"assistant"} else "other"

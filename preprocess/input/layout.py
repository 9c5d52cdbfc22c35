"""Builds and reads conversations of either prompt layout, for training and for speaking.

In: a text, its references (audio and what it says), and the recording of the text. Out: ChatML messages in the layout
`chat` or `serve` (`shards/layout.py` says what they are); and back, where a conversation has one of these layouts.
Guarantees (test_prompt_layouts.py): `read_conversation` is the inverse of `build_conversation`; a `serve` conversation
has the tokens that boson's serving engine sends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from higgs_tune.shards.layout import layout_of, parts_of

SYSTEM = "Generate audio following instruction."
INSTRUCTION = "Read this text in the same voice: "
PLAIN_INSTRUCTION = "Read this text: "
PromptLayout = Literal["chat", "serve"]
Part = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """A recording of the voice. audio: an audio part. text: what it says; None where that is not known."""

    audio: Part
    text: str | None = None


@dataclass(frozen=True)
class Wording:
    """The fixed texts of a conversation.

    system: the system turn; empty for none. instruction, plain_instruction: in `chat`, what stands before the text
    with and without a reference.
    """

    system: str = SYSTEM
    instruction: str = INSTRUCTION
    plain_instruction: str = PLAIN_INSTRUCTION


@dataclass(frozen=True)
class Conversation:
    """A text to speak. audio: the audio part of its recording. instruction: what stands before the text in `chat`."""

    layout: PromptLayout
    text: str
    audio: Part
    references: tuple[Reference, ...]
    system: str
    instruction: str


def build_conversation(
    layout: PromptLayout, text: str, audio: Part, references: Sequence[Reference] = (), wording: Wording | None = None
) -> dict[str, Any]:
    """`messages`, and `start_index` where earlier assistant turns are not to be trained on.

    Args:
        audio: the audio part of the text's recording; to speak, any part: the prompt ends before it.
    """
    wording = wording or Wording()
    messages: list[dict[str, Any]] = [{"role": "system", "content": wording.system}] if wording.system else []
    if layout == "chat":
        user = [part for reference in references for part in _spoken(reference)]
        instruction = wording.instruction if references else wording.plain_instruction
        messages.append({"role": "user", "content": [*user, _text(instruction + text)]})
        return {"messages": [*messages, {"role": "assistant", "content": [_text(text), audio]}]}
    for reference in references:
        messages += [{"role": "user", "content": [_text(reference.text)]}] if reference.text else []
        messages.append({"role": "assistant", "content": [reference.audio]})
    messages += [{"role": "user", "content": [_text(text)]}, {"role": "assistant", "content": [audio]}]
    return {"messages": messages, "start_index": len(messages) - 1}


def read_conversation(messages: Sequence[dict[str, Any]]) -> Conversation | None:
    """The text and references of a conversation; None where `build_conversation` would not make it from them."""
    layout = layout_of(messages)
    if layout == "other":
        return None
    system = messages[0] if messages[0]["role"] == "system" else None
    *turns, answer = messages[1:] if system else messages
    said = _texts(parts_of(system)) if system else ""
    *before, asked = [part for message in turns for part in parts_of(message)] or [_text("")]
    text, whole = _texts(parts_of(answer)[:-1]) if layout == "chat" else asked.get("text", ""), asked.get("text", "")
    instruction = whole.removesuffix(text) if layout == "chat" else ""
    conversation = Conversation(layout, text, parts_of(answer)[-1], tuple(_references(before)), said, instruction)
    wording = Wording(said, instruction, instruction)
    made = build_conversation(layout, text, conversation.audio, conversation.references, wording)
    same = list(map(_comparable, made["messages"])) == list(map(_comparable, messages))
    return conversation if same else None


def _comparable(message: dict[str, Any]) -> tuple[Any, ...]:
    return message["role"], message.get("recipient"), parts_of(message)


def _texts(parts: Sequence[Part]) -> str:
    return "".join(part.get("text", "") for part in parts)


def _text(text: str | None) -> Part:
    return {"type": "text", "text": text}


def _spoken(reference: Reference) -> list[Part]:
    return [*([_text(reference.text)] if reference.text else []), reference.audio]


def _references(parts: Sequence[Part]) -> Iterator[Reference]:
    """Each audio part, with the text right before it."""
    for place, part in enumerate(parts):
        if part["type"] == "audio":
            before = parts[place - 1] if place else part
            yield Reference(part, before["text"] if before["type"] == "text" else None)

"""Puts conversations into a prompt layout where `--prompt_layout` asks for one; without it they keep their form.

In: raw entries, in the form of any tool. Out: for each the same text, recording, references and system turn in that
layout, or for `both` one after the other. A conversation that has it already stays as it is. One that has neither
layout is a `Reject`; a malformed one stays as it is, and the checks of every entry name its fault.
Guarantees (test_prompt_layouts.py): a conversation that is put into the other layout holds what a row of a manifest
with the same contents would hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

from higgs_tune.preprocess.input.chatml import SAFE_CHARS, TWIN_KEY, key_of, parse_entry
from higgs_tune.preprocess.input.conversations import as_chatml
from higgs_tune.preprocess.input.layout import PromptLayout, Wording, build_conversation, read_conversation
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.layout import layout_of

HASHED = 17  # last characters of a long key that are its hash


def in_layout(entries: Iterable[Any], layout: Literal["chat", "serve", "both"]) -> Iterator[Any]:
    """One entry for each, of `both` two; or a Reject."""
    for number, entry in enumerate(entries):
        try:
            parse_entry(chatml := as_chatml(entry), number)
        except Reject:
            yield entry  # it will be refused under its own reason
            continue
        try:
            chosen: tuple[PromptLayout, ...] = ("chat", "serve") if layout == "both" else (layout,)
            made = [_converted(chatml, one) for one in chosen]
        except Reject as reject:
            yield reject.of(key_of(chatml, number))
            continue
        yield from twins(made[0], made[1], key_of(chatml, number)) if layout == "both" else made


def twins(chat: dict[str, Any], serve: dict[str, Any], key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both entries of one row; the second's key is the first's with `-serve` after it."""
    short = key if len(key) <= SAFE_CHARS else key[: SAFE_CHARS - HASHED] + key[-HASHED:]
    return chat | {"id": short}, serve | {"id": short, TWIN_KEY: True}


def _converted(entry: dict[str, Any], layout: PromptLayout) -> dict[str, Any]:
    """The entry in a layout.

    Raises:
        Reject: it has neither layout, or its last turn is not trained on.
    """
    messages = entry["messages"]
    if layout_of(messages) == layout:
        return entry
    conversation = read_conversation(messages)
    if conversation is None:
        raise Reject("other_layout", f"the conversation has neither prompt layout, so it cannot be put into {layout}")
    if (entry.get("start_index") or 0) >= len(messages):
        raise Reject("nothing_to_train", "no assistant content at or after start_index")
    wording = replace(Wording(), system=conversation.system)
    made = build_conversation(layout, conversation.text, conversation.audio, conversation.references, wording)
    return {name: value for name, value in entry.items() if name != "start_index"} | made

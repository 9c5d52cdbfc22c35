"""Prompt layouts against boson's serving engine; the training record that names them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from conftest import EXAMPLES, preprocess
from helpers.samples import random_sample
from helpers.tiny import ids_of, run_train, write_checkpoint, write_set
from higgs_tune.preprocess.checkpoints.training_record import RECORD, TrainingRecord, read_record
from higgs_tune.preprocess.input.chatml import parse_entry, tokenize
from higgs_tune.preprocess.input.layout import (
    INSTRUCTION,
    SYSTEM,
    Reference,
    Wording,
    build_conversation,
    read_conversation,
)
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.layout import layout_of
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.train.record import make_record
from transformers import PreTrainedTokenizerBase

TARGET = {"type": "audio", "audio_url": "target.wav"}
ONE = Reference({"type": "audio", "audio_url": "one.wav"}, "النص الأول.")
TWO = Reference({"type": "audio", "audio_url": "two.wav"}, "The second.")
UNTOLD = Reference({"type": "audio", "audio_url": "three.wav"})


def engine_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """What `HiggsAudioServeEngine._prepare_inputs` makes of messages, with force_audio_gen."""
    tokens, _, _, _ = prepare_chatml_sample(ChatMLSample(messages=messages), tokenizer)
    assert tokens is not None
    postfix = "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>"
    return [*tokens, *tokenizer.encode(postfix, add_special_tokens=False)]


@pytest.mark.fast
@pytest.mark.parametrize("references", [(), (ONE,), (ONE, TWO), (UNTOLD,)])
def test_serve_has_the_tokens_of_bosons_engine(
    toy_tokenizer: PreTrainedTokenizerBase, toy_ids: SpecialIds, references: tuple[Reference, ...]
) -> None:
    made = build_conversation("serve", "Read me. اقرأني", TARGET, references)
    tokens_2L = tokenize(parse_entry(made, 0), toy_tokenizer, toy_ids)
    messages = [Message(role="system", content=SYSTEM)]
    for reference in references:
        messages += [Message(role="user", content=reference.text)] if reference.text else []
        messages.append(Message(role="assistant", content=AudioContent(audio_url=reference.audio["audio_url"])))
    messages.append(Message(role="user", content="Read me. اقرأني"))
    prompt = engine_prompt(toy_tokenizer, messages)
    assert tokens_2L[0, : len(prompt)].tolist() == prompt
    assert tokens_2L[0, len(prompt)] == toy_ids.audio_out
    assert (tokens_2L[1, : len(prompt) - 1] == -100).all()  # a reference is not trained on


@pytest.mark.fast
@pytest.mark.parametrize("layout", ["chat", "serve"])
@pytest.mark.parametrize("references", [(), (ONE,), (ONE, TWO), (UNTOLD,)])
def test_a_conversation_reads_back(layout: Any, references: tuple[Reference, ...]) -> None:
    wording = Wording("Speak.", "Say as they do: ", "Say: ")
    messages = build_conversation(layout, "Hello.", TARGET, references, wording)["messages"]
    assert layout_of(messages) == layout
    back = read_conversation(messages)
    assert back is not None
    assert (back.layout, back.text, back.audio, back.references) == (layout, "Hello.", TARGET, references)
    assert back.system == "Speak."
    expected = wording.instruction if references else wording.plain_instruction
    assert back.instruction == (expected if layout == "chat" else "")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("messages", "layout"),
    [
        ([], "other"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "other"),
        ([{"role": "assistant", "content": [TARGET]}], "other"),
        ([{"role": "user", "content": [TARGET, "Hi"]}, {"role": "assistant", "content": [TARGET]}], "other"),
        (
            [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": [TARGET]},
                {"role": "user", "content": "More"},
                {"role": "assistant", "content": ["More", TARGET]},
            ],
            "other",
        ),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": TARGET}], "serve"),
        ([{"role": "user", "content": [TARGET]}, {"role": "assistant", "content": ["Hi", TARGET]}], "chat"),
    ],
)
def test_layout_of_other_conversations(messages: list[dict[str, Any]], layout: str) -> None:
    assert layout_of(messages) == layout


def test_irregular_conversations_are_not_read() -> None:
    """Those that would not be built the same: another order of parts, a turn more, a text that is not asked for."""
    good = build_conversation("chat", "Hello.", TARGET, [ONE])["messages"]
    user, answer = good[1]["content"], good[2]
    for content in (["Hi", *user], [*user, "and quickly"], [user[1], user[0]]):
        assert read_conversation([good[0], {"role": "user", "content": content}, answer]) is None
    more = [{"role": "user", "content": "Wait."}, {"role": "assistant", "content": "Yes?"}]
    assert read_conversation([good[0], *more, *good[1:]]) is None
    assert read_conversation(good) is not None


def test_a_set_counts_its_layouts(shards: ShardSet) -> None:
    assert shards.manifest["layouts"] == {"chat": len(shards), "serve": 0, "other": 0}


def test_record_of_the_example(shards: ShardSet, toy: Path) -> None:
    record = make_record([shards], "stage1", toy / "model", None)
    assert record.layouts == {"chat": len(shards), "serve": 0, "other": 0}
    assert record.layouts_from == "all samples"
    assert (record.prompt_layout, record.text_normalization) == ("chat", "none")
    assert (record.system, record.instruction, record.plain_instruction) == (SYSTEM, INSTRUCTION, None)
    assert record.wording == Wording()
    assert (record.speakers, record.speaker_names) == (4, ("amal", "huda", "karim", "zayd"))
    assert record.base_name == "model"
    assert str(toy) not in record.to_bytes().decode()


def test_record_follows_the_set(toy: Path, tmp_path: Path) -> None:
    """A set in the serve layout, normalized, with languages; and one whose manifest counts no layouts."""
    entries = json.loads(EXAMPLES.read_text())[:3]
    for entry in entries:
        read = read_conversation(entry["messages"])
        assert read is not None
        reference = replace(read.references[0], audio={"type": "audio", "audio_url": "clips/zayd-09.flac"})
        entry.update(build_conversation("serve", read.text, read.audio, [reference], Wording("Talk.")))
        entry["misc"] = {"language": "ar"}
    data = tmp_path / "serve.json"
    data.write_text(json.dumps(entries))
    (tmp_path / "clips").symlink_to(EXAMPLES.parent / "clips")
    preprocess(toy, data, tmp_path / "set", text_normalization="arabic", val_fraction=0.0)
    shards = ShardSet(tmp_path / "set")
    record = make_record([shards], "single", toy / "model", None)
    assert record.prompt_layout == "serve"
    assert (record.text_normalization, record.languages, record.system) == ("arabic", {"ar": 3}, "Talk.")
    assert (shards.read(0).tokens_2L[0] == shards.special_ids.audio_out).sum() == 2
    del shards.manifest["layouts"]
    again = make_record([shards], "single", toy / "model", None)
    assert again == replace(record, layouts_from="3 samples looked at")


def test_the_trainer_writes_the_record_everywhere(toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_checkpoint(model, toy_tokenizer)
    rng, ids = np.random.default_rng(0), ids_of(model)
    data = write_set(tmp_path / "set", [random_sample(f"s{i}", rng, toy_tokenizer, ids) for i in range(4)], model)
    run_train("stage1", model, data, tmp_path / "one", save_steps=1)
    run_train("stage2", tmp_path / "one", data, tmp_path / "two", save_steps=1)
    record = read_record(tmp_path / "two")
    assert record is not None
    assert record.stages == ("stage1", "stage2")
    assert record == read_record(tmp_path / "two" / "checkpoint-1")
    assert (tmp_path / "two" / "checkpoint-1" / RECORD).is_file()
    (tmp_path / "two" / "checkpoint-1" / RECORD).unlink()
    assert record == read_record(tmp_path / "two" / "checkpoint-1")  # of a run's folder around it
    assert read_record(model) is None


@pytest.mark.fast
@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"version":2}', b'{"version":1,"layouts":{"chat":"x"}}'])
def test_damaged_records_are_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / RECORD).write_bytes(damage)
    with pytest.raises(UserError, match=RECORD):
        read_record(tmp_path)
    (tmp_path / RECORD).write_bytes(TrainingRecord(layouts={"chat": 2, "serve": 2}, stages=("single",)).to_bytes())
    record = read_record(tmp_path)
    assert record is not None
    assert (record.prompt_layout, record.stages) == ("serve", ("single",))

"""Prompt layouts against boson's serving engine; the training record that names them."""

from __future__ import annotations

import importlib
import json
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from conftest import EXAMPLES, preprocess
from helpers.samples import random_sample
from helpers.tiny import ids_of, run_train, write_checkpoint, write_set
from higgs_tune.inspect.stats import notes, scan_samples, statistics
from higgs_tune.inspect.web.pages import set_info
from higgs_tune.preprocess.check import check_data
from higgs_tune.preprocess.checkpoints.training_record import RECORD, TrainingRecord, read_record
from higgs_tune.preprocess.config import PreprocessConfig
from higgs_tune.preprocess.input.chatml import key_of, parse_entry, tokenize
from higgs_tune.preprocess.input.layout import (
    INSTRUCTION,
    SYSTEM,
    Reference,
    Wording,
    build_conversation,
    read_conversation,
)
from higgs_tune.preprocess.input.relayout import in_layout
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.layout import layout_of
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.train.record import make_record
from higgs_tune.train.set_checks import layout_warning
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


def test_serve_is_what_bosons_engine_prepares(
    toy_tokenizer: PreTrainedTokenizerBase, toy_ids: SpecialIds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`HiggsAudioServeEngine._prepare_inputs` itself; its codec, model and collator are stood in for."""
    standin = types.ModuleType("boson_multimodal.audio_processing.higgs_audio_tokenizer")
    vars(standin)["load_higgs_audio_tokenizer"] = None  # it imports packages that we do not install
    monkeypatch.setitem(sys.modules, standin.__name__, standin)
    engine = importlib.import_module("boson_multimodal.serve.serve_engine")
    codes_KT = torch.arange(24).view(8, 3)
    seen: list[Any] = []

    @dataclass
    class Collated:
        input_ids: torch.Tensor

    def collate(samples: list[Any]) -> Collated:
        seen.extend(samples)
        return Collated(samples[0].input_ids)

    one = types.SimpleNamespace(
        tokenizer=toy_tokenizer,
        device="cpu",
        model=types.SimpleNamespace(device="cpu"),
        collator=collate,
        audio_tokenizer=types.SimpleNamespace(sampling_rate=24_000, encode=lambda wave, rate: codes_KT[None]),
    )
    clip = EXAMPLES.parent / "clips" / "zayd-09.flac"
    reference = Reference({"type": "audio", "audio_url": str(clip)}, "النص الأول.")
    made = build_conversation("serve", "اقرأني", TARGET, [reference])
    said = [Message(role=m["role"], content=_boson(m["content"])) for m in made["messages"][:-1]]
    prepared = engine.HiggsAudioServeEngine._prepare_inputs(one, ChatMLSample(messages=said), force_audio_gen=True)
    prompt = prepared["input_ids"].tolist()
    tokens_2L = tokenize(parse_entry(made, 0), toy_tokenizer, toy_ids)
    assert tokens_2L[0, : len(prompt)].tolist() == prompt
    assert tokens_2L[0, len(prompt)] == toy_ids.audio_out
    assert torch.equal(seen[0].audio_ids_concat, codes_KT), "the reference is read, as one segment"


def _boson(content: Any) -> Any:
    parts = [content] if isinstance(content, str) else content
    made = [AudioContent(audio_url=part["audio_url"]) if "audio_url" in part else part["text"] for part in parts
            if not isinstance(part, str)]  # fmt: skip
    return content if isinstance(content, str) else made[0]


def manifest(folder: Path, count: int) -> Path:
    """Rows over example clips, two speakers."""
    rows = json.loads(EXAMPLES.read_text())[:count]
    lines = []
    for number, row in enumerate(rows):
        target = row["messages"][-1]["content"][-1]["audio_url"]
        fields = {"audio": str(EXAMPLES.parent / target), "text": row["messages"][-1]["content"][0]["text"]}
        lines.append(
            fields | {"speaker": "a" if number % 2 else "b", "id": f"row-{number}-{'x' * (60 * (number == 0))}"}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def test_both_layouts_of_a_manifest_share_codes_and_side(toy: Path, tmp_path: Path, capsys: Any) -> None:
    data = manifest(tmp_path, 6)
    preprocess(toy, data, tmp_path / "both", prompt_layout="both", val_fraction=0.4)
    shards = ShardSet(tmp_path / "both")
    assert shards.manifest["layouts"] == {"chat": 6, "serve": 6, "other": 0}
    samples = {sample.key: (row, sample) for row in range(len(shards)) for sample in [shards.read(row)]}
    twins = [key for key in samples if key.endswith("-serve")]
    assert len(twins) == 6
    for twin in twins:
        (row, serve), (other, chat) = samples[twin], samples[twin.removesuffix("-serve")]
        assert (layout_of(serve.meta["messages"]), layout_of(chat.meta["messages"])) == ("serve", "chat")
        assert np.array_equal(serve.codes_KT, chat.codes_KT)
        assert shards.index["split"][row] == shards.index["split"][other]
        assert (serve.tokens_2L[1] >= 0).sum() < (chat.tokens_2L[1] >= 0).sum(), "serve says audio alone"
    assert 0 < len(shards.rows_of(validation=True)) < len(shards)
    for layout in ("chat", "serve"):
        preprocess(toy, data, tmp_path / layout, prompt_layout=layout, val_fraction=0.4)
        alone = ShardSet(tmp_path / layout)
        assert alone.manifest["layouts"][layout] == 6
        for row in range(len(alone)):
            sample = alone.read(row)
            same = [s for _, s in samples.values() if s.meta["messages"] == sample.meta["messages"]]
            assert [np.array_equal(s.codes_KT, sample.codes_KT) for s in same] == [True]
            assert np.array_equal(same[0].tokens_2L, sample.tokens_2L)


def test_layouts_are_counted_before_and_after_a_build(toy: Path, tmp_path: Path) -> None:
    config = PreprocessConfig(data=manifest(tmp_path, 4), model_path=toy / "model", prompt_layout="both", check=True)
    assert check_data(config)["prompt_layouts"] == {"chat": 4, "serve": 4, "other": 0}
    examples, count = replace(config, data=EXAMPLES, prompt_layout=None), len(json.loads(EXAMPLES.read_text()))
    assert check_data(examples)["prompt_layouts"]["chat"] == count
    assert check_data(replace(examples, prompt_layout="serve"))["prompt_layouts"]["serve"] == count


def test_conversations_become_what_a_manifest_would(toy: Path, tmp_path: Path) -> None:
    """The example's conversations in the other layout: the samples of a manifest with the same texts and clips."""
    entries, rows = json.loads(EXAMPLES.read_text())[:4], []
    for entry, name in zip(entries, "abcd", strict=True):
        entry["id"] = name
        read = read_conversation(entry["messages"])
        assert read is not None
        row = {"audio": read.audio["audio_url"], "text": read.text, "ref_audio": read.references[0].audio["audio_url"]}
        rows.append(row | {"ref_text": read.references[0].text, "speaker": entry["speaker"], "id": name})
    (tmp_path / "clips").symlink_to(EXAMPLES.parent / "clips")
    for name, data in (("talks", entries), ("rows", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in data))
        preprocess(toy, tmp_path / f"{name}.jsonl", tmp_path / name, prompt_layout="both", val_fraction=0.5)
    talks, manifest_rows = ShardSet(tmp_path / "talks"), ShardSet(tmp_path / "rows")
    assert talks.manifest["layouts"] == {"chat": 4, "serve": 4, "other": 0}
    for row in range(8):
        one, two = talks.read(row), manifest_rows.read(row)
        assert (one.key, one.meta["messages"]) == (two.key, two.meta["messages"])
        assert np.array_equal(one.tokens_2L, two.tokens_2L)
        assert np.array_equal(one.codes_KT, two.codes_KT)
    assert np.array_equal(talks.index["split"], manifest_rows.index["split"])


@pytest.mark.fast
def test_conversations_are_converted_there_and_back() -> None:
    entries = [{"id": "a", "start_index": None, **build_conversation("chat", "Hello.", TARGET, r)}
               for r in ((), (ONE,), (ONE, TWO), (UNTOLD,))]  # fmt: skip
    served = list(in_layout(entries, "serve"))
    assert [layout_of(entry["messages"]) for entry in served] == ["serve"] * 4
    assert [entry["start_index"] for entry in served] == [len(entry["messages"]) - 1 for entry in served]
    assert list(in_layout(served, "serve")) == served
    assert [back["messages"] for back in in_layout(served, "chat")] == [entry["messages"] for entry in entries]
    said = [
        {"from": "human", "value": "<audio>one.wav</audio>Say: Hi"},
        {"from": "gpt", "value": "Hi<audio>t.wav</audio>"},
    ]
    (other_tools,) = in_layout([{"conversations": said}], "serve")
    assert layout_of(other_tools["messages"]) == "serve"
    assert [message["role"] for message in other_tools["messages"]] == ["assistant", "user", "assistant"]


@pytest.mark.fast
def test_what_has_neither_layout_is_rejected_under_its_name() -> None:
    chat = build_conversation("chat", "Hello.", TARGET, [ONE])["messages"]
    backwards = [chat[0], {"role": "user", "content": chat[1]["content"][::-1]}, chat[2]]
    twice = [*chat, {"role": "user", "content": "More."}, {"role": "assistant", "content": [TARGET]}]
    for messages, reason in ((backwards, "other_layout"), (twice, "other_layout"), ([{"role": "user"}], None)):
        (made,) = in_layout([{"id": "mine", "messages": messages}], "both")
        assert key_of(made, 7) == "mine"
        assert (made.reason if isinstance(made, Reject) else None) == reason
    (unheard,) = in_layout([{"messages": chat, "start_index": 9}], "serve")
    assert isinstance(unheard, Reject) and unheard.reason == "nothing_to_train"


def test_stats_and_page_count_them(shards: ShardSet) -> None:
    found = statistics(shards, scan_samples(shards, 4), 8192)
    assert found["prompt_layouts"] == {"chat": len(shards), "serve": 0, "other": 0} == set_info(shards)["layouts"]
    assert any("no sample has the prompt layout serve" in note for note in notes(shards))


@pytest.mark.parametrize(("stage", "warns"), [("stage1", False), ("stage2", True), ("single", True)])
def test_the_trainer_warns_where_no_sample_is_as_engines_send_it(stage: str, warns: bool) -> None:
    assert bool(layout_warning({"chat": 4, "serve": 0, "other": 0}, stage)) is warns
    assert not layout_warning({"chat": 4, "serve": 1, "other": 0}, stage)


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

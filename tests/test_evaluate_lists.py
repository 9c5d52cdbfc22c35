"""Evaluation lists of every form, bad lines by name, and leaks into training sets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import soundfile
from conftest import EXAMPLES
from higgs_tune.evaluate.held_out import audio_hashes, find_leaks, read_split
from higgs_tune.evaluate.lists import Line, find_faults, read_list
from higgs_tune.preprocess.judges.normalisers import normaliser
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.writer import file_sha256

OMNIVOICE = normaliser("omnivoice")


def write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def wav(path: Path, seconds: float = 0.1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(np.arange(int(seconds * 16_000)) / 9) / 2, 16_000)
    return path


@pytest.mark.fast
def test_our_jsonl_and_omnivoices(tmp_path: Path) -> None:
    ours = {
        "id": "a/1",
        "text": "نعم",
        "ref_audio": "r.wav",
        "ref_text": "لا",
        "language": "ar",
        "target_audio": "/t.wav",
    }
    theirs = {
        "id": 7,
        "text": "yes",
        "ref_audio": "r.wav",
        "ref_text": "no",
        "language_id": "en",
        "language_name": "English",
    }
    lines = read_list(write(tmp_path / "list.jsonl", ours, "", theirs))
    reference = str(tmp_path / "r.wav")
    assert lines == [
        Line("a/1", "نعم", reference, "لا", "ar", "/t.wav"),
        Line("7", "yes", reference, "no", "en"),
    ]


@pytest.mark.fast
def test_seedtts(tmp_path: Path) -> None:
    path = write(tmp_path / "en" / "meta.lst", "u1|Hi.|prompts/p.wav|Good day.", "u2.wav|Hi.|p.wav|Bye.|wavs/u2.wav")
    one, two = read_list(path)
    assert one == Line("u1", "Good day.", str(tmp_path / "en/prompts/p.wav"), "Hi.", "en")
    assert (two.id, two.target_audio) == ("u2", str(tmp_path / "en/wavs/u2.wav"))
    lines = read_list(write(tmp_path / "bad.lst", "u1|Hi.", "u2|Hi.|p.wav|Yes.", "a|b|c|d|e|f"))
    assert [(line.id, line.fault[:13]) for line in lines] == [
        ("bad.lst line 1", "expected utt|"), ("u2", ""), ("bad.lst line 3", "expected utt|"),
    ]  # fmt: skip


@pytest.mark.fast
def test_minimax(tmp_path: Path) -> None:
    write(tmp_path / "text" / "arabic.txt", "arabic_female|نعم", "arabic_male|لا | حقا")
    write(tmp_path / "text" / "thai.txt", "thai_male|ใช่")
    for prompt in ("arabic/arabic_female/f.mp3", "arabic/arabic_male/m.mp3", "thai/thai_male/t.mp3"):
        wav(tmp_path / "speaker" / prompt).rename(tmp_path / "speaker" / prompt)
    write(tmp_path / "speaker" / "prompt_text.txt", "f.mp3|مرحبا", "m.mp3|أهلا")
    one, two, three = read_list(tmp_path)
    reference = str(tmp_path / "speaker/arabic/arabic_female/f.mp3")
    assert one == Line("arabic-001", "نعم", reference, "مرحبا", "ar", speaker="arabic_female")
    assert (two.id, two.text, two.ref_text) == ("arabic-002", "لا | حقا", "أهلا")
    assert (three.id, three.language) == ("thai-001", "th")
    assert read_list(tmp_path / "text" / "arabic.txt") == [one, two]
    write(tmp_path / "text" / "arabic.txt", "arabic_child|نعم", "لا")
    one, two = read_list(tmp_path / "text" / "arabic.txt")
    assert "no speaker/arabic/arabic_child/" in one.fault and "expected label" in two.fault


def habibi(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    audio = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    names = ("text", "speaker_id", "dialect")
    schema = pyarrow.schema([("audio", audio), *((name, pyarrow.string()) for name in names)])
    with pyarrow.ipc.new_stream(str(folder / "data.arrow"), schema) as stream:
        stream.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


@pytest.mark.fast
def test_habibi(tmp_path: Path) -> None:
    """The prompt is the same speaker's clip before; the speaker's last for the first."""
    rows = [
        {"audio": {"bytes": b"x", "path": f"{i}.wav"}, "text": f"text {i}", "speaker_id": speaker, "dialect": "EGY"}
        for i, speaker in enumerate("abab" + "a")
    ]
    lines = read_list(habibi(tmp_path / "set", rows))
    assert [line.id for line in lines] == [f"EGY-{i:05d}" for i in range(5)]
    assert [line.ref_text for line in lines] == ["text 4", "text 3", "text 0", "text 1", "text 2"]
    assert lines[2].ref_audio == lines[0].target_audio == str(tmp_path / "set" / "data.arrow#audio:0")
    assert {(line.language, line.dialect) for line in lines} == {("ar", "EGY")}
    hashes = audio_hashes(lines)
    assert hashes[lines[0].id] == {
        name: {hashlib.sha256(b"x").hexdigest()} for name in ("reference_audio", "target_audio")
    }
    bad = read_list(habibi(tmp_path / "bad", [rows[0], rows[1], rows[0] | {"text": None}, rows[0]]))
    assert [line.fault[:32] for line in bad] == [
        "",
        "speaker b has no other clip",
        "expected audio, text and speaker",
        "",
    ]


@pytest.mark.fast
def test_bad_lines_are_all_named(tmp_path: Path) -> None:
    """Each keeps its place and costs no other; lines with one id cannot be told from each other."""
    good = {"id": "a", "text": "yes"}
    path = write(
        tmp_path / "list.jsonl", good, {"id": "x/y", "text": "fine"}, good, {"id": "b", "text": " "},
        {"id": "../c", "text": "c"}, "{", {"text": "d"}, [], {"id": "e", "text": 5}, {"id": "f", "text": "?!"},
    )  # fmt: skip
    faults = [(line.id, line.fault) for line in find_faults(read_list(path), OMNIVOICE)]
    assert faults == [
        ("a", "duplicate id a, also in list.jsonl line 3"),
        ("x/y", ""),
        ("a", "duplicate id a, also in list.jsonl line 1"),
        ("b", "empty text (id b)"),
        ("../c", "id '../c' is no file name"),
        ("list.jsonl line 6", "not JSON: {"),
        ("list.jsonl line 7", "id is missing"),
        ("list.jsonl line 8", "expected an object, got []"),
        ("list.jsonl line 9", "text: expected a string, got 5"),
        ("f", "normaliser omnivoice leaves nothing of the text (id f)"),
    ]
    with pytest.raises(UserError, match=r"none of 2 lines can be used: list.jsonl line 1: duplicate id a, also"):
        find_faults(read_list(write(tmp_path / "list.jsonl", good, good)), OMNIVOICE)
    with pytest.raises(UserError, match="no such list"):
        read_list(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no lines"):
        read_list(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "a", "text": "caf\xe9"}\n{"id": "b", "text": "plain"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        read_list(tmp_path / "latin.jsonl")


@pytest.mark.fast
def test_every_form_with_marks_and_line_ends_of_other_systems(tmp_path: Path) -> None:
    """A byte-order mark, CRLF, tabs and spaces around lines, Arabic file names."""
    jsonl = json.dumps({"id": "سطر", "text": "نعم", "ref_audio": "صوت.wav"}, ensure_ascii=False)
    (tmp_path / "list.jsonl").write_bytes(f"\ufeff \t{jsonl}\t \r\n\r\n".encode())
    (line,) = read_list(tmp_path / "list.jsonl")
    assert (line.id, line.ref_audio) == ("سطر", str(tmp_path / "صوت.wav"))
    (tmp_path / "meta.lst").write_bytes("\ufeffسطر|لا|\tصوت.wav |نعم \r\n \r\n".encode())
    assert read_list(tmp_path / "meta.lst") == [Line("سطر", "نعم", str(tmp_path / "صوت.wav"), "لا")]
    wav(tmp_path / "speaker" / "arabic" / "a" / "صوت.mp3")
    (tmp_path / "text").mkdir()
    (tmp_path / "speaker" / "prompt_text.txt").write_bytes("\ufeffصوت.mp3|لا\r\n".encode())
    (tmp_path / "text" / "arabic.txt").write_bytes("\ufeffa|نعم\r\n\r\na|لا\t\r\n".encode())
    assert [(line.text, line.ref_text, line.fault) for line in read_list(tmp_path)] == [
        ("نعم", "لا", ""),
        ("لا", "لا", ""),
    ]


def test_held_out_split_and_leaks(shards: ShardSet) -> None:
    lines = read_split(shards.location, "val", EXAMPLES.parent)
    assert len(lines) == len(shards.rows_of(validation=True)) > 0
    sources = {
        entry["messages"][-1]["content"][-1]["audio_url"]: entry for entry in json.loads(EXAMPLES.read_text("utf-8"))
    }
    for line in lines:
        entry = sources[str(Path(line.target_audio).relative_to(EXAMPLES.parent))]
        user, answer = entry["messages"][-2]["content"], entry["messages"][-1]["content"]
        assert line.text == answer[0]["text"].strip()
        assert line.ref_audio == str(
            EXAMPLES.parent / next(part["audio_url"] for part in user if part["type"] == "audio")
        )
        assert line.ref_text == user[0]["text"]
        assert line.speaker == entry["speaker"]
    assert not any(line.fault for line in find_faults(lines, OMNIVOICE))

    trained = read_split(shards.location, "train", EXAMPLES.parent)
    new = Line("new", "جملة لم يقلها أحد من قبل", speaker="nobody")
    for line in trained:
        assert audio_hashes([line])[line.id]["target_audio"] == {file_sha256(Path(line.target_audio))}
    prompted = Line("prompted", "جملة لم يقلها أحد", ref_audio=trained[0].target_audio)
    leaks = find_leaks([*trained, new, prompted], audio_hashes([*trained, new, prompted]), shards.location, OMNIVOICE)
    assert leaks["target_audio"] == leaks["text"] == [line.id for line in trained]
    assert leaks["reference_audio"] == [line.id for line in (*trained, prompted) if line.ref_audio]
    assert leaks["speaker"] == sorted({line.speaker for line in trained})
    assert leaks["compared"] == len(trained)
    clean = find_leaks([new], {}, shards.location, OMNIVOICE)
    assert not any(clean[kind] for kind in ("reference_audio", "target_audio", "text", "speaker"))

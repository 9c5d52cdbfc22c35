"""Evaluation lists of every form, bad lines by name, and leaks into training sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import soundfile
from conftest import EXAMPLES
from higgs_tune.evaluate.held_out import find_leaks, read_split
from higgs_tune.evaluate.lists import Line, check_lines, read_list
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
    with pytest.raises(
        UserError, match=r"2 lines cannot be used: line 1: expected utt\|.*; line 3|line 1: .*, line 3: "
    ):
        read_list(write(tmp_path / "bad.lst", "u1|Hi.", "u2|Hi.|p.wav|Yes.", "a|b|c|d|e|f"))


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
    with pytest.raises(UserError, match=r"2 lines .*no speaker/arabic/arabic_child/.*expected label"):
        read_list(tmp_path / "text" / "arabic.txt")


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
    check_lines(lines, OMNIVOICE, references=True, targets=True)
    with pytest.raises(
        UserError, match=r"2 lines .*row 1: speaker b has no other clip, row 2: expected audio, text and"
    ):
        read_list(habibi(tmp_path / "bad", [rows[0], rows[1], rows[0] | {"text": None}, rows[0]]))


@pytest.mark.fast
def test_bad_lines_are_all_named(tmp_path: Path) -> None:
    good = {"id": "a", "text": "yes"}
    path = write(
        tmp_path / "list.jsonl", good, good, {"id": "b", "text": " "}, {"id": "../c", "text": "c"}, "{", {"text": "d"},
        [], {"id": "e", "text": 5},
    )  # fmt: skip
    with pytest.raises(UserError) as error:
        read_list(path)
    for part in (
        "7 lines cannot be used",
        "line 2: duplicate id a, also in line 1",
        "line 3: empty text (id b)",
        "line 4: id '../c' is no file name",
        "line 5: not JSON: {",
        "line 6: id is missing",
        "line 7: expected an object, got []",
        "line 8: text: expected a string, got 5",
    ):
        assert part in str(error.value)
    with pytest.raises(UserError, match="no such list"):
        read_list(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no lines"):
        read_list(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "a", "text": "caf\xe9"}\n{"id": "b", "text": "plain"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        read_list(tmp_path / "latin.jsonl")


@pytest.mark.fast
def test_lines_that_cannot_be_judged_are_named(tmp_path: Path) -> None:
    there = str(wav(tmp_path / "r.wav"))
    lines = [Line("a", "yes", there, target_audio=there), Line("b", "no", "/none.wav"), Line("c", "ok")]
    check_lines(lines, OMNIVOICE, references=False, targets=False)
    with pytest.raises(UserError, match=r"ref_audio is missing in 2 lines: b \(/none.wav\), c \(none given\)"):
        check_lines(lines, OMNIVOICE, references=True, targets=False)
    with pytest.raises(UserError, match="target_audio is missing in 2 lines"):
        check_lines(lines, OMNIVOICE, references=False, targets=True)
    with pytest.raises(UserError, match="normaliser omnivoice leaves nothing of 1 texts: d"):
        check_lines([*lines, Line("d", "?!")], OMNIVOICE, references=False, targets=False)
    with pytest.raises(UserError, match="1 ids are in more than one list: a"):
        check_lines([*lines, lines[0]], OMNIVOICE, references=False, targets=False)


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
    check_lines(lines, OMNIVOICE, references=True, targets=True)

    trained = read_split(shards.location, "train", EXAMPLES.parent)
    new = Line("new", "جملة لم يقلها أحد من قبل", speaker="nobody")
    hashes = {line.id: [file_sha256(Path(line.target_audio))] for line in trained}
    leaks = find_leaks([*trained, new], hashes | {"new": ["0" * 64]}, shards.location, OMNIVOICE)
    assert leaks["audio"] == leaks["text"] == [line.id for line in trained]
    assert leaks["speaker"] == sorted({line.speaker for line in trained})
    assert leaks["compared"] == len(trained)
    clean = find_leaks([new], {}, shards.location, OMNIVOICE)
    assert not clean["audio"] and not clean["text"] and not clean["speaker"]

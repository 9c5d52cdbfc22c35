"""Manifests and datasets folders: the reference policy, and that every form of the same data gives the same set."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import soundfile
from conftest import EXAMPLES, preprocess
from higgs_tune.preprocess.config import PreprocessConfig
from higgs_tune.preprocess.entries import read_entries
from higgs_tune.preprocess.pipeline import make_job
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet

Row = dict[str, Any]


def rows_of(speakers: str) -> list[Row]:
    """One row a letter; the letter is its speaker."""
    return [{"audio": f"{i}.wav", "text": f"text {i}", "speaker": name} for i, name in enumerate(speakers)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 different clips; those whose number ends in 9 are short."""
    rng = np.random.default_rng(0)
    for i in range(40):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * rng.standard_normal(2000 if i % 10 == 9 else 18000), 16000)
    return tmp_path


def write_csv(path: Path, rows: list[Row]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def entries(toy: Path, data: Path, **options: Any) -> list[Any]:
    config = PreprocessConfig(
        data=data, out=str(data.parent / "out"), model_path=toy / "model", audio_tokenizer_path=toy / "codec", **options
    )
    return list(read_entries(make_job(config)))


def parts(entry: Any) -> tuple[list[str], list[str]]:
    """(audios, texts) of an entry, in order."""
    assert not isinstance(entry, Reject), entry
    found = [part for message in entry["messages"][1:] for part in message["content"]]
    return [p["audio_url"] for p in found if p["type"] == "audio"], [p["text"] for p in found if p["type"] == "text"]


def test_references_follow_the_policy(toy: Path, folder: Path) -> None:
    """Same speaker, another file, long enough, not always the same one; the text is the reference's own."""
    rows = rows_of("abcd" * 10)
    made = entries(toy, write_csv(folder / "data.csv", rows))
    by_audio = {row["audio"]: row for row in rows}
    for row, entry in zip(rows, made, strict=True):
        (reference, target), texts = parts(entry)
        assert target == row["audio"] != reference
        assert by_audio[reference]["speaker"] == row["speaker"] == entry["speaker"]
        assert not reference.endswith("9.wav")
        assert texts == [by_audio[reference]["text"], f"Read this text in the same voice: {row['text']}", row["text"]]
    assert len(Counter(parts(entry)[0][0] for entry in made)) > 10
    assert entries(toy, folder / "data.csv") == made
    assert entries(toy, folder / "data.csv", seed=1) != made
    assert any(parts(e)[0][0].endswith("9.wav") for e in entries(toy, folder / "data.csv", ref_min_seconds=0.0))


def test_references_stay_when_other_speakers_come(toy: Path, folder: Path) -> None:
    few = entries(toy, write_csv(folder / "few.csv", rows_of("ab" * 10)))
    more = entries(toy, write_csv(folder / "more.csv", rows_of("ab" * 10 + "c" * 20)))
    assert more[:20] == few


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_reference_drop(toy: Path, folder: Path, share: float) -> None:
    rows = rows_of("a" * 40) * 10
    for number, row in enumerate(rows):
        (folder / f"copy-{number}.wav").symlink_to(row["audio"])
    rows = [row | {"audio": f"copy-{number}.wav"} for number, row in enumerate(rows)]
    made = entries(toy, write_csv(folder / "data.csv", rows), ref_drop=share)
    dropped = sum(len(parts(entry)[0]) == 1 for entry in made)
    assert dropped / len(rows) == pytest.approx(share, abs=0.08)
    assert dropped == share * len(rows) or 0 < share < 1
    plain = [entry for entry in made if len(parts(entry)[0]) == 1]
    assert all(entry["messages"][1]["content"][0]["text"].startswith("Read this text: ") for entry in plain)


def test_own_references_and_what_is_refused(toy: Path, folder: Path) -> None:
    (folder / "equal.wav").write_bytes((folder / "0.wav").read_bytes())
    (folder / "link.wav").symlink_to("1.wav")
    rows = [
        {"audio": "0.wav", "text": "given", "speaker": "a", "ref_audio": "9.wav", "ref_text": "short one"},
        {"audio": "1.wav", "text": "no ref text", "speaker": "", "ref_audio": "2.wav", "ref_text": ""},
        {"audio": "1.wav", "text": "itself", "speaker": "b", "ref_audio": "1.wav", "ref_text": ""},
        {"audio": "1.wav", "text": "itself by a link", "speaker": "b", "ref_audio": "link.wav", "ref_text": ""},
        {"audio": "0.wav", "text": "itself by content", "speaker": "b", "ref_audio": "equal.wav", "ref_text": ""},
        {"audio": "3.wav", "text": "alone", "speaker": "c", "ref_audio": "", "ref_text": ""},
        {"audio": "4.wav", "text": "nobody", "speaker": "", "ref_audio": "", "ref_text": ""},
        {"audio": "5.wav", "text": "", "speaker": "a", "ref_audio": "6.wav", "ref_text": ""},
        {"audio": "", "text": "no audio", "speaker": "a", "ref_audio": "6.wav", "ref_text": ""},
        {"audio": "x\0y.wav", "text": "NUL", "speaker": "a", "ref_audio": "", "ref_text": ""},
    ]
    summary = preprocess(toy, write_csv(folder / "data.csv", rows), folder / "out", val_fraction=0.0)
    expected = {"self_reference": 3, "no_reference": 2, "empty_text": 1, "malformed_manifest": 1, "unreadable_audio": 1}
    assert summary["rejects"] == expected
    shards = ShardSet(folder / "out")
    assert [s["source"] for s in shards.read(0).meta["segments"]] == ["9.wav", "0.wav"]
    assert [s["source"] for s in shards.read(1).meta["segments"]] == ["2.wav", "1.wav"]
    assert [len(message["content"]) for message in shards.read(1).meta["messages"]] == [1, 2, 2]


def as_jsonl(folder: Path, rows: list[Row]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def as_json(folder: Path, rows: list[Row]) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def as_tsv(folder: Path, rows: list[Row]) -> Path:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), delimiter="\t")
    table.writeheader()
    table.writerows(rows)
    path = folder / "rows.tsv"
    path.write_text("\ufeff" + text.getvalue())
    return path


def as_dataset(folder: Path, rows: list[Row], *, embed: bool = True) -> Path:
    """As `datasets.Dataset.save_to_disk` lays it out: Arrow streams, state.json, the audio's bytes inside."""
    out = folder / "dataset"
    out.mkdir(exist_ok=True)
    audio = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("audio", audio), ("text", pyarrow.string()), ("speaker", pyarrow.string())])
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (rows[:7], rows[7:]), strict=True):
        with pyarrow.OSFile(str(out / name), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
            for at in range(0, len(part), 4):
                batch = [
                    row
                    | {
                        "audio": {
                            "bytes": (folder / row["audio"]).read_bytes() if embed else None,
                            "path": row["audio"] if embed else str(folder / row["audio"]),
                        }
                    }
                    for row in part[at : at + 4]
                ]
                stream.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))
    (out / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return out


@pytest.mark.parametrize("form", [as_jsonl, as_json, as_tsv, as_dataset])
def test_every_form_gives_the_same_set(toy: Path, tmp_path: Path, form: Any) -> None:
    """Same tokens and codes as from the CSV file; a datasets folder differs in the names of its audio only."""
    with (EXAMPLES.parent / "transcripts.csv").open() as file:
        rows = list(csv.DictReader(file))[:12]
    (tmp_path / "clips").symlink_to(EXAMPLES.parent / "clips")
    options = {"ref_drop": 1.0, "val_fraction": 0.2}  # a reference is chosen by the audio's name
    preprocess(toy, write_csv(tmp_path / "rows.csv", rows), tmp_path / "csv", **options)
    preprocess(toy, form(tmp_path, rows), tmp_path / "other", **options)
    one, two = ShardSet(tmp_path / "csv"), ShardSet(tmp_path / "other")
    assert len(one) == len(two) == 12
    for row in range(12):
        a, b = one.read(row), two.read(row)
        np.testing.assert_array_equal(a.codes_KT, b.codes_KT)
        np.testing.assert_array_equal(a.tokens_2L, b.tokens_2L)
        assert a.meta["segments"][0]["sha256"] == b.meta["segments"][0]["sha256"]
        assert a.meta["speaker"] == b.meta["speaker"]


def test_dataset_folders(toy: Path, folder: Path) -> None:
    """Paths instead of bytes, references by policy, and folders that are none."""
    rows = rows_of("ab" * 10)
    summary = preprocess(toy, as_dataset(folder, rows, embed=False), folder / "paths")
    assert summary["samples"] == 20
    preprocess(toy, as_dataset(folder, rows), folder / "bytes")
    for row in range(20):
        reference, target = ShardSet(folder / "bytes").read(row).meta["segments"]
        assert reference["sha256"] != target["sha256"]
        assert target["source"] == f"data-0000{int(row > 6)}-of-00002.arrow#audio:{row if row < 7 else row - 7}"
    for change, message in (
        ((folder / "dataset" / "data-00001-of-00002.arrow").unlink, "files of the dataset are missing"),
        (lambda: (folder / "dataset" / "state.json").write_text("{}"), "cannot read the dataset's state"),
        ((folder / "dataset" / "state.json").unlink, "not a datasets folder"),
        (lambda: (folder / "dataset" / "dataset_dict.json").write_text('{"splits": ["train"]}'), "Give one of: train"),
    ):
        change()
        with pytest.raises(UserError, match=message):
            entries(toy, folder / "dataset")


def test_damaged_tables(toy: Path, folder: Path) -> None:
    """A line that is no row is named; a file without the columns is refused."""
    (folder / "data.csv").write_text(
        'audio,text,speaker\n0.wav,one,a\n1.wav,two\n2.wav,"three\n2.wav,four",a\n3.wav,"fi"ve,a\n4.wav,six,a\n'
    )
    made = entries(toy, folder / "data.csv", ref_drop=1.0)
    reasons = [entry.reason if isinstance(entry, Reject) else None for entry in made]
    assert reasons == [None, "malformed_manifest", None, "malformed_manifest", None]
    assert isinstance(made[1], Reject)
    assert made[1].detail == "line 3: expected 3 fields, got 2"
    (folder / "data.csv").write_text("path,sentence\n0.wav,one\n")
    with pytest.raises(
        UserError, match=r"lacks columns .*expected \['audio', 'speaker', 'text'\], got \['path', 'sentence'\]"
    ):
        preprocess(toy, folder / "data.csv", folder / "out")

"""Manifests and datasets folders: the reference policy, and that every form of the same data gives the same set."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import soundfile
from conftest import EXAMPLES, preprocess
from higgs_tune.preprocess.config import Job, PreprocessConfig
from higgs_tune.preprocess.input import manifest
from higgs_tune.preprocess.input.entries import read_entries
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


def job_of(toy: Path, data: Path, **options: Any) -> Job:
    config = PreprocessConfig(
        data=data, out=str(data.parent / "out"), model_path=toy / "model", audio_tokenizer_path=toy / "codec", **options
    )
    return make_job(config)


def entries(toy: Path, data: Path, **options: Any) -> list[Any]:
    return list(read_entries(job_of(toy, data, **options)))


def parts(entry: Any) -> tuple[list[str], list[str]]:
    """(audios, texts) of an entry, in order."""
    assert not isinstance(entry, Reject), entry
    given = [part for message in entry["messages"][1:] for part in message["content"]]
    return [p["audio_url"] for p in given if p["type"] == "audio"], [p["text"] for p in given if p["type"] == "text"]


@pytest.mark.fast
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


class _NoCopies(list[int]):
    """A list that is not to be copied, as its slices would be for each row."""

    def __getitem__(self, at: Any) -> Any:
        assert isinstance(at, int)
        return super().__getitem__(at)


def test_a_reference_is_the_first_other_clip_from_a_hashed_place_on(
    toy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the naive rotation finds it, at no cost that grows with the number of clips."""
    rows = rows_of("a" * 12) + [{"audio": "./3.wav", "text": "again", "speaker": "a"}] * 8
    data = write_csv(folder / "data.csv", rows)
    candidates = manifest.References(list(rows), job_of(toy, data)).candidates
    monkeypatch.setattr(
        manifest.References, "_candidates", lambda _: {name: _NoCopies(rows) for name, rows in candidates.items()}
    )
    for row, entry in zip(rows, entries(toy, data), strict=True):
        start = int(manifest._uniform(f"reference 0 {row['audio']}") * len(candidates["a"]))
        rotated = [rows[i]["audio"] for i in candidates["a"][start:] + candidates["a"][:start]]
        assert parts(entry)[0][0] == next(name for name in rotated if name.strip("./") != row["audio"].strip("./"))


@pytest.mark.parametrize("bad", ["   ", "\u200f", "bad <|eot_id|>", "\x07", "\ud800", "x" * 30_000])
def test_rows_that_cannot_be_used_are_no_references(toy: Path, folder: Path, bad: str) -> None:
    soundfile.write(folder / "7.wav", np.zeros((18000, 6)), 16000)
    rows = [{"audio": f"{i}.wav", "text": text, "speaker": "a"} for i, text in enumerate([bad, "one", "two"])]
    rows.append({"audio": "7.wav", "text": "surround", "speaker": "a"})
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    made = entries(toy, data)
    assert isinstance(made[0], Reject)
    assert [parts(entry)[0][0] for entry in made[1:3]] == ["2.wav", "1.wav"]


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"ref_text": "bad <|eot_id|>"}, "template_token_in_text", "ref_text: text holds"),
        ({"ref_text": " "}, "empty_text", "ref_text: text is empty"),
        ({"ref_text": 7}, "malformed_manifest", "ref_text: expected a string, got 7"),
        ({"ref_audio": 7}, "malformed_manifest", "ref_audio: expected a string, got 7"),
        ({"ref_audio": True}, "malformed_manifest", "ref_audio: expected a string, got True"),
        ({"speaker": True}, "malformed_manifest", "speaker: expected a string, got True"),
        ({"text": 7}, "malformed_manifest", "text: expected a string, got 7"),
    ],
)
def test_the_column_at_fault_is_named(toy: Path, folder: Path, row: Row, reason: str, detail: str) -> None:
    good = {"audio": "0.wav", "text": "good", "speaker": "a", "ref_audio": "1.wav", "ref_text": "one"}
    made = entries(toy, as_jsonl(folder, [good, good | row, good]))
    assert [isinstance(entry, Reject) for entry in made] == [False, True, False]
    assert made[1].reason == reason
    assert made[1].detail.startswith(detail)


@pytest.mark.fast
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


def as_dataset(folder: Path, rows: list[Row], *, embed: bool = True, more: Row | None = None) -> Path:
    """As `datasets.Dataset.save_to_disk` lays it out: Arrow streams, state.json, the audio's bytes inside; `more`:
    further columns, each with the same value in all rows."""
    more = more or {}
    out = folder / "dataset"
    out.mkdir(exist_ok=True)
    audio = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = [("audio", audio), ("text", pyarrow.string()), ("speaker", pyarrow.string())]
    schema = pyarrow.schema([*columns, *((name, pyarrow.scalar(value).type) for name, value in more.items())])
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (rows[:7], rows[7:]), strict=True):
        with pyarrow.OSFile(str(out / name), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
            for at in range(0, len(part), 4):
                batch = [
                    row
                    | more
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


def test_columns_of_every_type_are_stored(toy: Path, folder: Path) -> None:
    noon = datetime(2020, 1, 2, 12, tzinfo=UTC)
    given = {
        "at": noon,
        "day": date(2020, 1, 2),
        "cost": Decimal("1.50"),
        "thumbnail": b"\x00\xff",
        "snr": float("nan"),
    }
    given |= {
        "took": timedelta(seconds=90),
        "peak": float("inf"),
        "tags": [{"at": noon, "b": b"xyz"}],
        "id": b"no text",
    }
    expected = {"at": "2020-01-02T12:00:00+00:00", "day": "2020-01-02", "cost": "1.50", "thumbnail": "<2 bytes>"}
    expected |= {"took": "0:01:30", "tags": [{"at": expected["at"], "b": "<3 bytes>"}]}
    summary = preprocess(toy, as_dataset(folder, rows_of("a"), more=given), folder / "out", ref_drop=1.0)
    assert summary["samples"] == 1
    assert ShardSet(folder / "out").read(0).meta["misc"] == expected


def test_damaged_tables(toy: Path, folder: Path) -> None:
    """A line that is no row is named; a file without the columns is refused."""
    (folder / "data.csv").write_text(
        'audio,text,speaker\n0.wav,one,a\n1.wav,two\n2.wav,"three\nfour",a\n3.wav,"fi"ve,a\n4.wav,six,a\n'
        '5.wav,"sev\nen"\n6.wav,"eight,a'
    )
    made = entries(toy, folder / "data.csv", ref_drop=1.0)
    details = [entry.detail if isinstance(entry, Reject) else None for entry in made]
    assert details[1] == "line 3: expected 3 fields, got 2"
    assert details[5] == "lines 8 to 9: expected 3 fields, got 2"
    assert [str(detail).partition(":")[0] for detail in details] == [
        *("None", "line 3", "None", "line 6", "None", "lines 8 to 9", "line 10")
    ]
    (folder / "data.csv").write_text("colour,size\nred,one\n")
    with pytest.raises(
        UserError, match=r"lacks columns .*expected \['audio', 'speaker', 'text'\], got \['colour', 'size'\]"
    ):
        preprocess(toy, folder / "data.csv", folder / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"audio"x,text,speaker\n0.wav,one,a\n', "cannot read the names of the table's columns"),
        (f"{'a' * 200_000},text,speaker,audio\nx,one,a,0.wav\n", "cannot read the names of the table's columns"),
        ("audio,text,text,speaker\n0.wav,one,two,a\n", r"several columns .* have the same name .*got \['text'\]"),
        ('audio,text,speaker\n0.wav,one,a\n1.wav,"two,a\n2.wav,three,a\n3.wav,four,a\n', r"data\.CSV, line 3.* closed"),
        ('audio,text,speaker\n0.wav,"one,a\n1.wav,"two",a\n2.wav,three,a\n', r"ends on line 3.*data\.CSV, line 2"),
        ("audio,text,speaker\n", "the data holds no samples"),
    ],
)
def test_tables_that_would_lose_rows_or_columns_are_refused(
    toy: Path, folder: Path, content: str, message: str
) -> None:
    (folder / "data.CSV").write_text(content)
    with pytest.raises(UserError, match=message):
        preprocess(toy, folder / "data.CSV", folder / "out")

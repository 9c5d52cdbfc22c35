"""JSON objects, Parquet and folders of other tools give the rows that a plain manifest gives, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import soundfile
from conftest import preprocess
from higgs_tune.preprocess.config import Job, PreprocessConfig
from higgs_tune.preprocess.input.entries import read_entries
from higgs_tune.preprocess.input.folders import data_digest
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from pyarrow import parquet

TEXTS = ["الماء بارد.", "النهر قريب.", "نعود مساء.", "هذا بيتنا."]
NAMES = [f"u{i}" for i in range(4)]
FILES = [f"wavs/{name}.wav" for name in NAMES]
ROWS = [{"audio": file, "text": text, "speaker": "s"} for file, text in zip(FILES, TEXTS, strict=True)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four clips in `wavs`, each with its text beside it."""
    (tmp_path / "wavs").mkdir()
    rng = np.random.default_rng(0)
    for name, text in zip(NAMES, TEXTS, strict=True):
        soundfile.write(tmp_path / "wavs" / f"{name}.wav", 0.1 * rng.standard_normal(18000), 16000)
        (tmp_path / "wavs" / f"{name}.txt").write_text(f"{text}\n")
    return tmp_path


def spoken(data: Path) -> list[tuple[str, str]]:
    """(name of the clip, text) of each entry."""
    nowhere = Path("/nowhere")
    config = PreprocessConfig(data=data, model_path=nowhere, out="out", audio_tokenizer_path=nowhere, speaker="s")
    made = list(read_entries(Job(config, data, nowhere, nowhere, None, nowhere)))
    assert not [entry for entry in made if isinstance(entry, Reject)]
    pairs = [entry["messages"][-1]["content"] for entry in made]
    return [(Path(audio["audio_url"]).stem, text["text"]) for text, audio in pairs]


EXPECTED = list(zip(NAMES, TEXTS, strict=True))
FORMS: dict[str, Any] = {
    "samples": {"info": {"n": 4}, "samples": [
        {"id": n, "audio_file": f"{n}.wav", "transcript_file": f"{n}.txt", "speaker_id": "s"} for n in NAMES
    ]},
    "columns": {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "pandas": {name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]},
    "texts by file": dict(zip(FILES, TEXTS, strict=True)),
    "rows by id": {n: {"wav": f, "transcript": t} for n, f, t in zip(NAMES, FILES, TEXTS, strict=True)},
}  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("form", FORMS)
def test_objects_that_hold_the_rows(folder: Path, form: str, indent: int | None) -> None:
    (folder / "data.json").write_text(json.dumps(FORMS[form], ensure_ascii=False, indent=indent))
    assert spoken(folder / "data.json") == EXPECTED


def nemo(folder: Path) -> Path:
    rows = [{"audio_filepath": row["audio"], "duration": 1.1, "text": row["text"]} for row in ROWS]
    (folder / "nemo.json").write_text("\n".join(map(json.dumps, rows)))
    return folder / "nemo.json"


def moshi(folder: Path) -> Path:
    (folder / "moshi.jsonl").write_text("\n".join(json.dumps({"path": file, "duration": 1.1}) for file in FILES))
    return folder / "moshi.jsonl"


def audiofolder(folder: Path) -> Path:
    rows = "".join(f'{file},"{text}"\n' for file, text in zip(FILES, TEXTS, strict=True))
    (folder / "metadata.csv").write_text("file_name,transcription\n" + rows)
    return folder


def kaldi(folder: Path) -> Path:
    (folder / "text").write_text("".join(f"{n} {t}\n" for n, t in zip(NAMES, TEXTS, strict=True)))
    (folder / "wav.scp").write_text("".join(f"{n} {f}\n" for n, f in zip(NAMES, FILES, strict=True)))
    return folder


def pairs(folder: Path) -> Path:
    return folder / "wavs"


@pytest.mark.parametrize("form", [nemo, moshi, audiofolder, kaldi, pairs])
def test_lists_and_folders(folder: Path, form: Callable[[Path], Path]) -> None:
    assert spoken(form(folder)) == EXPECTED


def test_a_restart_sees_a_change_of_the_list_that_is_read(folder: Path) -> None:
    """Also beside what `datasets` would read."""
    (folder / "state.json").write_text('{"_data_files": []}')
    audiofolder(folder)
    assert spoken(folder) == EXPECTED
    before = data_digest(folder)
    (folder / "metadata.csv").write_text((folder / "metadata.csv").read_text() + "\n")
    assert data_digest(folder) != before


@pytest.mark.parametrize("as_folder", [False, True])
def test_parquet_with_its_audio_inside(toy: Path, folder: Path, as_folder: bool) -> None:
    """Rows of several row groups; the audio is read in place."""
    rows = [row | {"audio": {"bytes": (folder / row["audio"]).read_bytes(), "path": row["audio"]}} for row in ROWS]
    (folder / "data").mkdir()
    name = "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data" / name, row_group_size=3)
    data = folder if as_folder else folder / "data" / name
    preprocess(toy, data, folder / "one")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    preprocess(toy, folder / "rows.jsonl", folder / "two")
    one, two = ShardSet(folder / "one"), ShardSet(folder / "two")
    targets = [[s.read(row).meta["segments"][-1]["sha256"] for row in range(4)] for s in (one, two)]
    assert targets[0] == targets[1]
    assert one.read(3).meta["segments"][-1]["source"].endswith(f"{name}#audio:3")
    assert preprocess(toy, data, folder / "one")["already_built"]


def test_pieces_of_one_recording(toy: Path, folder: Path) -> None:
    """Kaldi's segments, and offset and duration as NeMo means them: each row has its own codes."""
    wave = 0.1 * np.random.default_rng(1).standard_normal(3 * 24000)
    soundfile.write(folder / "long.wav", wave, 24000, subtype="FLOAT")
    (folder / "kaldi").mkdir()
    (folder / "kaldi" / "text").write_text("".join(f"p{i} text {i}\n" for i in range(3)))
    (folder / "kaldi" / "wav.scp").write_text(f"rec {folder / 'long.wav'}\n")
    (folder / "kaldi" / "segments").write_text("".join(f"p{i} rec {i}.0 {i + 1}.0\n" for i in range(3)))
    (folder / "kaldi" / "utt2spk").write_text("".join(f"p{i} s\n" for i in range(3)))
    preprocess(toy, folder / "kaldi", folder / "one")
    rows = [{"audio": "long.wav", "offset": i, "duration": 1, "text": f"text {i}", "speaker": "s"} for i in range(3)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    preprocess(toy, folder / "rows.jsonl", folder / "two")
    for i in range(3):
        soundfile.write(folder / f"p{i}.wav", wave[i * 24000 :][:24000], 24000, subtype="FLOAT")
    whole = [row | {"audio": f"p{i}.wav", "offset": None} for i, row in enumerate(rows)]
    (folder / "whole.jsonl").write_text("\n".join(map(json.dumps, whole)))
    preprocess(toy, folder / "whole.jsonl", folder / "three", ref_drop=1.0)
    sets = [ShardSet(folder / name) for name in ("one", "two", "three")]
    for row in range(3):
        codes = [s.read(row).codes_KT[:, -25:] for s in sets]
        assert np.array_equal(codes[0], codes[2])
        assert np.array_equal(codes[1], codes[2])


def refused(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder / name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"text": "a b", "segments": [{"start": 0.0, "end": 1.0, "text": "a"}]}), "as Whisper writes it"),
        (json.dumps({"train": ROWS, "test": ROWS}), r"several lists .*got train, test\. .*jq \.train"),
        (json.dumps({"wavs/u0.wav": "a"})[:-1] + ', "wavs/u0.wav": "b"}', "a name stands twice"),
        (json.dumps({"colour": 1}), "holds no rows in a known way"),
        (json.dumps([{"prompt": "a", "completion": "b"}]), "got objects with completion, prompt"),
        ("\n".join(json.dumps(row, indent=1) for row in ROWS), "jq -c"),
        ("\n".join(json.dumps({"audio": "x.wav", "text": str(i), "speaker": "s", "start": i, "end": i + 1})
                   for i in range(3)), "pieces of recordings, but not cut.*Name start offset"),
    ],
)  # fmt: skip
def test_objects_that_cannot_be_read_are_refused(folder: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        spoken(refused(folder, "data.json", content))


@pytest.mark.fast
def test_folders_that_cannot_be_read_are_refused(folder: Path) -> None:
    kaldi(folder)
    (folder / "wav.scp").write_text("".join(f"{n} sox {n}.mp3 -t wav - |\n" for n in NAMES))
    with pytest.raises(UserError, match=r"not an audio file .*got u0 sox"):
        spoken(folder)
    (folder / "wav.scp").write_text("u0 wavs/u0.wav\nu9 wavs/u1.wav\n")
    with pytest.raises(UserError, match=r"different utterances .*got u1, u2, u3 and 1 more"):
        spoken(folder)
    (folder / "wav.scp").write_text("u0 wavs/u0.wav\nu0 wavs/u1.wav\n")
    with pytest.raises(UserError, match=r"u0 stands twice \(.*wav\.scp, line 2\)"):
        spoken(folder)
    (folder / "voice").mkdir()
    (folder / "voice" / "train.tsv").write_text("path\tsentence\n")
    with pytest.raises(UserError, match=r"Give one of its lists: train\.tsv"):
        spoken(folder / "voice")
    for file in (folder / "wavs").glob("*.txt"):
        file.unlink()
    with pytest.raises(UserError, match="clips without texts"):
        spoken(folder / "wavs")


def test_a_text_file_that_is_missing_is_a_named_reject(toy: Path, folder: Path) -> None:
    (folder / "wavs" / "u1.txt").unlink()
    (folder / "wavs" / "u2.txt").write_bytes("كلمة".encode("cp1256"))
    assert preprocess(toy, folder / "wavs", folder / "out", speaker="s")["rejects"] == {"missing_text": 2}

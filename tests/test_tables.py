"""Tables of every separator: no row is swallowed by a quote, and the first line tells what the columns are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from higgs_tune.preprocess.config import Job, PreprocessConfig
from higgs_tune.preprocess.input.entries import read_entries
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.errors import UserError

TEXTS = ["الماء بارد.", "النهر قريب, والطريق قصير.", "نعود مساء.", "هذا بيتنا."]
NAMES = [f"u{i}" for i in range(4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four clips in `wavs`."""
    (tmp_path / "wavs").mkdir()
    rng = np.random.default_rng(0)
    for name in NAMES:
        soundfile.write(tmp_path / "wavs" / f"{name}.wav", 0.1 * rng.standard_normal(18000), 16000)
    return tmp_path


def job_of(data: Path, **options: Any) -> Job:
    nowhere = Path("/nowhere")
    config = PreprocessConfig(data=data, model_path=nowhere, out="out", audio_tokenizer_path=nowhere, **options)
    return Job(config, data, nowhere, nowhere, None, nowhere)


def spoken(data: Path, **options: Any) -> list[tuple[str, str, Any]]:
    """(audio, text, speaker) of each entry; a reject as its reason and detail."""
    made: list[tuple[str, str, Any]] = []
    for entry in read_entries(job_of(data, **{"speaker": "one", **options})):
        if isinstance(entry, Reject):
            made.append((entry.reason, entry.detail, None))
        else:
            text, audio = entry["messages"][-1]["content"]
            made.append((audio["audio_url"], text["text"], entry["speaker"]))
    return made


def expected(speaker: str = "one") -> list[tuple[str, str, Any]]:
    return [(f"wavs/{name}.wav", text, speaker) for name, text in zip(NAMES, TEXTS, strict=True)]


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def lines(form: str, header: str = "") -> str:
    """A line a clip; `form` with {n} for its name and {t} for its text."""
    return header + "".join(form.format(n=name, t=text) + "\n" for name, text in zip(NAMES, TEXTS, strict=True))


@pytest.mark.parametrize(
    ("name", "content", "speaker"),
    [
        ("metadata.csv", lines("{n}|{t}|{t}"), "one"),  # LJSpeech
        ("f5.csv", lines("wavs/{n}.wav|{t}", "audio_file|text\n"), "one"),
        ("xtts.csv", lines("wavs/{n}.wav|{t}|s", "audio_file|text|speaker_name\n"), "s"),
        ("train.list", lines("wavs/{n}.wav|s|ar|{t}"), "s"),  # GPT-SoVITS
        ("vits.txt", lines("wavs/{n}.wav|7|{t}"), "7"),
        ("excel.csv", lines("wavs/{n}.wav;{t};s", "audio;text;speaker\n").replace("\n", "\r\n"), "s"),
        ("tab.csv", lines("wavs/{n}.wav\t{t}\ts", "audio\ttext\tspeaker\n"), "s"),
        ("rows.txt", lines('wavs/{n}.wav,"{t}",s', "audio,text,speaker\n"), "s"),
        ("spaced.csv", lines('wavs/{n}.wav, "{t}", s', "audio, text, speaker\n"), "s"),
        ("upper.csv", lines('wavs/{n}.wav,"{t}",s', "Audio,Text,Speaker\n"), "s"),
        ("pandas.csv", lines('0,wavs/{n}.wav,"{t}",s', ",audio,text,speaker\n"), "s"),
        ("voice.tsv", lines("s\t{n}.wav\t{t}\tar", "client_id\tpath\tsentence\tlocale\n"), "s"),  # Common Voice
        ("windows.csv", lines('wavs\\{n}.wav,"{t}",s', "audio,text,speaker\n"), "s"),
    ],
)
def test_tables_of_other_tools(folder: Path, name: str, content: str, speaker: str) -> None:
    made = spoken(write(folder, name, content))
    assert [(audio.replace("\\", "/"), text, who) for audio, text, who in made] == expected(speaker)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("form", ["table", "lines"])
def test_a_byte_order_mark_tells_the_encoding(folder: Path, encoding: str, form: str) -> None:
    rows = [{"audio": f"wavs/{n}.wav", "text": t, "speaker": "s"} for n, t in zip(NAMES, TEXTS, strict=True)]
    table = lines("wavs/{n}.wav\t{t}\ts", "audio\ttext\tspeaker\n")
    content = table if form == "table" else "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert spoken(write(folder, f"{form}.tsv", content, encoding)) == expected("s")


@pytest.mark.parametrize("separator", ["\t", "|"])
@pytest.mark.parametrize("last", [False, True])
def test_quotes_are_text_between_tabs_and_bars(folder: Path, separator: str, last: bool) -> None:
    """A quotation that opens in one row and closes two rows later; one that never closes."""
    texts = ['"We leave at dawn.', "Nobody is to speak of it.", 'I mean it."', '"Are we safe, he asked.']
    rows = [["audio", "text", "speaker"], *([f"wavs/{n}.wav", t, "s"] for n, t in zip(NAMES, texts, strict=True))]
    order = (2, 0, 1) if last else (0, 1, 2)
    content = "".join(separator.join(row[i] for i in order) + "\n" for row in rows)
    assert [text for _, text, _ in spoken(write(folder, "rows.csv", content))] == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('wavs/u0.wav,"one,s\nwavs/u1.wav,two,s\nwavs/u2.wav,three",s\n', r"lines 2 to 4.*JSON lines"),
        ('wavs/u0.wav,"one,s\nwavs/u1.wav,two,s\nwavs/u2.wav,three,s\n', r"line 2\).*not closed"),
    ],
)
def test_a_quote_that_swallows_rows_ends_the_command(folder: Path, content: str, message: str) -> None:
    data = write(folder, "rows.csv", "audio,text,speaker\n" + content)
    with pytest.raises(UserError, match=message):
        spoken(data)
    with pytest.raises(UserError, match=message):
        spoken(write(folder, "semi.csv", "audio;text;speaker\n" + content.replace(",", ";")))


@pytest.mark.fast
def test_a_quoted_cell_of_two_lines_is_one_row(folder: Path) -> None:
    made = spoken(write(folder, "rows.csv", 'audio,text,speaker\nwavs/u0.wav,"one\ntwo",s\nwavs/u1.wav,three,s\n'))
    assert [text for _, text, _ in made] == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("old.csv", lines('wavs/{n}.wav,"{t}",s', "audio,text,speaker\n").encode("cp1256"), r"cp1256.*iconv -f CP1256"),
        ("old.jsonl", lines('{{"audio": "wavs/{n}.wav", "text": "{t}"}}').encode("cp1256"), "iconv -f CP1256"),
        ("bare.csv", lines("wavs/{n}.wav|{t}", "audio|text\n").encode("utf-16-le"), "UTF-16-LE without"),
        ("book.csv", b"PK\x03\x04" + bytes(range(256)) * 9, "zip file or Excel workbook"),
        ("list.csv.gz", b"\x1f\x8b" + bytes(range(256)) * 9, "gunzip"),
        ("rows.csv", b"RIFF" + bytes(range(256)) * 9, "got audio"),
        ("text", lines("{n} {t}").encode(), "with its folder, which holds wav.scp"),
        ("three.txt", lines("wavs/{n}.wav|a b|c d").encode(), "Write a header as its first line"),
        ("many.txt", lines("wavs/{n}.wav|a|b|c|d").encode(), "Write a header as its first line"),
        (
            "two.csv",
            lines("wavs/{n}.wav|x|y", "audio|sentence|transcript\n").encode(),
            "several columns may be the text",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_helps(folder: Path, name: str, data: bytes, message: str) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        spoken(folder / name)
    assert str(error.value).isprintable()


def test_without_speakers_the_ways_out_are_named_and_work(folder: Path) -> None:
    data = write(folder, "rows.csv", lines('wavs/{n}.wav,"{t}"', "audio,text\n"))
    with pytest.raises(UserError, match=r"expected \['speaker'\].*--speaker NAME.*--ref_drop 1"):
        spoken(data, speaker=None)
    assert spoken(data) == expected()
    assert spoken(data, speaker=None, ref_drop=1.0) == [(*row[:2], None) for row in expected()]

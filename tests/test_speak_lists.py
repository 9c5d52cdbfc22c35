"""Lists that are spoken: bad lines cost no others, what is done is not done again, files are named by ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from conftest import EXAMPLES
from helpers.speaking import lines_of, speak, write_list
from higgs_tune.evaluate.speak import run
from higgs_tune.evaluate.speak.config import SpeakConfig
from higgs_tune.evaluate.speak.sentences import split_text
from higgs_tune.shards.errors import UserError

CLIPS = EXAMPLES.parent / "clips"
CLIP = str(CLIPS / "zayd-01.flac")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the lines that the model was given, over all runs of a test."""
    given: list[str] = []
    speak_utterances = run.speak_utterances

    def spy(engine: Any, utterances: Any, *rest: Any) -> Any:
        given.extend(utterance.id for utterance in utterances)
        return speak_utterances(engine, utterances, *rest)

    monkeypatch.setattr(run, "speak_utterances", spy)
    return given


def write_clips(folder: Path) -> None:
    """Recordings that can and cannot be references."""
    rng = np.random.default_rng(0)
    soundfile.write(folder / "short.wav", rng.uniform(-0.1, 0.1, 2400), 24_000)
    soundfile.write(folder / "long.wav", rng.uniform(-0.1, 0.1, 600 * 8000), 8000)
    wave, rate = soundfile.read(CLIP)
    wave = soxr.resample(wave, rate, 44_100)
    soundfile.write(folder / "stereo.wav", np.stack([wave, wave / 2], 1), 44_100)
    (folder / "text.wav").write_text("no audio")


GOOD = {
    "plain": {"text": "مرحبا بالعالم."},
    "voice": {"text": "Hello there.", "ref_audio": CLIP, "ref_text": "قَالَ"},
    "stereo": {"text": "Hello there.", "ref_audio": "stereo.wav"},
    "two": {"text": "[SPEAKER0] Hi. [SPEAKER1] Ho.", "ref_audio": [CLIP, "stereo.wav"], "ref_text": ["a", "b"]},
    "sub/folder": {"text": "Hello there."},
}
BAD = {
    "missing": ({"text": "x", "ref_audio": "nowhere.wav"}, "no such reference"),
    "short": ({"text": "x", "ref_audio": "short.wav"}, "expected 0.5 to 60 s, got 0.100 s"),
    "long": ({"text": "x", "ref_audio": "long.wav"}, "expected 0.5 to 60 s, got 600.000 s"),
    "text": ({"text": "x", "ref_audio": "text.wav"}, "text.wav"),
    "empty": ({"text": " \u200f"}, "empty"),
    "tokens": ({"text": "Hi <|eot_id|>"}, "<|eot_id|>"),
    "ref_tokens": ({"text": "x", "ref_audio": CLIP, "ref_text": "<|AUDIO|>"}, "ref_text: text holds <|AUDIO|>"),
    "number": ({"text": 3}, "expected a string"),
    "../up": ({"text": "x"}, "no file name"),
    "n" * 300: ({"text": "x"}, "too long for a file name"),
    "counts": ({"text": "x", "ref_audio": [CLIP, CLIP], "ref_text": ["a"]}, "as many ref_text"),
}


def test_bad_lines_are_named_and_the_others_spoken(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_clips(tmp_path)
    lines: list[dict[str, Any]] = [{"id": name, **line} for name, line in GOOD.items()]
    lines += [{"id": name, **line} for name, (line, _) in BAD.items()]
    lines += [{"id": "twice", "text": "one"}, {"id": "./twice", "text": "two"}, {"text": "no id"}]
    data, out = write_list(tmp_path / "list.jsonl", lines), tmp_path / "out"
    with data.open("a") as file:
        file.write("{broken\n")
    speak(toy / "model", toy / "codec", "--input", data, "-o", out, code=1)
    assert set(lines_of(out / "spoken.jsonl")) == set(GOOD)
    assert {str(path.relative_to(out)) for path in out.rglob("*.wav")} == {f"{name}.wav" for name in GOOD}
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert len(failures) == len(BAD) + 4
    reasons = {failure["id"]: failure["reason"] for failure in failures}
    shown = capfd.readouterr().err
    for name, (_, reason) in BAD.items():
        named = "number" if name == "number" else name
        if named in reasons:
            assert reason in reasons[named], name
        assert reason in json.dumps(failures, ensure_ascii=False)
    assert "duplicate id twice" in reasons["twice"]
    assert "duplicate" in reasons["./twice"]
    assert "failed: missing: no such reference" in shown
    assert f"{len(failures)} of {len(lines) + 1} lines failed" in shown
    assert not list(out.glob(".*"))


def test_a_list_continues_and_only_changed_lines_are_spoken_again(
    toy: Path, tmp_path: Path, counted: list[str]
) -> None:
    shutil.copy(CLIP, tmp_path / "ref.flac")
    lines = [{"id": f"l{i}", "text": f"Line {i}.", "ref_audio": "ref.flac"} for i in range(4)]
    data, out = write_list(tmp_path / "list.jsonl", lines), tmp_path / "out"

    def again(*flags: object, code: int = 0) -> list[str]:
        counted.clear()
        speak(toy / "model", toy / "codec", "--input", data, "-o", out, *flags, code=code)
        return list(counted)

    assert again() == ["l0", "l1", "l2", "l3"]
    assert again() == []
    assert again("--batch_size", 2) == []  # changes no code
    (out / "l1.wav").write_bytes(b"damaged")
    (out / "l3.wav").unlink()
    assert again() == ["l1", "l3"]
    killed = (out / "spoken.jsonl").read_bytes()
    (out / "spoken.jsonl").write_bytes(killed[:-20])  # within the last line
    assert len(again()) == 1
    lines[2]["text"] = "Another text."
    write_list(data, lines)
    assert again() == ["l2"]
    assert again("--seed", 1) == ["l0", "l1", "l2", "l3"]
    shutil.copy(CLIPS / "amal-01.flac", tmp_path / "ref.flac")
    assert again("--seed", 1) == ["l0", "l1", "l2", "l3"]
    lines[0]["text"] = "<|eot_id|>"
    write_list(data, lines)
    assert again("--seed", 1, code=1) == []
    assert not (out / "l0.wav").exists()  # it would speak another text
    assert (out / "l1.wav").exists()
    lines[0]["text"] = "Good again."
    write_list(data, lines)
    assert again("--seed", 1) == ["l0"]
    assert not (out / "failures.jsonl").exists()


def test_text_files(toy: Path, tmp_path: Path) -> None:
    """One text for a file, a line each for a folder; --ref_audio is the voice of all."""
    text = tmp_path / "story.txt"
    text.write_text("\ufeffThe first line.\n\nThe second line.\n", encoding="utf-8")
    voice = ("--ref_audio", CLIP, "--ref_text", "قال")
    speak(toy / "model", toy / "codec", "--input", text, "-o", tmp_path / "story.flac", *voice)
    assert soundfile.info(tmp_path / "story.flac").format == "FLAC"
    speak(toy / "model", toy / "codec", "--input", text, "-o", tmp_path / "lines", *voice)
    spoken = lines_of(tmp_path / "lines" / "spoken.jsonl")
    assert {name: line["text"] for name, line in spoken.items()} == {
        "story-0001": "The first line.",
        "story-0003": "The second line.",
    }


@pytest.mark.fast
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--text", "x", "--input", "y"), "expected --text or --input"),
        ((), "expected --text or --input"),
        (("--text", " "), "empty"),
        (("--text", "Hi <|AUDIO|>"), "<|AUDIO|>"),
        (("--text", "x", "--ref_audio", "nowhere.wav"), "no such reference: nowhere.wav"),
        (("--text", "x", "--ref_text", "y"), "--ref_text has a wrong number"),
        (("--text", "x", "--top_p", "0"), "--top_p is out of range"),
        (("--text", "x", "--device", "tpu"), "--device"),
        (("--input", "nowhere.jsonl"), "no such list"),
        (("--text", "x", "-o", "folder"), "no audio file"),
        (("--text", "x", "--model_path", "nowhere"), "no checkpoint here"),
        (("--text", "x", "--audio_tokenizer_path", "nowhere"), "no checkpoint here"),
        (("--text", "x", "--system", "<|eot_id|>"), "the system text or instruction cannot be used"),
    ],
)
def test_mistakes_are_one_line(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    speak(toy / "model", toy / "codec", "-o", tmp_path / "o.wav", *flags, code=2)
    *_, last = capfd.readouterr().err.strip().splitlines()
    assert last.startswith("error: ")
    assert message in last
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_without_a_codec_nothing_begins(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--audio_tokenizer_path is missing"):
        SpeakConfig(model_path=toy / "model", output=tmp_path / "o.wav", text="x")


@pytest.mark.fast
def test_texts_are_split_at_sentences() -> None:
    assert split_text("One. Two!  Three? ", 100) == ["One. Two!  Three?"]
    assert split_text("One. Two! Three?", 10) == ["One. Two!", "Three?"]
    arabic = "كيف حالك؟ أنا بخير، شكرا. وأنت؟"
    assert split_text(arabic, 12) == ["كيف حالك؟", "أنا بخير،", "شكرا. وأنت؟"]
    assert split_text("Costs 3.50 now. He said “No.” Then left.", 18)[1:] == ["He said “No.”", "Then left."]
    assert split_text("你好。再见！好", 3) == ["你好。", "再见！", "好"]
    assert split_text("First line\n\nSecond line", 12) == ["First line", "Second line"]
    assert split_text("abcdefgh ij", 3) == ["abc", "def", "gh", "ij"]
    tagged = "[SPEAKER0] One. Two. [SPEAKER1] Three. Four."
    assert split_text(tagged, 18) == ["[SPEAKER0] One.", "[SPEAKER0] Two.", "[SPEAKER1] Three.", "[SPEAKER1] Four."]


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(4))
def test_no_word_is_lost_in_splitting(seed: int) -> None:
    rng = np.random.default_rng(seed)
    words = rng.choice(["word", "كلمة؟", "end.", "وقف،", "(see.)", "x" * 30, "\n", "「你好。」"], 200)
    text = " ".join(words)
    pieces = split_text(text, 25)
    assert max(map(len, pieces)) <= 25
    assert "".join("".join(pieces).split()) == "".join(text.split())

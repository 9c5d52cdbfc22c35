"""higgs-eval on wavs whose stub recogniser knows their text: figures, faults, resuming, budget, the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from helpers.stub_judge import RATE, TEXTS, Stub, run, write_wav
from higgs_tune.evaluate import cli
from higgs_tune.evaluate.config import EvalConfig
from higgs_tune.evaluate.evaluate import evaluate
from higgs_tune.evaluate.judging import Judges
from higgs_tune.shards.errors import UserError

pytest.importorskip("rapidfuzz")


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Path]:
    """A list of six lines with references and targets, and a system `good` that says every text."""
    lines = []
    for number, text in enumerate(TEXTS):
        write_wav(tmp_path / "ref" / f"{number}.wav", 0, voice=10 * (number % 2))
        write_wav(tmp_path / "real" / f"{number}.wav", number, voice=10 * (number % 2) + 1)
        write_wav(tmp_path / "good" / f"u{number}.wav", number, voice=10 * (number % 2) + 2)
        audio = {"ref_audio": f"ref/{number}.wav", "target_audio": f"real/{number}.wav"}
        lines.append({"id": f"u{number}", "text": text, "ref_text": "", "speaker": f"s{number % 2}"} | audio)
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    yield tmp_path


def utterances(setting: Path) -> dict[tuple[str, str], dict[str, Any]]:
    lines = map(json.loads, (setting / "out" / "utterances.jsonl").read_text("utf-8").splitlines())
    return {(line["system"], line["id"]): line for line in lines}


@pytest.mark.fast
def test_known_answers(setting: Path) -> None:
    for number in range(6):
        write_wav(setting / "poor" / f"u{number}.wav", 6 if number == 0 else number, voice=10 * (number % 2) + 50)
    result = run(setting, ("good", "poor"), Stub([*TEXTS, "the cat sat on mat"]), ceiling=True)
    good, poor = result["good"], result["poor"]
    words = sum(len(text.split()) for text in TEXTS)
    assert good["wer"] == {"mean": 0, "low": 0, "high": 0, "n": 6}
    assert poor["wer"]["mean"] == pytest.approx(1 / words) and poor["wer_mean"]["mean"] == pytest.approx(1 / 6 / 6)
    assert poor["wer"]["low"] == 0 < poor["wer"]["mean"] < poor["wer"]["high"]
    assert poor["cer"]["mean"] == pytest.approx(4 / sum(map(len, TEXTS)))
    assert poor["counts"]["word_deletions"] == 1 and poor["counts"]["utterances"] == 6
    assert good["sim"]["mean"] == pytest.approx(np.cos(0.02), abs=1e-5)
    assert poor["sim"]["mean"] == pytest.approx(np.cos(0.5), abs=1e-5)
    assert good["quality"]["mean"] == 3.5 and good["quality_speech"]["mean"] == 4
    assert good["duration_ratio"]["mean"] == 1 and good["run_on_rate"]["mean"] == 0
    letters = sum(len(text.replace(" ", "")) for text in TEXTS)
    assert good["chars_per_second"]["mean"] == pytest.approx(letters / 6)
    assert result["ceiling"]["sim"]["mean"] == pytest.approx(np.cos(0.01), abs=1e-5)
    assert result["floor"]["wer"]["mean"] > 0.8
    other_voices = (np.cos(0.11) + np.cos(0.09)) / 2  # the other speaker's real clip against each reference
    assert result["floor"]["sim"]["mean"] == pytest.approx(other_voices, abs=1e-5)
    assert result["paired"]["base"] == "good"
    difference = result["paired"]["minus_base"]["poor"]["sim"]
    assert difference["high"] == pytest.approx(np.cos(0.5) - np.cos(0.02), abs=1e-4)
    assert set(result["groups"]) == {"language", "speaker", "length"}
    assert result["groups"]["speaker"]["s1"]["figures"]["poor"]["wer"]["mean"] == 0
    assert result["about"]["judges"]["asr"] == {"name": "stub", "revision": "1"}
    assert result["about"]["normaliser"]["name"] == "omnivoice"
    assert result["about"]["figures"]["cer"] == {"judge": "stub", "revision": "1", "normaliser": "omnivoice"}
    assert result["about"]["figures"]["quality"] == {"judge": "stub", "revision": "1", "normaliser": ""}
    line = utterances(setting)["poor", "u0"]
    same, missing, last = line["differences"]
    assert same[0] == last[0] == "equal" and missing == ["delete", "the", ""]
    assert json.loads((setting / "out" / "eval.json").read_text("utf-8")) == result


@pytest.mark.fast
def test_failures_count_as_wrong_and_are_listed(setting: Path) -> None:
    """Missing, cut off, no audio, zeros, 40 minutes, and a recogniser that hears nothing."""
    bad = setting / "bad"
    whole = setting / "good" / "u1.wav"
    bad.mkdir()
    (bad / "u1.wav").write_bytes(whole.read_bytes()[:-9000])
    (bad / "u2.wav").write_bytes(b"no audio")
    soundfile.write(bad / "u3.wav", np.zeros(RATE), RATE)
    soundfile.write(bad / "u4.wav", np.full(40 * 60 * 8000, 0.1), 8000)
    write_wav(bad / "u5.wav", 6, voice=10)
    write_wav(bad / "other.wav", 0)
    result = run(setting, ("good", "bad"), Stub([*TEXTS, ""]))
    problems = {given["id"]: given["problem"] for given in result["findings"]["bad"]["problems"]}
    assert problems == {
        "u0": "missing_audio",
        "u1": "truncated_audio",
        "u2": "unreadable_audio",
        "u3": "silent_audio",
        "u4": "too_long",
        "u5": "nothing_heard",
    }
    assert result["findings"]["bad"]["files_of_no_line"] == ["other"]
    figures = result["bad"]
    assert figures["wer"]["mean"] == figures["cer"]["mean"] == 1 and figures["wer"]["n"] == 6
    assert figures["counts"]["problems"] == 6
    assert figures["sim"]["mean"] == pytest.approx(np.cos(0.0) / 6) and figures["sim"]["n"] == 6
    assert figures["quality"]["mean"] == pytest.approx((5 * 1 + 3.5) / 6)
    assert figures["run_on_rate"]["mean"] == pytest.approx(1 / 6)
    assert result["good"]["wer"]["mean"] == 0
    page = (setting / "out" / "index.html").read_text("utf-8")
    assert "6 lines have a problem" in page and page.index("<b>u0</b>") < page.index("<b>u3</b>")


@pytest.mark.fast
def test_bad_lines_references_and_targets_cost_no_other_line(setting: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad lines count as wrong for every system; a line without a reference has no similarity, one without a real
    recording is not in the ceiling. All are named: in eval.json, on the page, and before anything is judged."""
    lines = [json.loads(line) for line in (setting / "list.jsonl").read_text().splitlines()]
    (setting / "ref" / "1.wav").unlink()
    (setting / "ref" / "2.wav").write_bytes(b"")
    (setting / "real" / "3.wav").unlink()
    soundfile.write(setting / "real" / "4.wav", np.zeros(RATE), RATE)
    del lines[5]["target_audio"]
    lines += [{"id": "u0", "text": "go home now"}, {"id": "none", "text": " "}]
    (setting / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    result = run(setting, ("good",), ceiling=True)
    faults = {kind: [given["id"] for given in listed] for kind, listed in result["list"].items()}
    bad = ["u0", "u0", "none", "list.jsonl line 9"]
    assert faults == {"bad_lines": bad, "without_reference": ["u1", "u2"], "without_target": ["u3", "u4", "u5"]}
    shown = capsys.readouterr().err
    assert "4 lines cannot be judged" in shown and "2 lines have no usable reference" in shown
    good, ceiling = result["good"], result["ceiling"]
    words = [len(text.split()) for text in TEXTS]
    assert good["wer"]["mean"] == pytest.approx((words[0] + words[5]) / (sum(words) + words[5]))
    assert good["wer_mean"]["mean"] == pytest.approx(4 / 9) and good["counts"]["problems"] == 4
    assert good["sim"]["n"] == 9 - 5  # u1, u2, and the bad lines that name no reference
    assert (ceiling["wer"]["n"], ceiling["counts"]["utterances"], ceiling["wer"]["mean"]) == (2, 2, 0)
    assert result["paired"]["minus_base"]["ceiling"]["wer"] == {"mean": 0, "low": 0, "high": 0, "n": 2}
    by_line = utterances(setting)
    assert by_line["good", "u1"]["sim"] is None and "missing_audio" in by_line["good", "u1"]["reference_fault"]
    assert by_line["good", "none"]["problem"] == "bad_line" and by_line["good", "none"]["cer"] == 1
    assert not by_line["ceiling", "u4"]["counted"] and by_line["ceiling", "u4"]["wer"] is None
    page = (setting / "out" / "index.html").read_text("utf-8")
    for text in (
        "4 lines of the list cannot be judged",
        "duplicate id u0",
        "no usable reference",
        "not in the ceiling",
    ):
        assert text in page


@pytest.mark.fast
def test_the_table_fits_into_80_columns(setting: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No name and no figure is cut there; where the output is no terminal, a system is one row."""
    name = "checkpoint-20000-of-a-long-run"
    (setting / "good").rename(setting / name)
    config = EvalConfig(setting / "out", "stub", data=("list",), wavs=(str(setting / name),))
    result = run(setting, (name,), ceiling=True)
    for columns in ("80", None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", columns) if columns else patch.delenv("COLUMNS", raising=False)
            cli.print_summary(result, config)
        shown = capsys.readouterr().out
        for column in cli.TABLE:
            assert column in shown
        assert "…" not in shown
        table = [line for line in shown.splitlines() if "[" in line or "wer" in line]
        if columns:
            assert max(map(len, table)) <= 80
        else:
            assert len([line for line in table if line.startswith(f"{name} ")]) == 1


@pytest.mark.fast
def test_swapped_files_are_caught(setting: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A system whose outputs came in another order: WER near 100 %, and the reason is said."""
    for number in range(6):
        write_wav(setting / "swapped" / f"u{number}.wav", (number + 1) % 6)
    result = run(setting, ("swapped",))
    assert result["findings"]["swapped"]["speaks_other_line"] == {f"u{i}": f"u{(i + 1) % 6}" for i in range(6)}
    assert "6 of 6 lines speak another line's text: u0 speaks u1" in capsys.readouterr().err
    assert result["swapped"]["wer"]["mean"] > 0.8
    assert "lines speak another line" in (setting / "out" / "index.html").read_text("utf-8")


def test_run_on(setting: Path) -> None:
    write_wav(setting / "long" / "u0.wav", 6)
    write_wav(setting / "long" / "u1.wav", 1, seconds=2.5)
    for number in range(2, 6):
        write_wav(setting / "long" / f"u{number}.wav", number)
    result = run(setting, ("long",), Stub([*TEXTS, f"{TEXTS[0]} and then it sat and sat"]), ceiling=True)
    assert result["long"]["run_on_rate"]["mean"] == pytest.approx(2 / 6)
    assert [i for i in range(6) if utterances(setting)["long", f"u{i}"]["run_on"]] == [0, 1]


@pytest.mark.fast
def test_killed_evaluation_resumes_to_the_same_table(setting: Path) -> None:
    whole = run(setting, ceiling=True)
    files = {path.name: path.read_bytes() for path in (setting / "out").iterdir()}
    (store,) = (name for name in files if name.startswith("judgements"))

    class Killed(Stub):
        def transcribe(self, waves_S: Sequence[np.ndarray], language: str) -> list[str]:
            if self.asked >= 4:
                raise KeyboardInterrupt
            return super().transcribe(waves_S, language)

    for path in (setting / "out").iterdir():
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(setting, stub=Killed(TEXTS), ceiling=True, batch_size=2)
    assert [path.name for path in (setting / "out").iterdir()] == [store]
    with (setting / "out" / store).open("ab") as file:
        file.write(b'{"clip": "half a li')
    again = Stub(TEXTS)
    assert run(setting, stub=again, ceiling=True) == whole
    assert again.asked == 12 - 4
    assert {name: (setting / "out" / name).read_bytes() for name in files if name != store} == {
        name: data for name, data in files.items() if name != store
    }
    third = Stub(TEXTS)
    run(setting, stub=third, normaliser="habibi", ceiling=True)
    assert third.asked == 0  # another normaliser judges nothing anew
    write_wav(setting / "good" / "u0.wav", 1)
    assert run(setting, stub=third, ceiling=True)["good"]["wer"]["mean"] > 0
    assert third.asked == 1


@pytest.mark.fast
def test_lists_by_language(setting: Path) -> None:
    lines = (setting / "list.jsonl").read_text().splitlines(keepends=True)
    (setting / "one.jsonl").write_text("".join(lines[:3]))
    (setting / "two.jsonl").write_text("".join(lines[3:]))
    stub = Stub(TEXTS)
    data = (f"en={setting / 'one.jsonl'}", f"ar={setting / 'two.jsonl'}")
    wavs = (str(setting / "good"), f"same={setting / 'good'}")
    result = evaluate(EvalConfig(out=setting / "out", asr="", data=data, wavs=wavs), lambda _c: Judges(stub))
    assert set(result["groups"]["language"]) == {"ar", "en"}
    assert result["groups"]["language"]["ar"]["paired"]["same"]["wer"]["n"] == 3
    assert stub.asked == 6  # one file is judged once
    assert result["good"]["sim"] is None


@pytest.mark.fast
def test_mistakes_are_named(setting: Path) -> None:
    base: dict[str, Any] = {"out": setting / "out", "asr": "stub", "data": (str(setting / "list.jsonl"),)}
    with pytest.raises(UserError, match="--audio_tokenizer_path is missing"):
        EvalConfig(**base, model_path=("m",))
    with pytest.raises(UserError, match="--model_path or --wavs is missing"):
        EvalConfig(**base)
    with pytest.raises(UserError, match="--data or --shards is missing"):
        EvalConfig(out=setting / "out", asr="stub", wavs=("w",))
    for wavs, message in (
        (("a=x", "a=y"), "'a' is given twice"),
        (("floor=x",), "'floor' cannot be used"),
        (("a=nowhere",), "no such folder of wavs"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(EvalConfig(**base, wavs=wavs), lambda _c: Judges(Stub(TEXTS)))
    (setting / "good" / "u0.flac").write_bytes((setting / "good" / "u0.wav").read_bytes())
    with pytest.raises(UserError, match="1 ids have several files: u0"):
        run(setting)
    (setting / "good" / "u0.flac").unlink()

    class Lossy(Stub):
        def transcribe(self, waves_S: Sequence[np.ndarray], language: str) -> list[str]:
            return super().transcribe(waves_S, language)[1:]

    with pytest.raises(UserError, match="the recogniser lost clips"):
        run(setting, stub=Lossy(TEXTS))


def test_damaged_store_is_named(setting: Path) -> None:
    run(setting)
    (store,) = (setting / "out").glob("judgements-*")
    store.write_bytes(b"[]\n" + store.read_bytes())
    with pytest.raises(UserError, match=r"damaged judgement \(.*line 1\)"):
        run(setting)


@pytest.mark.fast
def test_the_page_escapes_texts(setting: Path) -> None:
    lines = (setting / "list.jsonl").read_text().replace("yes", "<script>alert(1)</script> & yes")
    (setting / "list.jsonl").write_text(lines)
    run(setting, stub=Stub([*TEXTS[:3], "<b>", *TEXTS[4:]]))
    page = (setting / "out" / "index.html").read_text("utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert 'src="../good/u0.wav"' in page


@pytest.mark.fast
def test_command(setting: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The table, the JSON, and the exit code of a mistake."""
    wavs = [f"one={setting / 'good'}", f"two={setting / 'good'}"]
    command = ["higgs-eval", "--out", str(setting / "out"), "--asr", "stub", "--data", str(setting / "list.jsonl")]
    monkeypatch.setattr(cli, "load_judges", lambda _config: Judges(Stub(TEXTS)))
    monkeypatch.setattr("sys.argv", [*command, "--wavs", *wavs, "--language", "en", "--ceiling"])
    monkeypatch.setenv("COLUMNS", "200")
    cli.main()
    shown = capsys.readouterr().out
    assert "6 lines; rates in per cent" in shown and "two - one" in shown and "ceiling" in shown and "floor" in shown
    assert "0.00 [0.00, 0.00]" in shown and "normaliser omnivoice; asr stub 1" in shown
    monkeypatch.setattr("sys.argv", [*command, "--wavs", *wavs, "--json"])
    cli.main()
    assert json.loads(capsys.readouterr().out)["one"]["wer"]["mean"] == 0
    monkeypatch.setattr("sys.argv", [*command, "--model_path", "A"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and "--audio_tokenizer_path is missing" in capsys.readouterr().err


BUDGET = """
import re, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from helpers.stub_judge import TEXTS, Stub, run
began = time.process_time()
run(Path(sys.argv[1]), stub=Stub([" ".join([text] * 3) for text in TEXTS] * 200))
print(time.process_time() - began, int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
"""


def test_budget_of_1000_utterances(tmp_path: Path) -> None:
    """Judging without models, of clips of 4 s at 24 kHz, in less than 10 s and 500 MB.

    In seconds of one core, which are seconds on a machine that does nothing else: all of it runs on one thread.
    """
    samples = (np.random.default_rng(0).standard_normal(4 * 24_000) * 3000).astype(np.int16)
    (tmp_path / "good").mkdir()
    soundfile.write(tmp_path / "ref.wav", samples, 24_000)
    with (tmp_path / "list.jsonl").open("w") as file:
        for number in range(1000):
            samples[:200] = number % 6
            samples[200] = number
            soundfile.write(tmp_path / "good" / f"{number}.wav", samples, 24_000)
            line = {"id": str(number), "text": " ".join([TEXTS[number % 6]] * 3), "ref_audio": "ref.wav"}
            file.write(json.dumps(line | {"speaker": f"s{number % 20}"}) + "\n")
    command = [sys.executable, "-c", BUDGET, str(tmp_path), str(ROOT / "tests")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 10 and megabytes < 500

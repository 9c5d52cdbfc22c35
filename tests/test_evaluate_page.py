"""The page of an evaluation in a real browser: players play, the worst line is first, differences are marked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.browser import console_errors, open_browser, resize
from helpers.stub_judge import Stub, run, write_wav
from selenium.webdriver import Chrome

pytest.importorskip("rapidfuzz")
TEXTS = ("ذهب الولد إلى المدرسة", "the cat sat on the mat", "قرأت كتابا جديدا", "go home now", "نعم")
SAID = (*TEXTS, "ذهب البنت إلى المدرسة اليوم", "the dog sat on mat")
SECONDS = (1.0, 1.5, 0.5, 2.0, 1.2)
DURATIONS = """
const done = arguments[0];
Promise.all([...document.querySelectorAll("audio")].map((audio) => new Promise((resolve) => {
  audio.onloadedmetadata = () => resolve([decodeURI(audio.getAttribute("src")), audio.duration]);
  audio.onerror = () => resolve([audio.getAttribute("src"), audio.error.message]);
  audio.preload = "metadata"; audio.load();
}))).then(done);
"""
PLAYED = """
const done = arguments[0], audio = document.querySelector("audio");
audio.muted = true; audio.onended = () => done("ended"); audio.play().catch((error) => done(String(error)));
"""


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two systems; `tuned` misreads lines 0 and 1 and lacks line 3. The ids are Arabic, the folder has a space."""
    folder = tmp_path_factory.mktemp("page of an evaluation")
    write_wav(folder / "voice.wav", 0)
    lines = [{"id": f"سطر {i}", "text": text, "ref_audio": "voice.wav"} for i, text in enumerate(TEXTS)]
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number, seconds in enumerate(SECONDS):
        write_wav(folder / "base" / f"سطر {number}.wav", number, seconds=seconds)
        heard = {0: 5, 1: 6}.get(number, number)
        if number != 3:
            write_wav(folder / "tuned" / f"سطر {number}.wav", heard, voice=9, seconds=seconds)
    result = run(folder, ("base", "tuned"), Stub(SAID))
    lines = [json.loads(line) for line in (folder / "out" / "utterances.jsonl").read_text("utf-8").splitlines()]
    return {"page": folder / "out" / "index.html", "result": result, "lines": lines}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser: Chrome, evaluation: dict[str, Any]) -> Chrome:
    resize(browser, 1400)
    browser.get(evaluation["page"].as_uri())
    return browser


def each(page: Chrome, selector: str, expression: str) -> list[Any]:
    """A script's value for each element of a selector."""
    return page.execute_script(
        f"return [...document.querySelectorAll(arguments[0])].map((e) => {expression})", selector
    )


@pytest.mark.fast
def test_an_evaluation_without_other_voices_has_no_floor_of_them(evaluation: dict[str, Any]) -> None:
    assert evaluation["result"]["floor"]["sim"] is None
    assert evaluation["result"]["floor"]["cer"]["mean"] > 0.6


def test_every_player_plays_its_file(page: Chrome) -> None:
    found: list[tuple[str, float]] = page.execute_async_script(DURATIONS)
    length = {f"سطر {number}.wav": seconds for number, seconds in enumerate(SECONDS)} | {"voice.wav": 1.0}
    assert len(found) == 5 * 3 - 1  # reference, base, tuned; one is missing
    for source, duration in found:
        assert duration == pytest.approx(length[source.rpartition("/")[2]], abs=0.01)
    assert page.execute_async_script(PLAYED) == "ended"
    assert not console_errors(page)


def test_the_worst_line_is_first(page: Chrome, evaluation: dict[str, Any]) -> None:
    worst: dict[str, float] = {}
    for line in evaluation["lines"]:
        worst[line["id"]] = max(worst.get(line["id"], 0), line["cer"])
    shown = each(page, ".lines td:first-child b", "e.textContent")
    assert shown[0] == "سطر 3" and len(shown) == len(TEXTS)
    assert [worst[line] for line in shown] == sorted(worst.values(), reverse=True)


def test_differences_are_marked_in_the_direction_of_the_text(page: Chrome, evaluation: dict[str, Any]) -> None:
    for kind, at in (("del", 1), ("ins", 2)):
        marked = each(page, f".lines {kind}", "e.textContent")
        differing = [part[at] for line in evaluation["lines"] for part in line["differences"] if part[0] != "equal"]
        assert sorted(marked) == sorted(text for text in differing if text)
        background = set(each(page, f".lines {kind}", "getComputedStyle(e).backgroundColor"))
        assert len(background) == 1 and background != {"rgba(0, 0, 0, 0)"}
    for text, direction in each(page, ".lines .text", "[e.textContent, getComputedStyle(e).direction]"):
        assert direction == ("rtl" if any("\u0600" <= letter <= "\u06ff" for letter in text) else "ltr")


@pytest.mark.parametrize("width", [1400, 390])
def test_nothing_is_wider_than_the_window(page: Chrome, width: int) -> None:
    """Tables that are scroll by themselves; on a phone each line stands below the other, under its system's name."""
    resize(page, width)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    names = each(page, ".lines .name", "e.offsetHeight > 0 ? e.textContent : ''")
    assert set(names) == ({"base", "tuned"} if width == 390 else {""})
    for text in ("WER", "floor", "+", "deleted"):
        assert text in page.execute_script("return document.body.textContent")

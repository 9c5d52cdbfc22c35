"""The report and the served page in a real browser: they play, search, sort and page; data is never markup."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browser import Chrome, console_errors, open_browser, resize, wait
from helpers.inspect_runs import write_run
from helpers.inspect_sets import HOSTILE, SampleMaker, write_set
from higgs_tune.inspect import cli
from higgs_tune.inspect.checkpoints import Checkpoints
from higgs_tune.inspect.view import positions
from higgs_tune.inspect.web.pages import folded
from higgs_tune.inspect.web.run import read_run
from higgs_tune.inspect.web.serve import open_server
from higgs_tune.shards.reader import ShardSet
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

ROWS = "[...document.querySelectorAll('#samples tbody tr[data-key]')]"
COUNT = 60


@pytest.fixture(scope="module")
def made(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Sixty samples; some hold markup wherever a sample can hold text."""
    maker = SampleMaker(toy, frames=10)
    samples = [maker(number, speaker=f"voice{number % 7}v") for number in range(COUNT - 3)]
    for number in range(COUNT - 3, COUNT):
        said = [{"type": "text", "text": HOSTILE}, {"type": "audio", "audio_url": f"{HOSTILE}.wav"}]
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        samples.append(
            maker(number, id=f"{number}{HOSTILE}", speaker=HOSTILE, misc={HOSTILE: HOSTILE}, messages=messages)
        )
    return write_set(tmp_path_factory.mktemp("set"), toy, [samples])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "out", ["clip-000000", "clip-000001"], HOSTILE)


@pytest.fixture(scope="module")
def report(made: ShardSet, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    cli.ReportCommand(str(made.folder), path, run_dirs=(run_folder,)).run()
    return path


@pytest.fixture(scope="module")
def server(made: ShardSet, run_folder: Path) -> Iterator[str]:
    server = open_server(made, Checkpoints(made.provenance), [read_run(run_folder)], audio=True, port=0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(params=["report", "served"])
def page(browser: Chrome, request: pytest.FixtureRequest) -> Chrome:
    """The page, freshly loaded: from disk, and from the server."""
    report = request.param == "report"
    return load(browser, request.getfixturevalue("report").as_uri() if report else request.getfixturevalue("server"))


def load(browser: Chrome, url: str, width: int = 1400, **options: bool) -> Chrome:
    resize(browser, width, **options)
    browser.get("about:blank")
    console_errors(browser)
    browser.get(url)
    wait(lambda: keys(browser), "rows")
    return browser


def keys(page: Chrome) -> list[str]:
    return page.execute_script(f"return {ROWS}.map((row) => row.dataset.key)")


def status(page: Chrome) -> str:
    return page.execute_script("return document.getElementById('status').textContent")


def search(page: Chrome, text: str) -> None:
    page.find_element("id", "search").send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE, text)


def clips(page: Chrome, place: str) -> list[dict[str, Any]]:
    script = f"""return [...document.querySelectorAll({json.dumps(place + " audio")})].map((audio) =>
        ({{duration: audio.duration, error: audio.error?.message ?? null, label: audio.getAttribute("aria-label")}}))"""
    return page.execute_script(script)


def loaded(page: Chrome, place: str) -> list[dict[str, Any]]:
    """Every player of a place, once all have a duration."""
    return wait(lambda: (shown := clips(page, place)) and all(c["duration"] for c in shown) and shown, "players", 60)


def test_players_have_the_length_of_their_codes(page: Chrome, made: ShardSet) -> None:
    shown = loaded(page, "#samples")
    assert len(shown) == 50
    frames = [made.read(row).segment_frames for row in range(25)]
    expected = [count / 25 for sample in frames for count in sample]
    for clip, seconds in zip(shown, expected, strict=True):
        assert clip["error"] is None
        assert clip["duration"] == pytest.approx(seconds, abs=0.03)
        assert clip["label"]
    generated = loaded(page, "#run")
    assert [round(clip["duration"], 1) for clip in generated] == [1.0] * 8
    assert console_errors(page) == []


def test_a_player_plays_alone(page: Chrome) -> None:
    loaded(page, "#samples")
    audios = page.find_elements("css selector", "#samples audio")
    for audio in audios[:2]:
        page.execute_script("arguments[0].loop = true; arguments[0].play()", audio)
        wait(lambda audio=audio: page.execute_script("return arguments[0].currentTime > 0", audio), "sound")
    assert page.execute_script("return [arguments[0].paused, arguments[1].paused]", *audios[:2]) == [True, False]


@pytest.mark.fast
def test_search(page: Chrome, made: ShardSet) -> None:
    texts = [folded(json.dumps(made.read(row).meta["messages"], ensure_ascii=False)) for row in range(COUNT)]
    every = [key.decode() for key in made.index["key"].tolist()]
    said = "السلام عليكم"  # without the vowel signs of the data
    greetings = [every[row] for row, text in enumerate(texts) if all(word in text for word in said.split())]
    assert 0 < len(greetings) < 25
    searches = [
        ("clip-000042", ["clip-000042"]),
        ("VOICE3v clip", [key for number, key in enumerate(every[:-3]) if number % 7 == 3]),
        (said, greetings),
        ("<script>", every[-3:]),
        ("nothing holds this", []),
        ("", every),
    ]
    for text, expected in searches:
        search(page, text)
        wait(lambda e=expected: keys(page) == e[:25], text)
        assert (f"of {len(expected)} samples" if expected else "no sample") in status(page)


def page_of(page: Chrome, rows: int) -> None:
    script = "const s = document.getElementById('count'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))"
    page.execute_script(script, rows)


def test_sort(page: Chrome, made: ShardSet) -> None:
    index = made.index
    # as numbers: speakers are numbered in the order of their names, keys stand in theirs
    orders = {
        "key": np.argsort(np.argsort(index["key"])).tolist(),
        "seconds": index["seconds"].tolist(),
        "positions": index["tokens"].tolist(),
        "speaker": index["speaker"].tolist(),
        "split": index["split"].tolist(),
    }
    page_of(page, 10)
    for name, values in orders.items():
        for sign, order in ((1, "ascending"), (-1, "descending")):
            page.find_element("css selector", f'#samples [data-sort="{name}"] button').click()
            rows = sorted(range(COUNT), key=lambda row, v=values, s=sign: s * v[row])  # equal values in stored order
            expected = [index["key"].item(row).decode() for row in rows[:10]]
            wait(lambda e=expected: keys(page) == e, f"{name}, {order}")
            head = page.find_element("css selector", f'#samples [data-sort="{name}"]')
            assert head.get_attribute("aria-sort") == order


def test_pages(page: Chrome, made: ShardSet) -> None:
    every = [key.decode() for key in made.index["key"].tolist()]

    def go(text: str, first: int) -> None:
        page.find_element("xpath", f"//nav[@class='pager']/button[text()='{text}']").click()
        wait(lambda: keys(page) == every[first : first + 25], f"the page from {first}")
        assert status(page).startswith(f"{first + 1} to {min(first + 25, COUNT)} of {COUNT}")

    for text, first in (("Next", 25), ("Next", 50), ("Previous", 25), ("Last", 50), ("First", 0)):
        go(text, first)
    page_of(page, 100)
    wait(lambda: keys(page) == every, "one long page")


def open_sample(page: Chrome, key: str) -> None:
    search(page, key)
    wait(lambda: len(keys(page)) == 1, key)
    page.find_element("css selector", "#samples button.open").click()
    wait(lambda: page.find_elements("css selector", ".detail .segment"), "details")


def test_the_sequence_is_the_one_that_is_trained_on(page: Chrome, made: ShardSet) -> None:
    """The page works the delay pattern out by itself; it must equal what Python expands."""
    open_sample(page, "clip-000011")
    page.execute_script("document.querySelector('.sequence-box').open = true")
    wait(lambda: page.find_elements("css selector", ".sequence tbody tr"), "the sequence")
    page.execute_script("document.querySelectorAll('.sequence .more button').forEach((button) => button.click())")
    rows = page.execute_script("""return [...document.querySelectorAll('.sequence tbody tr')]
        .map((row) => [...row.cells].map((cell) => cell.textContent))""")
    expected = []
    for one in positions(made.read(11), made.special_ids):
        label = "" if one.modality != "text" else "·" if one.text_label is None else str(one.text_label)
        codes = [str(code) for code in one.codes] if one.codes else [""] * 8
        labels = ["·" if code < 0 else str(code) for code in one.audio_labels] if one.audio_labels else [""] * 8
        token = "" if one.token is None else str(one.token)
        expected.append([str(one.number), one.modality.replace("_", " "), token, label, *codes, *labels])
    assert [[*row[:3], *row[4:]] for row in rows] == expected


def test_details_draw(browser: Chrome, report: Path) -> None:
    page = load(browser, report.as_uri())
    open_sample(page, "clip-000003")
    page.execute_script("document.querySelectorAll('.pattern').forEach((one) => { one.open = true })")
    painted = """return [...document.querySelectorAll('.detail canvas')].map((canvas) => {
        const {width, height} = canvas;
        const copy = new OffscreenCanvas(width, height).getContext('2d', {willReadFrequently: true});
        copy.drawImage(canvas, 0, 0);
        const pixels = copy.getImageData(0, 0, width, height).data;
        return [canvas.getAttribute('aria-label'), new Set(new Uint32Array(pixels.buffer)).size];
    })"""
    drawn = wait(lambda: (got := page.execute_script(painted)) and min(c for _, c in got) > 1 and got, "pictures")
    names = [label.split()[0] for label, _ in drawn]
    assert names == ["Waveform", "Spectrogram,", "Codes", "Delayed", "Labels"] * 2
    labels = [colors for name, (_, colors) in zip(names, drawn, strict=True) if name == "Labels"]
    assert labels[0] == 2 and labels[1] > 8, "the reference has no label: empty cells and the lines between them"
    assert console_errors(page) == []


def test_charts_draw(page: Chrome) -> None:
    names = wait(
        lambda: page.execute_script("return [...document.querySelectorAll('.chart')].map((c) => c.id)"), "charts"
    )
    assert {"chart-seconds", "chart-rate", "chart-entropy", "chart-codes", "chart-run-loss", "chart-run-wait"} <= set(
        names
    )
    for name in names:
        page.execute_script("document.getElementById(arguments[0]).scrollIntoView()", name)
        wait(lambda name=name: page.find_elements("css selector", f"#{name} svg.main-svg"), name)
    page.execute_script("document.querySelector('#chart-run-loss details').open = true")
    wait(lambda: page.find_elements("css selector", "#chart-run-loss td"), "numbers")
    assert console_errors(page) == []


def test_data_is_never_markup(page: Chrome, report: Path) -> None:
    """Markup in texts, speakers, sources, rejects, run files shows as itself, everywhere, and does nothing."""
    open_sample(page, "57_script")
    page.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    page.execute_script("document.querySelectorAll('.chart').forEach((one) => one.scrollIntoView())")
    wait(lambda: HOSTILE in page.execute_script("return document.querySelector('.detail').textContent"), "the text")
    assert page.execute_script("return window.hacked ?? null") is None
    foreign = "return document.querySelectorAll('img, iframe, object, embed, form[action], main script').length"
    assert page.execute_script(foreign) == 0
    for place in (
        "#samples td.text",
        "#samples td.speaker",
        ".detail .segment figcaption",
        "#run .generated",
        "#run dl",
    ):
        shown = page.execute_script("return document.querySelector(arguments[0]).textContent", place)
        assert HOSTILE in shown, place
    label = "return [...document.querySelectorAll('#chart-speakers .ytick text')].map((t) => t.textContent)"
    assert any("<script>" in text for text in wait(lambda: page.execute_script(label), "speakers"))
    page.execute_script(
        "document.head.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 2'}))"
    )
    assert page.execute_script("return window.hacked ?? null") is None, (
        "the policy lets only the page's own scripts run"
    )
    assert HOSTILE not in report.read_text()


def test_nothing_is_loaded_from_elsewhere(page: Chrome) -> None:
    loaded(page, "#samples")
    names = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(("blob:", "data:", page.current_url)) for name in names)


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_layout(browser: Chrome, report: Path, width: int, dark: bool) -> None:
    """Nothing is wider than the page, the theme is the system's or the reader's, and contrast holds."""
    page = load(browser, report.as_uri(), width, dark=dark)
    open_sample(page, "57_script")
    page.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    loaded(page, "#samples")
    sizes = page.execute_script("const d = document.documentElement; return [d.scrollWidth, d.clientWidth, innerWidth]")
    assert sizes[0] <= sizes[1] <= sizes[2] == width
    wide = """return [...document.querySelectorAll('main *')]
        .filter((node) => !node.closest('.scroll, .plot, .hidden'))
        .filter((node) => node.getBoundingClientRect().right > innerWidth + 1).map((node) => node.outerHTML)"""
    assert page.execute_script(wide) == []
    bright = "return getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)[0]"
    assert (page.execute_script(bright) < 64) == dark
    theme = "const s = document.getElementById('theme'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))"
    page.execute_script(theme, "light" if dark else "dark")
    assert (page.execute_script(bright) < 64) != dark


def test_keyboard_and_screen_reader(browser: Chrome, report: Path) -> None:
    page = load(browser, report.as_uri())
    ActionChains(page).send_keys(Keys.TAB).perform()
    assert page.switch_to.active_element.text == "Skip to the samples"
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.execute_script(outline) == "solid"
    opener = page.find_element("css selector", "#samples button.open")
    page.execute_script("arguments[0].focus()", opener)
    for expanded in ("true", "false"):
        ActionChains(page).send_keys(Keys.ENTER).perform()
        assert opener.get_attribute("aria-expanded") == expanded
    named = "audio, canvas, input, select, button, [role=img], [role=region], nav"
    nameless = """return [...document.querySelectorAll(arguments[0])]
        .filter((node) => !(node.getAttribute('aria-label') || node.labels?.length || node.textContent.trim()))
        .map((node) => node.outerHTML.slice(0, 80))"""
    assert page.execute_script(nameless, named) == []
    assert page.execute_script("return document.documentElement.lang") == "en"
    levels = page.execute_script("return [...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_right_to_left_text(browser: Chrome, report: Path) -> None:
    page = load(browser, report.as_uri())
    direction = "return getComputedStyle(document.querySelector(arguments[0])).direction"
    assert page.execute_script(direction, "#samples td.text .said") == "rtl"
    assert page.execute_script(direction, "#samples tbody th bdi") == "ltr"


def test_two_thousand_samples_stay_fluent(browser: Chrome, toy: Path, tmp_path: Path) -> None:
    maker = SampleMaker(toy, frames=4)
    made = write_set(tmp_path / "set", toy, [[maker(number) for number in range(2000)]])
    cli.ReportCommand(str(made.folder), tmp_path / "report.html", no_audio=True).run()
    assert (tmp_path / "report.html").stat().st_size < 25e6
    page = load(browser, (tmp_path / "report.html").as_uri())
    assert "of 2,000" in status(page)
    sort = """
        const [done] = arguments, began = performance.now();
        new MutationObserver(() => done(performance.now() - began)).observe(
            document.querySelector('#samples tbody'), {childList: true});
        document.querySelector('#samples [data-sort="seconds"] button').click();"""
    took_ms = [page.execute_async_script(sort) for _ in range(5)]
    assert min(took_ms) < 1000, "the least of five, as other processes may hold the machine up"
    assert len(keys(page)) == 25
    assert console_errors(page) == []

"""Review by people: what the server writes and refuses, and the page in a real browser, up to the rerun."""

from __future__ import annotations

import http.client
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from helpers.browser import console_errors, open_browser, resize, wait
from helpers.prepared import make_prepared
from higgs_tune.preprocess.prepare import review as module
from higgs_tune.preprocess.prepare.records import DECISIONS, Decision, Segment, read_decisions
from higgs_tune.preprocess.prepare.review import append_decisions
from higgs_tune.preprocess.prepare.review_server import HOST, MAX_BODY, ReviewServer, open_review
from higgs_tune.shards.errors import UserError
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Path, list[Segment]]:
    return tmp_path / "prepared", make_prepared(tmp_path / "prepared")


@pytest.fixture
def server(prepared: tuple[Path, list[Segment]]) -> Iterator[ReviewServer]:
    server = open_review(prepared[0], 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server: ReviewServer, target: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    """Status and body of a GET, or with a body of the POST that the page sends."""
    connection = http.client.HTTPConnection(HOST, server.port, timeout=60)
    if body is None:
        connection.request("GET", target, headers={k.replace("_", "-"): v for k, v in headers.items()})
    else:
        given = {"X-Token": server.review.token, "Content-Type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", target, data, {name: value for name, value in given.items() if value})
    answer = connection.getresponse()
    answered = answer.status, answer.read()
    connection.close()
    return answered


def decide(server: ReviewServer, **given: Any) -> tuple[int, bytes]:
    return ask(server, "/api/decide", given)


@pytest.mark.fast
def test_decisions_are_lines_of_the_file(prepared: tuple[Path, list[Segment]], server: ReviewServer) -> None:
    folder, (one, two, three, *_) = prepared
    assert decide(server, decisions=[{"id": one.id, "verdict": "reject"}])[0] == 200
    assert decide(server, decisions=[{"id": one.id, "verdict": "accept", "text": " a  b "}])[0] == 200
    assert decide(server, decisions=[{"id": two.id, "speaker": "ليلى"}, {"id": three.id, "speaker": "ليلى"}])[0] == 200
    assert (folder / DECISIONS).read_bytes().count(b"\n") == 4
    assert read_decisions(folder) == {
        one.id: Decision(one.id, "accept", "a b"),
        two.id: Decision(two.id, speaker="ليلى"),
        three.id: Decision(three.id, speaker="ليلى"),
    }
    listed = json.loads(ask(server, "/api/segments?show=decided")[1])
    assert [(row["id"], row["verdict"], row["speaker"]) for row in listed["rows"]] == [
        (one.id, "accept", one.speaker), (two.id, None, "ليلى"), (three.id, None, "ليلى")]  # fmt: skip


def test_merged_speakers_have_one_name(prepared: tuple[Path, list[Segment]], server: ReviewServer) -> None:
    """Every segment of both, so that another numbering of clusters changes nothing."""
    folder, segments = prepared
    assert decide(server, merge=["speaker-0", "speaker-2"], speaker="narrator")[0] == 200
    merged = {s.id for s in segments if s.speaker in ("speaker-0", "speaker-2")}
    assert {one.id for one in read_decisions(folder).values() if one.speaker == "narrator"} == merged
    assert set(json.loads(ask(server, "/api/segments")[1])["speakers"]) == {"narrator", "speaker-1"}


@pytest.mark.fast
@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[]", b"{}", b'{"decisions": []}', b'{"decisions": [1]}', b"[" * 100_000,
        {"decisions": [{"id": "no such", "verdict": "accept"}]},
        {"decisions": [{"id": "ID"}]},
        {"decisions": [{"id": "ID", "verdict": "maybe"}]},
        {"decisions": [{"id": "ID", "verdict": "accept", "path": "/etc/passwd"}]},
        {"decisions": [{"id": "ID", "text": "  "}]},
        {"decisions": [{"id": "ID", "text": 5}]},
        {"decisions": [{"id": "ID", "text": "\ud800"}]},
        {"decisions": [{"id": "ID", "text": "a" * 20_001}]},
        {"decisions": [{"id": "ID", "speaker": "speaker-001"}]},
        {"decisions": [{"id": "ID", "verdict": "accept"}, {"id": "ID", "speaker": ""}]},
        {"merge": ["speaker-0"], "speaker": "x"},
        {"merge": ["speaker-0", "nobody"], "speaker": "x"},
        {"merge": ["speaker-0", "speaker-1"]},
        {"merge": "speaker-0", "speaker": "x"},
    ],
)  # fmt: skip
def test_bad_decisions_are_refused_whole(prepared: tuple[Path, list[Segment]], server: ReviewServer, body: Any) -> None:
    folder, segments = prepared
    if isinstance(body, dict):
        body = json.loads(json.dumps(body).replace('"ID"', json.dumps(segments[0].id)))
    assert ask(server, "/api/decide", body)[0] == 400
    assert not (folder / DECISIONS).exists()


@pytest.mark.fast
def test_other_origins_decide_and_read_nothing(prepared: tuple[Path, list[Segment]], server: ReviewServer) -> None:
    folder, segments = prepared
    good = {"decisions": [{"id": segments[0].id, "verdict": "reject"}]}
    for headers in (
        {"X_Token": ""}, {"X_Token": "guess"}, {"X_Token": "ü"}, {"Host": "example.com"},
        {"Host": f"example.com:{server.port}"},
        {"Origin": "http://example.com"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"}, {"Content_Type": "text/plain"}, {"Content_Length": "-1"},
        {"Content_Length": str(MAX_BODY + 1)},
    ):  # fmt: skip
        assert ask(server, "/api/decide", good, **headers)[0] in (400, 403, 413, 421), headers
    for headers in ({"Host": "example.com"}, {"Origin": "http://example.com"}, {"Sec_Fetch_Site": "cross-site"}):
        assert ask(server, "/", **headers)[0] in (403, 421)
    for target in ("/clip/../config.json", "/clip/%2e%2e/config.json", "/clip/no", "/decisions.jsonl", "/api/decide",
                   "/api/segments?count=101", "/api/segments?offset=-1", "/api/segments?offset=x"):  # fmt: skip
        assert ask(server, target)[0] in (400, 404), target
    assert not (folder / DECISIONS).exists()


def test_a_clip_is_the_segments_sound(prepared: tuple[Path, list[Segment]], server: ReviewServer) -> None:
    _, segments = prepared
    status, data = ask(server, f"/clip/{segments[3].id}")
    wave_S, rate = soundfile.read(io.BytesIO(data))
    assert status == 200 and len(wave_S) / rate == pytest.approx(4.0, abs=0.01)
    Path(segments[0].recording).unlink()
    assert ask(server, f"/clip/{segments[0].id}")[0] == 404


def test_a_full_disk_leaves_the_file_as_it_was(
    prepared: tuple[Path, list[Segment]], server: ReviewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, segments = prepared
    append_decisions(folder, [Decision(segments[0].id, "accept")])
    before = (folder / DECISIONS).read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fail)
    status, said = decide(server, decisions=[{"id": segments[1].id, "verdict": "reject"}])
    assert status == 507 and b"No space" in said
    assert (folder / DECISIONS).read_bytes() == before


@pytest.mark.fast
def test_what_a_power_cut_left_is_dropped(prepared: tuple[Path, list[Segment]]) -> None:
    folder, segments = prepared
    append_decisions(folder, [Decision(segments[0].id, "accept")])
    whole = (folder / DECISIONS).read_bytes()
    (folder / DECISIONS).write_bytes(whole + b'{"id": "half')
    open_review(folder, 0).server_close()
    assert (folder / DECISIONS).read_bytes() == whole


@pytest.mark.fast
def test_a_taken_port_and_no_folder_are_named(tmp_path: Path, server: ReviewServer) -> None:
    with pytest.raises(UserError, match="cannot listen"):
        open_review(server.review.folder, server.port)
    with pytest.raises(UserError, match="segments"):
        open_review(tmp_path / "nothing", 0)


def test_a_person_decides_in_the_browser(
    prepared: tuple[Path, list[Segment]], server: ReviewServer, tmp_path: Path
) -> None:
    """Verdicts, a text (which a verdict doesn't lose), split and merged speakers; nothing of the data runs; a narrow
    page does not overflow."""
    folder, segments = prepared
    with open_browser(tmp_path / "profile") as browser:
        resize(browser, 390)
        browser.get(f"http://{HOST}:{server.port}/")
        rows = wait(lambda: browser.find_elements(By.CSS_SELECTOR, ".row"), "the list")
        assert len(rows) == 25 and browser.title == "Prepared recordings"
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        resize(browser, 1400)
        _click(browser, segments[1], ".no")
        wait(lambda: read_decisions(folder).get(segments[1].id), "the verdict")
        text = _row(browser, segments[2]).find_element(By.TAG_NAME, "textarea")
        text.clear()
        text.send_keys("نص آخر")
        _click(browser, segments[2], ".yes")
        pressed = f'[data-id="{segments[2].id}"] .yes[aria-pressed=true]'
        wait(lambda: browser.find_elements(By.CSS_SELECTOR, pressed), "the verdict")
        _click(browser, segments[2], ".save")
        wait(lambda: read_decisions(folder)[segments[2].id].text, "the text")
        for segment in segments[3:5]:
            _row(browser, segment).find_element(By.CSS_SELECTOR, "input[type=checkbox]").click()
        browser.find_element(By.ID, "new-name").send_keys("guest")
        browser.find_element(By.ID, "assign").click()
        wait(lambda: "guest" in _row(browser, segments[4]).text, "the new speaker")
        browser.find_element(By.CSS_SELECTOR, "#review summary").click()
        choice = Select(browser.find_element(By.ID, "merge-from"))
        for name in ("speaker-1", "speaker-2"):
            choice.select_by_value(name)
        browser.find_element(By.ID, "merge-name").send_keys("narrator")
        browser.find_element(By.ID, "merge").click()
        wait(lambda: len(read_decisions(folder)) == 4 + 24, "the merged speakers")
        wait(lambda: browser.find_elements(By.CSS_SELECTOR, "#merge-from [value=narrator]"), "the new list")
        play = "const a = document.querySelector('.row audio'); a.play(); return a.currentTime > 0"
        wait(lambda: browser.execute_script(play), "sound")
        assert browser.title == "Prepared recordings" and not console_errors(browser)
    decided = read_decisions(folder)
    assert decided[segments[1].id].verdict == "reject"
    assert (decided[segments[2].id].verdict, decided[segments[2].id].text) == ("accept", "نص آخر")
    assert {decided[s.id].speaker for s in segments[3:5]} == {"guest"}
    assert {decided[s.id].speaker for s in segments[12:]} == {"narrator"}


def _row(browser: Chrome, segment: Segment) -> Any:
    return browser.find_element(By.CSS_SELECTOR, f'[data-id="{segment.id}"]')


def _click(browser: Chrome, segment: Segment, button: str) -> None:
    _row(browser, segment).find_element(By.CSS_SELECTOR, button).click()

"""The report of a prepared folder: what it says is what the segments say, nothing of the data is markup, it plays."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.browser import console_errors, open_browser, resize, wait
from helpers.prepared import MARKUP, make_prepared
from higgs_tune.preprocess.prepare.config import PrepareConfig
from higgs_tune.preprocess.prepare.decide import decide
from higgs_tune.preprocess.prepare.records import Decision, Segment
from higgs_tune.preprocess.prepare.report import read_prepared, write_report
from higgs_tune.preprocess.prepare.thresholds import METRICS, edges_of
from higgs_tune.shards.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Segment]]:
    folder = tmp_path_factory.mktemp("report") / "prepared"
    return folder, make_prepared(folder)


class Page(HTMLParser):
    """Tags, attributes that run something, and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.running, self.text = set[str](), list[str](), ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.running += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def decided(
    segments: list[Segment], config: PrepareConfig, decisions: dict[str, Decision] | None = None
) -> list[Segment]:
    return decide(segments, None, config, decisions or {}, config.language, str)


@pytest.mark.fast
def test_costs_are_what_other_thresholds_keep(prepared: tuple[Path, list[Segment]]) -> None:
    """Of every threshold, against a decision with the other value."""
    config = read_prepared(prepared[0]).config
    decisions = {prepared[1][5].id: Decision(prepared[1][5].id, "accept"),
                 prepared[1][8].id: Decision(prepared[1][8].id, "reject")}  # fmt: skip
    segments = decided(prepared[1], config, decisions)
    before = sum(segment.milliseconds for segment in segments if segment.keep)
    edges = edges_of(segments, config)
    assert [edge.metric for edge in edges] == list(METRICS)
    checked = 0
    for edge in edges:
        for cost in edge.costs:
            others = decided(segments, replace(config, **{edge.metric.option: cost.value}), decisions)
            after = sum(segment.milliseconds for segment in others if segment.keep)
            assert round(1000 * cost.seconds) == after - before, (edge.metric.option, cost.value)
            checked += cost.segments != 0
    assert checked > 8


@pytest.mark.fast
def test_edges_are_the_nearest_on_either_side(prepared: tuple[Path, list[Segment]]) -> None:
    config = read_prepared(prepared[0]).config
    segments = decided(prepared[1], config)
    for edge in edges_of(segments, config):
        if edge.metric.option == "pace_fences":
            continue
        values = [[getattr(segment, edge.metric.field) for segment in side] for side in (edge.kept, edge.rejected)]
        sign, bound = edge.metric.sign, edge.threshold
        every = [s for s in segments if s.keep]
        nearest = sorted((getattr(s, edge.metric.field) for s in every), key=lambda v: abs(v - bound))[:3]
        assert values[0] == nearest and all((v - bound) * sign >= 0 for v in values[0])
        assert all((v - bound) * sign < 0 for v in values[1])
        total = sum(edge.histogram.kept) + sum(edge.histogram.rejected)
        assert total == pytest.approx(sum(s.milliseconds for s in segments) / 1000)


@pytest.mark.fast
def test_the_page_is_one_safe_file(prepared: tuple[Path, list[Segment]]) -> None:
    text = write_report(prepared[0]).read_text(encoding="utf-8")
    assert write_report(prepared[0]).read_text(encoding="utf-8") == text
    page = Page(text)
    assert not page.tags & {"script", "img", "link", "iframe", "object"} and not page.running
    assert MARKUP in page.text and "default-src &#39;none&#39;" in text
    assert not re.search(r"(src|href)=\"(?!data:audio/flac|#)", text)
    assert "−" in page.text and "3 → 2.8" in page.text and "broken.wav" in page.text


@pytest.mark.fast
def test_differences_are_marked_in_the_texts_direction(prepared: tuple[Path, list[Segment]]) -> None:
    text = write_report(prepared[0]).read_text(encoding="utf-8")
    agreement = text.split('id="agreement"')[1].split("</section>")[0]
    assert re.search(r'<p class="said" dir="auto">[^<]*(?:<ins>|<del>)', agreement)


@pytest.mark.fast
def test_recordings_that_are_gone_cost_their_players_only(tmp_path: Path) -> None:
    segments = make_prepared(tmp_path / "prepared", 2, 8)
    Path(segments[0].recording).unlink()
    text = write_report(tmp_path / "prepared").read_text(encoding="utf-8")
    assert "no audio" in text and "<audio" in text


@pytest.mark.fast
def test_an_empty_or_foreign_folder(tmp_path: Path) -> None:
    make_prepared(tmp_path / "empty", 1, 0)
    assert "Nothing was measured" in write_report(tmp_path / "empty").read_text(encoding="utf-8")
    with pytest.raises(UserError):
        write_report(tmp_path)


def test_the_page_fits_and_plays(prepared: tuple[Path, list[Segment]], tmp_path: Path) -> None:
    """Wide and narrow, light and dark: no overflow, no error, sound."""
    path = write_report(prepared[0])
    with open_browser(tmp_path / "profile") as browser:
        colours = set()
        for width, dark in ((1400, False), (390, True)):
            resize(browser, width, dark=dark)
            browser.get(path.as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            colours.add(browser.execute_script("return getComputedStyle(document.body.parentElement).backgroundColor"))
        assert len(colours) == 2
        play = "const a = document.querySelector('audio'); a.play(); return a.currentTime > 0"
        wait(lambda: browser.execute_script(play), "sound")
        assert not console_errors(browser)

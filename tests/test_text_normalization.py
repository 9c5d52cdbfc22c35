"""Normalization of texts, and what --check finds doubtful in them."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from pathlib import Path

import pytest
from conftest import EXAMPLES, ROOT, preprocess
from higgs_tune.preprocess.check_stats import findings_table
from higgs_tune.preprocess.text_findings import DESCRIPTIONS, excerpt, text_findings
from higgs_tune.preprocess.text_normalization import normalize_text
from higgs_tune.shards.reader import ShardSet

BASE = "إنّ السَّلامَ لا يُؤجَّلُ"
NAMED = {
    "mojibake": ["Ø§Ù„Ø³Ù„Ø§Ù…", "ط§ظ„ط³ظ„ط§ظ…", "cafÃ© noir", "РџСЂРёРІРµС‚", "donâ€™t"],
    "replacement_character": ["السل\ufffdم", "????? ???"],
    "html_entities": ["السلام &amp; التحية", "&#1575;"],
    "escape_literals": [r"\u0627\u0644", r"one\ntwo"],
    "tags": ["<think>السلام", "<audio>a", "a<br/>b", "<|im_start|>a"],
    "urls": ["see https://example.org", "www.example.org", "me@example.org"],
    "doubled_quotes": ['"He said ""no"" twice."'],
    "presentation_forms": ["ﻻ ﻳﺆﺟﻞ", "ﷲ أعلم"],
    "tatweel": ["الســلام"],
    "bidi_marks": ["\u202b" + BASE + "\u202c", "السلام\u200f", "\u2067a\u2069"],
    "invisible_characters": ["السلا\u200dم", "ال\u200cسلام", "\ufeffa", "السل\u00adام", "نعم\U000e0041"],
    "unusual_spaces": ["a\u00a0b", "a\u3000b", "a\tb"],
    "line_breaks": ["a\r\nb", "a\rb", "a\u2028b", "a\nb"],
    "decomposed": [unicodedata.normalize("NFD", "إن")],
    "mark_order": ["السّ\u064eلام".replace("\u0651\u064e", "\u0651\u064e")],
    "symbols": ["نعم 👍", "۞"],
    "private_characters": ["السلام\ue000", "a\u0378"],
    "visual_order": [BASE[::-1], "ةملك", ".هذا بيتنا"],
}
CLEAN = [
    BASE,
    "il dit : « voilà…»",  # as bytes of Windows-1252 it begins like UTF-8, and is none
    "نعم، لا؛ لماذا؟",
    "٥٠٪",
    "هٰذا",
    "voilà déjà là-bas où ÀÉ",
    "گفتگو چه ژرف",
    "اُردو زبان میں ٹ ڈ",
    "Straße 5 < 6 & 7",
]


@pytest.mark.parametrize("name", NAMED)
def test_each_kind_is_found(name: str) -> None:
    for text in NAMED[name]:
        assert name in text_findings(text), text


def test_good_texts_have_no_findings() -> None:
    with (EXAMPLES.parent / "transcripts.csv").open() as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    assert [(text, text_findings(text)) for text in texts + CLEAN if text_findings(text)] == []


def test_a_set_is_to_have_one_form_of_digits_and_letters() -> None:
    samples = [("a", ["سنة ٢٠٢٤"]), ("b", ["سنة ٢٠٢٥"]), ("c", ["سنة 2024"]), ("d", ["year 2024"]), ("e", ["یوم کبیر"])]
    samples += [(f"f{i}", ["يوم كبير"]) for i in range(2)]
    table = findings_table(samples)
    assert table["mixed_digits"] == {"samples": 1, "examples": [{"id": "c", "text": "سنة 2024"}]}
    assert table["mixed_letters"]["examples"][0]["id"] == "e"


def test_what_is_shown_has_no_hidden_characters() -> None:
    assert all(excerpt(text).isprintable() for texts in NAMED.values() for text in texts)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ﻻ ﻳﺆﺟﻞ ﷲ", "لا يؤجل الله"),
        ("الســـلام", "السلام"),
        ("\u202bالسلا\u200dم\u202c\ufeff", "السلام"),
        (" سطر\r\nثان\u00a0 آخر ", "سطر ثان آخر"),
        ("٢٠٢٤ و۲۰۲۴", "2024 و2024"),
        ("ﱠ", "\u064e\u0651"),  # a mark's shape has a space in its compatible form
        ("إنّ أبٌ ؤ ئ ى ة ء «؟»", "إنّ أبٌ ؤ ئ ى ة ء «؟»"),  # what is spoken stays
    ],
)
def test_arabic_rules(before: str, after: str) -> None:
    assert normalize_text(before, "arabic") == unicodedata.normalize("NFC", after)


@pytest.mark.fast
def test_normalizing_twice_changes_nothing_more() -> None:
    texts = [text for texts in NAMED.values() for text in texts] + CLEAN
    for text in texts:
        assert normalize_text(text, "none") == text
        for kind in ("nfc", "arabic"):
            once = normalize_text(text, kind)
            assert normalize_text(once, kind) == once
        assert normalize_text(text, "nfc") == unicodedata.normalize("NFC", text)
    cured = {name for name, text in DESCRIPTIONS.items() if "--text_normalization arabic" in text}
    assert not [t for t in texts if text_findings(normalize_text(t, "arabic")) & cured]


def test_a_build_normalizes_every_text_and_says_so(toy: Path, tmp_path: Path) -> None:
    entries = json.loads(EXAMPLES.read_text())[:3]
    marked = json.dumps(entries, ensure_ascii=False).replace("ال", "الـ\u200f")
    assert marked != json.dumps(entries, ensure_ascii=False)
    (tmp_path / "clips").symlink_to(EXAMPLES.parent / "clips")
    (tmp_path / "marked.json").write_text(marked)
    (tmp_path / "plain.json").write_text(json.dumps(entries, ensure_ascii=False))
    for name in ("marked", "plain"):
        preprocess(toy, tmp_path / f"{name}.json", tmp_path / name, text_normalization="arabic")
    one, two = (ShardSet(tmp_path / name) for name in ("marked", "plain"))
    for row in range(3):
        assert one.read(row).tokens_2L.tolist() == two.read(row).tokens_2L.tolist()
        assert one.read(row).meta["messages"] == two.read(row).meta["messages"]
    assert one.provenance["text_normalization"] == "arabic"


def test_every_finding_and_rule_is_documented() -> None:
    page = (ROOT / "docs" / "text_normalization.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(DESCRIPTIONS)

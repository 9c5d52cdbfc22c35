"""Normalisers, rule by rule on hand-made pairs; error counts against jiwer and a table of edit distances."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest
from higgs_tune.preprocess.judges.edits import count_edits, differences
from higgs_tune.preprocess.judges.normalisers import NORMALISERS, normaliser
from higgs_tune.shards.errors import UserError

pytest.importorskip("rapidfuzz")

PAIRS = {
    "seedtts_en": [
        ("Hello, World!", "hello world"),
        ("it's Mary's", "it's mary's"),  # the apostrophe stays
        ("it’s", "its"),  # the typographic one is in zhon's list
        ("well-known e.g. 3.5", "wellknown eg 35"),  # deleted, not spaced
        ("“Quoted” – and… more", "quoted and more"),
        ("全角，标点。！？", "全角标点"),
        ("a  b\t c ", "a b c"),
        ("10% of $5", "10 of 5"),
        ("naïve café", "naïve café"),
        ("•", "•"),  # in neither list
    ],
    "omnivoice": [
        ("Hello,World!", "hello world"),
        ("it's", "it s"),  # punctuation becomes a space
        ("ذَهَبَ الوَلَدُ", "ذهب الولد"),  # short vowels
        ("كتابٌ كتابًا كتابٍ", "كتاب كتابا كتاب"),  # tanween
        ("مُدَرِّسْ", "مدرس"),  # shadda, sukun
        ("هٰذا", "هٰذا"),  # U+0670 is not in the ranges
        ("ٱلكتاب", "الكتاب"),  # alef wasla
        ("ا\u0656ب\u0657", "اب"),
        ("ﻣﺮﺣﺒﺎ ﷲ", "مرحبا الله"),  # presentation forms, by NFKC
        ("ﻻ", "لا"),
        ("ا\u0653", "آ"),  # NFKC composes the madda
        ("كـــتاب", "كـــتاب"),  # tatweel stays
        ("مدرسة، ؟؛", "مدرسة"),  # ta marbuta stays; Arabic punctuation goes
        ("أحمد إلى آخر شيء", "أحمد إلى آخر شيء"),  # hamza stays
        ("١٢٣", "١٢٣"),
        ("ＡＢＣ１２", "abc12"),  # full width
    ],
    "habibi": [
        ("أحمد إلى آخر ٱلشيء", "احمد الي اخر الشي".replace("الي", "الى")),
        ("مؤمن بئر ماء", "مومن بير ما"),
        ("مدرسة", "مدرسه"),
        ("كـــتاب", "كتاب"),
        ("پاريس ڤيديو", "باريس فيديو"),
        ("٠١٢٣٤٥٦٧٨٩", "0123456789"),
        ("۰۱۲۳۴۵۶۷۸۹", "0123456789"),
        ("ذَهَبَ، الوَلَدُ!", "ذهب الولد"),
        ("ﻣﺆﻣﻦ", "مومن"),  # presentation forms first
        ("و\u0654", "و"),  # a combining hamza is composed, then dropped
        ("مستشفى", "مستشفى"),  # alef maqsura stays
    ],
}


@pytest.mark.fast
@pytest.mark.parametrize(("name", "text", "expected"), [(n, *pair) for n, pairs in PAIRS.items() for pair in pairs])
def test_each_rule(name: str, text: str, expected: str) -> None:
    assert normaliser(name).apply(text) == expected
    assert normaliser(name).apply(expected) == expected


@pytest.mark.fast
def test_normalisers_are_chosen_by_name() -> None:
    assert list(NORMALISERS) == list(PAIRS)
    with pytest.raises(UserError, match="unknown normaliser, expected seedtts_en, omnivoice, habibi, got whisper"):
        normaliser("whisper")


def test_every_mark_of_seedtts_is_deleted() -> None:
    """Unicode's punctuation below U+3030 in ASCII and CJK blocks, but the apostrophe."""
    marks = [chr(i) for i in [*range(0x21, 0x7F), *range(0x3001, 0x3031)]]
    marks = [mark for mark in marks if unicodedata.category(mark).startswith("P") and mark != "'"]
    assert normaliser("seedtts_en").apply("".join(marks)) == ""


def edit_table(text: list[str], heard: list[str]) -> int:
    row = list(range(len(heard) + 1))
    for i, unit in enumerate(text, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            last, row[j] = row[j], min(last + (unit != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@pytest.mark.fast
def test_rates_equal_jiwer_on_random_pairs() -> None:
    jiwer = pytest.importorskip("jiwer")
    rng = random.Random(0)
    vocabulary = ["نعم", "لا", "كتاب", "ولد", "في", "yes", "no"]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 12))) for _ in range(200)]
    heard = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 12))) for _ in range(200)]
    words = [count_edits(text.split(), other.split()) for text, other in zip(texts, heard, strict=True)]
    for text, other, edits in zip(texts, heard, words, strict=True):
        theirs = jiwer.process_words(text, other)
        assert (edits.substitutions, edits.deletions, edits.insertions) == (
            theirs.substitutions,
            theirs.deletions,
            theirs.insertions,
        )
        assert edits.rate == pytest.approx(theirs.wer)
        assert count_edits(text, other).rate == pytest.approx(jiwer.cer(text, other))
        assert edits.errors == edit_table(text.split(), other.split())
    corpus = sum(edits.errors for edits in words) / sum(edits.length for edits in words)
    assert corpus == pytest.approx(jiwer.wer(texts, heard))


@pytest.mark.fast
def test_seedtts_aggregation_by_hand() -> None:
    """The mean of utterance rates: 1/4, 0/1 and 2/2 give 41.7 %; the corpus rate is 3/7."""
    pairs = [("The cat, sat down.", "the cat sat town"), ("Yes!", "yes"), ("go on", "no")]
    words = normaliser("seedtts_en").words
    rates = [count_edits(words(text), words(heard)) for text, heard in pairs]
    assert [edits.rate for edits in rates] == [0.25, 0, 1]
    assert np.mean([edits.rate for edits in rates]) == pytest.approx(5 / 12)
    assert sum(edits.errors for edits in rates) / sum(edits.length for edits in rates) == pytest.approx(3 / 7)


@pytest.mark.fast
def test_differences_name_the_runs() -> None:
    runs = differences(["a", "b", "c", "d"], ["a", "x", "c", "d", "e"])
    assert runs == [("equal", "a", "a"), ("replace", "b", "x"), ("equal", "c d", "c d"), ("insert", "", "e")]
    assert differences([], []) == []
    assert count_edits(["a"], []).rate == 1
    assert count_edits([], ["a"]).rate == 1
    assert count_edits([], []).rate == 0

"""The steps of higgs-prepare, each against what is known: planted speech, brute force, naive loops."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.recordings import make_recording, speak
from higgs_tune.preprocess.prepare.align import Symbols, divide_text, forced_alignment, realign
from higgs_tune.preprocess.prepare.config import Thresholds
from higgs_tune.preprocess.prepare.decide import decide
from higgs_tune.preprocess.prepare.fingerprint import alike, fingerprint, unpack
from higgs_tune.preprocess.prepare.listen import LEVEL, Listened, clipped_samples, listen
from higgs_tune.preprocess.prepare.reading import read_blocks, read_form
from higgs_tune.preprocess.prepare.records import Decision, RejectReason, Segment, segment_id
from higgs_tune.preprocess.prepare.segment import SOFT_MS, Cutting, Span, cut_recording, find_speech
from higgs_tune.preprocess.prepare.speakers import cluster_voices
from higgs_tune.preprocess.prepare.transcripts import (
    BadTranscript,
    Piece,
    boundaries,
    read_transcript,
    refuse_later,
    text_between,
    turns,
)

CUTTING = Cutting(min_ms=2880, max_ms=14880, min_pause_ms=200, max_pause_ms=1000, pad_ms=60, vad_threshold=0.5)


def plain(text: str) -> str:
    return text.lower().replace(".", "")


# reading and listening


@pytest.mark.fast
@pytest.mark.parametrize("rate_hz", [16_000, 22_050, 48_000])
def test_blocks_join_to_the_recording_and_speech_is_found(tmp_path: Path, rate_hz: int) -> None:
    truth = make_recording(tmp_path / "a.wav", 1, sentences=6, rate_hz=rate_hz)
    form = read_form(tmp_path / "a.wav")
    blocks = list(read_blocks(tmp_path / "a.wav", form))
    assert len(blocks) > 1 and sum(len(block.samples_SC) for block in blocks) == form.frames
    assert abs(sum(len(block.mono_S) for block in blocks) - form.frames * 16_000 / rate_hz) <= 1
    heard = listen(tmp_path / "a.wav", form, "energy")
    total_ms = round(form.frames * 1000 / rate_hz)
    cuts = cut_recording(heard, total_ms, CUTTING)
    assert len(cuts.segments) == len(truth) and not cuts.too_short and not cuts.no_pause
    for span, sentence in zip(cuts.segments, truth, strict=True):
        assert abs(span.start / 1000 - sentence.start) < 0.15 and abs(span.end / 1000 - sentence.end) < 0.15
        assert span.start / 1000 <= sentence.start + 0.03 and span.end / 1000 >= sentence.end - 0.03


@pytest.mark.fast
def test_clipping_is_counted_as_a_naive_loop_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wave_S = np.clip(rng.normal(0, 0.5, 44_100 * 3), -1, 1).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave_S, 44_100, subtype="FLOAT")
    form = read_form(tmp_path / "a.wav")
    heard = listen(tmp_path / "a.wav", form, "energy")
    runs = [list(group) for _, group in itertools.groupby(range(len(wave_S)), key=lambda i: abs(wave_S[i]) >= 0.99)]
    naive_S = np.zeros(len(wave_S), np.bool_)
    for run in runs:
        if abs(wave_S[run[0]]) >= 0.99 and len(run) >= 3:
            naive_S[run] = True
    assert naive_S.any()
    np.testing.assert_array_equal(clipped_samples(wave_S[:, None], 44_100), naive_S)
    assert len(heard.clipped_L) == 300 and heard.clipped_L.any()
    assert heard.clipped_L.mean() / 255 == pytest.approx(naive_S.mean(), abs=1 / 255)
    limited_S = 0.5 * np.clip(np.sin(np.arange(16_000) / 20), -0.8, 0.8).astype(np.float32)
    assert clipped_samples(limited_S[:, None], 16_000).mean() > 0.2  # a limiter before the last change of gain


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(6))
def test_cuts_never_lie_in_speech(seed: int) -> None:
    """Whatever the recording: segments keep their bounds, do not overlap, and no stretch of speech is divided."""
    rng = np.random.default_rng(seed)
    levels, speech = [], []
    for _ in range(60):
        length, gap = int(rng.integers(12, 700)), int(rng.integers(2, 200))
        speech.append((sum(map(len, levels)), length))
        levels += [np.full(length, 40, np.uint8), np.full(gap, 140, np.uint8)]
    levels_L = np.concatenate(levels)
    total_ms = len(levels_L) * 10
    heard = Listened(np.zeros(0, np.uint8), levels_L, np.zeros(len(levels_L), np.uint8))
    cuts = cut_recording(heard, total_ms, CUTTING)
    spans = sorted([*cuts.segments, *cuts.too_short, *cuts.no_pause])
    assert all(one.end <= two.start for one, two in itertools.pairwise(spans))
    assert all(0 <= span.start < span.end <= total_ms for span in spans)
    assert all(3000 - 240 <= span.end - span.start <= 15_000 for span in cuts.segments)
    for span in find_speech(heard, total_ms, 0.5):
        assert sum(one.start <= span.start and span.end <= one.end for one in spans) == 1


@pytest.mark.fast
@pytest.mark.parametrize(("pause_db", "earlier_ms"), [(50, 0), (12, SOFT_MS)])
def test_a_soft_beginning_that_noise_hides_is_not_cut_off(pause_db: int, earlier_ms: int) -> None:
    """The network hears the vowel at 4.8 s; a consonant before it is as loud as the noise."""
    levels_L = np.full(1000, 2 * (15 + pause_db), np.uint8)
    levels_L[480:800] = 2 * 15
    probs_F = np.zeros(10_000 // 32 + 1, np.uint8)
    probs_F[150:250] = 255
    (speech,) = find_speech(Listened(probs_F, levels_L, np.zeros(1000, np.uint8)), 10_000, 0.5)
    assert speech == Span(4800 - earlier_ms, 8000)


@pytest.mark.fast
def test_a_beginning_that_the_network_hears_late_is_found_by_the_level() -> None:
    """By 250 ms, so that near to it no level is quiet."""
    levels_L = np.full(1000, 2 * 65, np.uint8)
    levels_L[455:800] = 2 * 15
    probs_F = np.zeros(10_000 // 32 + 1, np.uint8)
    probs_F[150:250] = 255
    (speech,) = find_speech(Listened(probs_F, levels_L, np.zeros(1000, np.uint8)), 10_000, 0.5)
    assert abs(speech.start - 4550) <= 20 and abs(speech.end - 8000) <= 20


@pytest.mark.fast
def test_no_segment_holds_two_named_speakers() -> None:
    levels_L = np.concatenate([np.full(250, 40, np.uint8), np.full(40, 140, np.uint8)] * 6)
    heard = Listened(np.zeros(0, np.uint8), levels_L, np.zeros(len(levels_L), np.uint8))
    total_ms, turn = len(levels_L) * 10, 3 * 2900
    (whole, *_) = cut_recording(heard, total_ms, CUTTING, None, []).segments
    assert whole.start < turn < whole.end - 200
    cuts = cut_recording(heard, total_ms, CUTTING, None, [turn])
    assert len(cuts.segments) == 2 and not any(one.start + 200 < turn < one.end - 200 for one in cuts.segments)


# transcripts


ARABIC = "قال الرجل إن البحر كان هادئا في الصباح"
FORMS = {
    "a.srt": "1\n00:00:01,000 --> 00:00:02,500\n<i>Hello</i> there\n\n2\n00:00:03,000 --> 00:00:04,000\nagain\n",
    "b.srt": "1\r\n00:00:01,000 --> 00:00:02,500\r\nHello\r\n\r\nthere\r\n\r\n\r\n"
    "2\r\n00:00:03,000 --> 00:00:04,000\r\nagain",
    "a.vtt": "WEBVTT\n\nNOTE no cue\n\n00:01.000 --> 00:02.500 align:start\n<v Ann>Hello there\n\n"
    "00:03.000 --> 00:04.000\nagain\n",
    "a.json": json.dumps({"segments": [{"start": 1, "end": 2.5, "text": " Hello there"},
                                       {"start": 3.0, "end": 4.0, "text": "again"}]}),
    "b.json": json.dumps({"segments": [{"start": 1, "end": 4, "text": "Hello there again", "speaker": "Ann", "words": [
        {"word": " Hello", "start": 1.0, "end": 1.5}, {"word": " there", "start": 1.6, "end": 2.5},
        {"word": " again", "start": 3.0, "end": 4.0}]}]}),
    "a.ctm": ";; comment\na 1 1.0 0.5 Hello 0.9\na 1 1.6 0.9 there\na 1 3.0 1.0 again\n",
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_transcript_says_the_same(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FORMS[name])
    transcript = read_transcript(tmp_path / name)
    assert (
        text_between(transcript, 500, 2800)[0] == "Hello there" and text_between(transcript, 2800, 9000)[0] == "again"
    )
    assert (boundaries(transcript) == [1000, 2500, 3000, 4000]) is (transcript.kind == "cues")
    assert text_between(transcript, 500, 2800)[1] == {"Ann" if name in ("a.vtt", "b.json") else ""}
    assert turns(transcript) == ([3000] if name == "a.vtt" else [])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.srt", b"Hello there", "no line with times"),
        ("a.srt", b"1\n00:00:xx --> 00:00:02,000\nHello", "expected a time"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b"", "not JSON"),
        ("a.json", b"[1, 2]", "an object with segments"),
        ("a.json", b"[]", "no text"),
        ("a.json", b'{"segments": 7}', "an object with segments"),
        ("a.json", b'{"segments": [{"text": "Hello"}]}', "without start"),
        ("a.json", b'{"segments": [{"start": 2, "end": 1, "text": "Hello"}]}', '"start": 2, "end": 1'),
        ("a.json", b'{"segments": [{"start": NaN, "end": 1, "text": "Hello"}]}', '"start": NaN'),
        ("a.json", b'{"segments": [{"start": 0, "end": Infinity, "text": "Hello"}]}', '"end": Infinity'),
        ("a.json", b'{"segments": [{"start": 0, "end": 1%s, "text": "Hello"}]}' % (b"0" * 400), "without start"),
        ("a.json", b'{"segments": [{"start": "0", "end": "1", "text": "Hello"}]}', '"start": "0"'),
        ("a.json", b'{"segments": [{"start": 0, "end": 1, "text": ["Hello"]}]}', '"text"'),
        ("a.json", b'{"segments": [{"start": 0, "end": 1, "text": "\\ud800"}]}', "surrogate"),
        ("a.json", b'{"segments": [{"start": 0, "end": 1, "words": 5}]}', "without start"),
        ("a.srt", b"1\n00:00:01,000 -->\nHello", "got 00:00:01,000 -->"),
        ("a.srt", b"1\n00:00:01,000 -> 00:00:02,000\nHello", "got 00:00:01,000 -> 00"),
        ("a.srt", b"1\n00:00:02,000 --> 00:00:01,000\nHello", "ends before it begins"),
        ("a.srt", b"1\n00:99:01,000 --> 00:99:02,000\nHello", "expected a time"),
        ("a.srt", b"1\n00:00:01,000 --> 00:00:02,000\nHello\n2\n00:00:02,000 --> 00:00:03,000\nno", "no empty line"),
        ("a.srt", b"1\n00:00:01,000 --> 00:00:02,000\nHello\n\n2\nno times", "in the block 2"),
        ("a.srt", f"1\n00:00:01,000 --> 00:00:02,000\n{ARABIC}".encode("cp1256"), "not UTF-8.*iconv"),
        ("a.srt", f"1\n00:00:01,000 --> 00:00:02,000\n{ARABIC}".encode("utf-16-le"), "without a byte-order mark"),
        ("a.srt", f"1\n00:00:01,000 --> 00:00:02,000\n{ARABIC}".encode("utf-16")[:-1], "truncated data"),
        ("a.vtt", b"WEBVTT\n\n00:00.000 --> 1:2:3:4\nHello", "expected a time"),
        ("a.vtt", b"WEBVTT\n\nNOTE nothing else\n", "no line with times"),
        ("a.ctm", b"a 1 one 0.5 Hello", "line 1"),
        ("a.ctm", b"a 1 0.0 0.5 Hello\na 1 1.0 0.5\n", "line 2"),
        ("a.ctm", b"a 1 nan 0.5 Hello", "expected seconds, got nan"),
        ("a.ctm", b"a 1 1e308 0.5 Hello", "expected seconds"),
        ("a.ctm", b"a 1 2.0 -0.5 Hello", "expected seconds, got 2.0 -0.5"),
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n", "no text"),
        ("a.txt", "café au lait, déjà vu".encode("latin-1"), "not UTF-8"),
        ("a.txt", ARABIC.encode("cp1256"), "not UTF-8.*iconv"),
        ("a.txt", b"RIFF\0\0\0\0WAVEfmt ", "not text .*got audio"),
    ],
)
def test_a_bad_transcript_is_named(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadTranscript, match=why):
        read_transcript(tmp_path / name)


@pytest.mark.fast
def test_a_transcript_of_a_longer_recording_is_named_and_utf16_with_its_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_text(f"1\n00:00:01,000 --> 00:00:02,000\n{ARABIC}", encoding="utf-16")
    transcript = read_transcript(tmp_path / "a.srt")
    assert transcript.pieces[0].text == ARABIC
    refuse_later(transcript, 300)
    with pytest.raises(BadTranscript, match=r"a text at 1\.001 s, after the recording's end at 0"):
        refuse_later(replace(transcript, pieces=(Piece("a", 0, 5), Piece("b", 1001, 2000))), 0)


@pytest.mark.fast
def test_a_long_text_is_divided_as_it_was_said() -> None:
    """Also where a sentence of the text was not said, one that was said is missing, one is wrong, two are swapped."""
    said = ["the first thing i saw was the sea", "then came a long and quiet road", "we walked until it was dark",
            "nobody asked us for our names", "in the morning the bells rang"]  # fmt: skip
    given = [f"{one[0].upper()}{one[1:]}." for one in said]

    def divide(text: list[str], heard: list[str] = said) -> list[str]:
        words = " ".join(text).split()
        return [" ".join(words[i] for i in part) for part in divide_text(words, heard, plain)]

    assert divide(given) == given
    noisy = [one.replace("a", "e").replace("th", "d") for one in said]
    assert divide(given, noisy) == given
    assert divide([*given[:2], "Completely other words stand here instead.", *given[3:]])[:2] == given[:2]
    assert divide(given[:2] + given[3:]) == [given[0], given[1], "", given[3], given[4]]
    swapped = divide([given[0], given[2], given[1], *given[3:]])
    assert swapped[0] == given[0] and swapped[3:] == given[3:] and swapped[1:3] != given[1:3]
    assert divide([*given[:2], "Zzz xxx qqq vvv kkk.", *given[2:]])[3:] == given[3:]


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(8))
def test_forced_alignment_is_the_best_path(seed: int) -> None:
    """Against all paths of few frames; source: A. Graves et al. 2006."""
    rng = np.random.default_rng(seed)
    frames, tokens = 6, [int(token) for token in rng.integers(1, 3, 3)]
    log_probs_TV = np.log(rng.dirichlet(np.ones(3), frames))

    def collapsed(path: tuple[int, ...]) -> list[int]:
        return [symbol for symbol, _ in itertools.groupby(path) if symbol]

    paths = [path for path in itertools.product(range(3), repeat=frames) if collapsed(path) == tokens]
    best = max(paths, key=lambda path: sum(log_probs_TV[at, symbol] for at, symbol in enumerate(path)))
    spans, at = [], 0
    for symbol, group in itertools.groupby(best):
        length = len(list(group))
        spans += [(at, at + length)] if symbol else []
        at += length
    assert forced_alignment(log_probs_TV, tokens, 0) == spans
    assert forced_alignment(log_probs_TV[:2], tokens, 0) is None and forced_alignment(log_probs_TV, [], 0) == []


@pytest.mark.fast
def test_ctc_moves_words_to_the_segment_they_are_said_in() -> None:
    rng = np.random.default_rng(0)
    words = [[int(token) for token in rng.integers(2, 20, int(rng.integers(2, 6)))] for _ in range(60)]
    truth = [list(range(begin, begin + 6)) for begin in range(0, 60, 6)]
    rows = []
    for part in truth:
        path = [0] * 3
        for word in part:
            path += [symbol for token in words[word] for symbol in (token, token, 0)] + [1, 0]
        row_TV = rng.normal(0, 1, (len(path), 20))
        row_TV[np.arange(len(path)), path] += 6
        rows.append(row_TV - np.log(np.exp(row_TV).sum(1, keepdims=True)))
    wrong = [part[:] for part in truth]
    for at in range(9):  # the first way put a word or two on the wrong side
        wrong[at + 1][:0] = wrong[at][-(at % 3) :] if at % 3 else []
        wrong[at] = wrong[at][: len(wrong[at]) - at % 3]
    assert wrong != truth
    for most in (60, 200, 10_000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("higgs_tune.preprocess.prepare.align.WINDOW_FRAMES", most)
            assert realign(wrong, rows.__getitem__, Symbols(words, 0, 1)) == truth
    short = [row_TV[:4] for row_TV in rows]
    assert realign(truth, short.__getitem__, Symbols(words, 0, 1)) == truth  # too few frames: as it was


# fingerprints and voices


@pytest.mark.fast
def test_fingerprints_find_repeats_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    clips = [speak(rng, int(rng.integers(8, 14))).astype(np.float32) for _ in range(30)]
    louder_S = np.clip(2.5 * clips[3], -1, 1)
    shifted_S = np.concatenate([np.zeros(777, np.float32), clips[5], np.zeros(3000, np.float32)])
    noisy_S = (clips[7] + rng.normal(0, 0.005, len(clips[7]))).astype(np.float32)
    longer_S = np.concatenate([clips[9], np.zeros(5000, np.float32), speak(rng, 3).astype(np.float32)])
    cut = len(clips[11]) // 3
    phrase_S = np.concatenate([speak(rng, 20).astype(np.float32)[:cut], clips[11][cut:]])  # two thirds are the same
    prints = [unpack(fingerprint(wave_S)) for wave_S in (*clips, louder_S, shifted_S, noisy_S, longer_S, phrase_S)]
    assert np.bitwise_count(prints[11] ^ prints[34]).mean() / 16 < Thresholds().max_duplicate_distance
    assert alike(prints, Thresholds().max_duplicate_distance) == [(3, 30), (5, 31), (7, 32), (9, 33)]
    assert fingerprint(np.zeros(100, np.float32)) == "" and alike([], 0.2) == []


@pytest.mark.fast
def test_voices_are_clustered_in_one_step_or_two(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 32))
    of = rng.integers(0, 4, 120)
    embeddings_ND = centres[of] + 0.2 * rng.normal(size=(120, 32))
    names = {int(voice): number for number, voice in enumerate(dict.fromkeys(of.tolist()))}
    wanted = [names[int(voice)] for voice in of]
    recordings = [f"r{number % 3}" for number in range(120)]
    assert cluster_voices(embeddings_ND, recordings, 0.4) == wanted
    monkeypatch.setattr("higgs_tune.preprocess.prepare.speakers.MOST_AT_ONCE", 50)
    assert cluster_voices(embeddings_ND, recordings, 0.4) == wanted


# decisions


def segment(number: int, recording: int = 0, **values: object) -> Segment:
    sha256 = f"{recording:012d}".ljust(64, "0")
    start, end = number * 10_000, number * 10_000 + 5000
    made = Segment(segment_id(sha256, start, end), f"r{recording}.wav", sha256, start / 1000, end / 1000,
                   text=f"text {recording} {number}", text_source="given", asr_text="heard", cer=0.02, quality=3.5,
                   snr=30.0, clipping=0.0, seconds_per_char=0.08, language="en", language_probability=0.99,
                   speaker=f"s{recording}")  # fmt: skip
    return replace(made, **values)  # pyright: ignore[reportArgumentType]


def decided(segments: list[Segment], decisions: dict[str, Decision] | None = None, **limits: object) -> list[Segment]:
    return decide(segments, None, Thresholds(**limits), decisions or {}, "en", plain)  # pyright: ignore[reportArgumentType]


FAULTS: list[tuple[str, dict[str, object]]] = [
    ("quality", {"quality": 2.9}), ("snr", {"snr": 9.0}), ("clipping", {"clipping": 0.01}),
    ("pace", {"seconds_per_char": 0.01}), ("pace", {"seconds_per_char": 2.0}), ("language", {"language": "fr"}),
    ("language", {"language_probability": 0.5}), ("agreement", {"cer": 0.5}), ("speaker", {"speaker": None}),
]  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize(("step", "fault"), FAULTS)
def test_each_threshold_rejects_what_misses_it(step: str, fault: dict[str, object]) -> None:
    segments = [segment(number, seconds_per_char=0.08 + number / 1000) for number in range(12)]
    segments[5] = replace(segments[5], **fault)  # pyright: ignore[reportArgumentType]
    made = decided(segments)
    assert [one.keep for one in made] == [number != 5 for number in range(12)]
    reject = made[5].reject
    assert reject and reject.step == step and not made[5].split and not made[5].ref
    if step != "speaker":
        assert made == decided(made)  # decided segments are measured ones, too
        accepted = decided(segments, {segments[5].id: Decision(segments[5].id, "accept")})
        assert accepted[5].keep and accepted[5].decision


@pytest.mark.fast
def test_names_of_people_and_transcripts_outlast_clusters() -> None:
    """What joins a merged voice later gets its name; a voice that the transcript names is not clustered."""
    segments = [segment(number, speaker=None) for number in range(6)] + [segment(6, speaker="Ann")]
    voices_ND = np.eye(3, dtype=np.float16)[[0, 0, 0, 1, 1, 1, 0]]

    def speakers(decisions: dict[str, Decision]) -> list[str | None]:
        made = decide(segments, voices_ND, Thresholds(), decisions, "en", plain)
        return [one.speaker for one in made]

    assert speakers({}) == ["speaker-001"] * 3 + ["speaker-002"] * 3 + ["Ann"]
    merged = {one.id: Decision(one.id, speaker="Bob") for one in segments[:2]}
    assert speakers(merged) == ["Bob"] * 3 + ["speaker-002"] * 3 + ["Ann"]
    split = {segments[3].id: Decision(segments[3].id, speaker="Eve")}
    assert speakers(split) == ["speaker-001"] * 3 + ["Eve"] + ["speaker-002"] * 2 + ["Ann"]


@pytest.mark.fast
def test_people_overrule_and_correct() -> None:
    segments = [segment(number) for number in range(4)]
    segments[2] = replace(segments[2], text=None, cer=None, reject=RejectReason("text", "not_in_transcript"))
    said = {
        segments[0].id: Decision(segments[0].id, "reject"),
        segments[1].id: Decision(segments[1].id, text="Heard.", speaker="Ann"),
        segments[2].id: Decision(segments[2].id, "accept"),
        segments[3].id: Decision(segments[3].id, text="something else entirely"),
    }
    one, two, three, four = decided(segments, said)
    assert one.reject and one.reject.step == "review"
    assert (two.text, two.cer, two.speaker, two.keep) == ("Heard.", 0.0, "Ann", True)
    assert three.reject and three.reject.reason == "not_in_transcript"  # there is no text to accept
    assert four.reject and four.reject.step == "agreement"
    again = decided(segments, said | {segments[2].id: Decision(segments[2].id, text="heard")})
    assert again[2].keep


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(5))
def test_the_split_leaks_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    segments = [
        segment(number, recording, speaker=f"s{recording // 2}" if recording < 12 else f"s{recording % 3}",
                text=f"text {int(rng.integers(60))} of {recording if number % 2 else 0}")
        for recording in range(16) for number in range(6)
    ]  # fmt: skip
    made = decided(segments, val_fraction=0.2, seed=seed, max_same_text=0)
    kept = {side: [one for one in made if one.split == side] for side in ("train", "val")}
    assert kept["train"] and kept["val"] and sum(map(len, kept.values())) == sum(one.keep for one in made)
    for of in (lambda one: one.speaker, lambda one: one.recording, lambda one: plain(one.text)):
        assert not {of(one) for one in kept["train"]} & {of(one) for one in kept["val"]}
    by_id = {one.id: one for one in made}
    for one in made:
        if one.keep:
            assert one.ref is not None
            other = by_id[one.ref]
            assert other.keep and (other.speaker, other.split) == (one.speaker, one.split) and other.id != one.id
            choice = {two.recording for two in made if two.keep and two.speaker == one.speaker} - {one.recording}
            assert other.recording in choice or not choice


@pytest.mark.fast
def test_one_speaker_is_split_by_recordings_and_the_best_repeat_stays() -> None:
    one, two = "same text", "another"
    segments = [segment(n, r, speaker="s", text=f"text {r} {n}") for r in range(5) for n in range(3)]
    segments[1] = replace(segments[1], text=one, quality=3.2)
    segments[7] = replace(segments[7], text=one, quality=4.0)
    segments[9] = replace(segments[9], text=two)
    made = decided(segments, val_fraction=0.2)
    sides = {r: {s.split for s in made if s.recording == f"r{r}.wav" and s.keep} for r in range(5)}
    assert all(len(side) == 1 for side in sides.values()) and {"val"} in sides.values() and {"train"} in sides.values()
    assert made[7].keep and made[1].duplicate_of == made[7].id and made[1].reject
    assert made[1].reject.reason == "same_text"
    assert all(s.keep for s in decided(segments, max_same_text=2, val_fraction=0.0))


def test_levels_do_not_depend_on_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_recording(tmp_path / "a.wav", 2, sentences=3, rate_hz=44_100)
    form = read_form(tmp_path / "a.wav")
    whole = listen(tmp_path / "a.wav", form, "energy")
    monkeypatch.setattr("higgs_tune.preprocess.prepare.reading.BLOCK_S", 1)
    parts = listen(tmp_path / "a.wav", form, "energy")
    assert len(whole.levels_L) == -(-round(form.frames * 16_000 / form.rate) // LEVEL)
    np.testing.assert_array_equal(whole.levels_L, parts.levels_L)
    np.testing.assert_array_equal(whole.clipped_L, parts.clipped_L)

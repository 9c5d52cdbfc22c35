"""examples/miniature: its sentences, its training codec against the inference one, and the committed results."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, preprocess
from higgs_tune.evaluate.speak.config import SpeakConfig
from higgs_tune.evaluate.speak.run import speak
from higgs_tune.preprocess.audio.resample import resample_soxr
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.judges.edits import count_edits
from higgs_tune.preprocess.judges.load import load_recogniser
from higgs_tune.preprocess.judges.normalisers import normaliser
from higgs_tune.shards.layout import layout_of
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.model.load import load_model
from transformers import AutoTokenizer

HERE = ROOT / "examples" / "miniature"
COMMITTED = HERE / "codec"
sys.path.append(str(HERE))
import compose  # noqa: E402
import make_base  # noqa: E402
import word_clips  # noqa: E402
from codec_files import write_codec  # noqa: E402
from codec_model import MiniatureCodec  # noqa: E402
from evaluate_codec import in_digits  # noqa: E402
from sentences import ONES, TENS, arabic_number, arabic_words, english_number, without_marks  # noqa: E402
from speech import split_of  # noqa: E402
from train_codec import CodecTraining, MelLoss, entropy_bits, learning_rate  # noqa: E402
from train_recogniser import BANDS, SAMPLE_RATE_HZ, WINDOW, filter_bank  # noqa: E402


def arabic_clip(name: str) -> np.ndarray:
    samples, rate_hz = soundfile.read(ROOT / "examples" / "arabic" / "clips" / f"{name}.flac", dtype="float32")
    return resample_soxr(samples, rate_hz, 24_000)


@pytest.mark.fast
def test_numbers_are_said_and_written() -> None:
    said = {
        0: "zero",
        12: "twelve",
        60: "sixty",
        87: "eighty seven",
        300: "three hundred",
        342: "three hundred and forty two",
    }
    assert {number: english_number(number) for number in said} == said
    assert arabic_number(121) == "مِئَة وَوَاحِد وَعِشْرُون"
    for number in range(1000):
        assert in_digits(english_number(number)) == str(number)
    assert in_digits("two, thirty one") == in_digits("2 31") == "231"
    assert in_digits("two hundred and thirty one") == in_digits("200 and 31") == "231"
    assert in_digits("The twelfth of July.") == in_digits("the 12th of July") == "the12ofjuly"


@pytest.mark.fast
def test_the_split_goes_by_the_written_text() -> None:
    """Vowel marks do not move a sentence to the other side."""
    for number in range(1000):
        assert split_of(arabic_number(number)) == split_of(without_marks(arabic_number(number)))


def test_the_codec_that_trains_is_the_codec_that_encodes(tmp_path: Path) -> None:
    """Codes of a whole clip, through float16 files of both layouts."""
    model = MiniatureCodec(0)
    for tensor in model.codec.state_dict().values():
        tensor.copy_(tensor.half().float())
    wave_S = torch.from_numpy(arabic_clip("amal-00")[: 40 * 960])
    features_BTC = model.semantic_features(wave_S)[None]
    books_B = torch.tensor([8])
    model(wave_S[None], features_BTC, books_B, learn_codes=False)  # the first call fills the codebooks
    for codebook in model.codec.quantizers:
        codebook.get_buffer("embed").copy_(codebook.get_buffer("embed").half().float())
    codes_KBT = model(wave_S[None], features_BTC, books_B, learn_codes=False)[2]
    write_codec(model.codec, tmp_path)
    for layout in ("native", "original"):
        codes_KT = load_codec(tmp_path / layout).encode(wave_S.numpy())
        assert (codes_KT == codes_KBT[:, 0].numpy()).mean() > 0.95  # another order of sums


@pytest.mark.fast
def test_learning_rate_of_the_codec() -> None:
    """Warm-up, a constant, and a decay to 0 at the last step."""
    options = CodecTraining(speech=(HERE,), out=HERE, steps=1000, decay=0.3, learning_rate=1.0)
    rates = [learning_rate(options, step) for step in (0, 99, 700, 850, 1000)]
    assert rates == pytest.approx([0.01, 1, 1, 0.5, 0])


@pytest.mark.fast
def test_committed_codec_speaks() -> None:
    """Both layouts give the same codes; what they decode is nearer to the recording than silence by far."""
    native, original = (load_codec(COMMITTED / layout) for layout in ("native", "original"))
    wave_S = arabic_clip("amal-00")
    codes_KT = native.encode(wave_S)
    np.testing.assert_array_equal(original.encode(wave_S), codes_KT)
    decoded_S = native.decode(codes_KT)[: len(wave_S)]
    np.testing.assert_allclose(original.decode(codes_KT)[: len(wave_S)], decoded_S, atol=1e-5)
    target = torch.from_numpy(wave_S)[None]
    distance = MelLoss(5e-4)
    assert distance(torch.from_numpy(decoded_S)[None], target) < 0.6 * distance(torch.zeros_like(target), target)
    assert min(entropy_bits(torch.from_numpy(codes_KT.astype(np.int64)))) > 4  # of 6 that so few frames can have


@pytest.mark.fast
def test_changes_weigh_more_in_the_codecs_loss() -> None:
    """10 ms of noise too few cost more at a burst than in steady noise; what lies below the floor costs nothing."""
    torch.manual_seed(0)
    noise_S, loss = 0.05 * torch.randn(24_000), MelLoss(5e-4)
    burst_S = torch.zeros(24_000)
    burst_S[12_000:12_480] = noise_S[12_000:12_480]
    faulty = [wave_S.clone() for wave_S in (burst_S, noise_S)]
    for wave_S in faulty:
        wave_S[12_000:12_240] = 0
    at_burst, in_noise = (
        float(loss(made_S[None], wanted_S[None])) for made_S, wanted_S in zip(faulty, (burst_S, noise_S), strict=True)
    )
    assert at_burst > 1.3 * in_noise
    assert float(loss(1e-5 * noise_S[None], 0 * noise_S[None])) < 0.01 < in_noise


@pytest.mark.fast
def test_filter_bank_hears_pitch() -> None:
    """The loudest band moves with the pitch, and is as loud at any phase of the tone."""
    samples = torch.arange(WINDOW) / SAMPLE_RATE_HZ
    loudest = []
    for pitch_hz in (200, 1000, 4000):
        by_phase = []
        for phase in (0.0, 1.0):
            heard = filter_bank() @ torch.cos(2 * torch.pi * pitch_hz * samples + phase)
            by_phase.append(heard.view(4, BANDS).square().sum(0))
        torch.testing.assert_close(by_phase[0].max(), by_phase[1].max(), rtol=0.1, atol=0.0)
        loudest.append(int(by_phase[0].argmax()))
    assert loudest == sorted(set(loudest))


def run_script(monkeypatch: pytest.MonkeyPatch, script: Any, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
    script.main()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base before it is trained."""
    out = tmp_path_factory.mktemp("miniature") / "base"
    with pytest.MonkeyPatch.context() as patch:
        run_script(patch, make_base, "--audio_tokenizer_path", COMMITTED / "native", "--out", out)
    return out


@pytest.mark.fast
def test_the_untrained_base_follows_a_text(untrained: Path) -> None:
    """Number words are one token; where a text says a word again, the head of layer 1 has what stood behind it."""
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    words = [*ONES, *TENS, "hundred", "and", *map(without_marks, arabic_words())]
    assert {len(tokenizer.tokenize(text)) for word in words for text in (word, f" {word}")} == {1}
    model = load_model(untrained, device=torch.device("cpu"), dtype=torch.float32).model.eval()
    said = "five nine three eight ten twelve fifty sixty"  # with and without a space the first is the same
    ids_1N = tokenizer(f"{said}<|eot_id|>{said}", return_tensors="pt").input_ids
    seen: list[torch.Tensor] = []
    handle = model.layers[1].register_forward_hook(lambda _layer, _inputs, output: seen.append(output[0]))
    with torch.no_grad():
        model(input_ids=ids_1N, attention_mask=torch.ones_like(ids_1N))
    handle.remove()
    next_NH = seen[0].reshape(-1, seen[0].shape[-1])[-ids_1N.shape[1] :, make_base.NEXT]  # padded on the left
    own_NH = model.embed_tokens(ids_1N)[0, :, make_base.OWN]
    likeness_N = torch.nn.functional.cosine_similarity(next_NH[9:-1], own_NH[10:])
    assert likeness_N.min() > 0.8


@pytest.mark.fast
def test_kinds_of_composed_sentences() -> None:
    """Of `few`, the same two to five words come again and again; split and length hold for it, too."""
    no_codes = np.zeros((8, 0), np.uint16)
    voice, rng = compose.Voice({word: [no_codes] for word in (*ONES, compose.PAUSE)}, []), Random(0)
    config = compose.Composition(HERE, HERE, HERE, HERE, HERE, ("slt",), kinds=("few",))
    texts = [compose.draw_text(config, rng, voice, "slt", "train", 14).split() for _ in range(200)]
    assert {len(text) for text in texts} == set(range(1, 15))
    assert {len(set(text)) for text in texts if len(text) > 9} == {2, 3, 4, 5}


@pytest.mark.skipif(shutil.which("flite") is None, reason="needs flite")
def test_phrases_that_nobody_has_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--unlike` leaves out what another folder's voice has said."""
    monkeypatch.setitem(word_clips.WORDS, "en", {})
    common = ("--voices", "slt", "--longest_reference", 1)  # one number in words: few enough that seeds meet
    run_script(monkeypatch, word_clips, *("--out", tmp_path / "a", "--references", 20), *common)

    def texts(folder: str) -> list[str]:
        return [json.loads(line)["text"] for line in (tmp_path / folder / "manifest.jsonl").read_text().splitlines()]

    for folder, unlike in (("b", ()), ("c", ("--unlike", tmp_path / "a"))):
        run_script(
            monkeypatch, word_clips, *("--out", tmp_path / folder, "--references", 3, "--seed", 1), *common, *unlike
        )
    assert set(texts("b")) & set(texts("a"))
    assert not set(texts("c")) & set(texts("a"))


@pytest.mark.skipif(shutil.which("flite") is None, reason="needs flite")
def test_composed_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained: Path) -> None:
    """Both layouts; codes are those of the said words; held-out sentences are not trained on; one in two is written."""
    monkeypatch.setitem(word_clips.WORDS, "en", {word: word for word in ONES[:10]})
    codec, words, out = COMMITTED / "native", tmp_path / "words", tmp_path / "data"
    run_script(monkeypatch, word_clips, *("--out", words, "--voices", "slt", "--takes", 2, "--references", 2))
    models = {"model_path": untrained, "audio_tokenizer_path": codec}
    preprocess(
        untrained, words / "manifest.jsonl", words / "shards", **models, ref_drop=1.0, min_seconds=0.1, val_fraction=0.0
    )
    encoded = ShardSet(words / "shards")
    run_script(
        monkeypatch,
        compose,
        *(
            "--model_path",
            untrained,
            "--audio_tokenizer_path",
            codec,
            "--words",
            words,
            "--word_shards",
            words / "shards",
        ),
        *("--voices", "slt", "--kinds", "digits", "--samples", 16, "--held_out", 2, "--decoded", 1, "--written", 2),
        *("--out", out),
    )
    shards = ShardSet(out / "shards")
    samples = [shards.read(row) for row in range(16)]
    written = [sample for sample in samples if sample.meta["misc"]["language"] == "ar"]
    spoken = [sample for sample in samples if sample.meta["misc"]["language"] == "en"]
    assert 0 < len(written) < 16
    assert {sample.meta["segments"][-1]["role"] for sample in written} == {"user"}
    assert {layout_of(sample.meta["messages"]) for sample in spoken} == {"chat", "serve"}
    takes: dict[str, list[np.ndarray]] = {}
    for row in range(len(encoded)):
        sample = encoded.read(row)
        if sample.meta["segments"][-1]["source"].startswith("words"):
            takes.setdefault(sample.meta["messages"][-1]["content"][0]["text"], []).append(sample.codes_KT)
    assert {len(codes) for codes in takes.values()} == {2}
    for sample in spoken:
        text = sample.meta["misc"]["said"][1]
        said_KT = np.concatenate([takes[word][0] for word in text.split()], axis=1)
        np.testing.assert_array_equal(sample.codes_KT[:, -said_KT.shape[1] :], said_KT)
    held_out = [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]
    assert not {line["text"] for line in held_out} & {sample.meta["misc"]["said"][1] for sample in samples}
    assert all((out / line[name]).is_file() for line in held_out for name in ("ref_audio", "target_audio"))


@pytest.mark.fast
@pytest.mark.parametrize("layout", ["chat", "serve"])
def test_committed_base_says_the_text(layout: Literal["chat", "serve"], tmp_path: Path) -> None:
    """By the command, with a recording as reference that it has not heard; it ends by itself, and is understood."""
    text, out = "seven two nine", tmp_path / "out.wav"  # the recogniser hears these words as the codec decodes them
    config = SpeakConfig(
        model_path=HERE / "base",
        audio_tokenizer_path=COMMITTED / "native",
        layout=layout,
        temperature=0.0,
        ras_win_len=0,
        max_seconds=5,
        ref_audio=(HERE / "words" / "phrases" / "slt-02.flac",),
        ref_text=("five six eight",),
        text=text,
        output=out,
    )
    assert speak(config) == 0
    samples, rate_hz = soundfile.read(out, dtype="float32")
    assert 0.5 < len(samples) / rate_hz < 4
    heard = load_recogniser(str(HERE / "recogniser"), "cpu").transcribe([resample_soxr(samples, rate_hz, 16_000)], "en")
    assert count_edits(text, normaliser("omnivoice").apply(heard[0])).errors <= 2, heard


@pytest.mark.fast
def test_committed_recogniser_hears() -> None:
    """It is taken as any other, and hears most of a clip whose sentence it knows."""
    line = json.loads((ROOT / "examples" / "arabic" / "chatml.json").read_text())[0]
    text = normaliser("omnivoice").apply(line["messages"][-1]["content"][0]["text"])
    wave_S = resample_soxr(arabic_clip(Path(line["messages"][-1]["content"][1]["audio_url"]).stem), 24_000, 16_000)
    heard = load_recogniser(str(HERE / "recogniser"), "cpu").transcribe([wave_S], "ar")[0]
    assert count_edits(text, heard).errors < 0.5 * len(text)


@pytest.mark.fast
def test_results_are_small_and_hold_no_pickle() -> None:
    files = [path for path in HERE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files} <= {
        ".json",
        ".jsonl",
        ".md",
        ".safetensors",
        ".sh",
        ".yaml",
        ".png",
        ".flac",
    }

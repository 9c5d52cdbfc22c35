"""Speaking: the codes are those of boson's `generate` on boson's own prompt, the sound is the codec's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
import soundfile
import torch
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from conftest import EXAMPLES
from helpers.samples import random_sample
from helpers.speaking import lines_of, speak, write_list
from helpers.tiny import ids_of, run_train, write_checkpoint, write_set
from higgs_tune.evaluate.speak.config import SpeakConfig, VoiceConfig
from higgs_tune.evaluate.speak.engine import PAUSE_S, SpeechEngine, Task
from higgs_tune.evaluate.speak.plan import plan, read_lines
from higgs_tune.evaluate.speak.settings import resolve_settings
from higgs_tune.preprocess.checkpoints.training_record import RECORD, TrainingRecord
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.input.layout import INSTRUCTION, PLAIN_INSTRUCTION, SYSTEM
from higgs_tune.shards.format import Sample
from higgs_tune.train.export.merge import ExportConfig, export
from higgs_tune.train.model.generate import boson_generate
from higgs_tune.train.model.load import load_model
from higgs_tune.train.model.sampling import Request, Sampling
from test_native import write_native
from transformers import PreTrainedTokenizerBase

CLIPS = EXAMPLES.parent / "clips"
TEXT, REF_TEXT, CLIP = "مرحبا بالعالم، hello.", "تَشْرَبُ أُمِّي القَهْوَةَ.", CLIPS / "huda-01.flac"
FRAMES = 15  # of the helper's --max_seconds
GREEDY = ("--temperature", "0", "--ras_win_len", "0")


def boson_messages(layout: str, *, reference: bool) -> list[Message]:
    """The conversation up to the answer's text, as boson's classes."""
    audio, said = AudioContent(audio_url=str(CLIP)), TextContent(text=REF_TEXT)
    system = Message(role="system", content=SYSTEM)
    if layout == "serve":
        before = [Message(role="user", content=[said]), Message(role="assistant", content=[audio])]
        return [system, *(before if reference else ()), Message(role="user", content=TEXT)]
    asked = TextContent(text=(INSTRUCTION if reference else PLAIN_INSTRUCTION) + TEXT)
    return [system, Message(role="user", content=[*([said, audio] if reference else []), asked])]


def boson_request(toy: Path, tokenizer: PreTrainedTokenizerBase, layout: str, *, reference: bool) -> Request:
    """The same prompt by boson's own preparation; the reference by librosa and the codec."""
    codec, ids = load_codec(toy / "codec"), ids_of(toy / "model")
    tokens, _, _, _ = prepare_chatml_sample(
        ChatMLSample(messages=boson_messages(layout, reference=reference)), tokenizer
    )
    assert tokens is not None
    answer = "<|start_header_id|>assistant<|end_header_id|>\n\n" + (TEXT if layout == "chat" else "")
    tokens += tokenizer.encode(answer, add_special_tokens=False)
    tokens += tokenizer.encode("<|audio_out_bos|>", add_special_tokens=False)
    codes_KT, segments = np.zeros((8, 0), np.uint16), []
    if reference:
        codes_KT = codec.encode(librosa.load(CLIP, sr=24_000)[0])
        role = "assistant" if layout == "serve" else "user"
        segments = [{"role": role, "frames": codes_KT.shape[1]}]
    tokens_2L = np.stack([tokens, np.full(len(tokens), -100)]).astype(np.int32)
    (stop,) = tokenizer.encode("<|audio_eos|>", add_special_tokens=False)
    assert ids.audio_in in tokens or layout == "serve" or not reference
    return Request(Sample("x", {"segments": segments}, tokens_2L, codes_KT), stop, FRAMES, 4)


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no reference"])
@pytest.mark.parametrize("layout", ["chat", "serve"])
def test_codes_are_those_of_bosons_generate_and_sound_the_codecs(
    toy: Path, toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, layout: str, reference: bool
) -> None:
    model = load_model(toy / "model", device=torch.device("cpu"), dtype=torch.float32).model
    request = boson_request(toy, toy_tokenizer, layout, reference=reference)
    said = boson_generate(model, request, ids_of(toy / "model"), Sampling(temperature=0))
    assert said.codes_KT is not None
    voice = ("--ref_audio", CLIP, "--ref_text", REF_TEXT) if reference else ()
    speak(toy / "model", toy / "codec", "--text", TEXT, *voice, "--layout", layout, *GREEDY, "-o", tmp_path / "o.wav")
    wave, rate = soundfile.read(tmp_path / "o.wav", dtype="float32")
    expected = load_codec(toy / "codec").decode(np.clip(said.codes_KT[:, :FRAMES], 0, 1023))
    assert rate == 24_000
    assert len(wave) == len(expected)
    assert np.abs(wave - np.clip(expected, -1, 1)).max() < 2**-14


def engine_of(toy: Path, model: Path, **options: Any) -> SpeechEngine:
    given: dict[str, Any] = {"temperature": 0.0, "ras_win_len": 0, "max_seconds": 0.4} | options
    config = VoiceConfig(model_path=model, audio_tokenizer_path=toy / "codec", **given)
    return SpeechEngine(resolve_settings(config), device="cpu", batch_size=4)


def codes_of(engine: SpeechEngine) -> np.ndarray:
    voice = engine.voice(str(CLIP), REF_TEXT)
    (task,) = engine.speak([Task([TEXT], (voice,), 0)])
    return task.codes[0]


def test_every_kind_of_model_folder_speaks_the_same(
    toy: Path, toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Adapter, checkpoint and merged model; and base, its native layout and the adapter switched off."""
    base, rng = tmp_path / "model", np.random.default_rng(0)
    write_checkpoint(base, toy_tokenizer)
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids_of(base)) for i in range(4)]
    data = write_set(tmp_path / "set", samples, base)
    out = tmp_path / "out"
    run_train("single", base, data, out, save_steps=2, max_steps=2, learning_rate=0.1, lr_scheduler_type="constant")
    export(ExportConfig(adapter=out, out=tmp_path / "merged", dtype="float32"))
    write_native(tmp_path / "native", base)
    tuned = engine_of(toy, out)
    expected = codes_of(tuned)
    for folder in (out / "checkpoint-2", tmp_path / "merged"):
        np.testing.assert_array_equal(codes_of(engine_of(toy, folder)), expected)
    untuned = codes_of(engine_of(toy, base))
    assert untuned.shape != expected.shape or (untuned != expected).any()
    np.testing.assert_array_equal(codes_of(engine_of(toy, tmp_path / "native")), untuned)
    with tuned.base_only():
        np.testing.assert_array_equal(codes_of(tuned), untuned)


def test_the_same_seed_gives_the_same_codes_at_any_batch_size(toy: Path, tmp_path: Path) -> None:
    """Sampled, with references and without, a text in pieces among them; another seed gives other codes."""
    lines = [{"id": f"l{i}", "text": f"Line {i}. Second sentence. And a third.", "language": "en"} for i in range(5)]
    for line in lines[:3]:
        line |= {"ref_audio": str(CLIP), "ref_text": REF_TEXT}
    data = write_list(tmp_path / "list.jsonl", lines)
    for name, flags in {"one": ("1", "0"), "five": ("5", "0"), "seed": ("5", "1")}.items():
        options = ("--batch_size", flags[0], "--seed", flags[1], "--max_chars", "20", "--temperature", "1")
        speak(toy / "model", toy / "codec", "--input", data, "-o", tmp_path / name, *options, "--max_seconds", "0.3")
    one, five, seed = (lines_of(tmp_path / name / "spoken.jsonl") for name in ("one", "five", "seed"))
    codes = [{name: line["codes_sha256"] for name, line in run.items()} for run in (one, five, seed)]
    assert codes[0] == codes[1]
    assert not set(codes[0].values()) & set(codes[2].values())
    assert {line["pieces"] for line in one.values()} == {3}
    assert (tmp_path / "one" / "l4.wav").read_bytes() == (tmp_path / "five" / "l4.wav").read_bytes()


def test_pieces_are_spoken_in_one_voice_and_joined(toy: Path) -> None:
    """Without a reference, the first piece is the reference of the others."""
    engine = engine_of(toy, toy / "model")
    (task,) = engine.speak([Task(["First.", "Second."], (), 7)])
    first, second = task.codes
    request = engine._request(task, 1)
    assert request.prompt.segment_frames == [first.shape[1]]
    np.testing.assert_array_equal(request.prompt.codes_KT, np.clip(first, 0, 1023))
    assert request.seed == 8
    wave = engine.sound(task.codes)
    pause = round(PAUSE_S * 24_000)
    assert len(wave) == (first.shape[1] + second.shape[1]) * 960 + pause


@pytest.mark.fast
def test_the_record_chooses_layout_texts_and_normalization(toy: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (toy / "model").iterdir():
        (model / file.name).symlink_to(file)
    config = SpeakConfig(
        model_path=model, audio_tokenizer_path=toy / "codec", text="ســلام ١", output=tmp_path / "o.wav"
    )
    settings = resolve_settings(config)
    assert (settings.layout, settings.normalization, settings.wording.system) == ("serve", "none", SYSTEM)
    record = TrainingRecord(layouts={"chat": 3, "serve": 1}, text_normalizations={"arabic": 4}, instruction="Say: ")
    (model / RECORD).write_bytes(replace(record, system="Talk.").to_bytes())
    settings = resolve_settings(config)
    assert (settings.layout, settings.normalization) == ("chat", "arabic")
    assert (settings.wording.system, settings.wording.instruction) == ("Talk.", "Say: ")
    ((spoken,), failures) = plan(read_lines(config), config, settings)
    assert (spoken.text, spoken.pieces, failures) == ("سلام 1", ("سلام 1",), [])
    chosen = replace(config, layout="serve", text_normalization="none", system="Mine.")
    settings = resolve_settings(chosen)
    assert (settings.layout, settings.normalization, settings.wording.system) == ("serve", "none", "Mine.")

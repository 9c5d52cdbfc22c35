"""Train the miniature's recogniser: a small HuBERT with a CTC head, on speech of `speech.py` in both languages.

    python examples/miniature/train_recogniser.py --speech runs/miniature/asr-speech --out runs/miniature/recogniser

Started again, it goes on from its last checkpoint. Out: `OUT/state.pt` (tensors), `OUT/metrics.jsonl`, and
`OUT/model`, a checkpoint of transformers (`HubertForCTC`, its processor, float16) that higgs-eval takes as `--asr`, and
its character error rates on held-out recordings, `error_rates.json`.
Texts are normalised as higgs-eval does by default (omnivoice): Arabic without vowel marks. Clips are heard at random
speeds and under random noise, so that more is learned than clean speech of known voices.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torch.nn.functional as F  # noqa: N812
import tyro
from higgs_tune.preprocess.audio.resample import resample_soxr
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.codec.codec import HiggsCodec
from higgs_tune.preprocess.judges.edits import count_edits
from higgs_tune.preprocess.judges.load import load_recogniser
from higgs_tune.preprocess.judges.normalisers import normaliser
from higgs_tune.shards.durable import atomic_file, write_bytes
from torch import nn
from transformers import HubertConfig, HubertForCTC, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

SAMPLE_RATE_HZ = 16_000
BANDS, WINDOW, HOP = 48, 400, 160
PAD, UNKNOWN, SPACE = "<pad>", "<unk>", "|"


@dataclass(frozen=True)
class RecogniserTraining:
    """Train the recogniser."""

    speech: tuple[Path, ...]
    """Folders of `speech.py`."""
    out: Path
    """Output folder."""
    through: tuple[Path, ...] = ()
    """More such folders, whose clips are heard through `--codec`."""
    codec: Path = Path("examples/miniature/codec/native")
    """Codec, of either layout."""
    steps: int = 3000
    """Steps in all."""
    batch_seconds: float = 16.0
    """Speech of a step, in seconds."""
    learning_rate: float = 1e-3
    """Peak learning rate; it falls linearly to 0."""
    save_steps: int = 100
    """Steps between checkpoints."""
    test_clips: int = 40
    """Held-out clips of each language for the final error rates."""
    seed: int = 0
    """Seed of weights and batches."""


@dataclass(frozen=True)
class Clip:
    """A clip at 16 kHz [S], what is said, normalised, and its language."""

    wave_S: torch.Tensor
    text: str
    language: str


def load_clips(folders: tuple[Path, ...], split: str, codec: HiggsCodec | None = None) -> list[Clip]:
    """The clips of a split; with a codec as it decodes them."""
    plain, clips = normaliser("omnivoice").apply, []
    for folder, text in ((f, text) for f in folders for text in (f / "speech.jsonl").read_text().splitlines()):
        line = json.loads(text)
        if line["split"] == split:
            wave_S, _rate = soundfile.read(folder / line["audio"], dtype="float32")
            if codec:
                rate_hz = codec.config.sample_rate_hz
                decoded_S = codec.decode(codec.encode(resample_soxr(wave_S, SAMPLE_RATE_HZ, rate_hz)))
                wave_S = resample_soxr(decoded_S, rate_hz, SAMPLE_RATE_HZ)
            clips.append(Clip(torch.from_numpy(wave_S), plain(line["text"]), line["language"]))
    return clips


def make_processor(clips: list[Clip], folder: Path) -> Wav2Vec2Processor:
    """A processor whose symbols are the letters of the clips' texts; written to `folder`."""
    letters = sorted({letter for clip in clips for letter in clip.text} - {" "})
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {symbol: number for number, symbol in enumerate([PAD, UNKNOWN, SPACE, *letters])}
    write_bytes(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False).encode())
    specials = {"bos_token": None, "eos_token": None, "pad_token": PAD, "unk_token": UNKNOWN}
    options: dict[str, Any] = specials | {"word_delimiter_token": SPACE}
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **options)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=SAMPLE_RATE_HZ, do_normalize=True, return_attention_mask=True)
    processor = Wav2Vec2Processor(extractor, tokenizer)
    processor.save_pretrained(folder)
    return processor


def make_model(symbols: int, seed: int) -> HubertForCTC:
    """HuBERT at small sizes, 50 frames a second, 1.1 M parameters."""
    torch.manual_seed(seed)
    config = HubertConfig(
        vocab_size=symbols,
        hidden_size=144,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=432,
        conv_dim=(4 * BANDS, 144),
        conv_kernel=(WINDOW, 4),
        conv_stride=(HOP, 2),
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=8,
        mask_time_prob=0.05,
        mask_time_length=5,
        mask_feature_prob=0.0,
        hidden_dropout=0.05,
        attention_dropout=0.05,
        activation_dropout=0.0,
        feat_proj_dropout=0.05,
        final_dropout=0.0,
        layerdrop=0.0,
        pad_token_id=0,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )
    model = HubertForCTC(config)
    first: Any = model.hubert.feature_extractor.conv_layers[0].conv
    first.weight.data[:, 0], first.bias.data[:] = filter_bank(), 0.0
    return model


def filter_bank() -> torch.Tensor:
    """Windowed waves at mel-spaced pitches, each in four phases: [4 * BANDS, WINDOW].

    The first layer starts from these, so that, rectified, it says how loud each band is from the first step on. From
    random weights the recogniser hears nothing but blanks for hundreds of steps.
    """
    pitch_hz = 700 * (10 ** (torch.linspace(65, 2800, BANDS) / 2595) - 1)
    angle_BW = 2 * torch.pi * pitch_hz[:, None] * (torch.arange(WINDOW) - WINDOW / 2) / SAMPLE_RATE_HZ
    phases = [torch.hann_window(WINDOW) * torch.cos(angle_BW + turn * torch.pi / 2) for turn in range(4)]
    return torch.cat(phases) * WINDOW**-0.5


def heard_otherwise(wave_S: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """The clip at a random speed (0.92 to 1.08), and half of the time under white noise of 15 to 45 dB."""
    samples = int(len(wave_S) / rng.uniform(0.92, 1.08))
    wave_S = F.interpolate(wave_S[None, None], samples, mode="linear", align_corners=False)[0, 0]
    if rng.random() < 0.5:
        level = wave_S.square().mean().sqrt() * 10 ** (-rng.uniform(15, 45) / 20)
        wave_S = wave_S + level * torch.from_numpy(rng.standard_normal(samples, np.float32))
    return wave_S


def draw_batch(clips: list[Clip], processor: Any, config: RecogniserTraining, step: int) -> dict[str, torch.Tensor]:
    """Inputs of the model: clips of about one length, `batch_seconds` together; `clips` are sorted by length."""
    rng = np.random.default_rng((config.seed, step))
    first = int(rng.integers(len(clips)))
    count = max(1, int(config.batch_seconds * SAMPLE_RATE_HZ / len(clips[first].wave_S)))
    near = np.arange(max(0, first - 4 * count), min(len(clips), first + 4 * count))
    chosen = [clips[i] for i in rng.choice(near, min(count, len(near)), replace=False)]
    waves = [heard_otherwise(clip.wave_S, rng).numpy() for clip in chosen]
    inputs = processor(waves, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt", padding=True)
    labels = processor.tokenizer([clip.text for clip in chosen], return_tensors="pt", padding=True)
    masked = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    return {**inputs, "labels": masked}


def error_rates(folder: Path, clips: list[Clip], count: int) -> dict[str, float]:
    """Character error rate of each language on its first clips, by the project's own judge."""
    recogniser, rates = load_recogniser(str(folder), "cpu"), {}
    for language in sorted({clip.language for clip in clips}):
        chosen = [clip for clip in clips if clip.language == language][:count]
        heard = [recogniser.transcribe([clip.wave_S.numpy()], language)[0] for clip in chosen]
        edits = [count_edits(clip.text, text) for clip, text in zip(chosen, heard, strict=True)]
        rates[language] = round(sum(edit.errors for edit in edits) / sum(edit.length for edit in edits), 4)
    return rates


def save(config: RecogniserTraining, model: HubertForCTC, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the checkpoint of the training and, in float16, the model."""
    with atomic_file(config.out / "state.pt") as file:
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    halves = {name: value.half() for name, value in model.state_dict().items()}
    model.save_pretrained(config.out / "model", state_dict=halves)


def main() -> None:
    config = tyro.cli(RecogniserTraining)
    decoded = load_clips(config.through, "train", load_codec(config.codec)) if config.through else []
    clips = sorted([*load_clips(config.speech, "train"), *decoded], key=lambda clip: len(clip.wave_S))
    processor: Any = make_processor(clips, config.out / "model")
    model = make_model(len(processor.tokenizer), config.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    done = 0
    if (config.out / "state.pt").exists():
        state = torch.load(config.out / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    begin, losses = time.monotonic(), []
    for step in range(done, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min((step + 1) / 200, 1 - step / config.steps)
        torch.manual_seed(step)
        np.random.seed(step)  # transformers draws its masks from it
        loss = model(**draw_batch(clips, processor, config, step)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % config.save_steps == 0:
            line = {"step": step + 1, "loss": round(float(np.mean(losses)), 4),
                    "seconds": round(time.monotonic() - begin, 1)}  # fmt: skip
            with (config.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
            losses = []
            save(config, model, optimizer, step + 1)
    rates = error_rates(config.out / "model", load_clips(config.speech, "test"), config.test_clips)
    write_bytes(config.out / "model" / "error_rates.json", json.dumps(rates).encode() + b"\n")
    print(rates)


if __name__ == "__main__":
    main()

"""Train the miniature codec on clips of `speech.py`.

    python examples/miniature/train_codec.py --speech runs/miniature/codec-speech --out runs/miniature/codec

On two cores: `OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/miniature/train_codec.py ...`; each process has a
batch of its own. Started again, it goes on from its last checkpoint. Out: `OUT/state.pt` (tensors),
`OUT/metrics.jsonl`, and, each time it saves, `OUT/native` and `OUT/original`, the codec in both layouts.

Loss: L1 between log-mel spectrograms at five window lengths, more where the sound changes, and the commitment loss; no
discriminator. A clip in six uses only its first few codebooks, so that these carry most.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import tyro
from codec_files import write_codec
from codec_model import CODEBOOK_SIZE, CODEBOOKS, SAMPLE_RATE_HZ, MiniatureCodec
from higgs_tune.preprocess.audio.resample import resample_soxr
from higgs_tune.shards.durable import atomic_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.audio_utils import mel_filter_bank

HOP = 960
MELS = {2048: 80, 1024: 64, 512: 40, 256: 24, 128: 12}  # window in samples: mel bands
CHANGE_WEIGHT, CHANGE_SAMPLES = 3.0, 960  # bursts and onsets last a few ms of a second, and carry the consonants
COMMITMENT = 0.02


@dataclass(frozen=True)
class CodecTraining:
    """Train the miniature codec."""

    speech: tuple[Path, ...]
    """Folders of `speech.py`."""
    out: Path
    """Output folder."""
    steps: int = 4000
    """Steps in all."""
    decay: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls to 0."""
    batch: int = 4
    """Crops a step."""
    frames: int = 25
    """Frames of a crop, 40 ms each."""
    learning_rate: float = 4e-4
    """Peak learning rate."""
    decoder_only: bool = False
    """Train the decoder alone, so that codes stay as they are."""
    floor: float = 5e-4
    """Added to mel magnitudes before the logarithm, so that silence need not be exact; f and s must stay above it."""
    save_steps: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of weights and crops."""


class MelLoss(nn.Module):
    """Mean distance of log-mel spectrograms over several window lengths."""

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor
        for window, bands in MELS.items():
            bank = mel_filter_bank(window // 2 + 1, bands, 0.0, SAMPLE_RATE_HZ / 2, SAMPLE_RATE_HZ, "slaney")
            bank = bank / np.maximum(bank.sum(0), 1e-9)  # means, so that the floor is as high for every window
            self.register_buffer(f"bank_{window}", torch.from_numpy(bank).float())
            self.register_buffer(f"window_{window}", torch.hann_window(window))

    def forward(self, wave_BS: torch.Tensor, target_BS: torch.Tensor) -> torch.Tensor:
        waves, loss = torch.cat([wave_BS, target_BS]), torch.zeros(())
        for size in MELS:
            spectrum = torch.stft(
                waves, size, size // 4, window=self.get_buffer(f"window_{size}"), normalized=True, return_complex=True
            )
            power = spectrum.real.square() + spectrum.imag.square()
            mel = (power + 1e-10).sqrt().transpose(1, 2) @ self.get_buffer(f"bank_{size}")
            made, wanted = (mel + self.floor).log().chunk(2)
            loss = loss + ((made - wanted).abs() * _change(wanted, max(1, CHANGE_SAMPLES // size))).mean()
        return loss / len(MELS)


@torch.no_grad()
def _change(log_mel_BTM: torch.Tensor, reach: int) -> torch.Tensor:
    """Weights [B, T, 1] of mean 1: more where the sound changes from `reach` frames before to `reach` after."""
    change_BT = torch.zeros(log_mel_BTM.shape[:2])
    change_BT[:, reach:-reach] = (log_mel_BTM[:, 2 * reach :] - log_mel_BTM[:, : -2 * reach]).abs().mean(2)
    weight_BT = 1 + CHANGE_WEIGHT * change_BT
    return (weight_BT / weight_BT.mean())[..., None]


@dataclass(frozen=True)
class Clip:
    """A clip: whole frames of its waveform [S] and HuBERT's features [T, C]."""

    wave_S: torch.Tensor
    semantic_TC: torch.Tensor


def load_clips(folders: tuple[Path, ...], split: str, model: MiniatureCodec, shortest: int) -> list[Clip]:
    """The clips of a split that have at least `shortest` frames."""
    clips = []
    for folder, line in ((f, line) for f in folders for line in (f / "speech.jsonl").read_text().splitlines()):
        entry = json.loads(line)
        if entry["split"] != split:
            continue
        samples, rate_hz = soundfile.read(folder / entry["audio"], dtype="float32")
        wave_S = torch.from_numpy(resample_soxr(samples, rate_hz, SAMPLE_RATE_HZ))
        wave_S = wave_S[: len(wave_S) // HOP * HOP]
        if len(wave_S) >= shortest * HOP:
            clips.append(Clip(wave_S, model.semantic_features(wave_S)))
    return clips


def draw_batch(
    clips: list[Clip], config: CodecTraining, step: int, rank: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Crops [B, S] of random loudness, their features [B, T, C], and how many codebooks each uses [B]."""
    rng = np.random.default_rng((config.seed, step, rank) if rank else (config.seed, step))
    share = np.array([len(clip.semantic_TC) for clip in clips], dtype=float)
    waves, semantic, books = [], [], []
    for index in rng.choice(len(clips), config.batch, p=share / share.sum()):
        clip = clips[index]
        first = int(rng.integers(len(clip.semantic_TC) - config.frames + 1))
        gain = float(rng.uniform(0.5, 1.3))
        waves.append(gain * clip.wave_S[first * HOP : (first + config.frames) * HOP])
        semantic.append(clip.semantic_TC[first : first + config.frames])
        books.append(int(rng.integers(1, CODEBOOKS)) if rng.random() < 1 / 6 else CODEBOOKS)
    return torch.stack(waves), torch.stack(semantic), torch.tensor(books)


def entropy_bits(codes_KM: torch.Tensor) -> list[float]:
    """Entropy of each codebook's codes, in bits."""
    shares = [torch.bincount(codes, minlength=CODEBOOK_SIZE) / len(codes) for codes in codes_KM]
    return [round(float(-(p[p > 0] * p[p > 0].log2()).sum()), 2) for p in shares]


def learning_rate(config: CodecTraining, step: int) -> float:
    """Warm-up over 100 steps, constant, then linear decay."""
    left = (config.steps - step) / (config.decay * config.steps) if config.decay else 1.0
    return config.learning_rate * min(1.0, (step + 1) / 100, left)


def save_state(config: CodecTraining, model: MiniatureCodec, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the checkpoint and both layouts."""
    with atomic_file(config.out / "state.pt") as file:
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    write_codec(model.codec, config.out)


def main() -> None:
    config = tyro.cli(CodecTraining)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    config.out.mkdir(parents=True, exist_ok=True)
    model, loss_of, done, saved = MiniatureCodec(config.seed), MelLoss(config.floor), 0, config.out / "state.pt"
    state = torch.load(saved, weights_only=True) if saved.exists() else None
    if state:
        model.load_state_dict(state["model"])
    clips = load_clips(config.speech, "train", model, config.frames)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.8, 0.99), weight_decay=0.0)
    if state:
        done = state["step"]
        optimizer.load_state_dict(state["optimizer"])
    # each process has a batch of its own; codebooks are those of the first
    forward = DistributedDataParallel(model, find_unused_parameters=True) if dist.is_initialized() else model
    begin, losses, codes = time.monotonic(), [], []
    for step in range(done, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        torch.manual_seed(step)
        waves, semantic, books = draw_batch(clips, config, step, rank)
        made, commitment, codes_KBT = forward(waves, semantic, books, learn_codes=not config.decoder_only)
        loss = loss_of(made, waves)
        optimizer.zero_grad()
        (loss + COMMITMENT * commitment).backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if rank:
            continue
        losses.append((loss.item(), commitment.item(), norm.item()))
        codes.append(codes_KBT.flatten(1))
        if (step + 1) % config.save_steps == 0:
            mel, commit, norm = np.mean(losses, axis=0).round(4).tolist()
            line = {"step": step + 1, "mel": mel, "commitment": commit, "grad_norm": norm,
                    "bits": entropy_bits(torch.cat(codes, dim=1)),
                    "seconds": round(time.monotonic() - begin, 1)}  # fmt: skip
            with (config.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
            losses, codes = [], []
            save_state(config, model, optimizer, step + 1)


if __name__ == "__main__":
    main()

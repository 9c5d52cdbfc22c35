"""How fast a set is built, against the loop that public trainers run: boson's `encode` and log-mel, file after file.

    python bench/preprocess.py [--voices FOLDER] [--shares 8 1] [--rounds 3] [--device cuda --num_processes 4]

And against several processes that each run that loop over their share of the samples (`--loops`), which is what people
do; theirs have loaded the codec before the clock starts, so compare with the ratio without start-up.

All sides get the same files in the same run, alternately, with a codec of the released sizes and random weights: the
work is the same as with the released weights. `shares` is how many samples use each reference clip: 8 is like a
voice-cloning set, with 1 every clip is distinct. Boson's side is its real class with PyTorch's threads on all cores;
torchaudio's resampler is stood in for by ours, which is the same formula. Ours is the whole of higgs-preprocess:
listing, worker processes, encoding, log-mel, shards. Its start-up (imports, loading the codec) is timed on short clips
and taken off, since it does not grow with the data; the ratio with it is printed too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import soundfile
import torch
import tyro
from higgs_tune.preprocess.codec.resample import resample_sinc
from higgs_tune.preprocess.config import PreprocessConfig
from higgs_tune.preprocess.pipeline import build_shards
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.toy import ToyConfig, make_toy
from machine import describe_machine
from transformers import HubertConfig, WhisperFeatureExtractor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.boson_codec import boson_tokenizer, save_boson  # noqa: E402


@dataclass(frozen=True)
class Options:
    """Preprocessing benchmark."""

    voices: Path | None = None
    """Folder of recordings that the clips are cut from; by default the example's."""
    shares: tuple[int, ...] = (8, 1)
    """Samples that use each reference clip, one scenario each."""
    samples: int = 16
    """Samples of each scenario."""
    seconds: float = 6.2
    """Mean length of a clip, in seconds (by default that of bench/models/synthetic.py); they vary by 40 % around it."""
    rounds: int = 3
    """Times that both sides run, alternately."""
    device: str = "cpu"
    """Where both sides encode."""
    num_processes: int = 0
    """Worker processes of ours; 0: as higgs-preprocess chooses."""
    threads: int = 0
    """CPU threads of boson's side; 0: all cores."""
    loops: int = 0
    """Processes of boson's loop, with one thread each; 0: one a core. 1: they are left out."""
    out: Path | None = None
    """JSON file of the results."""


@dataclass(frozen=True)
class Data:
    """One scenario on disk.

    pairs: reference and target of each sample. seconds: of all samples; distinct_s: of distinct clips.
    """

    manifest: Path
    pairs: list[tuple[Path, Path]]
    seconds: float
    distinct_s: float


def recordings(folder: Path | None) -> Iterator[np.ndarray]:
    """Speech without end, at 24 kHz: the recordings, one after another, again and again."""
    files = sorted((folder or ROOT / "examples/arabic/clips").glob("*.*"))
    waves = [librosa.load(file, sr=24_000)[0] for file in files if file.suffix in (".wav", ".flac", ".ogg")]
    while True:
        yield from waves


def make_data(folder: Path, share: int, options: Options) -> Data:
    """Cut clips and write a manifest whose references serve `share` samples each."""
    rng, speech, buffer = np.random.default_rng(share), recordings(options.voices), np.zeros(0, np.float32)
    folder.mkdir()
    lengths: dict[Path, float] = {}

    def clip(name: str) -> Path:
        nonlocal buffer
        count = int(24_000 * options.seconds * rng.uniform(0.6, 1.4))
        while len(buffer) < count:
            buffer = np.concatenate([buffer, next(speech)])
        # a little noise, so that no two clips have the same content
        soundfile.write(folder / name, buffer[:count] + 1e-3 * rng.standard_normal(count), 24_000)
        buffer, lengths[folder / name] = buffer[count:], count / 24_000
        return folder / name

    references = [clip(f"reference-{i}.wav") for i in range(-(-options.samples // share))]
    pairs = [(references[i // share], clip(f"target-{i}.wav")) for i in range(options.samples)]
    lines = [f"{target.name},text number {i},speaker,{given.name}" for i, (given, target) in enumerate(pairs)]
    (folder / "data.csv").write_text("\n".join(["audio,text,speaker,ref_audio", *lines]) + "\n")
    used = sum(lengths[file] for pair in pairs for file in pair)
    return Data(folder / "data.csv", pairs, used, sum(lengths.values()))


def resample(wave_11S: torch.Tensor, source_hz: int, target_hz: int) -> torch.Tensor:
    """In torchaudio's place."""
    return resample_sinc(wave_11S[:, 0], source_hz, target_hz)[:, None]


def run_boson(tokenizer: Any, data: Data) -> tuple[float, dict[str, float], list[np.ndarray]]:
    """Seconds, what they went to, and the codes of every sample's segments."""
    extractor, spent, codes = WhisperFeatureExtractor(feature_size=128), {"encode": 0.0, "mel": 0.0}, []
    began = time.perf_counter()
    for pair in data.pairs:
        for file in pair:
            start = time.perf_counter()
            codes.append(tokenizer.encode(str(file)).cpu().numpy())
            spent["encode"] += time.perf_counter() - start
        start = time.perf_counter()
        wave_S, rate = librosa.load(pair[0], sr=None)
        wave_S = librosa.resample(wave_S, orig_sr=rate, target_sr=16_000)
        extractor([wave_S], sampling_rate=16_000, return_attention_mask=True, padding="max_length", return_tensors="pt")
        spent["mel"] += time.perf_counter() - start
    return time.perf_counter() - began, spent, codes


class Loops:
    """Processes that each run boson's loop over their share of the samples, ready before the clock starts.

    A build of ours ends every child of this process, so they live from one build to the next.
    """

    def __init__(self, count: int, device: str) -> None:
        context, self.pipes = multiprocessing.get_context("spawn"), [multiprocessing.Pipe() for _ in range(count)]
        self.processes = [context.Process(target=_loop, args=(there, device)) for _, there in self.pipes]
        for process in self.processes:
            process.start()
        for here, there in self.pipes:
            there.close()  # so that a process that dies is no endless wait
            here.recv()

    def run(self, data: Data) -> float:
        """Seconds until the last process is done."""
        began = time.perf_counter()
        for number, (here, _) in enumerate(self.pipes):
            here.send(data.pairs[number :: len(self.pipes)])
        for here, _ in self.pipes:
            here.recv()
        return time.perf_counter() - began

    def close(self) -> None:
        for (here, _), process in zip(self.pipes, self.processes, strict=True):
            here.send(None)
            process.join()


def _loop(pipe: Connection, device: str) -> None:
    torch.set_num_threads(1)
    tokenizer = boson_tokenizer(HubertConfig(), resample=resample)
    tokenizer.to(device).device = device
    pipe.send(None)
    with torch.inference_mode():
        while (pairs := pipe.recv()) is not None:
            run_boson(tokenizer, Data(Path(), pairs, 0.0, 0.0))
            pipe.send(None)


def run_ours(data: Path, out: Path, folder: Path, options: Options, samples: int) -> tuple[float, dict[str, float]]:
    """Seconds of a build, and what they went to."""
    config = PreprocessConfig(
        data=data,
        model_path=folder / "toy" / "model",
        audio_tokenizer_path=folder / "codec",
        out=str(out),
        whisper_features="mel",
        device=options.device,
        num_processes=options.num_processes,
        clips_per_unit=max(1, samples // 16),
    )
    began = time.perf_counter()
    spent = build_shards(config)["spent"]
    return time.perf_counter() - began, spent


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended: what other programs take changes it little."""
    return sum(os.times()[:4])


def compare(share: int, tokenizer: Any, loops: int, folder: Path, options: Options) -> dict[str, Any]:
    """One scenario: all rounds, then its lines."""
    data = make_data(folder / f"data-{share}", share, options)
    tiny = make_data(folder / f"tiny-{share}", 1, Options(samples=2, seconds=0.5, voices=options.voices))
    took: dict[str, list[float]] = {"ours": [], "boson": [], "start-up": []}
    cpu: dict[str, list[float]] = {"ours": [], "boson": [], "start-up": []}
    spent: dict[str, dict[str, float]] = {}
    codes: list[np.ndarray] = []
    run_boson(tokenizer, tiny)  # the first calls set things up
    took |= {"loops": []} if loops > 1 else {}
    for number in range(options.rounds):
        at = [cpu_seconds()]
        took["start-up"].append(run_ours(tiny.manifest, folder / f"tiny-{share}-{number}", folder, options, 16)[0])
        at.append(cpu_seconds())
        seconds, spent["ours"] = run_ours(
            data.manifest, folder / f"out-{share}-{number}", folder, options, options.samples
        )
        took["ours"].append(seconds)
        at.append(cpu_seconds())
        seconds, spent["boson"], codes = run_boson(tokenizer, data)
        took["boson"].append(seconds)
        for name, used in zip(("start-up", "ours", "boson"), np.diff([*at, cpu_seconds()]).tolist(), strict=True):
            cpu[name].append(used)
        if loops > 1:
            processes = Loops(loops, options.device)
            processes.run(tiny)
            took["loops"].append(processes.run(data))
            processes.close()
    built = ShardSet(folder / f"out-{share}-0")
    ours_KT = np.concatenate([built.read(row).codes_KT for row in range(len(built))], axis=1)
    equal = float((ours_KT == np.concatenate(codes, axis=1)).mean())
    steady = [a - b for a, b in zip(took["ours"], took["start-up"], strict=True)]
    ratios = [theirs / ours for theirs, ours in zip(took["boson"], steady, strict=True)]
    whole = [theirs / ours for theirs, ours in zip(took["boson"], took["ours"], strict=True)]
    apart = [theirs / ours for theirs, ours in zip(took.get("loops", []), steady, strict=False)]
    count = len(data.pairs)
    print(f"\neach reference serves {share}: {count} samples, {data.seconds:.0f} s, {data.distinct_s:.0f} s distinct")
    sides = [("boson's loop", took["boson"]), ("ours", steady)]
    sides += [(f"{loops} such loops", took["loops"])] if loops > 1 else []
    for name, found in sides:
        middle = statistics.median(found)
        speed = f"{count / middle:.2f} samples/s, {data.seconds / middle:.2f} hours of samples' audio an hour"
        print(f"{name:<14}{middle:>8.1f} s  ({min(found):.1f} to {max(found):.1f})  {speed}")
    hours, encoded = data.distinct_s / statistics.median(steady), data.distinct_s / spent["ours"]["encode"]
    print(f"ours: {hours:.2f} hours of distinct audio an hour, all told")
    print(f"one process of ours encodes {encoded:.2f} hours of audio an hour")
    print(f"{'start-up':<14}{statistics.median(took['start-up']):>8.1f} s")
    steady_cpu = [a - b for a, b in zip(cpu["ours"], cpu["start-up"], strict=True)]
    work = [theirs / ours for theirs, ours in zip(cpu["boson"], steady_cpu, strict=True)]
    to_loops = [("to the loops", apart)] if loops > 1 else []
    for name, found in (("ratio", ratios), ("with start-up", whole), ("of CPU time", work), *to_loops):
        print(f"{name:<14}{statistics.median(found):>8.2f}x ({min(found):.2f} to {max(found):.2f})")
    for name, parts in spent.items():
        print(
            f"{name} spent, in the last round: " + ", ".join(f"{what} {value:.1f} s" for what, value in parts.items())
        )
    print(f"equal codes   {equal:.4%}")
    return {
        "share": share,
        "distinct_audio_s": data.distinct_s,
        "audio_hours_an_hour": hours,
        "encoded_hours_an_hour_of_one_process": encoded,
        "seconds": took,
        "cpu_seconds": cpu,
        "ratios": ratios,
        "ratios_to_loops": apart,
        "with_start_up": whole,
        "spent": spent,
        "equal": equal,
    }


def main() -> None:
    options = tyro.cli(Options)
    print(describe_machine())
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_toy(ToyConfig(out=folder / "toy", chatml=ROOT / "examples/arabic/chatml.json"))
        tokenizer = boson_tokenizer(HubertConfig(), resample=resample)
        save_boson(tokenizer, folder / "codec")
        tokenizer.to(options.device).device = options.device
        loops = options.loops or len(os.sched_getaffinity(0))
        with torch.inference_mode():
            results = [compare(share, tokenizer, loops, folder, options) for share in options.shares]
    print(json.dumps(results))
    if options.out:
        found = {"machine": describe_machine(), "device": options.device, "scenarios": results}
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Speed and memory of higgs-prepare on recordings of any length, and kills at random moments.

    python bench/prepare.py --hours 10                     one file of ten hours: speed, and memory against six minutes
    python bench/prepare.py --hours 0.5 --files 4 --processes 2 [--quality dnsmos] [--speaker_model resemblyzer]
    python bench/prepare.py --hours 0.1 --files 4 --kills 20     kill -9 at 20 moments, then compare every byte

The recordings are speech of flite where it is installed, else bursts of noise; neither a recogniser nor a text is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import tyro

RATE_HZ = 16_000
SENTENCES = (
    "The weather was warm and the children played in the garden until evening.",
    "Please send the letter to my brother before the end of the week.",
    "Nobody had seen the old captain since the storm took his boat away.",
    "They will build a new school beside the library next summer.",
)
COMMAND = [sys.executable, "-c", "from higgs_tune.preprocess.prepare.cli import main; main()"]


@dataclass(frozen=True)
class Options:
    """Speed and memory of higgs-prepare, or kills at random moments."""

    hours: float = 1.0
    """Length of each file."""
    files: int = 1
    """Number of files."""
    processes: int = 1
    """Worker processes."""
    longest_pause: float = 2.0
    """Longest pause between sentences, in seconds: long ones leave little for the models."""
    vad: str = "auto"
    """As of higgs-prepare."""
    quality: str = "none"
    """As of higgs-prepare."""
    speaker_model: str = ""
    """As of higgs-prepare."""
    kills: int = 0
    """Kills at random moments, in place of the measurement."""
    folder: Path | None = None
    """Where files are made; by default a temporary folder."""


def sentences(folder: Path) -> list[np.ndarray]:
    """float32 waves at 16 kHz."""
    if not shutil.which("flite"):
        rng = np.random.default_rng(0)
        return [(0.1 * rng.normal(size=int(RATE_HZ * s))).astype(np.float32) for s in (3.5, 4, 5, 6)]
    waves = []
    for number, text in enumerate(SENTENCES):
        file = folder / f"sentence-{number}.wav"
        subprocess.run(["flite", "-voice", "slt", "-t", text, "-o", str(file)], check=True, timeout=60)
        waves.append(soundfile.read(file, dtype="float32")[0])
    return waves


def make_recording(path: Path, seconds: float, waves: list[np.ndarray], seed: int, longest_pause: float) -> None:
    """Sentences with pauses of 0.3 s to `longest_pause`, over quiet noise."""
    rng, written = np.random.default_rng(seed), 0
    with soundfile.SoundFile(path, "w", RATE_HZ, 1, "PCM_16") as file:
        while written < seconds * RATE_HZ:
            wave = waves[int(rng.integers(len(waves)))]
            pause = np.zeros(int(rng.uniform(0.3, longest_pause) * RATE_HZ), np.float32)
            block = np.concatenate([wave * rng.uniform(0.5, 1.0), pause])
            file.write(block + rng.normal(0, 3e-4, len(block)).astype(np.float32))
            written += len(block)


def command(recordings: Path, out: Path, given: Options) -> list[str]:
    options = ["--quality", given.quality, "--vad", given.vad, "--num_processes", str(given.processes)]
    if given.speaker_model:
        options += ["--speaker_model", given.speaker_model]
    return [*COMMAND, str(recordings), "--out", str(out), *options]


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def resident_mb(pid: int) -> float:
    """Peak resident memory of a process, in megabytes (`VmHWM`)."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def run(recordings: Path, out: Path, given: Options) -> tuple[float, float, float]:
    """Seconds of wall and of processor time, and the largest resident memory of one process in megabytes."""
    began, most, before = time.monotonic(), 0.0, os.times()
    process = subprocess.Popen(command(recordings, out, given), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        most = max([most, *map(resident_mb, (process.pid, *children(process.pid)))])
        time.sleep(0.1)
    if process.returncode:
        assert process.stderr
        sys.exit(process.stderr.read().decode())
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - began, used, most


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_runs(recordings: Path, folder: Path, given: Options) -> None:
    """Kill a run's process group at random moments, run it to the end, compare."""
    took, _, _ = run(recordings, folder / "whole", given)
    wanted, rng = digest(folder / "whole"), random.Random(0)
    for number in range(given.kills):
        out, after = folder / f"killed-{number}", rng.uniform(0.1, 1.0) * took
        process = subprocess.Popen(
            command(recordings, out, given),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(after)
        hit = process.poll() is None
        if hit:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = len(digest(out)) if out.exists() else 0
        run(recordings, out, given)
        same = digest(out) == wanted
        print(
            json.dumps({"kill": number, "after_s": round(after, 2), "hit": hit, "files": left, "same": same}),
            flush=True,
        )
        if not same:
            sys.exit("the result is another one")
        shutil.rmtree(out)


def main() -> None:
    given = tyro.cli(Options)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        (folder / "in").mkdir()
        (folder / "short").mkdir()
        waves = sentences(folder)
        for number in range(given.files):
            make_recording(folder / "in" / f"{number}.wav", given.hours * 3600, waves, number, given.longest_pause)
        if given.kills:
            kill_runs(folder / "in", folder, given)
            return
        make_recording(folder / "short" / "0.wav", min(360.0, given.hours * 3600), waves, 0, given.longest_pause)
        short_s, _, short_mb = run(folder / "short", folder / "out-short", given)
        long_s, long_cpu_s, long_mb = run(folder / "in", folder / "out", given)
        seconds = given.hours * 3600 * given.files
        made = {"audio_s": round(seconds), "wall_s": round(long_s, 1), "times_real_time": round(seconds / long_s, 1)}
        made |= {"cpu_s": round(long_cpu_s, 1), "times_real_time_a_core": round(seconds / long_cpu_s, 1)}
        made |= {"memory_mb": round(long_mb), "wall_s_of_6_minutes": round(short_s, 1)}
        made |= {"segments": sum(1 for _ in (folder / "out" / "segments.jsonl").open("rb"))}
        print(json.dumps(made | {"memory_mb_of_6_minutes": round(short_mb)}))


if __name__ == "__main__":
    main()

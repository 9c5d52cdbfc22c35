"""higgs-speak's main path: settings, lines, those that are spoken already, speaking, files.

In: the options. Out: one audio file; or a folder with ID.wav for each line, `spoken.jsonl` and `failures.jsonl`.
Guarantees (test_speak_lists.py): a file under its final name is whole, and named by its line's id; a line that is
spoken already with the same text, references, model and options is not spoken again; a bad line costs no other.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
from higgs_tune.evaluate.speak.config import SpeakConfig
from higgs_tune.evaluate.speak.plan import Failure, Utterance, plan, read_lines
from higgs_tune.evaluate.speak.settings import Settings, resolve_settings
from higgs_tune.evaluate.speak.store import FAILURES, Spoken, SpokenFolder
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError, few
from higgs_tune.shards.lock import locked
from higgs_tune.shards.writer import file_sha256

if TYPE_CHECKING:
    from higgs_tune.evaluate.speak.engine import SpeechEngine, Task

LOCK = ".lock"
PROGRESS_SECONDS = 5.0
ROUNDS = 8  # lines that are read, spoken and written together, in batches
SHOWN = 20  # failures that are printed


def speak(config: SpeakConfig) -> int:
    """Speak what the options ask for; returns the exit code: 0, or 1 where lines of a list failed.

    Raises:
        UserError: model, codec or list cannot be used; or the single text cannot be spoken.
    """
    settings, lines = resolve_settings(config), read_lines(config)
    for note in settings.notes:
        _say(note)
    utterances, failures = plan(lines, config, settings)
    if config.to_file:
        _speak_file(config, settings, utterances, failures)
        return 0
    with locked(config.output / LOCK, "higgs-speak", config.output):
        durable.check_writable(config.output)
        return _speak_folder(config, settings, utterances, failures)


def load_engine(config: SpeakConfig, settings: Settings) -> SpeechEngine:
    """Load the model; torch takes seconds to import."""
    from higgs_tune.evaluate.speak.engine import SpeechEngine

    return SpeechEngine(settings, device=config.device, batch_size=config.batch_size)


def _speak_file(config: SpeakConfig, settings: Settings, utterances: list[Utterance], failures: list[Failure]) -> None:
    folder = config.output.parent
    if not failures:
        durable.check_writable(folder)
        for result in speak_utterances(load_engine(config, settings), utterances, folder, config.output.name):
            if isinstance(result, Failure):
                failures.append(result)
                continue
            cut = "" if result.ended else f"; cut off at --max_seconds {config.max_seconds:g}"
            print(f"{config.output}: {result.seconds:.2f} s, {result.pieces} pieces{cut}")
    for failure in failures:
        raise UserError(f"cannot speak it: {failure.reason}", where=failure.place)


def _speak_folder(config: SpeakConfig, settings: Settings, utterances: list[Utterance], failures: list[Failure]) -> int:
    spoken, lines = SpokenFolder(config.output), len(utterances) + len(failures)
    began, count, seconds = time.monotonic(), *speak_into(spoken, config, settings, utterances, failures)
    spoken.close(failures)
    if cut := [utterance.id for utterance in utterances if spoken.is_cut_off(utterance.id)]:
        _say(f"warning: {len(cut)} lines did not end and were cut off at --max_seconds: {few(cut)}")
    for failure in failures[:SHOWN]:
        _say(f"failed: {failure.id or failure.place}: {failure.reason}")
    if failures:
        more = f"; {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
        _say(f"{len(failures)} of {lines} lines failed{more}: {config.output / FAILURES}")
    print(f"{lines - len(failures)} of {lines} lines are spoken in {config.output}: {count} now, "
          f"{seconds:.1f} s of audio in {time.monotonic() - began:.1f} s")  # fmt: skip
    return 1 if failures else 0


def speak_into(
    spoken: SpokenFolder,
    config: SpeakConfig,
    settings: Settings,
    utterances: list[Utterance],
    failures: list[Failure],
    label: str = "",
) -> tuple[int, float]:
    """Speak the lines that a folder lacks; returns their number and the seconds of their audio.

    Args:
        failures: lines that cannot be spoken; those that fail are added.
        label: begins each message.
    """
    waiting = [utterance for utterance in utterances if not spoken.has(utterance)]
    spoken.forget({utterance.id for utterance in waiting} | {failure.id for failure in failures})
    if there := len(utterances) - len(waiting):
        _say(f"{label}{there} of {len(utterances) + len(failures)} lines are spoken already")
    seconds = 0.0
    if waiting:
        progress = _Progress(len(waiting), label)
        for result in speak_utterances(load_engine(config, settings), waiting, spoken.folder):
            if isinstance(result, Failure):
                failures.append(result)
            else:
                spoken.add(result)
                seconds += result.seconds
            progress.add(f"lines, {seconds:.0f} s of audio")
    return len(waiting), seconds


def speak_utterances(
    engine: SpeechEngine, utterances: Sequence[Utterance], folder: Path, name: str | None = None
) -> Iterator[Spoken | Failure]:
    """Speak and write lines; gives each one's result when its file is written.

    Args:
        name: of the file, in place of ID.wav.
    """
    from higgs_tune.evaluate.speak.engine import Task

    step = ROUNDS * engine.batch_size
    for first in range(0, len(utterances), step):
        tasks: list[Task] = []
        of_task: dict[int, Utterance] = {}
        reading = _Progress(len(utterances[first : first + step]))
        for utterance in utterances[first : first + step]:
            reading.add("references are read")
            try:
                voices = tuple(engine.voice(path, text) for path, text in utterance.references)
            except Reject as reject:
                yield _failure(utterance, reject)
                continue
            tasks.append(Task(list(utterance.pieces), voices, engine.settings.sampling["seed"]))
            of_task[id(tasks[-1])] = utterance
        for task in engine.speak(tasks):
            utterance = of_task[id(task)]
            if all(codes_KT.size for codes_KT in task.codes):
                yield _write(engine, utterance, task, folder, name or f"{utterance.id}.wav")
            else:
                yield Failure(utterance.id, utterance.id, "the model ended before it said anything")


def _failure(utterance: Utterance, reject: Reject) -> Failure:
    named = f" ({reject.file})" if reject.file and reject.file not in reject.detail else ""
    return Failure(utterance.id, utterance.id, f"reference audio: {reject.detail}{named}")


def _write(engine: SpeechEngine, utterance: Utterance, task: Task, folder: Path, name: str) -> Spoken:
    """Write a line's file."""
    path, wave_S = folder / name, engine.sound(task.codes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.atomic_file(path) as file:
        kind = path.suffix[1:].upper()
        soundfile.write(file, wave_S, engine.sample_rate_hz, format=kind, subtype="PCM_16")
    codes = hashlib.sha256(b"".join(np.ascontiguousarray(part, np.int64).tobytes() for part in task.codes))
    return Spoken(
        id=utterance.id,
        file=name,
        text=utterance.text,
        seconds=round(len(wave_S) / engine.sample_rate_hz, 3),
        pieces=len(task.pieces),
        ended=all(said.reached_eos for said in task.said.values()),
        key=utterance.key,
        codes_sha256=codes.hexdigest(),
        sha256=file_sha256(path),
    )


class _Progress:
    """Shows how far a list is, every few seconds."""

    def __init__(self, total: int, label: str = "") -> None:
        self.total, self.label, self.count, self.began = total, label, 0, time.monotonic()
        self.shown = self.began

    def add(self, what: str) -> None:
        """One more is done."""
        self.count += 1
        now = time.monotonic()
        if now - self.shown >= PROGRESS_SECONDS:
            self.shown = now
            left = (now - self.began) / self.count * (self.total - self.count)
            _say(f"{self.label}{self.count} of {self.total} {what}, about {left:.0f} s left")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

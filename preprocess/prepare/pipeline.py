"""The main path of higgs-prepare: list, prepare each recording, decide, write.

In: recordings and the options. Out: the files of `records.py`.

1. list      files, folders and lists become recordings (inputs)
2. prepare   each recording, in stages: listen, cut, hear, align, measure (work), as tasks of preprocess/engine.py
3. decide    thresholds, duplicates, speakers, split, references: no audio, no model (decide)
4. write     segments, manifest, rejects, accounting (outputs), the page (report)

Guarantees (tests/test_prepare.py): originals are never changed; every millisecond of the input has one fate; the files
depend neither on the engine nor on kills and restarts.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.preprocess.judges.edits import levenshtein
from higgs_tune.preprocess.judges.normalisers import normaliser
from higgs_tune.preprocess.prepare.config import PrepareConfig, from_saved, to_saved
from higgs_tune.preprocess.prepare.decide import counts_by_step, decide
from higgs_tune.preprocess.prepare.outputs import write_outputs
from higgs_tune.preprocess.prepare.reading import AUDIO
from higgs_tune.preprocess.prepare.records import (
    CONFIG,
    DECISIONS,
    MANIFEST,
    RECORDINGS,
    REJECTS,
    SEGMENTS,
    UNREADABLE_TRANSCRIPT,
    Recording,
    Segment,
    read_decisions,
    read_recordings,
    read_segments_file,
    write_lines,
)
from higgs_tune.preprocess.prepare.report import write_report
from higgs_tune.preprocess.prepare.speakers import EMBEDDINGS, read_embeddings
from higgs_tune.preprocess.prepare.stages import PARTS, WORK
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.lock import locked

COMMAND = "higgs-prepare"
MEASURED = "measured.jsonl"


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare recordings, or continue.

    Returns:
        `out`, `accounting`, `segments` (counts by step), `errors` (the recordings that cannot be used),
        `bad_transcripts` (by recording, why its transcript cannot be used).

    Raises:
        UserError: bad paths or options, or no recordings.
        Stopped: a signal came; the recordings in hand are finished.
    """
    from higgs_tune.preprocess.engine import Stop, run_tasks  # torch takes seconds to import
    from higgs_tune.preprocess.prepare.work import prepare_recording
    from higgs_tune.preprocess.progress import ProgressBar

    out = _own_folder(config)
    with Stop() as stop, locked(out / WORK / "lock", COMMAND, out):
        job = _make_job(config, out)
        durable.write_bytes(out / CONFIG, _saved(config, job.judges, job.vad))
        facts: list[Any] = [None] * len(job.recordings)
        with ProgressBar() as progress:
            progress.start("prepare", len(facts), "recordings")
            numbers = _largest_first(job.recordings)
            for fact in run_tasks(partial(prepare_recording, job), numbers, _with_processes(config, len(facts)), stop):
                facts[fact.number] = fact
                progress.advance(1)
        recordings = _recordings(job.recordings, facts)
        segments, embeddings_ND = _measured(job, [fact for fact, one in zip(facts, recordings, strict=True)
                                                  if one.error is None])  # fmt: skip
        durable.remove(out / WORK / PARTS)
        write_lines(out / WORK / MEASURED, segments)
        _write_embeddings(out, embeddings_ND)
        return _decide_and_write(config, out, segments, embeddings_ND, recordings)


def _largest_first(recordings: Sequence[str]) -> list[int]:
    """Numbers of the recordings: a long one that began last would keep one process busy alone."""

    def size(number: int) -> int:
        try:
            return Path(recordings[number]).stat().st_size
        except (OSError, ValueError):  # its task names the reason
            return 0

    return sorted(range(len(recordings)), key=size, reverse=True)


def _with_processes(config: PrepareConfig, recordings: int) -> PrepareConfig:
    """Two recordings are worth two processes, unlike two tasks of higgs-preprocess; a GPU has one recogniser."""
    from higgs_tune.preprocess.engine import auto_processes

    if config.num_processes or config.engine != "local":
        return config
    return replace(config, num_processes=auto_processes(config.device, recordings, 1, per_gpu=1))


def decide_again(config: PrepareConfig) -> dict[str, Any]:
    """Decide anew over the stored measurements of `--from`, without audio or models; returns as `prepare`.

    Raises:
        UserError: the folder was not prepared to the end.
    """
    assert config.from_ is not None
    source = config.from_
    out = config.out or source
    segments = list(read_segments_file(source / WORK / MEASURED))
    recordings = read_recordings(source)
    with locked(out / WORK / "lock", COMMAND, out):
        saved = durable.from_json((source / CONFIG).read_bytes(), "the config", source / CONFIG)
        durable.write_bytes(out / CONFIG, _saved(config, saved["judges"], saved["vad"]))
        if out.absolute() != source.absolute() and (source / DECISIONS).is_file() and not (out / DECISIONS).exists():
            durable.write_bytes(out / DECISIONS, (source / DECISIONS).read_bytes())
        embeddings_ND = read_embeddings(source)
        _write_embeddings(out, embeddings_ND)
        return _decide_and_write(config, out, segments, embeddings_ND, recordings)


def saved_config(folder: Path) -> PrepareConfig:
    """The options of a prepared folder.

    Raises:
        UserError: it is none.
    """
    file = folder / CONFIG
    try:
        saved = durable.from_json(file.read_bytes(), "the config", file)
    except OSError as error:
        hint = "Give the --out of an earlier higgs-prepare."
        raise UserError("no prepared folder", where=folder, expected=CONFIG, hint=hint) from error
    if saved.get("command") != COMMAND or not isinstance(saved.get("options"), dict):
        raise UserError("the config is of another command", where=file, expected=COMMAND)
    return from_saved(saved["options"], file)


def _own_folder(config: PrepareConfig) -> Path:
    """The absolute folder of the results.

    Raises:
        UserError: none is given, it cannot be written, or it holds the files of something else.
    """
    if config.out is None:
        raise UserError("--out is missing", hint="Only --from does without.")
    out = config.out.absolute()
    durable.check_writable(out)
    if (out / CONFIG).exists():
        saved_config(out)
    else:
        foreign = [name for name in (SEGMENTS, MANIFEST, REJECTS, RECORDINGS) if (out / name).exists()]
        if foreign:
            raise UserError("--out holds files of something else", where=out, got=", ".join(foreign),
                            hint="Choose another folder.")  # fmt: skip
    return out


def _saved(config: PrepareConfig, judges: dict[str, str], vad: str) -> bytes:
    made = {"command": COMMAND, "options": to_saved(config), "judges": judges, "vad": vad}
    return durable.to_json(made, indent=1) + b"\n"


def _make_job(config: PrepareConfig, out: Path) -> Any:
    from higgs_tune.preprocess.judges.fetch import locate
    from higgs_tune.preprocess.judges.identity import judge_identity
    from higgs_tune.preprocess.judges.sounds import class_numbers
    from higgs_tune.preprocess.prepare.inputs import list_recordings
    from higgs_tune.preprocess.prepare.job import PrepareJob
    from higgs_tune.preprocess.prepare.listen import choose_vad, vad_revision

    normaliser(config.normaliser)
    levenshtein()
    if config.transcripts and not config.transcripts.is_dir():
        raise UserError("--transcripts is no folder", where=config.transcripts)
    recordings = tuple(list_recordings(config.recordings, out))
    vad = choose_vad(config.vad)
    named = {"asr": config.asr, "second_asr": config.second_asr, "speaker_model": config.speaker_model}
    named |= {"quality": _quality(config.quality), "sound_model": config.sound_model}
    if config.sound_model:
        class_numbers(locate(config.sound_model), config.sound_labels)
    judges = {name: judge_identity(given) for name, given in named.items() if given}
    for folder in (out, out / AUDIO, out / WORK, *(out / WORK).glob("*/")):
        durable.remove_leftovers(folder)
    return PrepareJob(config, out, recordings, vad, vad_revision(vad), judges)


def _quality(wanted: str) -> str:
    """The quality model; empty for none."""
    import importlib.util

    if wanted == "auto":
        here = all(importlib.util.find_spec(name) for name in ("speechmos", "onnxruntime"))
        return "dnsmos" if here else ""
    return "" if wanted == "none" else wanted


def _recordings(names: Sequence[str], facts: Sequence[Any]) -> list[Recording]:
    """The recordings in their order; of several with equal bytes the first is used, and each bad one has its reason."""
    seen: dict[str, str] = {}
    made = []
    for name, fact in zip(names, facts, strict=True):
        shown, error = name.encode("utf-8", "backslashreplace").decode(), fact.error
        if error is None and fact.sha256 in seen:
            error = f"same_file: its bytes are those of {seen[fact.sha256]}"
        elif error is None:
            seen[fact.sha256] = shown
        made.append(Recording(shown, fact.sha256, fact.total_ms / 1000, fact.rate, fact.channels, error))
    return made


def _measured(job: Any, facts: Sequence[Any]) -> tuple[list[Segment], np.ndarray | None]:
    from higgs_tune.preprocess.prepare.measured import measured_segments

    parts = [measured_segments(job, fact) for fact in facts]
    segments = [segment for part, _ in parts for segment in part]
    width = max((rows_ND.shape[1] for _, rows_ND in parts if rows_ND is not None), default=0)
    if not width:
        return segments, None
    rows = [np.zeros((len(part), width), np.float16) if rows_ND is None else rows_ND for part, rows_ND in parts]
    return segments, np.concatenate(rows)


def _write_embeddings(out: Path, embeddings_ND: np.ndarray | None) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((0, 0), np.float16) if embeddings_ND is None else embeddings_ND)
    durable.write_bytes(out / EMBEDDINGS, buffer.getvalue())


def _decide_and_write(
    config: PrepareConfig,
    out: Path,
    segments: Sequence[Segment],
    embeddings_ND: np.ndarray | None,
    recordings: Sequence[Recording],
) -> dict[str, Any]:
    apply = normaliser(config.normaliser).apply
    decided = decide(segments, embeddings_ND, config, read_decisions(out), config.language, apply)
    made = write_outputs(out, decided, recordings)
    write_report(out)
    return {
        "out": str(out),
        "accounting": made,
        "segments": dict(counts_by_step(decided)),
        "errors": [one for one in recordings if one.error is not None],
        "bad_transcripts": {
            one.recording: one.reject.value
            for one in decided
            if one.reject and one.reject.reason == UNREADABLE_TRANSCRIPT
        },
    }

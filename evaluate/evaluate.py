"""The evaluation: lists → judgements of each system → figures → eval.json, utterances.jsonl, index.html.

In: lists of lines, models and folders of wavs, judges. Out: the three files, and the content of eval.json. Every line
counts for every system; the rows `ceiling` (the real recordings) and `floor` (transcripts against other lines' texts)
bound them. Several ranks share the lines; then rank 0 puts the results together as if it continued a killed evaluation.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from higgs_tune.evaluate.bootstrap import LEVEL, RESAMPLES, SEED
from higgs_tune.evaluate.config import EvalConfig
from higgs_tune.evaluate.figures import Systems, changes, compare, compare_groups, find_swaps, shuffled
from higgs_tune.evaluate.held_out import find_leaks, read_split
from higgs_tune.evaluate.judging import Judgement, Judges, Judging, System, WavFolder
from higgs_tune.evaluate.lists import Line, check_lines, read_list
from higgs_tune.evaluate.page import write_page
from higgs_tune.evaluate.ranks import Ranks
from higgs_tune.evaluate.store import JudgementStore
from higgs_tune.evaluate.utterances import Utterance, measure
from higgs_tune.preprocess.judges.normalisers import Normaliser, normaliser
from higgs_tune.shards.durable import atomic_file, to_json, write_bytes
from higgs_tune.shards.errors import few
from higgs_tune.shards.lock import locked
from higgs_tune.shards.writer import file_sha256

if TYPE_CHECKING:
    from higgs_tune.evaluate.speaking import SpokenModel

CEILING, FLOOR, LOCK = "ceiling", "floor", ".lock"
PROGRESS_SECONDS = 5.0


def evaluate(
    config: EvalConfig, make_judges: Callable[[EvalConfig], Judges], ranks: Ranks | None = None
) -> dict[str, Any]:
    """Let the models speak, judge all systems and write the results.

    Args:
        make_judges: loads the judges; called when lists, models and folders are known to be good.
        ranks: this process among those that share the lines.

    Returns:
        The content of eval.json; empty on other ranks than 0.

    Raises:
        UserError: lists, models, folders or judges cannot be used.
    """
    ranks = ranks or Ranks()
    with locked(config.out / LOCK, "higgs-eval", config.out) if ranks.is_main else nullcontext():
        return _evaluate(replace(config, device=ranks.device(config.device)), make_judges, ranks)


def _evaluate(config: EvalConfig, make_judges: Callable[[EvalConfig], Judges], ranks: Ranks) -> dict[str, Any]:
    chosen = normaliser(config.normaliser)
    lines = read_lines(config)
    check_lines(lines, chosen, references=bool(config.speaker_model), targets=config.ceiling)
    systems: dict[str, System] = {name: WavFolder(path) for name, path in config.folders.items()}
    models = _models(config, lines, ranks)
    systems = {model.name: model for model in models} | systems
    judges = make_judges(config)
    about = {"judges": judges.describe(), "normaliser": {"name": chosen.name, "rules": chosen.rules}}
    leaks = _leaks(config, lines, chosen) if ranks.is_main else []
    work = _Work(config, lines, systems, models, judges)
    if ranks.is_main:  # an unusable reference is named before hours of speaking
        store = work.merge()
        Judging(judges, store).embed_references(lines)
        store.close()
    ranks.wait()
    work.speak_and_judge(ranks)
    ranks.wait()
    if not ranks.is_main:
        return {}
    store = work.merge()
    judging = Judging(judges, store, config.max_seconds, config.batch_size)
    said = _judge_all(config, lines, systems, judging, chosen)
    store.close()
    result = _figures(said, next(iter(systems)))
    result |= {"about": about | _settings(config, lines), "leakage": leaks, "findings": _findings(said, systems)}
    _write(config.out, said, result)
    return result


def _models(config: EvalConfig, lines: list[Line], ranks: Ranks) -> list[SpokenModel]:
    """The models, checked but not loaded yet."""
    if not config.models:
        return []
    from higgs_tune.evaluate.speaking import SpokenModel  # torch takes seconds to import

    models = [SpokenModel(name, path, config, lines, config.device) for name, path in config.models.items()]
    for note in (note for model in models for note in model.notes if ranks.is_main):
        print(note, file=sys.stderr, flush=True)
    return models


@dataclass(frozen=True)
class _Work:
    """What ranks do each for themselves, and how rank 0 joins it."""

    config: EvalConfig
    lines: list[Line]
    systems: dict[str, System]
    models: list[SpokenModel]
    judges: Judges

    def merge(self) -> JudgementStore:
        """Join what ranks have spoken and judged; none of them may be at work."""
        for model in self.models:
            model.merge()
        store = self._store(None)
        store.merge_parts()
        return store

    def speak_and_judge(self, ranks: Ranks) -> None:
        """Speak this rank's lines; judge them, too, where there are several ranks."""
        lines = ranks.share(self.lines)
        for model in self.models:
            model.speak(lines, ranks)
        if ranks.size > 1:
            store = self._store(ranks.part)
            judging = Judging(self.judges, store, self.config.max_seconds, self.config.batch_size)
            judging.embed_references(lines)
            for name, path_of in _paths(self.config, self.systems).items():
                judging.progress = _progress(f"{name} (rank {ranks.rank})", len(lines))
                judging.judge(lines, path_of)
            store.close()

    def _store(self, part: int | None) -> JudgementStore:
        settings = {"judges": self.judges.describe(), "asr_language": self.config.asr_language}
        return JudgementStore(self.config.out, settings, part)


def _paths(config: EvalConfig, systems: dict[str, System]) -> dict[str, Callable[[Line], str]]:
    """Where each row of the table has its files; the ceiling first."""
    paths: dict[str, Callable[[Line], str]] = {name: system.path for name, system in systems.items()}
    return {CEILING: lambda line: line.target_audio} | paths if config.ceiling else paths


def read_lines(config: EvalConfig) -> list[Line]:
    """The lines of all lists and of the shard set."""
    lines: list[Line] = []
    for given in config.data:
        prefix = re.match(r"([a-z]{2,3})=(?=.)", given)
        listed = read_list(Path(given[prefix.end() :] if prefix else given))
        lines += [replace(line, language=prefix[1]) for line in listed] if prefix else listed
    if config.shards:
        lines += read_split(config.shards, config.split, config.audio_root)
    return [replace(line, language=line.language or config.language) for line in lines]


def _leaks(config: EvalConfig, lines: list[Line], chosen: Normaliser) -> list[dict[str, Any]]:
    sets = [*config.leakage, *([config.shards] if config.shards and config.split == "val" else [])]
    if not sets:
        return []
    hashes = {}
    for line in lines:
        paths = (Path(path) for path in (line.ref_audio, line.target_audio) if path)
        hashes[line.id] = [file_sha256(path) for path in paths if path.is_file()]
    return [find_leaks(lines, hashes, location, chosen) for location in dict.fromkeys(sets)]


def _judge_all(
    config: EvalConfig, lines: list[Line], spoken: dict[str, System], judging: Judging, chosen: Normaliser
) -> Systems:
    """The utterances of every row of the table, ceiling and floor included, in the order of the lines."""
    references = judging.embed_references(lines)
    paths = _paths(config, spoken)
    judged: dict[str, list[Judgement]] = {}
    for name, path_of in paths.items():
        judging.progress = _progress(name, len(lines))
        judged[name] = judging.judge(lines, path_of)
        if name in spoken:
            judged[name] = [spoken[name].amend(*pair) for pair in zip(lines, judged[name], strict=True)]
    targets = [given.seconds for given in judged[CEILING]] if config.ceiling else [None] * len(lines)

    def utterances(
        judgements: list[Judgement], path_of: Callable[[Line], str], voices: dict[str, np.ndarray] = references
    ) -> list[Utterance]:
        return [
            measure(
                line,
                given,
                chosen,
                wav=path_of(line),
                reference_D=voices.get(line.ref_audio),
                rates_quality=judging.judges.quality is not None,
                target_seconds=target,
            )
            for line, given, target in zip(lines, judgements, targets, strict=True)
        ]

    systems = {name: utterances(judged[name], path_of) for name, path_of in paths.items()}
    for name in spoken:
        _warn_of_swaps(name, systems[name])
    if len(lines) > 1:
        source = next(iter(paths))
        voices = [line.speaker or line.ref_audio for line in lines]
        floor = _floor(judged[source], [utterance.text for utterance in systems[source]], voices)
        systems[FLOOR] = utterances(floor, lambda line: "", references if len(set(voices)) > 1 else {})
    return {name: systems[name] for name in (*spoken, *(name for name in (CEILING, FLOOR) if name in systems))}


def _floor(judged: list[Judgement], texts: list[str], voices: list[str]) -> list[Judgement]:
    """For each line the transcript of another text and the voice of another speaker."""
    pairs = zip(shuffled(texts), shuffled(voices), strict=True)
    return [Judgement(judged[text].heard, embedding_D=judged[voice].embedding_D) for text, voice in pairs]


def _progress(name: str, total: int) -> Callable[[int], None]:
    last = time.monotonic()

    def show(count: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            print(f"{name}: {count} of {total} judged", file=sys.stderr, flush=True)

    return show


def _warn_of_swaps(name: str, said: list[Utterance]) -> None:
    swaps = find_swaps(said)
    if swaps:
        shown = few([f"{line} speaks {other}" for line, other in swaps.items()])
        count = f"{len(swaps)} of {len(said)} lines speak another line's text"
        print(f"warning: {name}: {count}: {shown}. Are the files named by their ids?", file=sys.stderr, flush=True)


def _figures(systems: Systems, base: str) -> dict[str, Any]:
    figures, paired = compare(systems, base)
    if FLOOR in figures:  # of other lines' clips only these figures mean something
        figures[FLOOR] = {name: figures[FLOOR][name] for name in ("wer", "wer_mean", "cer", "cer_mean", "sim")}
        del paired[FLOOR]
    judged = {name: said for name, said in systems.items() if name != FLOOR}
    groups = compare_groups(judged, base)
    parts = {name: part["paired"] for name, part in groups.get("language", {}).items()} or {"all": paired}
    changed = {name: changes({k: v for k, v in part.items() if k != CEILING}) for name, part in parts.items()}
    differences = {"paired": {"base": base, "minus_base": paired}, "groups": groups}
    return figures | differences | {"changes": changed}


def _settings(config: EvalConfig, lines: list[Line]) -> dict[str, Any]:
    return {
        "lists": [*config.data, *([f"{config.shards} ({config.split})"] if config.shards else [])],
        "lines": len(lines),
        "languages": sorted({line.language or "detected" for line in lines}),
        "interval": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED, "over": "utterances"},
    }


def _findings(systems: Systems, spoken: dict[str, System]) -> dict[str, Any]:
    """Faults by system: lines with a problem, files of no line, lines that speak another's text or did not end."""
    findings = {}
    for name, said in systems.items():
        if name == FLOOR:
            continue
        problems = [
            {"id": u.line.id, "problem": u.judged.problem, "detail": u.judged.detail} for u in said if u.judged.problem
        ]
        findings[name] = {
            "problems": problems,
            "cut_off": [u.line.id for u in said if u.judged.cut_off],
            "files_of_no_line": spoken[name].strangers([u.line for u in said]) if name in spoken else [],
            "speaks_other_line": find_swaps(said),
        }
    return findings


def _write(out: Path, systems: Systems, result: dict[str, Any]) -> None:
    with atomic_file(out / "utterances.jsonl") as file:
        for name, said in systems.items():
            if name != FLOOR:
                file.writelines(to_json(utterance.as_line(name)) + b"\n" for utterance in said)
    write_page(out, systems, result)
    write_bytes(out / "eval.json", to_json(result, indent=1) + b"\n")

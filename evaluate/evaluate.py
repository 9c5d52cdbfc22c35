"""The evaluation: lists → judgements of each system → figures → eval.json, utterances.jsonl, index.html.

In: lists of lines, folders of wavs, judges. Out: the three files, and the content of eval.json. Every line counts for
every system; the rows `ceiling` (the real recordings) and `floor` (transcripts against other lines' texts) bound them.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from higgs_tune.evaluate.bootstrap import LEVEL, RESAMPLES, SEED
from higgs_tune.evaluate.config import EvalConfig
from higgs_tune.evaluate.figures import Systems, compare, compare_groups, find_swaps, shuffled
from higgs_tune.evaluate.held_out import find_leaks, read_split
from higgs_tune.evaluate.judging import Judgement, Judges, Judging, WavFolder
from higgs_tune.evaluate.lists import Line, check_lines, read_list
from higgs_tune.evaluate.page import write_page
from higgs_tune.evaluate.store import JudgementStore
from higgs_tune.evaluate.utterances import Utterance, measure
from higgs_tune.preprocess.judges.normalisers import Normaliser, normaliser
from higgs_tune.shards.durable import atomic_file, to_json, write_bytes
from higgs_tune.shards.errors import few
from higgs_tune.shards.writer import file_sha256

CEILING, FLOOR = "ceiling", "floor"
PROGRESS_SECONDS = 5.0


def evaluate(config: EvalConfig, make_judges: Callable[[EvalConfig], Judges]) -> dict[str, Any]:
    """Judge all systems and write the results.

    Args:
        make_judges: loads the judges; called when lists and folders are known to be good.

    Returns:
        The content of eval.json.

    Raises:
        UserError: lists, folders or judges cannot be used.
    """
    chosen = normaliser(config.normaliser)
    lines = read_lines(config)
    check_lines(lines, chosen, references=bool(config.speaker_model), targets=config.ceiling)
    folders = {name: WavFolder(path) for name, path in config.folders.items()}
    judges = make_judges(config)
    about = {"judges": judges.describe(), "normaliser": {"name": chosen.name, "rules": chosen.rules}}
    leaks = _leaks(config, lines, chosen)
    store = JudgementStore(config.out, {"judges": about["judges"], "asr_language": config.asr_language})
    systems = _judge_all(config, lines, folders, Judging(judges, store, config.max_seconds, config.batch_size), chosen)
    store.close()
    result = _figures(systems, next(iter(folders)))
    result |= {"about": about | _settings(config, lines), "leakage": leaks, "findings": _findings(systems, folders)}
    _write(config.out, systems, result)
    return result


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
    config: EvalConfig, lines: list[Line], folders: dict[str, WavFolder], judging: Judging, chosen: Normaliser
) -> Systems:
    """The utterances of every row of the table, ceiling and floor included, in the order of the lines."""
    references = judging.embed_references(lines)
    paths: dict[str, Callable[[Line], str]] = {name: folder.path for name, folder in folders.items()}
    if config.ceiling:
        paths = {CEILING: lambda line: line.target_audio} | paths
    judged: dict[str, list[Judgement]] = {}
    for name, path_of in paths.items():
        judging.progress = _progress(name, len(lines))
        judged[name] = judging.judge(lines, path_of)
    targets = [given.seconds for given in judged[CEILING]] if config.ceiling else [None] * len(lines)

    def utterances(judgements: list[Judgement], path_of: Callable[[Line], str]) -> list[Utterance]:
        return [
            measure(
                line,
                given,
                chosen,
                wav=path_of(line),
                reference_D=references.get(line.ref_audio),
                rates_quality=judging.judges.quality is not None,
                target_seconds=target,
            )
            for line, given, target in zip(lines, judgements, targets, strict=True)
        ]

    systems = {name: utterances(judged[name], path_of) for name, path_of in paths.items()}
    for name in folders:
        _warn_of_swaps(name, systems[name])
    if len(lines) > 1:
        source = next(iter(paths))
        other = shuffled([utterance.text for utterance in systems[source]])
        floor = [_floor(judged[source][at]) for at in other]
        systems[FLOOR] = utterances(floor, lambda line: "")
    return {name: systems[name] for name in (*folders, *(name for name in (CEILING, FLOOR) if name in systems))}


def _floor(given: Judgement) -> Judgement:
    """A judgement as another line's: transcript and voice alone."""
    return Judgement(given.heard, embedding_D=given.embedding_D)


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
    return figures | {"paired": {"base": base, "minus_base": paired}, "groups": compare_groups(judged, base)}


def _settings(config: EvalConfig, lines: list[Line]) -> dict[str, Any]:
    return {
        "lists": [*config.data, *([f"{config.shards} ({config.split})"] if config.shards else [])],
        "lines": len(lines),
        "languages": sorted({line.language or "detected" for line in lines}),
        "interval": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED, "over": "utterances"},
    }


def _findings(systems: Systems, folders: dict[str, WavFolder]) -> dict[str, Any]:
    """Faults by system: lines with a problem, files that belong to no line, lines that speak another's text."""
    findings = {}
    for name, said in systems.items():
        if name == FLOOR:
            continue
        problems = [
            {"id": u.line.id, "problem": u.judged.problem, "detail": u.judged.detail} for u in said if u.judged.problem
        ]
        strangers = folders[name].strangers([u.line for u in said]) if name in folders else []
        findings[name] = {"problems": problems, "files_of_no_line": strangers, "speaks_other_line": find_swaps(said)}
    return findings


def _write(out: Path, systems: Systems, result: dict[str, Any]) -> None:
    with atomic_file(out / "utterances.jsonl") as file:
        for name, said in systems.items():
            if name != FLOOR:
                file.writelines(to_json(utterance.as_line(name)) + b"\n" for utterance in said)
    write_page(out, systems, result)
    write_bytes(out / "eval.json", to_json(result, indent=1) + b"\n")

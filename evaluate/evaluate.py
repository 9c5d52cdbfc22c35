"""The evaluation: lists → judgements of each system → figures → eval.json, utterances.jsonl, index.html.

In: lists of lines, models and folders of wavs, judges. Out: the three files, and the content of eval.json. Every line
counts for every system; the rows `ceiling` (the real recordings, where there is one) and `floor` (transcripts against
other lines' texts) bound them. Several ranks share the lines; then rank 0 puts the results together as if it continued
a killed evaluation.
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
from higgs_tune.evaluate.figures import Systems, changes, compare, compare_groups, judged_by, shuffled
from higgs_tune.evaluate.findings import FLOOR, findings, leakage, list_findings, warn_of_swaps, without_reference
from higgs_tune.evaluate.held_out import read_split
from higgs_tune.evaluate.judging import Judgement, Judges, Judging, System, WavFolder
from higgs_tune.evaluate.lists import Line, find_faults, read_list
from higgs_tune.evaluate.page import write_page
from higgs_tune.evaluate.ranks import Ranks
from higgs_tune.evaluate.store import JudgementStore
from higgs_tune.evaluate.utterances import Utterance, measure
from higgs_tune.preprocess.judges.normalisers import Normaliser, normaliser
from higgs_tune.shards.durable import atomic_file, to_json, write_bytes
from higgs_tune.shards.errors import few
from higgs_tune.shards.lock import locked

if TYPE_CHECKING:
    from higgs_tune.evaluate.speaking import SpokenModel

CEILING, LOCK = "ceiling", ".lock"
SHOWN = 10  # faults of a list that a warning spells out
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
    lines = find_faults(read_lines(config), chosen)
    _warn(ranks, "lines cannot be judged, and count as wrong", [f"{x.place}: {x.fault}" for x in lines if x.fault])
    systems: dict[str, System] = {name: WavFolder(path) for name, path in config.folders.items()}
    models = _models(config, lines, ranks)
    systems = {model.name: model for model in models} | systems
    judges = make_judges(config)
    about = {"judges": judges.describe(), "normaliser": {"name": chosen.name, "rules": chosen.rules}}
    leaked = leakage(config, lines, chosen) if ranks.is_main else []
    work = _Work(config, lines, systems, models, judges)
    if ranks.is_main:  # an unusable reference is named before hours of speaking
        store = work.merge()
        unusable = without_reference(lines, Judging(judges, store).embed_references(lines))
        store.close()
        _warn(
            ranks, "lines have no usable reference, and no similarity", [f"{x['id']}: {x['fault']}" for x in unusable]
        )
    ranks.wait()
    work.speak_and_judge(ranks)
    ranks.wait()
    if not ranks.is_main:
        return {}
    store = work.merge()
    judging = Judging(judges, store, config.max_seconds, config.batch_size)
    references = judging.embed_references(lines)
    said = _judge_all(config, lines, systems, judging, references, chosen)
    store.close()
    result = _figures(said, next(iter(systems)))
    result |= {
        "about": about | _settings(config, lines) | {"figures": judged_by(result, about)},
        "list": list_findings(lines, references, said.get(CEILING, [])),
        "leakage": leaked,
        "findings": findings(said, systems),
    }
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
        errors = [model.error for model in self.models if model.error]
        if errors and len(errors) == len(self.systems):
            raise errors[0]
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


def _judge_all(
    config: EvalConfig,
    lines: list[Line],
    spoken: dict[str, System],
    judging: Judging,
    references: dict[str, np.ndarray | str],
    chosen: Normaliser,
) -> Systems:
    """The utterances of every row of the table, ceiling and floor included, in the order of the lines."""
    paths = _paths(config, spoken)
    judged: dict[str, list[Judgement]] = {}
    for name, path_of in paths.items():
        judging.progress = _progress(name, len(lines))
        judged[name] = judging.judge(lines, path_of)
        if name in spoken:
            pairs = zip(lines, judged[name], strict=True)
            judged[name] = [given if line.fault else spoken[name].amend(line, given) for line, given in pairs]
    targets = [given.seconds for given in judged[CEILING]] if config.ceiling else [None] * len(lines)

    def utterances(
        judgements: list[Judgement],
        path_of: Callable[[Line], str],
        voices: dict[str, np.ndarray | str],
        *,
        only_usable: bool = False,
    ) -> list[Utterance]:
        return [
            measure(
                line,
                given,
                chosen,
                wav="" if line.fault else path_of(line),
                reference_D=voices.get(line.ref_audio),
                rates_quality=judging.judges.quality is not None,
                target_seconds=target,
                counted=given.usable or not only_usable,
            )
            for line, given, target in zip(lines, judgements, targets, strict=True)
        ]

    systems = {
        name: utterances(judged[name], path_of, references, only_usable=name == CEILING)
        for name, path_of in paths.items()
    }
    for name in spoken:
        warn_of_swaps(name, systems[name])
    source = next(iter(paths))
    if sum(given.usable for given in judged[source]) > 1:
        voices = [line.speaker or line.ref_audio for line in lines]
        floor = _floor(judged[source], [utterance.text for utterance in systems[source]], voices)
        known = references if len(set(voices)) > 1 else {}
        systems[FLOOR] = utterances(floor, lambda line: "", known, only_usable=True)
    return {name: systems[name] for name in (*spoken, *(name for name in (CEILING, FLOOR) if name in systems))}


def _floor(judged: list[Judgement], texts: list[str], voices: list[str]) -> list[Judgement]:
    """For each line with a usable clip the transcript of another text and the voice of another speaker."""
    rows = [at for at, given in enumerate(judged) if given.usable]
    floor = [Judgement()] * len(judged)
    others = zip(rows, shuffled([texts[at] for at in rows]), shuffled([voices[at] for at in rows]), strict=True)
    for at, text, voice in others:
        heard, own = judged[rows[text]], judged[rows[voice]]
        floor[at] = Judgement(heard.heard, seconds=heard.seconds, embedding_D=own.embedding_D)
    return floor


def _progress(name: str, total: int) -> Callable[[int], None]:
    last = time.monotonic()

    def show(count: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            print(f"{name}: {count} of {total} judged", file=sys.stderr, flush=True)

    return show


def _warn(ranks: Ranks, what: str, listed: list[str]) -> None:
    if listed and ranks.is_main:
        print(f"warning: {len(listed)} {what}: {few(listed, SHOWN)}", file=sys.stderr, flush=True)


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


def _write(out: Path, systems: Systems, result: dict[str, Any]) -> None:
    about = result["about"]["judges"]
    judges = {role: f"{judge['name']} {judge['revision']}".strip() for role, judge in about.items() if judge}
    with atomic_file(out / "utterances.jsonl") as file:
        for name, said in systems.items():
            if name != FLOOR:
                file.writelines(to_json(utterance.as_line(name, judges)) + b"\n" for utterance in said)
    write_page(out, systems, result)
    write_bytes(out / "eval.json", to_json(result, indent=1) + b"\n")

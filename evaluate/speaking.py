"""Models as systems: each speaks the lines into a folder of its own, and its files are judged like all others.

In: a model and the lines. Out: `EVAL/wavs/NAME/ID.wav`. A killed evaluation goes on where it was. A line that could not
be spoken keeps its reason, and counts as wrong.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

from higgs_tune.evaluate.config import EvalConfig
from higgs_tune.evaluate.judging import Judgement
from higgs_tune.evaluate.lists import Line, line_name
from higgs_tune.evaluate.ranks import Ranks
from higgs_tune.evaluate.speak.config import SpeakConfig, VoiceOptions
from higgs_tune.evaluate.speak.plan import Failure, plan
from higgs_tune.evaluate.speak.run import speak_into
from higgs_tune.evaluate.speak.settings import resolve_settings
from higgs_tune.evaluate.speak.store import SpokenFolder, merge_parts
from higgs_tune.shards.errors import UserError
from higgs_tune.train.model.whisper_tower import TOWER_FILE


class SpokenModel:
    """One model's folder of spoken lines.

    Raises:
        UserError: model or codec cannot be used.
    """

    def __init__(self, name: str, model: Path, config: EvalConfig, lines: list[Line], device: str) -> None:
        self.name, self.folder = name, config.out / "wavs" / name
        options = {field.name: getattr(config, field.name) for field in fields(VoiceOptions)}
        if not (model / "adapter_config.json").is_file():  # the base itself is among the models
            options["base_model"] = None
        if not (model / TOWER_FILE).is_file():
            options["whisper_path"] = None
        self.config = SpeakConfig(
            **options,
            model_path=model,
            input=config.out,
            output=self.folder,
            max_seconds=config.speak_seconds,
            batch_size=config.batch_size,
            device=device,
            debug=config.debug,
        )
        self.settings = resolve_settings(self.config)
        self.notes = [f"{name}: {note}" for note in self.settings.notes]
        self.utterances, self.refused = plan(
            [(line.id, line) for line in lines if not line.fault], self.config, self.settings
        )
        self.error: UserError | None = None
        self._reasons: dict[str, str] = {}
        self._cut_off: set[str] = set()

    def speak(self, lines: list[Line], ranks: Ranks) -> None:
        """Speak those of the lines that are not spoken yet; where the model cannot be loaded, all of them fail."""
        wanted = {line_name(line.id) for line in lines}
        spoken = SpokenFolder(self.folder, ranks.part)
        failures = [failure for failure in self.refused if line_name(failure.id) in wanted]
        mine = [utterance for utterance in self.utterances if utterance.id in wanted]
        rank = f" (rank {ranks.rank})" if ranks.size > 1 else ""
        try:
            speak_into(spoken, self.config, self.settings, mine, failures, f"{self.name}{rank}: ")
        except UserError as error:
            self.error, reason = error, f"the model cannot be loaded: {error}"
            failures += [Failure(given.id, given.id, reason) for given in mine if not spoken.has(given)]
            print(f"warning: {self.name}: {reason}", file=sys.stderr, flush=True)
        spoken.close(failures)
        gc.collect()  # the next model needs the memory

    def merge(self) -> None:
        """Join what all ranks spoke; none of them may be at work."""
        self.folder.mkdir(parents=True, exist_ok=True)
        spoken, failures = merge_parts(self.folder)
        self._reasons = {line_name(failure.id): failure.reason for failure in failures}
        self._cut_off = {utterance.id for utterance in self.utterances if spoken.is_cut_off(utterance.id)}

    def path(self, line: Line) -> str:
        """The line's file, whether it is there or not."""
        return str(self.folder / f"{line_name(line.id)}.wav")

    def amend(self, line: Line, given: Judgement) -> Judgement:
        """The judgement of a line's file, with what speaking tells of it."""
        reason = self._reasons.get(line_name(line.id))
        if reason is not None:
            return Judgement(problem="not_spoken", detail=reason)
        return replace(given, cut_off=True) if line_name(line.id) in self._cut_off else given

    def strangers(self, lines: Iterable[Line]) -> list[str]:
        """None: the folder is ours."""
        return []

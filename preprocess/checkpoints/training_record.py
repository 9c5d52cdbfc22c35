"""`higgs_tune.json`: what a model was trained on, beside its adapter, checkpoints and merged weights.

In: the record that the trainer makes. Out: the file; and back. It travels with the weights: speaking takes the prompt
layout, the fixed texts and the text normalization from it, publishing its model card. It names no path of the machine
that trained. Shared by train and evaluate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast, get_args

from higgs_tune.preprocess.input.layout import PromptLayout, Wording
from higgs_tune.preprocess.text_normalization import TextNormalization
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError

RECORD = "higgs_tune.json"
VERSION = 1
Counts = dict[str, int]


@dataclass(frozen=True)
class TrainingRecord:
    """What a model was trained on.

    Attributes:
        stages: those that made it, in order: stage1, stage2, single.
        base_name, base_revision: the base checkpoint, by its name on the Hub, or by its folder's own name.
        samples, hours: of the training data, validation included.
        layouts: samples by prompt layout: chat, serve, other.
        layouts_from: `all samples`, or how many were looked at.
        text_normalizations: samples by the normalization of their texts.
        languages: of the samples looked at, by language code; empty where the data names none.
        speakers, speaker_names: their number, and up to `MAX_NAMES` names.
        looked_at: samples that `languages` and the fixed texts come from.
        system, instruction, plain_instruction: the fixed texts of the prompts (see `Wording`), the most frequent ones;
            None where no sample looked at had them in the usual place.
        codec: SHA-256 of the weights of the codec that made the codes.
    """

    stages: tuple[str, ...] = ()
    base_name: str = ""
    base_revision: str | None = None
    samples: int = 0
    hours: float = 0.0
    layouts: Counts = field(default_factory=dict)
    layouts_from: str = "all samples"
    text_normalizations: Counts = field(default_factory=dict)
    languages: Counts = field(default_factory=dict)
    speakers: int = 0
    speaker_names: tuple[str, ...] = ()
    looked_at: int = 0
    system: str | None = None
    instruction: str | None = None
    plain_instruction: str | None = None
    codec: str | None = None

    @property
    def prompt_layout(self) -> PromptLayout | None:
        """The layout of most samples, `serve` where both are equal; None where no sample has one of the two."""
        chat, serve = self.layouts.get("chat", 0), self.layouts.get("serve", 0)
        return None if not chat + serve else "chat" if chat > serve else "serve"

    @property
    def text_normalization(self) -> TextNormalization:
        """The normalization of most samples."""
        kinds = {kind: self.text_normalizations.get(kind, 0) for kind in get_args(TextNormalization)}
        return cast("TextNormalization", max(kinds, key=lambda kind: kinds[kind]))

    @property
    def wording(self) -> Wording:
        """The fixed texts of the prompts; our own where the data's are not known."""
        known = {name: getattr(self, name) for name in ("system", "instruction", "plain_instruction")}
        return Wording(**{name: text for name, text in known.items() if text is not None})

    def to_bytes(self) -> bytes:
        """The file's content."""
        return durable.to_json({"version": VERSION, **asdict(self)}, indent=1) + b"\n"


_FORMS: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "str": (str,), "str | None": (str, type(None)),
    "Counts": (dict,), "tuple[str, ...]": (list,),
}  # fmt: skip


def read_record(folder: Path) -> TrainingRecord | None:
    """The record in a folder of a model or adapter, or in the run's folder around a checkpoint; None without one.

    Raises:
        UserError: it is damaged, or of a later version.
    """
    for file in (folder / RECORD, folder.parent / RECORD):
        if file.is_file() and (file.parent == folder or folder.name.startswith(("checkpoint-", "best-"))):
            return _parse(durable.from_json(file.read_bytes(), "the training record", file), file)
    return None


def _parse(given: Any, file: Path) -> TrainingRecord:
    version = given.get("version") if isinstance(given, dict) else None
    if version != VERSION:
        raise UserError("a training record of another version", where=file, expected=VERSION, got=version)
    known: Mapping[str, str] = {item.name: str(item.type) for item in fields(TrainingRecord)}
    values = {name: value for name, value in given.items() if name in known}
    for name, value in values.items():
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        wanted = int if known[name] == "Counts" else str
        if not isinstance(value, _FORMS[known[name]]) or not all(isinstance(item, wanted) for item in inner):
            got = f"{json.dumps(value)[:60]}"
            raise UserError(f"the training record is damaged: {name}", where=file, expected=known[name], got=got)
    typed: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return TrainingRecord(**typed)

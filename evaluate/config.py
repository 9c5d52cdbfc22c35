"""Options of higgs-eval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from higgs_tune.evaluate.speak.config import VoiceOptions
from higgs_tune.shards.bounds import AT_LEAST_1, MORE_THAN_0, check_bounds
from higgs_tune.shards.errors import UserError

RESERVED = ("ceiling", "floor", "paired", "groups", "about", "findings", "leakage", "changes", "list")


@dataclass(frozen=True)
class JudgingOptions:
    """What is judged, and by whom."""

    out: Path
    """Folder that receives eval.json, utterances.jsonl, index.html and wavs/; a killed evaluation continues in it."""
    asr: str
    """Recogniser: a Whisper or CTC checkpoint of transformers or a Whisper of CTranslate2 (a folder, or Hub
    name[@revision]), or the URL of a transcription endpoint in OpenAI's form, http://HOST/v1#MODEL."""
    data: tuple[str, ...] = ()
    """Lists of lines to speak, each [LANGUAGE=]PATH: JSONL, a Seed-TTS-eval list, a MiniMax or Habibi folder."""
    shards: str | None = None
    """Shard set whose held-out samples are lines, too; what they share with its training samples is reported."""
    split: Literal["val", "train"] = "val"
    """Samples of --shards that are spoken."""
    audio_root: Path | None = None
    """Folder that the relative audio paths of --shards start from."""
    model_path: tuple[str, ...] = ()
    """Models that speak the lines, each [NAME=]MODEL: a base, the output folder of a training run, one of its
    checkpoints, a merged checkpoint; a folder, or Hub name[@revision]. Differences are to the first."""
    wavs: tuple[str, ...] = ()
    """Systems that have spoken already, each [NAME=]FOLDER; a line's file is FOLDER/ID.wav (or .flac, .mp3, .ogg,
    .opus)."""

    language: str = ""
    """Language of the lines that name none, as a code (ar, en); empty: the recogniser detects it."""
    asr_language: str = ""
    """The recogniser's own name of the language, where it is another (MMS: ara)."""
    speaker_model: str | None = None
    """Speaker encoder, for the similarity to ref_audio: Seed-TTS-eval's file wavlm_large_finetune.pth, a WavLM x-vector
    checkpoint (a folder, or Hub name[@revision]), or `resemblyzer`."""
    quality: str | None = None
    """Quality model: `dnsmos` or `distillmos`."""
    normaliser: Literal["seedtts_en", "omnivoice", "habibi"] = "omnivoice"
    """How texts are made alike before errors are counted."""
    ceiling: bool = False
    """Judge the real recordings (target_audio) too: the best that these judges can say."""
    leakage: tuple[str, ...] = ()
    """Shard sets that the models were trained on: lines whose audio, text or speaker they hold are reported."""

    max_seconds: Annotated[float, MORE_THAN_0] = 60.0
    """A longer clip is a failure, not judged."""
    batch_size: Annotated[int, AT_LEAST_1] = 16
    """Lines that a model speaks, and clips that the recogniser gets, at once."""
    speak_seconds: Annotated[float, MORE_THAN_0] = 30.0
    """Longest speech of one piece of text that a model speaks; it is cut off there, and counts as run on."""
    device: str = "auto"
    """Where models and judges run: auto (under torchrun a GPU for each rank), cpu, cuda, cuda:1."""
    json: bool = False
    """Print eval.json instead of the table."""
    debug: bool = False
    """Show tracebacks of user errors."""


@dataclass(frozen=True)
class EvalConfig(VoiceOptions, JudgingOptions):
    """Let models speak the same lines, and judge their speech: error rate, voice, quality, with 95 % intervals."""

    def __post_init__(self) -> None:
        if not self.model_path and not self.wavs:
            raise UserError("--model_path or --wavs is missing")
        if not self.data and not self.shards:
            raise UserError("--data or --shards is missing")
        if self.model_path and self.audio_tokenizer_path is None:
            hint = "Give its folder, or bosonai/higgs-audio-v2-tokenizer, which is downloaded."
            raise UserError("--audio_tokenizer_path is missing: models need a codec to speak", hint=hint)
        check_bounds(self)
        _ = self.models, self.folders

    @property
    def models(self) -> dict[str, Path]:
        """The models' paths by name.

        Raises:
            UserError: two have one name, or a name cannot be used.
        """
        return _named(self.model_path, "model_path", {})

    @property
    def folders(self) -> dict[str, Path]:
        """The systems' folders of wavs by name.

        Raises:
            UserError: two have one name, or a name cannot be used.
        """
        return _named(self.wavs, "wavs", self.models)


def _named(given: tuple[str, ...], flag: str, taken: dict[str, Path]) -> dict[str, Path]:
    """Paths by name. A path without a name is named by as many of its last parts as make it differ from the others."""
    pairs: list[tuple[str, Path]] = []
    for item in given:
        name, equals, path = item.partition("=")
        pairs.append((name, Path(path)) if equals and not Path(item).exists() else ("", Path(item)))
    parts = {path: _parts(path) for name, path in pairs if not name}
    named: dict[str, Path] = {}
    for (own, path), item in zip(pairs, given, strict=True):
        name = own or _shortest(parts[path], [other for place, other in parts.items() if place != path])
        if name in named or name in taken or name in RESERVED or not name or "/" in name or name in (".", ".."):
            why = "is given twice" if name in named or name in taken else "cannot be used"
            hint = f"Give --{flag} NAME=PATH."
            raise UserError(f"the system's name {name!r} {why}", where=item, hint=hint)
        named[name] = path
    return named


def _parts(path: Path) -> tuple[str, ...]:
    resolved = path.resolve() if path.exists() else path
    return tuple(part for part in resolved.parts if part != "/")


def _shortest(parts: tuple[str, ...], others: list[tuple[str, ...]]) -> str:
    for count in range(1, len(parts)):
        if all(other[-count:] != parts[-count:] for other in others):
            return "-".join(parts[-count:])
    return "-".join(parts)

"""Options of higgs-eval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from higgs_tune.shards.bounds import AT_LEAST_1, MORE_THAN_0, check_bounds
from higgs_tune.shards.errors import UserError

RESERVED = ("ceiling", "floor", "paired", "groups", "about", "findings", "leakage")


@dataclass(frozen=True)
class EvalConfig:
    """Judge the speech of several systems on the same lines: error rate, voice, quality, with 95 % intervals."""

    out: Path
    """Folder that receives eval.json, utterances.jsonl and index.html; a killed evaluation continues in it."""
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
    wavs: tuple[str, ...] = ()
    """Systems to judge, each [NAME=]FOLDER; a line's file is FOLDER/ID.wav (or .flac, .mp3, .ogg, .opus). Differences
    are to the first."""
    model_path: tuple[str, ...] = ()
    """Models that speak the lines first; not there yet."""

    language: str = ""
    """Language of the lines that name none, as a code (ar, en); empty: the recogniser detects it."""
    asr_language: str = ""
    """The recogniser's own name of the language, where it is another (MMS: ara)."""
    speaker_model: str | None = None
    """Speaker encoder, for the similarity to ref_audio: a WavLM x-vector checkpoint (a folder, or Hub name[@revision]),
    or `resemblyzer`."""
    quality: str | None = None
    """Quality model: `dnsmos`."""
    normaliser: Literal["seedtts_en", "omnivoice", "habibi"] = "omnivoice"
    """How texts are made alike before errors are counted."""
    ceiling: bool = False
    """Judge the real recordings (target_audio) too: the best that these judges can say."""
    leakage: tuple[str, ...] = ()
    """Shard sets that the models were trained on: lines whose audio, text or speaker they hold are reported."""

    max_seconds: Annotated[float, MORE_THAN_0] = 60.0
    """A longer clip is a failure, not judged."""
    batch_size: Annotated[int, AT_LEAST_1] = 8
    """Clips that the recogniser gets at once."""
    device: str = "auto"
    """Where the judges run: auto, cpu, cuda, cuda:1."""
    json: bool = False
    """Print eval.json instead of the table."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        if self.model_path:
            raise UserError("speaking is not there yet: give --wavs", got="--model_path")
        for name, given in (("wavs", self.wavs), ("data or --shards", self.data or self.shards)):
            if not given:
                raise UserError(f"--{name} is missing")
        check_bounds(self)

    @property
    def folders(self) -> dict[str, Path]:
        """The systems' folders by name.

        Raises:
            UserError: two have one name, or a name is reserved.
        """
        folders: dict[str, Path] = {}
        for given in self.wavs:
            name, equals, path = given.partition("=")
            folder = Path(path if equals else given)
            name = name if equals else folder.resolve().name
            if name in folders or name in RESERVED or not name:
                why = "is given twice" if name in folders else "cannot be used"
                raise UserError(f"the system's name {name!r} {why}", where=given, hint="Give --wavs NAME=FOLDER.")
            folders[name] = folder
        return folders

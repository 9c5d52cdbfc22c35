"""Options of higgs-prepare: what is read, how it is cut and measured, and the thresholds that decide.

`Thresholds` alone may change with `--from`: the rest stands for what was measured. Nothing heavy is imported here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from higgs_tune.preprocess.text_normalization import TextNormalization
from higgs_tune.shards.bounds import (
    AT_LEAST_0,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
    MORE_THAN_0,
    Bound,
    check_bounds,
)
from higgs_tune.shards.errors import UserError

QUALITIES = ("auto", "dnsmos", "distillmos", "none")
FROM_0_TO_5 = Bound("0 to 5", at_least=0, at_most=5)


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Bounds that decide over segments; they may change with --from. 0 switches a minimum off."""

    min_quality: Annotated[float, FROM_0_TO_5] = 3.0
    """Lowest DNSMOS P.835 (overall, 1 to 5) that is kept; only where it was measured."""
    min_snr: float = 10.0
    """Lowest signal-to-noise ratio that is kept, in dB: speech against the pauses around it."""
    max_clipping: Annotated[float, FROM_0_TO_1] = 0.001
    """Largest share of samples at full scale, or on a flat top, that is kept."""
    max_sound: Annotated[float, FROM_0_TO_1] = 0.5
    """Largest probability of music or another of --sound_labels that is kept; with --sound_model."""
    pace_fences: Annotated[float, AT_LEAST_0] = 1.5
    """Seconds a character are kept within the quartiles by this many interquartile ranges, by language; 0: all."""
    min_language_probability: Annotated[float, FROM_0_TO_1] = 0.8
    """Lowest probability of --language that is kept, where the recogniser detects languages."""
    max_cer: Annotated[float, AT_LEAST_0] = 0.2
    """Largest character error rate between a given transcript and the recogniser, or between two recognisers."""
    max_duplicate_distance: Annotated[float, FROM_0_TO_1] = 0.2
    """Segments whose fingerprints differ in at most this share of bits, in either half, are one sound; 0: none is."""
    max_same_text: Annotated[int, AT_LEAST_0] = 1
    """Segments with one text that are kept of a speaker; 0: all."""
    speaker_distance: Annotated[float, Bound("0 to 2", at_least=0, at_most=2)] = 0.25
    """Cosine distance up to which voices are one speaker (average linkage); with --speaker_model."""
    ref_min_seconds: Annotated[float, AT_LEAST_0] = 3.0
    """Shortest segment that is a reference, in seconds."""
    ref_max_seconds: Annotated[float, MORE_THAN_0] = 10.0
    """Longest segment that is a reference, in seconds."""
    val_fraction: Annotated[float, FROM_0_BELOW_1] = 0.05
    """Share of the kept seconds that whole speakers are held out for validation for, 0 to 1."""
    seed: int = 0
    """Seed of the choice of references and of the split."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Thresholds):
    """Turn long recordings into checked clips and a manifest for higgs-preprocess."""

    recordings: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Audio files, folders that hold them, or lists of them (.txt, .list: one path a line; .jsonl, .csv, .tsv with a
    column audio)."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A prepared folder: decide anew from its measurements, without audio or models; thresholds alone may change."""
    out: Path | None = None
    """Folder that receives segments, manifest and rejects; an interrupted run continues. With --from: that
    folder, unless another is given."""
    language: str = ""
    """Language that is spoken, as the recogniser names it (ar, en, …); empty: any."""
    transcripts: Path | None = None
    """Folder with the transcripts, one a recording, named as the recording; by default they stand beside it."""

    vad: Literal["auto", "silero", "energy"] = "auto"
    """Voice activity by silero's network or by loudness; auto: silero where it is installed."""
    vad_threshold: Annotated[float, Bound("between 0 and 1", more_than=0, below=1)] = 0.5
    """Probability of speech from which a window is speech."""
    min_seconds: Annotated[float, MORE_THAN_0] = 3.0
    """Shortest segment, in seconds."""
    max_seconds: Annotated[float, MORE_THAN_0] = 15.0
    """Longest segment, in seconds."""
    min_pause: Annotated[float, MORE_THAN_0] = 0.2
    """Shortest pause that a recording is cut in, in seconds."""
    max_pause: Annotated[float, MORE_THAN_0] = 1.5
    """Longest pause within a segment, in seconds."""
    pad_seconds: Annotated[float, AT_LEAST_0] = 0.06
    """Silence that a segment keeps before and after its speech, in seconds."""

    text_normalization: TextNormalization = "none"
    """Normalize every text: nfc or arabic; docs/text_normalization.md says what each does."""
    asr: str = ""
    """Recogniser: a folder or Hub name of a Whisper or CTC checkpoint, or the URL of an endpoint. It writes the texts
    that are not given, and checks those that are."""
    second_asr: str = ""
    """Second recogniser, whose agreement with the first decides over texts that are not given."""
    asr_language: str | None = None
    """Language for the recogniser where its name is another than --language."""
    normaliser: str = "omnivoice"
    """How texts are made alike before errors are counted: seedtts_en, omnivoice, habibi."""
    quality: str = "auto"
    """Quality model: dnsmos, distillmos, none, or auto (dnsmos where it is installed)."""
    sound_model: str = ""
    """Audio classifier that hears music, overlapping voices and the like: a folder or Hub name of a checkpoint of
    transformers, such as MIT/ast-finetuned-audioset-10-10-0.4593."""
    sound_labels: tuple[str, ...] = ("Music",)
    """Its classes that are not wanted under speech, by their names in the checkpoint."""
    speaker_model: str = ""
    """Speaker encoder whose embeddings are clustered: resemblyzer, or a WavLM x-vector checkpoint."""
    speaker: str = ""
    """The one speaker of all recordings."""
    speaker_by: Literal["recording", "folder"] = "recording"
    """Without --speaker, --speaker_model and names in the transcripts: a speaker for each recording or folder."""

    engine: Literal["local", "ray"] = "local"
    """Where the work runs: processes on this machine, or tasks on a Ray cluster that sees the same folders."""
    ray_address: str = ""
    """Address of the Ray cluster; empty: start one on this machine."""
    num_processes: Annotated[int, AT_LEAST_0] = 0
    """Worker processes on this machine; 0: one for each GPU, or without a GPU one for each core, at most 8."""
    device: str = "auto"
    """Where the models run: auto, cpu, cuda, cuda:1."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        check_bounds(self)
        checks = [
            ("max_seconds", self.min_seconds < self.max_seconds, "more than min_seconds", self.max_seconds),
            ("ref_max_seconds", self.ref_min_seconds <= self.ref_max_seconds, "at least ref_min_seconds",
             self.ref_max_seconds),
            ("device", bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device)), "auto, cpu, cuda or cuda:1",
             self.device),
            ("ray_address", not self.ray_address or self.engine == "ray", "--engine ray with it", self.ray_address),
            ("second_asr", not self.second_asr or bool(self.asr), "--asr with it", self.second_asr),
            ("quality", self.quality in QUALITIES, ", ".join(QUALITIES), self.quality),
        ]  # fmt: skip
        for name, good, expected, got in checks:
            if not good:
                raise UserError(f"--{name} is out of range", expected=expected, got=got)

    @property
    def spoken(self) -> str:
        """The language as the recogniser takes it."""
        return self.language if self.asr_language is None else self.asr_language


# options of where the work runs and of the command itself: they change no result
MACHINE_ONLY = ("from_", "out", "engine", "ray_address", "num_processes", "device", "debug")


def to_saved(config: PrepareConfig) -> dict[str, Any]:
    """The options as config.json holds them."""
    made: dict[str, Any] = {}
    for name in PrepareConfig.__dataclass_fields__:
        value = getattr(config, name)
        if name not in MACHINE_ONLY:
            made[name] = [str(path) for path in value] if isinstance(value, tuple) else value
    return made | {"transcripts": str(config.transcripts) if config.transcripts else None}


def from_saved(saved: dict[str, Any], where: Path) -> PrepareConfig:
    """The options of a config.json.

    Raises:
        UserError: they are of another version.
    """
    unknown = sorted(saved.keys() - PrepareConfig.__dataclass_fields__.keys())
    if unknown:
        raise UserError("unknown options in the config", where=where, got=", ".join(unknown))
    paths = tuple(Path(path) for path in saved.get("recordings", ()))
    transcripts = Path(saved["transcripts"]) if saved.get("transcripts") else None
    labels = tuple(saved.get("sound_labels", PrepareConfig.sound_labels))
    return PrepareConfig(**saved | {"recordings": paths, "transcripts": transcripts, "sound_labels": labels})

"""Options of higgs-preprocess."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from higgs_tune.preprocess.audio.options import AudioOptions, Flag
from higgs_tune.preprocess.input.audio_paths import AudioPaths
from higgs_tune.preprocess.text_normalization import TextNormalization, TextOptions
from higgs_tune.preprocess.text_tokens import TokenLimit
from higgs_tune.shards.bounds import AT_LEAST_0, AT_LEAST_1, FROM_0_TO_1, Bound, check_bounds
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.remote import is_url


@dataclass(frozen=True)
class PreprocessConfig:
    """Encode audio once, offline, into tar shards that the trainer streams."""

    data: Path
    """ChatML (JSON array or JSONL), a manifest (a table or JSON with audio, text, speaker and, optionally, ref_audio,
    ref_text, id), a list of another tool, or a folder of datasets, Parquet, Kaldi or clips with texts; see
    docs/preprocessing.md."""
    model_path: Path
    """Checkpoint of the language model, a folder or Hub name[@revision]: config and tokenizer are read; with
    --whisper_features encoder also its audio tower."""
    out: str | None = None
    """Folder, or URL that fsspec knows (s3://, hf://, …), that receives the shard set; needed unless --check. An
    interrupted run continues when started again."""
    audio_tokenizer_path: Path | None = None
    """Checkpoint of the audio tokenizer (the codec), a folder or Hub name[@revision]; needed unless --check."""
    staging: Path | None = None
    """Where --out is a URL: local folder for unfinished work, from which each finished shard is uploaded; by default
    one below $HIGGS_TUNE_CACHE, else ~/.cache/higgs-tune."""

    audio_root: Path | None = None
    """Folder that relative audio paths start from and that no path may leave, links resolved; a `..` that would leave
    it stops at it. By default relative paths start from the folder of the data, and may lead anywhere."""
    min_seconds: Annotated[float, AT_LEAST_0] = 0.1
    """Shortest clip that is taken, in seconds."""
    max_seconds: float = 60.0
    """Longest clip that is taken, in seconds."""
    max_text_chars: Annotated[int, AT_LEAST_1] = 20_000
    """Longest single text that is taken, in characters."""
    max_text_tokens: Annotated[int | None, AT_LEAST_1] = None
    """Longest single text that is taken, in tokens of the checkpoint's tokenizer; by default by characters alone."""
    text_normalization: TextNormalization = "none"
    """Normalize every text: nfc (Unicode's composed form), or arabic (also presentation forms, tatweel, invisible
    characters, spaces, digits); docs/text_normalization.md says what each does."""
    allow_text_only: bool = False
    """Build a set in which no assistant message has audio, so that only text is trained on."""
    loudness_lufs: Annotated[float | None, Bound("-70 to 0", more_than=-70, at_most=0)] = None
    """Bring every clip to this integrated loudness (LUFS, ITU-R BS.1770) before it is encoded; boson's value is -23."""
    reject_flags: tuple[Flag, ...] = ()
    """Leave out clips with these flags: silence (90 % of the mono mix is below -60 dBFS), clipping (three samples in a
    row at full scale), antiphase (two channels cancel each other in the mix). Without it they are only counted and
    marked."""

    prompt_layout: Literal["chat", "serve", "both"] | None = None
    """chat (the user's turn holds the reference, the assistant says text and audio), serve (as serving engines send
    it: audio alone is said), or both, two samples from the same codes. By default rows of manifests and datasets become
    chat, and conversations keep their form; a given layout converts conversations of the other one, too."""
    ref_drop: Annotated[float, FROM_0_TO_1] = 0.0
    """Manifests: share of samples that get no reference clip, 0 to 1; chosen by a hash, so it is stable."""
    ref_min_seconds: Annotated[float, AT_LEAST_0] = 1.0
    """Manifests: shortest clip that is chosen as a reference, in seconds."""
    speaker: str | None = None
    """Manifests: speaker of the rows that name none."""
    seed: int = 0
    """Manifests: seed of the choice of references."""

    whisper_features: Literal["none", "mel", "encoder"] = "none"
    """Whisper features to store: log-mel, or the output of a frozen audio tower."""
    whisper_roles: Literal["reference", "target", "both"] = "reference"
    """Which audio gets Whisper features: user and system (reference), assistant (target), or both."""
    whisper_path: Path | None = None
    """Checkpoint that holds the tower (a Higgs or a Whisper model), a folder or Hub name; by default --model_path."""

    val_fraction: Annotated[float, FROM_0_TO_1] = 0.05
    """Share of samples held out for validation, 0 to 1; chosen by a hash, so it is stable. Of two or more at least one
    is held out, and never all."""
    val_by: Literal["sample", "speaker", "split"] = "sample"
    """Hold out single samples, whole speakers, or those whose column split (in ChatML: misc) says val, not train; then
    --val_fraction does not count."""
    samples_per_shard: Annotated[int, AT_LEAST_1] = 4096
    """Input samples a shard file."""
    clips_per_unit: Annotated[int, AT_LEAST_1] = 16
    """Audio clips that a process encodes before it saves its work; a killed run loses at most this many a process."""

    engine: Literal["local", "ray"] = "local"
    """Where the work runs: processes on this machine, or tasks on a Ray cluster that sees the same folders."""
    ray_address: str = ""
    """Address of the Ray cluster; empty: start one on this machine."""
    num_processes: Annotated[int, AT_LEAST_0] = 0
    """Worker processes on this machine, each with its own codec, spread over the GPUs; 0: for each GPU up to 6, one for
    4 GiB of its memory and two cores, or without a GPU one for each core, at most 8."""
    decode_threads: Annotated[int, AT_LEAST_1] = 2
    """Threads of each worker that read and resample audio ahead of the codec."""
    device: str = "auto"
    """Where the codec runs: auto, cpu, cuda, cuda:1."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the codec's encoder; only float32 gives Boson's codes."""
    tf32: bool = False
    """Let a GPU round float32 products to TF32: faster, and some codes differ."""

    check: bool = False
    """Read everything, encode nothing, and report whether the data is fit to build."""
    json: bool = False
    """With --check: print the report as JSON."""
    max_reject_share: Annotated[float, FROM_0_TO_1] = 0.0
    """With --check: share of rejected samples, 0 to 1, up to which the data counts as fit to build."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        for name in ("out", "audio_tokenizer_path"):
            if not getattr(self, name) and not self.check:
                raise UserError(f"--{name} is missing", hint="Only --check does without.")
        check_bounds(self)
        checks = [
            ("max_seconds", self.min_seconds < self.max_seconds, "more than min_seconds"),
            (
                "num_processes",
                not (self.out or "").startswith("memory://") or (self.num_processes == 1 and self.engine == "local"),
                "1 with an --out in memory, which no other process sees",
            ),
            ("device", bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device)), "auto, cpu, cuda or cuda:1"),
            ("ray_address", not self.ray_address or self.engine == "ray", "--engine ray with it"),
            ("staging", not self.staging or is_url(self.out or ""), "a URL as --out"),
            (
                "staging",
                bool(self.staging) or not (self.ray_address and is_url(self.out or "")),
                "a folder that all nodes of the cluster see",
            ),
            ("json", self.check or not self.json, "--check with it"),
        ]
        for name, good, expected in checks:
            if not good:
                raise UserError(f"--{name} is out of range", expected=expected, got=getattr(self, name))


@dataclass(frozen=True)
class Job:
    """The options with all paths absolute and local; every task gets it.

    Attributes:
        data: file or folder.
        out: the folder of the set, or its staging folder.
        model, codec, tower: checkpoint folders.
    """

    config: PreprocessConfig
    data: Path
    out: Path
    model: Path
    codec: Path | None
    tower: Path

    @property
    def url(self) -> str | None:
        """The destination of a remote set; None for a local folder."""
        out = self.config.out
        return out if out and is_url(out) else None

    @property
    def audio_paths(self) -> AudioPaths:
        """Where audio is looked for."""
        folder = self.data if self.data.is_dir() else self.data.parent
        return AudioPaths(self.config.audio_root or folder, folder, self.config.audio_root)

    @property
    def texts(self) -> TextOptions:
        """Which texts are taken, and their normalization."""
        most = self.config.max_text_tokens
        tokens = TokenLimit(self.model, most) if most else None
        return TextOptions(self.config.max_text_chars, self.config.text_normalization, tokens)

    @property
    def audio(self) -> AudioOptions:
        """The options that reading audio needs."""
        c = self.config
        roots = (c.audio_root, self.data) if c.audio_root else ()
        return AudioOptions(c.min_seconds, c.max_seconds, c.loudness_lufs, roots, c.reject_flags)

    def wants_whisper(self, role: str) -> bool:
        """Whether audio in a message of this role gets Whisper features."""
        wanted = "target" if role == "assistant" else "reference"
        return self.config.whisper_features != "none" and self.config.whisper_roles in (wanted, "both")

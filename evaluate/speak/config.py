"""Options of higgs-speak."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from higgs_tune.preprocess.text_normalization import TextNormalization
from higgs_tune.shards.bounds import AT_LEAST_0, AT_LEAST_1, MORE_THAN_0, Bound, check_bounds
from higgs_tune.shards.errors import UserError
from tyro.conf import arg

AUDIO_SUFFIXES = (".wav", ".flac")
PORT = Bound("0 to 65535", at_least=0, at_most=65535)
SHARE = Bound("more than 0, at most 1", more_than=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class VoiceOptions:
    """Options of speaking that every command that speaks has."""

    audio_tokenizer_path: Path | None = None
    """Checkpoint of the audio tokenizer (the codec), a folder or Hub name[@revision]."""
    base_model: Path | None = None
    """Base checkpoint, in place of the one that the adapter's config names."""
    whisper_path: Path | None = None
    """Whisper checkpoint of an adapter with a tower, in place of the one that it names."""

    layout: Literal["auto", "chat", "serve"] = "auto"
    """Prompt layout: auto takes what the model was trained on (higgs_tune.json), serve without a record."""
    system: str | None = None
    """System text; by default the one of the training data."""
    text_normalization: Literal["auto"] | TextNormalization = "auto"
    """Normalization of texts: auto takes that of the training data, none without a record."""

    temperature: Annotated[float, AT_LEAST_0] = 0.7
    """Of sampling; 0 takes the likeliest code."""
    top_p: Annotated[float, SHARE] = 0.95
    """Sample from the likeliest codes that hold this share of the probability; 1: from all."""
    top_k: Annotated[int, AT_LEAST_0] = 50
    """Sample from this many likeliest codes; 0: from all."""
    ras_win_len: Annotated[int, AT_LEAST_0] = 7
    """Repetition-aware sampling: frames that are looked back at; 0: off."""
    ras_win_max_num_repeat: Annotated[int, AT_LEAST_1] = 2
    """Repetition-aware sampling: a code that occurred this often among them is drawn again."""
    seed: Annotated[int, AT_LEAST_0] = 0
    """Of sampling, for each text anew: a text's result does not depend on the others."""
    max_chars: Annotated[int, AT_LEAST_1] = 200
    """Longer texts are split at sentences into pieces of at most this many characters, which are joined again."""


@dataclass(frozen=True, kw_only=True)
class VoiceConfig(VoiceOptions):
    """Options of speaking with one model, that the command and the web page share."""

    model_path: Path
    """Model: the output folder of a training run, one of its checkpoints, a merged checkpoint, or a base, in either
    layout; a folder, or Hub name[@revision]."""
    max_seconds: Annotated[float, MORE_THAN_0] = 30.0
    """Longest speech of one piece of text, in seconds; it is cut off there."""
    batch_size: Annotated[int, AT_LEAST_1] = 16
    """Pieces that are spoken at once."""
    device: str = "auto"
    """Where model and codec run: auto, cpu, cuda, cuda:1."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.audio_tokenizer_path is None:
            hint = "Give its folder, or bosonai/higgs-audio-v2-tokenizer, which is downloaded."
            raise UserError("--audio_tokenizer_path is missing: codes need a codec to become sound", hint=hint)

    @property
    def sampling(self) -> dict[str, Any]:
        """The options that choose codes."""
        names = ("temperature", "top_p", "top_k", "ras_win_len", "ras_win_max_num_repeat", "seed", "max_seconds")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class SpeakConfig(VoiceConfig):
    """Speak a text, or a list of texts, in the voice of reference recordings."""

    output: Annotated[Path, arg(aliases=["-o"])]
    """The .wav or .flac file of one text; for a list the folder that receives ID.wav. A killed list continues in it."""
    text: str | None = None
    """The text."""
    input: Path | None = None
    """Texts: a list (JSONL with id, text and, optionally, ref_audio, ref_text; or another list of higgs-eval). A .txt
    file is one text where --output is a file, and one text a line where it is a folder."""
    ref_audio: tuple[Path, ...] = ()
    """Recording of the voice; several for a text with several speakers. For lines of a list that name none."""
    ref_text: tuple[str, ...] = ()
    """What each recording says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.text is None) == (self.input is None):
            raise UserError("expected --text or --input", got="both" if self.text is not None else "neither")
        if self.text is not None and not self.to_file:
            raise UserError("--output is no audio file", expected=" or ".join(AUDIO_SUFFIXES), got=self.output)
        if self.ref_text and len(self.ref_text) != len(self.ref_audio):
            expected = f"{len(self.ref_audio)}, one for each --ref_audio"
            raise UserError("--ref_text has a wrong number of texts", expected=expected, got=len(self.ref_text))

    @property
    def to_file(self) -> bool:
        """Whether the output is one audio file."""
        return self.output.suffix.lower() in AUDIO_SUFFIXES

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """(path, text) of each reference recording; the text is empty where it is not known."""
        texts = self.ref_text or ("",) * len(self.ref_audio)
        return tuple((str(path), text) for path, text in zip(self.ref_audio, texts, strict=True))


@dataclass(frozen=True, kw_only=True)
class ServeConfig(VoiceConfig):
    """Serve a page that speaks texts, the base beside the tuned model."""

    host: str = "127.0.0.1"
    """Address to listen on; on any but this machine's own, everyone who reaches it can use the page."""
    port: Annotated[int, PORT] = 7860
    """Port to listen on; 0: a free one."""

"""A model that speaks: texts and reference recordings become codes, codes become sound.

In: tasks (the pieces of a text, its references, a seed). Out: the codes of each task's pieces, as they end. All pieces
of all tasks run through one batch. Pieces after the first of a text without references are spoken in the first one's
voice: text and codes of the first piece are their reference.

Shapes: K codebooks, T frames, S samples at the codec's rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from higgs_tune.evaluate.speak.settings import Settings
from higgs_tune.preprocess.assemble import sample_of
from higgs_tune.preprocess.audio.audio import load_clip
from higgs_tune.preprocess.audio.clip import Clip
from higgs_tune.preprocess.audio.options import AudioOptions
from higgs_tune.preprocess.audio.whisper import log_mel
from higgs_tune.preprocess.checkpoints.checkpoint import load_tokenizer
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.encode import one_thread
from higgs_tune.preprocess.input.chatml import parse_entry, tokenize
from higgs_tune.preprocess.input.layout import Reference, build_conversation
from higgs_tune.preprocess.judges.device import torch_device
from higgs_tune.preprocess.reject import Reject
from higgs_tune.preprocess.workdir import Encoded, Features
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.memory import keep_memory, limit_shape_caches
from higgs_tune.train.model.adapter import apply_adapter, read_adapter
from higgs_tune.train.model.decoding import generate_batch
from higgs_tune.train.model.load import load_model
from higgs_tune.train.model.lora import base_only
from higgs_tune.train.model.sampling import Request, Said, Sampling, request_of
from torch import nn

MIN_REFERENCE_S, MAX_REFERENCE_S = 0.5, 60.0
PAUSE_S = 0.15  # of silence between the pieces of a text
RETRIES, RETRY_SEED = 3, 1_000_003  # of a piece that ended before its first frame, and what is added to its seed


@dataclass(frozen=True)
class Voice:
    """A reference as the model gets it.

    codes_KT: uint16. mels: log-mel for a Whisper tower; none without one. text: what it says; empty where that is not
    known.
    """

    codes_KT: np.ndarray
    mels: tuple[Features, ...] = ()
    text: str = ""


@dataclass
class Task:
    """A text to speak.

    pieces: spoken one by one. said: the result of each, by its number. retries: of pieces of which nothing was said.
    """

    pieces: list[str]
    voices: tuple[Voice, ...]
    seed: int
    said: dict[int, Said] = field(default_factory=dict)
    retries: dict[int, int] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return len(self.said) == len(self.pieces)

    @property
    def codes(self) -> list[np.ndarray]:
        """Codes [K, T] of each piece; a piece that was not spoken has none."""
        said = [self.said[i].codes_KT for i in range(len(self.pieces))]
        return [np.zeros((0, 0)) if codes_KT is None else codes_KT for codes_KT in said]


class SpeechEngine:
    """A loaded model, its tokenizer and codec.

    Raises:
        UserError: a checkpoint cannot be read, or model and codec do not fit together.
    """

    def __init__(self, settings: Settings, *, device: str, batch_size: int) -> None:
        self.settings, self.ids, self.batch_size = settings, settings.ids, batch_size
        place = usable_device(device)
        if place.type == "cpu":
            keep_memory()
            limit_shape_caches()
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
        adapter = read_adapter(settings.adapter) if settings.adapter else None
        attention = adapter is not None and adapter.has_audio_attention
        self.tokenizer = load_tokenizer(settings.base, self.ids)
        self.codec = load_codec(settings.codec, place)
        tower = settings.tower.folder if settings.tower else None
        self.model = load_model(settings.base, device=place, dtype=dtype, audio_attention=attention, tower=tower).model
        self.features = "none" if self.model.config.skip_audio_tower else "mel"
        self.tuned: nn.Module = apply_adapter(self.model, adapter).eval() if adapter else self.model
        codec, expected = self.codec.config, (self.ids.codebooks, self.model.config.audio_codebook_size)
        if (codec.codebooks, codec.codebook_size) != expected:
            raise UserError("the codec does not fit the model", where=settings.codec,
                            expected=f"{expected[0]} codebooks of {expected[1]}",
                            got=f"{codec.codebooks} of {codec.codebook_size}")  # fmt: skip
        chosen = settings.sampling
        self.sampling = Sampling(
            temperature=chosen["temperature"],
            top_p=chosen["top_p"],
            top_k=chosen["top_k"] or None,
            ras_window=chosen["ras_win_len"] or None,
            ras_repeats=chosen["ras_win_max_num_repeat"],
        )
        self._voices: dict[str, Voice | Reject] = {}
        try:
            self.prompt("probe", (), 0)
        except Reject as reject:
            raise UserError(f"the system text or instruction cannot be used: {reject.detail}") from reject

    @property
    def sample_rate_hz(self) -> int:
        return self.codec.config.sample_rate_hz

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Within the block the base speaks, without its adapter and without a tower that came with it."""
        features = self.features
        self.features = "none" if self.settings.tower else features
        try:
            with base_only(self.tuned):
                yield
        finally:
            self.features = features

    def voice(self, path: str, text: str) -> Voice:
        """Read and encode a reference recording; each file once.

        Raises:
            Reject: the file is missing or cannot be used.
        """
        if path not in self._voices:
            try:
                options = AudioOptions(MIN_REFERENCE_S, MAX_REFERENCE_S)
                with one_thread():
                    wave = load_clip(Clip(path, path), self.sample_rate_hz, options)
                    self._voices[path] = Voice(self.codec.encode(wave.samples_S), self._mels(wave.samples_S))
            except Reject as reject:
                self._voices[path] = reject
        voice = self._voices[path]
        if isinstance(voice, Reject):
            raise voice
        return replace(voice, text=text)

    def _mels(self, wave_S: np.ndarray) -> tuple[Features, ...]:
        """Log-mel of a reference as sets store it, for a model with a Whisper tower."""
        if self.model.config.skip_audio_tower:
            return ()
        mels = log_mel(wave_S, self.sample_rate_hz, self.model.config.audio_encoder_config.num_mel_bins)
        return tuple(replace(mel, values_CF=mel.values_CF.astype(np.float16)) for mel in mels)

    def prompt(self, text: str, voices: Sequence[Voice], seed: int) -> Request:
        """The request that speaks one piece of text.

        Raises:
            Reject: a text cannot be used.
        """
        references = [
            Reference({"type": "audio", "audio_url": f"reference-{i}"}, voice.text or None)
            for i, voice in enumerate(voices)
        ]
        spoken = {"type": "audio", "audio_url": "speech"}
        made = build_conversation(self.settings.layout, text, spoken, references, self.settings.wording)
        chat = parse_entry(made, 0)
        frame_s = 1 / self.codec.config.frame_rate_hz
        clips = [
            Encoded(voice.codes_KT, voice.mels, {"seconds": voice.codes_KT.shape[1] * frame_s}) for voice in voices
        ]
        clips.append(Encoded(np.zeros((self.ids.codebooks, 1), np.uint16), (), {"seconds": frame_s}))  # cut off again
        tokens_2L = tokenize(chat, self.tokenizer, self.ids)
        sample = sample_of(chat, tokens_2L, clips, self.ids, self._takes_features)
        return request_of(sample, self.ids, speak=True, max_frames=self._max_frames, seed=seed)

    def _takes_features(self, role: str) -> bool:
        """Whether audio in a message of this role passes through the tower: references in the user's turn."""
        return self.features != "none" and role != "assistant"

    @property
    def _max_frames(self) -> int:
        return max(1, round(self.settings.sampling["max_seconds"] * self.codec.config.frame_rate_hz))

    def speak(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """Speak all pieces of all tasks; gives each task when its last piece is spoken.

        Raises:
            Reject: a text cannot be used (see `check_text`: callers check texts before).
        """
        waiting = [(task, i) for task in tasks for i in range(len(task.pieces) if task.voices else 1)]
        while waiting:
            requests = [self._request(task, i) for task, i in waiting]
            results = generate_batch(
                self.model, requests, self.ids, self.sampling, batch_size=self.batch_size, features=self.features
            )
            later: list[tuple[Task, int]] = []
            for number, said in results:
                task, i = waiting[number]
                if self._is_silent(said) and self.sampling.temperature and task.retries.get(i, 0) < RETRIES:
                    task.retries[i] = task.retries.get(i, 0) + 1
                    later.append((task, i))
                    continue
                task.said[i] = said if said.reached_eos else self._cut_off(said)
                if i == 0 and not task.voices:
                    later += [(task, piece) for piece in range(1, len(task.pieces))]
                if task.done:
                    yield task
            waiting = later

    def _request(self, task: Task, i: int) -> Request:
        voices, first = task.voices, task.said.get(0)
        if not voices and i and first and first.codes_KT is not None and not self._is_silent(first):
            codes_KT = self._within(first.codes_KT).astype(np.uint16)
            mels = self._mels(self.sound([codes_KT])) if self.features != "none" else ()
            voices = (Voice(codes_KT, mels, task.pieces[0]),)
        return self.prompt(task.pieces[i], voices, task.seed + i + RETRY_SEED * task.retries.get(i, 0))

    @staticmethod
    def _is_silent(said: Said) -> bool:
        """Whether nothing was said: no frame of audio."""
        return said.codes_KT is None or not said.codes_KT.shape[1]

    def _cut_off(self, said: Said) -> Said:
        """What was said without an end, up to --max_seconds."""
        codes_KT = said.codes_KT
        return said if codes_KT is None else replace(said, codes_KT=codes_KT[:, : self._max_frames])

    def _within(self, codes_KT: np.ndarray) -> np.ndarray:
        """Codes that the codec has; boson's engine clips the ids of the stream, too."""
        return np.clip(codes_KT, 0, self.codec.config.codebook_size - 1)

    def sound(self, codes: Sequence[np.ndarray]) -> np.ndarray:
        """The waveform of a text's pieces, with pauses between them: float32 [S]."""
        pause_S = np.zeros(round(PAUSE_S * self.sample_rate_hz), np.float32)
        parts: list[np.ndarray] = []
        for codes_KT in codes:
            parts += [pause_S] if parts else []
            with one_thread():
                parts.append(self.codec.decode(self._within(codes_KT)))
        return np.concatenate(parts)


def usable_device(device: str) -> torch.device:
    """The device of `--device`.

    Raises:
        UserError: there is no such device.
    """
    try:
        place = torch.device(torch_device(device))
    except RuntimeError:
        raise UserError("--device is no device", expected="auto, cpu, cuda or cuda:1", got=device) from None
    if place.type not in ("cpu", "cuda") or (place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count()):
        expected = f"cpu, or a GPU that PyTorch sees (it sees {torch.cuda.device_count()})"
        raise UserError("--device is not there", expected=expected, got=device)
    return place

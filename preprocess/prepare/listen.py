"""The first pass over a recording: when somebody speaks, how loud it is, where it is clipped.

In: a recording. Out: arrays of one value a window, a few megabytes for ten hours; the passes after it know from them
where speech is. Speech is found by silero's network (ONNX, from the package's file; the package is not imported), or by
loudness alone.

Shapes: S samples, C channels, F windows of 32 ms, L windows of 10 ms.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from higgs_tune.preprocess.prepare.reading import RATE_HZ, Form, read_blocks
from higgs_tune.shards.errors import UserError, first_line

WINDOW = 512  # samples at 16 kHz of one probability: 32 ms
CONTEXT = 64  # samples before a window that the network sees, too
LEVEL = 160  # samples at 16 kHz of one level: 10 ms
FLOOR_DB = -127.5  # levels are stored as bytes, half a decibel a step, below full scale
FULL_SCALE = 0.99
FLAT_LEAST, FLAT_STEP, FLAT_S = 0.2, 2e-5, 0.25e-3  # a flat top: this loud, no change, at least so long
SILERO = ("silero_vad_16k_sequence.onnx", "silero_vad.onnx")  # the first takes many windows at once
Vad = Literal["silero", "energy"]


@dataclass(frozen=True)
class Listened:
    """One recording.

    Attributes:
        probs_F: uint8, probability of speech × 255; empty where speech is found by loudness.
        levels_L: uint8, half decibels below full scale.
        clipped_L: uint8, share of clipped samples × 255, rounded up.
    """

    probs_F: np.ndarray
    levels_L: np.ndarray
    clipped_L: np.ndarray


def listen(path: Path, form: Form, vad: Vad) -> Listened:
    """One pass over a recording.

    Raises:
        Reject: see `read_blocks`.
    """
    network = silero() if vad == "silero" else None
    speech = network.stream() if network else None
    probs: list[np.ndarray] = []
    levels: list[np.ndarray] = []
    clipped: list[np.ndarray] = []
    rest_S = np.zeros(0, np.float32)
    counter = _ClipCounter(form)
    for block in read_blocks(path, form):
        clipped.append(counter.add(block.samples_SC))
        mono_S = np.concatenate([rest_S, block.mono_S])
        whole = len(mono_S) // LEVEL * LEVEL
        levels.append(_levels(mono_S[:whole].reshape(-1, LEVEL)))
        rest_S = mono_S[whole:]
        if speech:
            probs.append(speech.add(block.mono_S))
    if len(rest_S):
        levels.append(_levels(rest_S[None]))
    if speech:
        probs.append(speech.end())
    clipped.append(counter.end())
    return Listened(_joined(probs), _joined(levels), _joined(clipped))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def _levels(windows_LS: np.ndarray) -> np.ndarray:
    power_L = np.einsum("ls,ls->l", windows_LS, windows_LS) / windows_LS.shape[1]
    decibels_L = 10 * np.log10(np.maximum(power_L, 10 ** (FLOOR_DB / 10)))
    return np.clip(np.round(-2 * decibels_L), 0, 255).astype(np.uint8)


class _ClipCounter:
    """The share of clipped samples in each window of 10 ms, at the recording's own rate."""

    def __init__(self, form: Form) -> None:
        self._rate, self._left, self._seen, self._done = form.rate, np.zeros(0, np.bool_), 0, 0

    def add(self, samples_SC: np.ndarray) -> np.ndarray:
        self._left = np.concatenate([self._left, clipped_samples(samples_SC, self._rate)])
        self._seen += len(samples_SC)
        return self._take(self._seen * 100 // self._rate)

    def end(self) -> np.ndarray:
        return self._take(-(-self._seen * 100 // self._rate))

    def _take(self, until: int) -> np.ndarray:
        """The windows up to number `until`."""
        first = self._done * self._rate // 100
        edges = np.arange(self._done, until + 1) * self._rate // 100 - first
        if until <= self._done:
            return np.zeros(0, np.uint8)
        sums = np.concatenate([[0], np.cumsum(self._left)])
        edges = np.minimum(edges, len(self._left))
        share_L = np.diff(sums[edges]) / np.maximum(1, np.diff(edges))
        self._left, self._done = self._left[edges[-1] :], until
        return np.ceil(share_L * 255).astype(np.uint8)


def clipped_samples(samples_SC: np.ndarray, rate_hz: int) -> np.ndarray:
    """bool [S]: three or more samples of a channel in a row at full scale, or a quarter of a millisecond of one level.

    The second is what a limiter before the last change of gain leaves.
    """
    clipped_S = np.zeros(len(samples_SC), np.bool_)
    for channel_S in samples_SC.T:
        loud_S = np.abs(channel_S)
        if not len(loud_S) or float(loud_S.max()) < FLAT_LEAST:
            continue
        full_S = loud_S >= FULL_SCALE
        if full_S.any():
            clipped_S |= _in_runs(full_S, 3)
        flat_S = np.zeros(len(loud_S), np.bool_)
        flat_S[1:] = (np.abs(np.diff(channel_S)) <= FLAT_STEP) & (loud_S[1:] >= FLAT_LEAST)
        if flat_S.any():
            clipped_S |= _in_runs(flat_S, max(3, round(FLAT_S * rate_hz) - 1))
    return clipped_S


def _in_runs(true_S: np.ndarray, least: int) -> np.ndarray:
    """Where at least `least` values in a row are true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], true_S.astype(np.int8), [0]])))
    kept_S = np.zeros(len(true_S), np.bool_)
    for begin, end in edges.reshape(-1, 2):
        if end - begin >= least:
            kept_S[begin:end] = True
    return kept_S


# silero


def choose_vad(wanted: str) -> Vad:
    """The way in which speech is found.

    Raises:
        UserError: silero is asked for, and not installed.
    """
    if wanted == "energy" or (wanted == "auto" and not _silero_here()):
        return "energy"
    if not _silero_here():
        hint = "pip install higgs-tune[prepare]; --vad energy needs no model."
        raise UserError("--vad silero needs silero-vad and onnxruntime", hint=hint)
    return "silero"


def _silero_here() -> bool:
    return bool(_silero_file()) and importlib.util.find_spec("onnxruntime") is not None


def _silero_file() -> Path | None:
    spec = importlib.util.find_spec("silero_vad")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for name in SILERO:
            if (file := Path(folder) / "data" / name).is_file():
                return file
    return None


def vad_revision(vad: Vad) -> str:
    """What the probabilities depend on, beside the audio."""
    file = _silero_file() if vad == "silero" else None
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file else vad


@lru_cache(maxsize=1)
def silero() -> Silero:
    """The network of this process."""
    file = _silero_file()
    assert file is not None
    return Silero(file)


class Silero:
    """silero's network on one thread; its two ONNX forms give the same probabilities.

    Raises:
        UserError: the file is of another form.
    """

    def __init__(self, file: Path) -> None:
        import onnxruntime  # pyright: ignore[reportMissingImports]

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self.session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except RuntimeError as error:
            raise UserError(f"cannot load silero: {first_line(error)}", where=file) from error
        names = {item.name for item in self.session.get_inputs()}
        self.by_sequence = names == {"input", "h", "c"}
        if not self.by_sequence and names != {"input", "state", "sr"}:
            got = ", ".join(sorted(names))
            raise UserError("another form of silero", where=file, expected="silero-vad 5 or 6", got=f"inputs {got}")

    def stream(self) -> _Stream:
        """A recording from its beginning."""
        return _Stream(self)


class _Stream:
    def __init__(self, network: Silero) -> None:
        self._network = network
        self._rest_S = np.zeros(CONTEXT, np.float32)  # the context, then what is no whole window yet
        self._hidden, self._cell = (np.zeros((1, 1, 128), np.float32) for _ in range(2))

    def add(self, mono_S: np.ndarray) -> np.ndarray:
        """uint8 [F]: probabilities of the windows that are whole now."""
        samples_S = np.concatenate([self._rest_S, mono_S])
        count = (len(samples_S) - CONTEXT) // WINDOW
        self._rest_S = samples_S[count * WINDOW :]
        if not count:
            return np.zeros(0, np.uint8)
        windows_FS = np.lib.stride_tricks.sliding_window_view(samples_S, CONTEXT + WINDOW)[: count * WINDOW : WINDOW]
        return np.round(self._run(np.ascontiguousarray(windows_FS, np.float32)) * 255).astype(np.uint8)

    def end(self) -> np.ndarray:
        """The last window, filled up with silence."""
        missing = WINDOW - (len(self._rest_S) - CONTEXT)
        return self.add(np.zeros(missing, np.float32)) if missing < WINDOW else np.zeros(0, np.uint8)

    def _run(self, windows_FS: np.ndarray) -> np.ndarray:
        session = self._network.session
        if self._network.by_sequence:
            inputs = {"input": windows_FS, "h": self._hidden, "c": self._cell}
            probs_F, self._hidden, self._cell = session.run(None, inputs)
            return probs_F
        probs_F, state = np.zeros(len(windows_FS), np.float32), np.concatenate([self._hidden, self._cell])
        for number, window_S in enumerate(windows_FS):
            inputs = {"input": window_S[None], "state": state, "sr": np.array(RATE_HZ, np.int64)}
            prob, state = session.run(None, inputs)
            probs_F[number] = prob[0, 0]
        self._hidden, self._cell = state[:1], state[1:]
        return probs_F

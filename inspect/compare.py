"""How far decoded audio is from its source: duration, log-spectral distance, a picture of both spectrograms.

In: two waveforms. Out: numbers, and a PNG. Never: a change of gain; the distance of equal shapes at different levels
is not zero.

The log-spectral distance is that of Gray and Markel, "Distance measures for speech processing" (IEEE Trans. ASSP 24,
1976): the root mean square over frequency of the difference of the log power spectra, in dB; here the mean over
frames, with both spectra floored at 80 dB below the louder one's peak, so that digital silence stays finite.

Shapes: S samples, F frequency bins, T spectrogram frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import librosa
import numpy as np
import soundfile
from higgs_tune.shards.durable import atomic_file
from higgs_tune.shards.errors import UserError
from PIL import Image, ImageDraw
from scipy.signal import correlate, correlation_lags

WINDOW, HOP = 1024, 256  # samples
FLOOR_DB = 80.0
MAX_LAG_S = 0.1  # a codec delays by far less
PICTURE_HEIGHT, MARGIN = 200, 40  # pixels, of one spectrogram; left and below


@dataclass(frozen=True)
class Comparison:
    """lag_s: how much later the decoded audio is; distance_db: log-spectral distance over `overlap_s` seconds."""

    source_s: float
    decoded_s: float
    lag_s: float
    overlap_s: float
    distance_db: float


def read_source(path: Path, sample_rate_hz: int) -> np.ndarray:
    """float32 [S]: an audio file, mixed down and resampled.

    Raises:
        UserError: it cannot be read.
    """
    try:
        wave_SC, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot read audio: {error}", where=path) from error
    if not len(wave_SC):
        raise UserError("the audio is empty", where=path)
    return librosa.resample(wave_SC.mean(axis=1), orig_sr=rate, target_sr=sample_rate_hz)


def power_db(wave_S: np.ndarray) -> np.ndarray:
    """Log power spectrogram [F, T] in dB."""
    spectrum_FT = librosa.stft(wave_S, n_fft=WINDOW, hop_length=HOP)
    return 10 * np.log10(np.maximum(np.abs(spectrum_FT) ** 2, 1e-12))


def find_lag(source_S: np.ndarray, decoded_S: np.ndarray, most: int) -> int:
    """Samples that the decoded audio is later than its source, by the peak of their correlation within `most`."""
    strength = correlate(decoded_S, source_S, mode="full", method="fft")
    lags = correlation_lags(len(decoded_S), len(source_S), mode="full")
    near = np.abs(lags) <= most
    return int(lags[near][np.argmax(np.abs(strength[near]))])


def align(source_S: np.ndarray, decoded_S: np.ndarray, lag: int) -> tuple[np.ndarray, np.ndarray]:
    """The parts of both that stand for the same time."""
    source_S, decoded_S = source_S[max(0, -lag) :], decoded_S[max(0, lag) :]
    length = min(len(source_S), len(decoded_S))
    return source_S[:length], decoded_S[:length]


def floored(source_FT: np.ndarray, decoded_FT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both spectrograms, nothing below the floor."""
    floor = max(float(source_FT.max()), float(decoded_FT.max())) - FLOOR_DB
    return np.maximum(source_FT, floor), np.maximum(decoded_FT, floor)


def log_spectral_distance(source_FT: np.ndarray, decoded_FT: np.ndarray) -> float:
    """Mean over frames of the root mean square difference over frequency, in dB."""
    return float(np.sqrt(((source_FT - decoded_FT) ** 2).mean(axis=0)).mean())


def compare(source_S: np.ndarray, decoded_S: np.ndarray, sample_rate_hz: int, picture: Path) -> Comparison:
    """Compare a decoded waveform with its source, and write the picture: source above, decoded below."""
    lag = find_lag(source_S, decoded_S, round(MAX_LAG_S * sample_rate_hz))
    parts = align(source_S, decoded_S, lag)
    source_FT, decoded_FT = floored(power_db(parts[0]), power_db(parts[1]))
    image = draw(source_FT, decoded_FT, sample_rate_hz)
    with atomic_file(picture) as file:
        image.save(file, format="PNG")
    return Comparison(
        source_s=len(source_S) / sample_rate_hz,
        decoded_s=len(decoded_S) / sample_rate_hz,
        lag_s=lag / sample_rate_hz,
        overlap_s=len(parts[0]) / sample_rate_hz,
        distance_db=log_spectral_distance(source_FT, decoded_FT),
    )


def compare_files(source: Path, decoded: Path) -> Comparison:
    """Compare a decoded wav file with its source, print the numbers, and write the picture beside it.

    Raises:
        UserError: a file cannot be read.
    """
    decoded_S, rate = soundfile.read(decoded, dtype="float32")
    picture = decoded.with_suffix(".compare.png")
    found = compare(read_source(source, rate), decoded_S, rate, picture)
    print(f"source    {found.source_s:.3f} s  {source}")
    print(f"decoded   {found.decoded_s:.3f} s  ({found.decoded_s - found.source_s:+.3f} s)")
    print(f"lag       {1000 * found.lag_s:+.1f} ms")
    print(f"distance  {found.distance_db:.2f} dB log-spectral, over {found.overlap_s:.3f} s")
    print(f"picture   {picture}")
    return found


def draw(source_FT: np.ndarray, decoded_FT: np.ndarray, sample_rate_hz: int) -> Image.Image:
    """Two grey spectrograms on one time axis, with seconds below and kilohertz beside."""
    seconds = source_FT.shape[1] * HOP / sample_rate_hz
    width = min(max(round(seconds * 150), 300), 3000)
    image = Image.new("L", (MARGIN + width, 2 * PICTURE_HEIGHT + MARGIN), 255)
    pen = ImageDraw.Draw(image)
    low, high = float(min(source_FT.min(), decoded_FT.min())), float(max(source_FT.max(), decoded_FT.max()))
    for number, (name, power_FT) in enumerate((("source", source_FT), ("decoded", decoded_FT))):
        grey = 255 - 255 * (power_FT[::-1] - low) / max(high - low, 1e-9)
        top = number * PICTURE_HEIGHT
        image.paste(Image.fromarray(grey.astype(np.uint8)).resize((width, PICTURE_HEIGHT - 4)), (MARGIN, top))
        pen.text((MARGIN + 4, top + 2), name, fill=0, stroke_width=2, stroke_fill=255)
        top_khz = sample_rate_hz / 2000
        for khz in range(0, int(top_khz), 4):
            y = top + round((PICTURE_HEIGHT - 4) * (1 - khz / top_khz))
            pen.text((2, y - 11), f"{khz} kHz", fill=0)
    step = max(1, round(seconds / 10))
    for second in range(0, int(seconds) + 1, step):
        x = MARGIN + round(width * second / max(seconds, 1e-9))
        pen.line((x, 2 * PICTURE_HEIGHT - 4, x, 2 * PICTURE_HEIGHT + 4), fill=0)
        pen.text((x, 2 * PICTURE_HEIGHT + 6), f"{second} s", fill=0)
    return image

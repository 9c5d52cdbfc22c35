"""Judge a codec on held-out clips of `speech.py`: errors of a recogniser on originals and on decoded codes, entropy.

    python examples/miniature/evaluate_codec.py --codec examples/miniature/codec/native \
        --speech runs/miniature/codec-speech --asr examples/miniature/recogniser --out runs/miniature/codec-eval

Both sides are compared as they would be written with digits ("three hundred and forty two" is 342), since recognisers
differ in how they write numbers (`cer`; where digits are said one by one, an error is an error of a word), and by
letters (`cer_letters`), for recognisers that write words as said. Rates are `[mean, low, high]`, with 95 % intervals.

Out: `OUT/original` and `OUT/decoded` (wav files), `OUT/eval.json`: figures by language and voice, what was heard.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import tyro
from higgs_tune.evaluate.bootstrap import resample
from higgs_tune.preprocess.audio.resample import resample_soxr
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.judges.edits import count_edits
from higgs_tune.preprocess.judges.interface import SAMPLE_RATE_HZ
from higgs_tune.preprocess.judges.load import load_recogniser
from higgs_tune.preprocess.judges.normalisers import normaliser
from higgs_tune.shards.durable import write_bytes
from sentences import ONES, ORDINALS, TENS
from train_codec import entropy_bits

VALUES = {word: number for number, word in enumerate(ONES)} | {word: 10 * n for n, word in enumerate(TENS, 2)}


@dataclass(frozen=True)
class CodecEvaluation:
    """Judge a codec."""

    codec: Path
    """Codec, of either layout."""
    speech: Path
    """Folder of `speech.py`."""
    out: Path
    """Output folder."""
    asr: str
    """Recogniser, as higgs-eval takes it."""
    languages: tuple[str, ...] = ("en", "ar")
    """Languages that the recogniser knows."""
    clips: int = 12
    """Held-out clips of each voice."""


def in_digits(text: str) -> str:
    """A text with its numbers in digits, without spaces and marks: `two, thirty one` is 231, and so is `2 31`."""
    return "".join(_phrase_in_digits(part) for part in re.split("[,،.;]", text))


def _phrase_in_digits(phrase: str) -> str:
    written, number, before = [], "", ""
    for word in re.findall(r"\d+|[^\W\d]+", normaliser("omnivoice").apply(phrase)):
        digits = word if word.isdecimal() else str(VALUES.get(word, ""))
        joins = before == "and" or not word.isdecimal()  # "200 and 31" is one number, "2 31" need not be
        if word == "hundred" and number:
            number += "00"
        elif joins and digits.strip("0") and _zeros(number) >= len(digits):
            number = str(int(number) + int(digits))
        elif not (word == "and" and number):
            written.append(number)
            number = digits
            if not digits and word not in ("st", "nd", "rd", "th"):
                written.append(str(ORDINALS.index(word) + 1) if word in ORDINALS else word)
        before = word
    return "".join([*written, number])


def _zeros(number: str) -> int:
    """Places at the end of a number that a smaller one can fill; zero and ten take nothing."""
    return 0 if number in ("0", "10") else len(number) - len(number.rstrip("0"))


def held_out(speech: Path, languages: tuple[str, ...], clips: int) -> list[dict[str, Any]]:
    """The first held-out clips of each voice."""
    by_voice: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in map(json.loads, (speech / "speech.jsonl").read_text().splitlines()):
        if line["split"] == "test" and line["language"] in languages:
            by_voice[line["voice"]].append(line)
    return [line for lines in by_voice.values() for line in lines[:clips]]


def count_errors(text: str, heard: str) -> dict[str, Any]:
    """Errors in what was heard, in digits and by letters."""
    plain = normaliser("omnivoice").apply
    edits, letters = count_edits(in_digits(text), in_digits(heard)), count_edits(plain(text), plain(heard))
    return {"heard": heard, "errors": edits.errors, "length": edits.length,
            "letter_errors": letters.errors, "letters": letters.length}  # fmt: skip


def error_rates(heard: list[dict[str, Any]]) -> dict[str, Any]:
    """Error rates with 95 % intervals over clips, clips without an error, and clips."""
    errors_N2 = np.array([(clip["errors"], clip["letter_errors"]) for clip in heard], dtype=float)
    lengths_N2 = np.array([(clip["length"], clip["letters"]) for clip in heard], dtype=float)
    resampled, rates = resample(errors_N2, lengths_N2), dict[str, Any]()
    for number, name in enumerate(("cer", "cer_letters")):
        found = resampled.interval(number)
        assert found  # every sentence has letters
        rates[name] = [round(found[part], 4) for part in ("mean", "low", "high")]
    return rates | {"right": int((errors_N2[:, 0] == 0).sum()), "clips": len(heard)}


def main() -> None:
    config = tyro.cli(CodecEvaluation)
    codec, recogniser = load_codec(config.codec), load_recogniser(config.asr, "cpu")
    codes, lines = [], held_out(config.speech, config.languages, config.clips)
    for kind in ("original", "decoded"):
        (config.out / kind).mkdir(parents=True, exist_ok=True)
    for line in lines:
        samples, rate_hz = soundfile.read(config.speech / line["audio"], dtype="float32")
        rate = codec.config.sample_rate_hz
        wave_S = resample_soxr(samples, rate_hz, rate)
        codes.append(codec.encode(wave_S))
        for kind, wave in (("original", wave_S), ("decoded", codec.decode(codes[-1]))):
            soundfile.write(config.out / kind / f"{Path(line['audio']).stem}.wav", wave, rate)
            heard = recogniser.transcribe([resample_soxr(wave, rate, SAMPLE_RATE_HZ)], line["language"])[0]
            line[kind] = count_errors(line["text"], heard)
    figures: dict[str, Any] = {"recogniser": recogniser.name, "bits": entropy_bits(_joined(codes))}
    for group in ("language", "voice"):
        for name in dict.fromkeys(line[group] for line in lines):
            chosen = [line for line in lines if line[group] == name]
            figures[name] = {kind: error_rates([line[kind] for line in chosen]) for kind in ("original", "decoded")}
    write_bytes(config.out / "eval.json", json.dumps({"figures": figures, "clips": lines}, indent=1).encode())
    print(json.dumps(figures, indent=1))


def _joined(codes: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(codes, axis=1).astype(np.int64))


if __name__ == "__main__":
    main()

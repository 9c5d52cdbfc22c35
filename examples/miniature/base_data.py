"""Training data of the base from recorded sentences: ChatML in both prompt layouts from clips of `speech.py`.

    python examples/miniature/base_data.py --speech runs/miniature/base-speech

Out: `SPEECH/chatml.jsonl`, a sample for each clip of the split `train`; samples are `chat` and `serve` in turn, each
with another, short clip of the same voice as reference. And `SPEECH/held_out.jsonl`, a list for higgs-eval of the first
clips of the split `test` of each voice, with a reference from the split `train`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import tyro
from higgs_tune.preprocess.input.layout import Reference, build_conversation
from sentences import without_marks
from speech import write_lines


@dataclass(frozen=True)
class BaseData:
    """Write the base's ChatML."""

    speech: Path
    """Folder of `speech.py`."""
    longest_reference: float = 2.0
    """Longest reference clip, in seconds."""
    held_out: int = 20
    """Held-out sentences of each voice in the list for higgs-eval."""
    seed: int = 0
    """Seed of the choice of references."""


def audio_part(line: dict[str, Any]) -> dict[str, Any]:
    """A clip as a part of a message."""
    return {"type": "audio", "audio_url": line["audio"]}


def held_out_line(line: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """A line of the list for higgs-eval."""
    return {
        "id": Path(line["audio"]).stem,
        **{name: line[name] for name in ("text", "language")},
        "speaker": line["voice"],
        "ref_audio": reference["audio"],
        "ref_text": reference["text"],
        "target_audio": line["audio"],
    }


def main() -> None:
    config = tyro.cli(BaseData)
    rng, judged, by_voice = (
        Random(config.seed),
        Random(config.seed + 1),
        defaultdict[str, dict[str, list[dict[str, Any]]]](lambda: defaultdict(list)),
    )
    for line in map(json.loads, (config.speech / "speech.jsonl").read_text().splitlines()):
        line["text"] = without_marks(line["text"])
        by_voice[line["voice"]][line["split"]].append(line)
    samples, held_out = [], []
    for voice, splits in by_voice.items():
        short = [line for line in splits["train"] if line["seconds"] <= config.longest_reference]
        for number, line in enumerate(splits["train"]):
            other = rng.choice([near for near in rng.sample(short, 2) if near is not line])
            reference = Reference(audio_part(other), other["text"])
            layout = "serve" if number % 2 else "chat"
            conversation = build_conversation(layout, line["text"], audio_part(line), [reference])
            misc = {"language": line["language"]}
            samples.append({"id": Path(line["audio"]).stem, **conversation, "speaker": voice, "misc": misc})
        held_out += [held_out_line(line, judged.choice(short)) for line in splits["test"][: config.held_out]]
    write_lines(config.speech / "chatml.jsonl", samples)
    write_lines(config.speech / "held_out.jsonl", held_out)
    print(f"{len(samples)} samples of {len(by_voice)} voices in {config.speech / 'chatml.jsonl'}")


if __name__ == "__main__":
    main()

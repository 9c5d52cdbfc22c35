"""Training data of the base: ChatML in both prompt layouts from clips of `speech.py`.

    python examples/miniature/base_data.py --speech runs/miniature/base-speech

Out: `SPEECH/chatml.jsonl`, a sample for each clip of the split `train`; samples are `chat` and `serve` in turn, each
with another, short clip of the same voice as reference.
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
from higgs_tune.shards.durable import write_bytes


@dataclass(frozen=True)
class BaseData:
    """Write the base's ChatML."""

    speech: Path
    """Folder of `speech.py`."""
    longest_reference: float = 2.0
    """Longest reference clip, in seconds."""
    seed: int = 0
    """Seed of the choice of references."""


def audio_part(line: dict[str, Any]) -> dict[str, Any]:
    """A clip as a part of a message."""
    return {"type": "audio", "audio_url": line["audio"]}


def main() -> None:
    config = tyro.cli(BaseData)
    rng, by_voice = Random(config.seed), defaultdict[str, list[dict[str, Any]]](list)
    for line in map(json.loads, (config.speech / "speech.jsonl").read_text().splitlines()):
        if line["split"] == "train":
            by_voice[line["voice"]].append(line)
    samples = []
    for voice, lines in by_voice.items():
        short = [line for line in lines if line["seconds"] <= config.longest_reference]
        for number, line in enumerate(lines):
            other = rng.choice([near for near in rng.sample(short, 2) if near is not line])
            reference = Reference(audio_part(other), other["text"])
            layout = "serve" if number % 2 else "chat"
            conversation = build_conversation(layout, line["text"], audio_part(line), [reference])
            conversation.pop("start_index", None)
            misc = {"language": line["language"]}
            samples.append({"id": Path(line["audio"]).stem, **conversation, "speaker": voice, "misc": misc})
    text = "\n".join(json.dumps(sample, ensure_ascii=False) for sample in samples)
    write_bytes(config.speech / "chatml.jsonl", text.encode() + b"\n")
    print(f"{len(samples)} samples of {len(by_voice)} voices in {config.speech / 'chatml.jsonl'}")


if __name__ == "__main__":
    main()

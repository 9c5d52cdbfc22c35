"""Speech from the model: our batched generation against boson's `generate` one by one, alternately, same greedy tokens.

    python bench/generate.py --size small [--batch 16] [--frames 32] [--pairs 3] [--out generate.json]

Both sides say the same prompts (random weights, synthetic references and texts, see models/synthetic.py) up to the same
number of frames. A round of boson's side says `--boson_prompts` of them, and its time is taken a prompt. The codes are
compared; a difference ends the run.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from higgs_tune.shards.format import Sample
from higgs_tune.train.model.decoding import generate_batch
from higgs_tune.train.model.generate import boson_generate
from higgs_tune.train.model.sampling import Sampling, request_of
from machine import describe_machine
from models.synthetic import IDS, SIZES, SizeName, config_of, make_model, synthetic_sample

OPEN_AUDIO = 128_013


@dataclass(frozen=True)
class Options:
    """Generation benchmark."""

    size: SizeName = "small"
    """Size of the model."""
    batch: int = 16
    """Prompts that run at once on our side."""
    boson_prompts: int = 4
    """Prompts of a round of boson's side."""
    frames: int = 32
    """Frames of audio that each prompt says."""
    pairs: int = 3
    """Rounds of each side."""
    out: Path | None = None
    """JSON file of the results."""


def sample_of(number: int) -> Sample:
    """Reference audio in the user's turn, then text up to the token that opens the target's audio."""
    arrays = synthetic_sample(number)
    tokens_2L = arrays.tokens_2L.copy()
    tokens_2L[0, int(np.flatnonzero(tokens_2L[0] == IDS.audio_out)[-1]) - 1] = OPEN_AUDIO
    segments = [
        {"frames": frames, "role": role}
        for frames, role in zip(arrays.segment_frames, ("user", "assistant"), strict=True)
    ]
    return Sample(arrays.key, {"segments": segments}, tokens_2L, arrays.codes_KT)


def main(options: Options) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_model(config_of(SIZES[options.size]), device, dtype)
    greedy, frames = Sampling(temperature=0), options.frames
    requests = [request_of(sample_of(number), IDS, speak=True, max_frames=frames) for number in range(options.batch)]
    seconds: dict[str, list[float]] = {"boson": [], "ours": []}
    for number in range(options.pairs + 1):  # the first pair warms up
        began = time.perf_counter()
        theirs = [boson_generate(model, request, IDS, greedy) for request in requests[: options.boson_prompts]]
        middle = time.perf_counter()
        ours = dict(generate_batch(model, requests, IDS, greedy, batch_size=options.batch))
        ended = time.perf_counter()
        if number:
            seconds["boson"].append((middle - began) / options.boson_prompts)
            seconds["ours"].append((ended - middle) / options.batch)
        for index, a in enumerate(theirs):
            b = ours[index]
            same = a.tokens == b.tokens and np.array_equal(a.codes_KT, b.codes_KT)  # pyright: ignore[reportArgumentType]
            assert same or device.type == "cuda", "the two sides differ"
    ratios = [a / b for a, b in zip(seconds["boson"], seconds["ours"], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(describe_machine())
    print(
        f"{options.size}, {options.frames} frames a prompt, batch of {options.batch}: boson {medians['boson']:.2f} s, "
        f"ours {medians['ours']:.2f} s a prompt; {statistics.median(ratios):.2f} times as fast "
        f"({min(ratios):.2f} to {max(ratios):.2f}); same codes"
    )
    if options.out:
        results = {"machine": describe_machine(), "options": asdict(options) | {"out": str(options.out)}}
        options.out.write_text(json.dumps(results | {"seconds": seconds, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))

"""higgs-speak: text and a reference recording in, sound out.

higgs-speak --model_path OUT2 --audio_tokenizer_path CODEC --text "…" --ref_audio r.wav --ref_text "…" -o out.wav
higgs-speak --model_path OUT2 --audio_tokenizer_path CODEC --input list.jsonl -o FOLDER
higgs-speak serve --model_path OUT2 --audio_tokenizer_path CODEC
"""

from __future__ import annotations

import sys

import tyro
from higgs_tune.evaluate.speak.config import SpeakConfig
from higgs_tune.shards.errors import run_command


def main() -> None:
    run_command(_main)


def _main() -> None:
    config = tyro.cli(SpeakConfig, prog="higgs-speak")
    from higgs_tune.evaluate.speak.run import speak  # torch takes seconds to import; flags are parsed before

    sys.exit(speak(config))

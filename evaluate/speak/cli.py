"""higgs-speak: text and a reference recording in, sound out.

higgs-speak --model_path OUT2 --audio_tokenizer_path CODEC --text "…" --ref_audio r.wav --ref_text "…" -o out.wav
higgs-speak --model_path OUT2 --audio_tokenizer_path CODEC --input list.jsonl -o FOLDER
higgs-speak serve --model_path OUT2 --audio_tokenizer_path CODEC
"""

from __future__ import annotations

import sys

import tyro
from higgs_tune.evaluate.speak.config import ServeConfig, SpeakConfig
from higgs_tune.shards.errors import run_command

DESCRIPTION = "Speak a text, or a list of texts, in the voice of reference recordings. `higgs-speak serve`: a web page."


def main() -> None:
    run_command(_main)


def _main() -> None:
    if sys.argv[1:2] == ["serve"]:
        page_config = tyro.cli(ServeConfig, prog="higgs-speak serve", args=sys.argv[2:])
        from higgs_tune.evaluate.speak.web import serve  # torch takes seconds to import; flags are parsed before

        serve(page_config)
        return
    config = tyro.cli(SpeakConfig, prog="higgs-speak", description=DESCRIPTION)
    from higgs_tune.evaluate.speak.run import speak

    sys.exit(speak(config))

"""higgs-eval: is the voice better?

higgs-eval --model_path BASE OUT2 OUT2/checkpoint-* --audio_tokenizer_path CODEC --data list.jsonl --out EVAL \
    --asr openai/whisper-large-v3 --language ar
torchrun --nproc_per_node 8 -m higgs_tune.evaluate …    the same on several GPUs
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tyro
from higgs_tune.evaluate.config import EvalConfig
from higgs_tune.evaluate.ranks import join_ranks
from higgs_tune.shards.durable import to_json
from higgs_tune.shards.errors import run_command

if TYPE_CHECKING:
    from higgs_tune.evaluate.judging import Judges

TABLE = {"wer": True, "wer_mean": True, "cer": True, "sim": False, "quality": False, "run_on_rate": True}


def main() -> None:
    run_command(_main)


def _main() -> None:
    config = tyro.cli(EvalConfig, prog="higgs-eval")
    from higgs_tune.evaluate.evaluate import evaluate  # torch takes seconds to import; flags are parsed before

    ranks = join_ranks()
    result = evaluate(config, load_judges, ranks)
    if not ranks.is_main:
        return
    if config.json:
        print(to_json(result, indent=1).decode())
    else:
        print_summary(result, config)


def load_judges(config: EvalConfig) -> Judges:
    """The judges that the options name."""
    from higgs_tune.evaluate.judging import Judges
    from higgs_tune.preprocess.judges.load import load_quality_model, load_recogniser, load_speaker_encoder

    return Judges(
        load_recogniser(config.asr, config.device),
        load_speaker_encoder(config.speaker_model, config.device) if config.speaker_model else None,
        load_quality_model(config.quality, config.device) if config.quality else None,
        config.asr_language,
    )


def print_summary(result: dict[str, Any], config: EvalConfig) -> None:
    """The table, what it was measured with, and the findings."""
    from higgs_tune.evaluate.page import shown_figure
    from rich.console import Console
    from rich.table import Table

    rows = [*config.models, *config.folders, *(name for name in ("ceiling", "floor") if name in result)]
    console = Console(width=None)
    table = Table("", *TABLE, title=f"{result['about']['lines']} lines, 95 % intervals over utterances")
    for name in rows:
        table.add_row(name, *(shown_figure(result[name].get(key), percent) for key, percent in TABLE.items()))
    for name, given in result["paired"]["minus_base"].items():
        shown = (shown_figure(given[key], percent, signed=True) for key, percent in TABLE.items())
        table.add_row(f"{name} - {result['paired']['base']}", *shown)
    console.print(table)
    for language, systems in result["changes"].items():
        for name, change in systems.items():
            shown = "; ".join(f"{kind}: {', '.join(change[kind]) or 'nothing'}" for kind in ("better", "worse"))
            console.print(f"{language}, {name} against {result['paired']['base']}: {shown}", markup=False)
    judges = "; ".join(f"{role} {j['name']} {j['revision']}" for role, j in result["about"]["judges"].items() if j)
    console.print(f"normaliser {result['about']['normaliser']['name']}; {judges}", markup=False)
    for name, found in result["findings"].items():
        for kind, listed in found.items():
            if listed:
                console.print(f"{name}: {len(listed)} {kind.replace('_', ' ')}", markup=False)
    for leak in result["leakage"]:
        shared = ", ".join(f"{len(leak[kind])} by {kind}" for kind in ("audio", "text", "speaker"))
        console.print(f"in the training samples of {leak['set']}: {shared}", markup=False)
    console.print(f"{config.out}/index.html", markup=False)

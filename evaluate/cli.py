"""higgs-eval: is the voice better?

higgs-eval --model_path BASE OUT2 OUT2/checkpoint-* --audio_tokenizer_path CODEC --data list.jsonl --out EVAL \
    --asr openai/whisper-large-v3 --language ar
torchrun --nproc_per_node 8 -m higgs_tune.evaluate …    the same on several GPUs
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import tyro
from higgs_tune.evaluate.config import EvalConfig
from higgs_tune.evaluate.ranks import join_ranks
from higgs_tune.shards.durable import to_json
from higgs_tune.shards.errors import few, run_command

if TYPE_CHECKING:
    from higgs_tune.evaluate.judging import Judges
    from rich.console import Console
    from rich.table import Table

TABLE = {"wer": True, "wer_mean": True, "cer": True, "sim": False, "quality": False, "run_on_rate": True}
HALF = 3  # figures of the first table where one is too wide: the error rates
PIPED_WIDTH = 400  # columns where the output is no terminal: nothing is wrapped
SHOWN = 10  # ids that a finding spells out


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
    from higgs_tune.evaluate.findings import LEAKS, LIST_FINDINGS
    from higgs_tune.evaluate.judging import BAD_LINE
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"{result['about']['lines']} lines; rates in per cent; in brackets 95 % intervals over utterances")
    _print_figures(console, result, [*config.models, *config.folders])
    for language, systems in result["changes"].items():
        for name, change in systems.items():
            shown = "; ".join(f"{kind}: {', '.join(change[kind]) or 'nothing'}" for kind in ("better", "worse"))
            say(f"{language}, {name} against {result['paired']['base']}: {shown}")
    judges = "; ".join(f"{role} {j['name']} {j['revision']}" for role, j in result["about"]["judges"].items() if j)
    say(f"normaliser {result['about']['normaliser']['name']}; {judges}")
    for kind, listed in result["list"].items():
        if listed:
            shown = few([f"{fault.get('place') or fault['id']}: {fault['fault']}" for fault in listed], SHOWN)
            say(f"{LIST_FINDINGS[kind].format(count=len(listed))}: {shown}")
    for name, found in result["findings"].items():
        own = [f"{given['id']} ({given['problem']})" for given in found["problems"] if given["problem"] != BAD_LINE]
        for kind, listed in (found | {"problems": own}).items():
            if listed:
                say(f"{name}: {len(listed)} {kind.replace('_', ' ')}: {few(list(listed), SHOWN)}")
    for leak in result["leakage"]:
        shared = ", ".join(f"{len(leak[kind])} {title}" for kind, title in LEAKS.items())
        say(f"the {leak['compared']} training samples of {leak['set']} hold of these lines: {shared}")
    say(f"{config.out}/index.html")


def _print_figures(console: Console, result: dict[str, Any], systems: list[str]) -> None:
    """One table where it fits into the width; else two, with each interval below its figure."""
    whole = _table(result, systems, list(TABLE), " ")
    if console.measure(whole, options=console.options.update(width=PIPED_WIDTH)).maximum <= console.width:
        console.print(whole)
        return
    for names in (list(TABLE)[:HALF], list(TABLE)[HALF:]):
        console.print(_table(result, systems, names, "\n"))


def _table(result: dict[str, Any], systems: list[str], names: list[str], between: str) -> Table:
    """A row a system and difference.

    Args:
        between: stands between a figure and its interval.
    """
    from higgs_tune.evaluate.page import shown_figure
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(name, no_wrap=True, justify="right")

    def add(name: str, given: dict[str, Any], *, signed: bool = False) -> None:
        shown = (shown_figure(given.get(key), TABLE[key], signed=signed) for key in names)
        table.add_row(Text(name), *(Text(text.replace(" ", between, 1), justify="right") for text in shown))

    for name in (*systems, *(bound for bound in ("ceiling", "floor") if bound in result)):
        count = result[name].get("counts", {}).get("utterances")
        lines = result["about"]["lines"]
        add(f"{name} ({count} of {lines} lines)" if name == "ceiling" and count < lines else name, result[name])
    for name, given in result["paired"]["minus_base"].items():
        add(f"{name} - {result['paired']['base']}", given, signed=True)
    return table

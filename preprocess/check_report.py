"""Prints the report of --check, for people or as JSON."""

from __future__ import annotations

import json
from typing import Any

from higgs_tune.preprocess.text_findings import DESCRIPTIONS
from higgs_tune.shards.errors import few
from rich.console import Console
from rich.table import Table

SHOWN = 5
SHOWN_TEXTS = 2
POOR_COVERAGE = 1.0  # tokens a character, from where a text falls apart into bytes


def print_report(report: dict[str, Any], *, as_json: bool) -> None:
    """Print the report on standard output."""
    if as_json:
        print(json.dumps(report, indent=1))
        return
    table = Table(show_header=False, box=None)
    for name, value in rows(report):
        table.add_row(name, value)
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    console.print(table)
    for line in warnings(report):
        console.print(f"warning: {line}")
    for line in problems(report):
        console.print(f"problem: {line}")
    fit = "fit to build" if report["fit_to_build"] else "not fit to build"
    console.print(f"{fit}: {report['bad_share']:.2%} of the samples are rejected or refer to themselves")


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures, one a line."""
    samples, hours, clips = report["samples"], report["hours"], report["clips"]
    predicted, files = report["predicted"], report["files"]
    figures = [
        ("samples", f"{samples['usable']} of {samples['all']} usable"),
        ("clips", f"{hours['distinct_clips']:.3f} h in {clips['distinct']} clips"),
        ("in samples", f"{hours['in_samples']:.3f} h"),
        ("audio targets", f"in {report['samples_with_audio_target']} of {samples['usable']} samples"),
        ("prompt layouts", ", ".join(f"{count} {name}" for name, count in report["prompt_layouts"].items() if count)),
        ("seconds", _spread(report["seconds"])),
        ("tokens", _spread(report["tokens"])),
        ("tokens of a text", _percentiles(report["text_tokens"])),
        ("files", ", ".join(f"{len(names)} {kind}" for kind, names in files.items())),
        ("speakers", _speakers(report)),
        ("held out", describe_sides(report["sides"], report["val_fraction"])),
        ("disk", f"{predicted['disk_bytes'] / 1e6:.1f} MB"),
        ("encoding", _time(predicted)),
    ]
    for language, sums in report["languages"].items():
        coverage = f"{sums['tokens_per_character']:.2f} tokens a character in {sums['texts']} texts"
        figures.append((f"language {language}", coverage))
    return figures


def _speakers(report: dict[str, Any]) -> str:
    speakers, nameless = report["speakers"], report["samples_without_speaker"]
    named = f"{speakers['count']}, {len(speakers['few_clips'])} of them with few clips"
    return f"{named}; {nameless} samples name none" if nameless else named


def describe_sides(sides: dict[str, int], fraction: float) -> str:
    """The samples and speakers on both sides of the validation split, in words."""
    held_out, samples = sides["validation_samples"], sides["validation_samples"] + sides["train_samples"]
    if not samples:
        return "nothing: no sample is usable"
    if not held_out:
        why = (
            "--val_fraction 0" if not fraction else "there is only one sample" if samples < 2 else "one speaker is left"
        )
        return f"nothing for validation: {why}"
    least = " (at least one)" if held_out == 1 and fraction * samples < 1 else ""
    speakers, both = sides["validation_speakers"], sides["speakers_in_both"]
    who = f"{speakers} speakers, {both} of them trained on too" if speakers else "no speakers named"
    return f"{held_out} of {samples} samples{least}: {who}"


def _spread(values: dict[str, Any]) -> str:
    """Percentiles, and the histogram by lower edge."""
    bars = "  ".join(f"{edge}+: {count}" for edge, count in values["histogram"].items() if count)
    return f"{_percentiles(values)}\n{bars}"


def _percentiles(values: dict[str, Any]) -> str:
    return ", ".join(f"p{percent} {value:g}" for percent, value in values["percentiles"].items()) or "nothing"


def _time(predicted: dict[str, Any]) -> str:
    if predicted["encode_seconds"] is None:
        return "unknown: give --audio_tokenizer_path"
    seconds, speed = round(predicted["encode_seconds"]), predicted["times_real_time"]
    clock = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{clock} with {predicted['processes']} processes of {speed:.1f}x real time here (timed on noise)"


def problems(report: dict[str, Any]) -> list[str]:
    """The reasons why samples are unusable."""
    lines = []
    for reason, count in sorted(report["rejects"].items()):
        examples = [reject for reject in report["reject_examples"] if reject["reason"] == reason][:SHOWN]
        named = "; ".join(f"{reject['id']}: {reject['detail']}" for reject in examples)
        lines.append(f"{count} rejected for {reason}: {named}" if named else f"{count} rejected for {reason}")
    if report["advice"]:
        lines.append(f"files are not where they are looked for; {report['advice']}")
    itself = report["self_references"]
    if itself:
        lines.append(f"{len(itself)} samples refer to their own target: {few(itself, SHOWN)}")
    return lines


def warnings(report: dict[str, Any]) -> list[str]:
    """Findings that do not make a sample unusable."""
    lines = [f"{count} clips are flagged for {flag}" for flag, count in sorted(report["clips"]["flags"].items())]
    if report["cut_short"]:
        what = "clips end before their files do, since they have a duration and no offset"
        lines.append(f"{len(report['cut_short'])} {what}: {few(report['cut_short'], SHOWN)}")
    duplicate, speakers = report["files"]["duplicate"], report["speakers"]
    if duplicate:
        lines.append(
            f"{len(duplicate)} groups of equal files: {few([' = '.join(group) for group in duplicate], SHOWN)}"
        )
    outliers = [f"{o['id']} ({o['characters_per_second']:g} against {o['median']:g})" for o in report["rate_outliers"]]
    if outliers:
        lines.append(f"{len(outliers)} texts do not fit their audio, in characters a second: {few(outliers, SHOWN)}")
    if speakers["few_clips"]:
        named = [f"{name} ({count})" for name, count in speakers["few_clips"].items()]
        lines.append(f"speakers with few clips: {few(named, SHOWN)}")
    for name, finding in report["text_findings"].items():
        examples = [f"{example['id']} «{example['text']}»" for example in finding["examples"]]
        lines.append(f"{finding['samples']} samples with {DESCRIPTIONS[name]}: {few(examples, SHOWN_TEXTS)}")
    for language, sums in report["languages"].items():
        if sums["tokens_per_character"] > POOR_COVERAGE:
            lines.append(f"the tokenizer covers {language} poorly: {sums['tokens_per_character']:g} tokens a character")
    return lines

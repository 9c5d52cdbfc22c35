"""higgs-inspect: look at a shard set and hear it.

    higgs-inspect stats SHARDS
    higgs-inspect show SHARDS KEY
    higgs-inspect decode SHARDS KEY -o x.wav
    higgs-inspect report SHARDS -o report.html

In: a finished shard set. Out: tables on the terminal, wav files, one HTML page. Never: a change to the set.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import soundfile
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from ..shards.durable import atomic_file
from ..shards.errors import UserError, run_command
from ..shards.reader import ShardSet
from .report import write_report
from .view import Checkpoints, Position, positions, segment_codes, segment_label, statistics

Output = Annotated[Path, arg(aliases=["-o"])]


@dataclass(frozen=True)
class Stats:
    """Counts, hours, speakers, lengths, label shares, rejects."""

    shards: Positional[Path]
    """Folder of the shard set."""
    json: bool = False
    """Print JSON."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> None:
        found = statistics(ShardSet(self.shards))
        if self.json:
            print(json.dumps(found, ensure_ascii=False, indent=1))
            return
        table = Table(show_header=False, box=None)
        for name, value in found.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) or "none" if isinstance(value, dict) else value
            table.add_row(name.replace("_", " "), f"{text:,.3f}" if isinstance(text, float) else str(text))
        Console().print(table)


@dataclass(frozen=True)
class Show:
    """Every position of one sample: id, text, label, modality."""

    shards: Positional[Path]
    """Folder of the shard set."""
    key: Positional[str]
    """Key of the sample, or its row number."""
    model_path: Path | None = None
    """Checkpoint whose tokenizer made the set; by default the one that the manifest remembers."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> None:
        shards = ShardSet(self.shards)
        sample = shards.read(shards.row_of(self.key))
        tokenizer = Checkpoints(shards, self.model_path, None).tokenizer
        console = Console() if sys.stdout.isatty() else Console(width=250)
        console.print(Text(f"{sample.key}  speaker {sample.meta['speaker']}"))
        for number, segment in enumerate(sample.meta["segments"]):
            console.print(Text(f"segment {segment_label(number, segment)}"))
        table = Table("position", "modality", "id or codes", "text", "label", box=None)
        for position in positions(sample, shards):
            table.add_row(*(Text(cell) for cell in _cells(position, tokenizer)))
        console.print(table)


def _cells(position: Position, tokenizer: object) -> tuple[str, ...]:
    decode = tokenizer.decode  # pyright: ignore[reportAttributeAccessIssue]
    shown = " ".join(f"{code:4d}" for code in position.codes) if position.codes else str(position.token)
    text = decode([position.token]) if position.token is not None else ""
    labels = []
    if position.text_label is not None:
        labels.append(f"{position.text_label} {decode([position.text_label])!r}")
    if position.audio_labels:
        labels.append(" ".join(f"{label:4d}" if label >= 0 else "   ·" for label in position.audio_labels))
    return str(position.number), position.modality, shown, repr(text) if text else "", "  ".join(labels)


@dataclass(frozen=True)
class Decode:
    """Turn a sample's codes back into audio."""

    shards: Positional[Path]
    """Folder of the shard set."""
    keys: Positional[tuple[str, ...]]
    """Keys of samples, or row numbers."""
    output: Output
    """A .wav file (one sample, its target unless --segment says otherwise), or a folder."""
    segment: Literal["auto", "ref", "target", "all"] = "auto"
    """Which segments; auto: the target for a .wav file, all for a folder."""
    audio_tokenizer_path: Path | None = None
    """Checkpoint of the codec; by default the one that the manifest remembers."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> None:
        shards = ShardSet(self.shards)
        codec = Checkpoints(shards, None, self.audio_tokenizer_path).codec
        to_file = self.output.suffix == ".wav"
        wanted = self.segment if self.segment != "auto" else "target" if to_file else "all"
        made = 0
        for key in self.keys:
            sample = shards.read(shards.row_of(key))
            for number, codes in enumerate(segment_codes(sample)):
                kind = "target" if sample.meta["segments"][number]["role"] == "assistant" else "ref"
                if wanted not in ("all", kind):
                    continue
                made += 1
                path = self.output if to_file else self.output / f"{sample.key}.{number}.{kind}.wav"
                if to_file and made > 1:
                    raise UserError("several segments do not fit one file", where=path, hint="Give a folder to -o.")
                path.parent.mkdir(parents=True, exist_ok=True)
                wave = codec.decode(codes)
                with atomic_file(path) as file:
                    soundfile.write(file, wave, codec.config.sample_rate_hz, format="WAV", subtype="PCM_16")
                print(f"{path}: {len(wave) / codec.config.sample_rate_hz:.2f} s")
        if not made:
            raise UserError(f"no {wanted} segment in these samples", where=self.shards, got=", ".join(self.keys))


@dataclass(frozen=True)
class Report:
    """One HTML page: summary, audio players, code grids."""

    shards: Positional[Path]
    """Folder of the shard set."""
    output: Output
    """The page to write."""
    max_samples: int = 200
    """Samples on the page; taken evenly over the set."""
    audio_tokenizer_path: Path | None = None
    """Checkpoint of the codec; by default the one that the manifest remembers."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> None:
        shards = ShardSet(self.shards)
        checkpoints = Checkpoints(shards, None, self.audio_tokenizer_path)
        shown = write_report(shards, checkpoints, self.output, self.max_samples)
        print(f"{self.output}: {shown} of {len(shards)} samples, {self.output.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    run_command(_main)


def _main() -> None:
    commands = {"stats": Stats, "show": Show, "decode": Decode, "report": Report}
    tyro.extras.subcommand_cli_from_dict(commands, prog="higgs-inspect", description=__doc__).run()

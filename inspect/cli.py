"""higgs-inspect: look into a shard set, listen to it, verify it.

    higgs-inspect stats SHARDS                      counts, lengths, languages, code usage
    higgs-inspect show SHARDS KEY                   one sample, position by position
    higgs-inspect decode SHARDS KEY -o x.wav        codes back into audio
    higgs-inspect verify SHARDS                     every checksum, header, index row and label rule
    higgs-inspect diff A B                          differences between two sets
    higgs-inspect report SHARDS -o report.html      all of it as one HTML page that needs no network
    higgs-inspect serve SHARDS                      the same page, served on this machine, for large sets
    higgs-inspect runs OUT …                        training runs as a table

Only `verify --repair-index` writes into a set, and only its index and manifest.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from higgs_tune.shards.errors import UserError, run_command
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

if TYPE_CHECKING:  # each command imports its own parts after its flags are checked
    from higgs_tune.inspect.packing import Packed
    from higgs_tune.shards.reader import ShardSet

Output = Annotated[Path, arg(aliases=["-o"])]
Shards = Annotated[Positional[str], arg(metavar="SHARDS", help="Folder or URL of the shard set.")]
Key = Annotated[str, arg(metavar="KEY")]
ModelPath = Annotated[
    Path | None, arg(help="Checkpoint with the tokenizer of the set; by default the one named in the manifest.")
]
CodecPath = Annotated[Path | None, arg(help="Checkpoint of the codec; by default the one named in the manifest.")]
Device = Annotated[str, arg(help="Where the codec runs: auto, cpu, cuda, cuda:1.")]
NoAudio = Annotated[bool, FlagCreatePairsOff, arg(help="A page without audio; needs no codec.")]
Runs = Annotated[tuple[Path, ...], UseAppendAction, arg(name="run")]
Debug = Annotated[bool, arg(help="Show tracebacks of user errors.")]


@dataclass(frozen=True)
class StatsCommand:
    """Statistics: hours, speakers, languages, lengths, pack fill, code usage, label shares, disk, rejects."""

    shards: Shards
    json: bool = False
    """Print JSON."""
    tokens_per_pack: int = 8192
    """Pack budget for which the fill is computed, in positions."""
    max_samples: int | None = None
    """Read at most this many samples, spread evenly, for languages and code usage; by default all."""
    debug: Debug = False

    def run(self) -> None:
        from higgs_tune.inspect.stats import notes, scan_samples, statistics
        from higgs_tune.shards.reader import ShardSet

        _at_least("tokens_per_pack", self.tokens_per_pack)
        _at_least("max_samples", self.max_samples)
        shards = ShardSet(self.shards)
        numbers = statistics(shards, scan_samples(shards, self.max_samples), self.tokens_per_pack)
        if self.json:
            print(json.dumps(numbers, indent=1))
            return
        from higgs_tune.inspect.console import print_statistics

        print_statistics(numbers, notes(shards))


def _at_least(name: str, value: int | None, least: int = 1) -> None:
    if value is not None and value < least:
        raise UserError(f"--{name} is out of range", expected=f"at least {least}", got=value)


@dataclass(frozen=True)
class ShowCommand:
    """One sample: its messages, and every position with id, text, modality, labels and codes."""

    shards: Shards
    key: Positional[Key]
    """Key of the sample, or its row number."""
    raw: bool = False
    """The stored values: metadata, tokens, labels, codes without delay."""
    prompt: bool = False
    """What is sent to speak the sample's text, token by token: the sequence up to its first generated frame."""
    as_trained: bool = False
    """The sample in its pack: pack number, neighbours, position ids, labels shifted as in the loss."""
    tokens_per_pack: int = 8192
    """For --as_trained: pack budget, in positions."""
    seed: int = 42
    """For --as_trained: seed of the run."""
    epoch: int = 0
    """For --as_trained: epoch, from 0."""
    run_dir: Annotated[Path | None, arg(name="run")] = None
    """For --as_trained: output folder of a training run; its data, budget and seed are used."""
    model_path: ModelPath = None
    debug: Debug = False

    def run(self) -> None:
        from higgs_tune.inspect import show
        from higgs_tune.inspect.checkpoints import Checkpoints
        from higgs_tune.shards.reader import ShardSet

        if self.raw + self.as_trained + self.prompt > 1:
            raise UserError("--raw, --prompt and --as_trained exclude each other")
        shards = ShardSet(self.shards)
        row = shards.row_of(self.key)
        sample = shards.read(row, mels=self.raw)
        console = show.open_console()
        if self.raw:
            show.print_raw(console, sample, shards, row)
            return
        checkpoints = Checkpoints(shards.provenance, self.model_path)
        checkpoints.model_folder()
        packed = self._packed(shards, row) if self.as_trained else None
        show.print_header(console, sample, shards, row)
        if self.prompt:
            show.print_prompt(console, sample, shards, checkpoints)
        elif packed:
            show.print_as_trained(console, sample, shards, checkpoints, packed)
        else:
            show.print_sequence(console, sample, shards, checkpoints)

    def _packed(self, shards: ShardSet, row: int) -> Packed:
        from higgs_tune.inspect.packing import Packing, find_pack, packing_of_run

        _at_least("tokens_per_pack", self.tokens_per_pack)
        _at_least("epoch", self.epoch, 0)
        packing = Packing([shards], self.tokens_per_pack, self.seed)
        return find_pack(shards, row, packing_of_run(self.run_dir, shards) if self.run_dir else packing, self.epoch)


@dataclass(frozen=True)
class DecodeCommand:
    """Decode codes into audio."""

    shards: Shards
    keys: Annotated[Positional[tuple[str, ...]], arg(metavar="KEY...")]
    """Keys of samples, or row numbers."""
    output: Output
    """A .wav file for one segment (the target, unless --segment names another), or a folder."""
    segment: Literal["auto", "ref", "target", "all"] = "auto"
    """Which segments; auto: the target for a .wav file, all for a folder."""
    delayed: bool = False
    """Take the codes from the delayed sequence that the model gets, instead of the stored ones."""
    audio_tokenizer_path: CodecPath = None
    device: Device = "auto"
    debug: Debug = False

    def run(self) -> None:
        from higgs_tune.inspect.checkpoints import Checkpoints
        from higgs_tune.inspect.decode import decode_to_files
        from higgs_tune.shards.reader import ShardSet

        shards = ShardSet(self.shards)
        checkpoints = Checkpoints(shards.provenance, None, self.audio_tokenizer_path, self.device)
        checkpoints.check_codec()
        auto = "target" if self.output.suffix == ".wav" else "all"
        kind = auto if self.segment == "auto" else self.segment
        decode_to_files(shards, checkpoints, self.keys, self.output, kind=kind, delayed=self.delayed)


@dataclass(frozen=True)
class VerifyCommand:
    """Check every checksum, header, index row and label rule of a local set. Exit code 0: sound, 1: findings."""

    shards: Annotated[Positional[Path], arg(metavar="SHARDS")]
    """Folder of the shard set."""
    jobs: int | None = None
    """Number of processes; by default one per core."""
    deep: bool = False
    """Also tokenize every sample's messages again and compare, and decompress Whisper features."""
    json: bool = False
    """Print JSON."""
    repair_index: bool = False
    """Rebuild the index from intact shards, then verify. Shards are never touched."""
    model_path: Path | None = None
    """Checkpoint to compare the provenance with; by default the one named in the manifest, if it is there."""
    audio_tokenizer_path: Path | None = None
    """Codec to compare the provenance with; by default the one named in the manifest, if it is there."""
    debug: Debug = False

    def run(self) -> None:
        from higgs_tune.inspect.console import print_verdict
        from higgs_tune.inspect.verify.repair import repair_index
        from higgs_tune.inspect.verify.verify import VerifyOptions, verify_set

        _at_least("jobs", self.jobs)
        jobs = self.jobs or os.cpu_count() or 1
        options = VerifyOptions(jobs, self.deep, self.model_path, self.audio_tokenizer_path)
        if self.repair_index:
            print(repair_index(self.shards, options), file=sys.stderr)
        verdict = verify_set(self.shards, options)
        if self.json:
            print(json.dumps(verdict.to_dict(), indent=1))
        else:
            print_verdict(verdict)
        sys.exit(1 if verdict.findings else 0)


@dataclass(frozen=True)
class DiffCommand:
    """Differences between two shard sets. Exit code 0: none, 1: some."""

    a: Annotated[Positional[str], arg(metavar="A")]
    """Folder or URL of the first set."""
    b: Annotated[Positional[str], arg(metavar="B")]
    """Folder or URL of the second set."""
    json: bool = False
    """Print JSON."""
    debug: Debug = False

    def run(self) -> None:
        from higgs_tune.inspect.console import print_diff
        from higgs_tune.inspect.diff import diff_sets
        from higgs_tune.shards.reader import ShardSet

        difference = diff_sets(ShardSet(self.a), ShardSet(self.b))
        if self.json:
            print(json.dumps(difference.to_dict(), indent=1))
        else:
            print_diff(difference)
        sys.exit(0 if difference.equal else 1)


@dataclass(frozen=True)
class ReportCommand:
    """One HTML page: summary, charts, samples with players, codes and labels; with --run also the training."""

    shards: Shards
    output: Output
    """The page to write."""
    run_dirs: Runs = ()
    """Output folder of a training run to show: curves, validation, generated samples; given again, runs to compare."""
    max_samples: int = 2000
    """Number of samples on the page, spread evenly over the set. Every clip is decoded: on a CPU, take fewer."""
    no_audio: NoAudio = False
    model_path: ModelPath = None
    audio_tokenizer_path: CodecPath = None
    device: Device = "auto"
    debug: Debug = False

    def run(self) -> None:
        from higgs_tune.inspect.checkpoints import Checkpoints
        from higgs_tune.inspect.web.report import write_report
        from higgs_tune.inspect.web.run import read_run
        from higgs_tune.shards.reader import ShardSet

        _at_least("max_samples", self.max_samples)
        shards = ShardSet(self.shards)
        checkpoints = Checkpoints(shards.provenance, self.model_path, self.audio_tokenizer_path, self.device)
        checkpoints.check(audio=not self.no_audio)
        runs = [read_run(folder) for folder in self.run_dirs]
        options = {"max_samples": self.max_samples, "runs": runs, "audio": not self.no_audio}
        shown = write_report(shards, checkpoints, self.output, **options)
        print(f"{self.output}: {shown} of {len(shards)} samples, {self.output.stat().st_size / 1e6:.1f} MB")


@dataclass(frozen=True)
class ServeCommand:
    """The report of a large set, loaded on demand from a web server on this machine only."""

    shards: Shards
    run_dirs: Runs = ()
    """Output folder of a training run to show; given again, runs to compare."""
    port: int = 8732
    """Port on 127.0.0.1; 0: any free port."""
    no_audio: NoAudio = False
    model_path: ModelPath = None
    audio_tokenizer_path: CodecPath = None
    device: Device = "auto"
    debug: Debug = False

    def run(self) -> None:
        from higgs_tune.inspect.checkpoints import Checkpoints
        from higgs_tune.inspect.web.run import read_run
        from higgs_tune.inspect.web.serve import HOST, open_server
        from higgs_tune.shards.reader import ShardSet

        shards = ShardSet(self.shards)
        checkpoints = Checkpoints(shards.provenance, self.model_path, self.audio_tokenizer_path, self.device)
        checkpoints.check(audio=not self.no_audio)
        runs = [read_run(folder) for folder in self.run_dirs]
        server = open_server(shards, checkpoints, runs, audio=not self.no_audio, port=self.port)
        print(f"http://{HOST}:{server.port}/  ({len(shards)} samples; Ctrl-C ends)", flush=True)
        server.serve_forever()


@dataclass(frozen=True)
class RunsCommand:
    """Training runs as a table: stage, state, steps, losses, best validation, speed, warnings."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="OUT...")]
    """Output folders of training runs."""
    json: bool = False
    """Print JSON."""
    debug: Debug = False

    def run(self) -> None:
        from higgs_tune.inspect.runs_table import print_runs, summarise_runs

        if not self.runs:
            raise UserError("no run is named", expected="output folders of training runs")
        rows = summarise_runs(self.runs)
        if self.json:
            print(json.dumps(rows, indent=1))
        else:
            print_runs(rows)


def main() -> None:
    run_command(_main)


def _main() -> None:
    commands = {
        "stats": StatsCommand,
        "show": ShowCommand,
        "decode": DecodeCommand,
        "verify": VerifyCommand,
        "diff": DiffCommand,
        "report": ReportCommand,
        "serve": ServeCommand,
        "runs": RunsCommand,
    }
    tyro.extras.subcommand_cli_from_dict(commands, prog="higgs-inspect", description=__doc__).run()

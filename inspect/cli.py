"""higgs-inspect: listen, look, verify.

    higgs-inspect stats SHARDS                      counts, lengths, languages, code usage
    higgs-inspect show SHARDS KEY                   one sample, position by position
    higgs-inspect decode SHARDS KEY -o x.wav        hear it
    higgs-inspect verify SHARDS                     every checksum, header and rule
    higgs-inspect diff A B                          what two sets do not share
    higgs-inspect report SHARDS -o report.html      one page with everything, that needs no network
    higgs-inspect serve SHARDS                      the same for a large set, on demand, on this machine only

In: a finished shard set, perhaps a training run. Out: tables on the terminal, wav files, one HTML page. Never: a change
to a shard; only `verify --repair-index` writes into a set, and only its index and manifest.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from higgs_tune.inspect.checkpoints import Checkpoints
from higgs_tune.inspect.console import print_diff, print_statistics, print_verdict
from higgs_tune.inspect.packing import Packed, Packing, find_pack, packing_of_run
from higgs_tune.inspect.stats import scan, statistics
from higgs_tune.shards.errors import UserError, run_command
from higgs_tune.shards.reader import ShardSet
from tyro.conf import Positional, arg

Output = Annotated[Path, arg(aliases=["-o"])]


@dataclass(frozen=True)
class Stats:
    """Counts, hours, speakers, languages, lengths, pack fill, code usage, label shares, disk, rejects."""

    shards: Positional[str]
    """Folder or URL of the shard set."""
    json: bool = False
    """Print JSON."""
    tokens_per_pack: int = 8192
    """Budget for which the fill of packs is worked out, in positions."""
    max_samples: int | None = None
    """Read at most this many samples for languages and code usage, taken evenly; by default all."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> None:
        _at_least("tokens_per_pack", self.tokens_per_pack)
        _at_least("max_samples", self.max_samples)
        shards = ShardSet(self.shards)
        found = statistics(shards, scan(shards, self.max_samples), self.tokens_per_pack)
        if self.json:
            print(json.dumps(found, indent=1))
            return
        print_statistics(found)


def _at_least(name: str, value: int | None, least: int = 1) -> None:
    if value is not None and value < least:
        raise UserError(f"--{name} is out of range", expected=f"at least {least}", got=value)


@dataclass(frozen=True)
class Show:
    """One sample: its messages, and every position with id, text, modality, labels and codes."""

    shards: Positional[str]
    """Folder or URL of the shard set."""
    key: Positional[str]
    """Key of the sample, or its row number."""
    raw: bool = False
    """What is stored, unchanged: metadata, tokens, labels, codes without delay."""
    as_trained: bool = False
    """After packing: pack number, neighbours, position ids, labels shifted as the loss takes them."""
    tokens_per_pack: int = 8192
    """For --as_trained: budget of a pack, in positions."""
    seed: int = 42
    """For --as_trained: seed of the run."""
    epoch: int = 0
    """For --as_trained: epoch, from 0."""
    run_dir: Annotated[Path | None, arg(name="run")] = None
    """For --as_trained: output folder of a training run, whose data, budget and seed are taken."""
    model_path: Path | None = None
    """Checkpoint whose tokenizer made the set; by default the one that the manifest remembers."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> None:
        from higgs_tune.inspect import show

        if self.raw and self.as_trained:
            raise UserError("--raw and --as_trained exclude each other")
        shards = ShardSet(self.shards)
        row = shards.row_of(self.key)
        sample = shards.read(row, mels=self.raw)
        console = show.open_console()
        if self.raw:
            show.print_raw(console, sample, shards, row)
            return
        checkpoints = Checkpoints(shards.provenance, self.model_path)
        packed = self._packed(shards, row) if self.as_trained else None
        show.print_header(console, sample, shards, row)
        if packed:
            show.print_as_trained(console, sample, shards, checkpoints, packed)
        else:
            show.print_sequence(console, sample, shards, checkpoints)

    def _packed(self, shards: ShardSet, row: int) -> Packed:
        _at_least("tokens_per_pack", self.tokens_per_pack)
        _at_least("epoch", self.epoch, 0)
        packing = Packing([shards], self.tokens_per_pack, self.seed)
        return find_pack(shards, row, packing_of_run(self.run_dir, shards) if self.run_dir else packing, self.epoch)


@dataclass(frozen=True)
class Decode:
    """Turn samples' codes back into audio."""

    shards: Positional[str]
    """Folder or URL of the shard set."""
    keys: Positional[tuple[str, ...]]
    """Keys of samples, or row numbers."""
    output: Output
    """A .wav file (one sample, its target unless --segment says otherwise), or a folder."""
    segment: Literal["auto", "ref", "target", "all"] = "auto"
    """Which segments; auto: the target for a .wav file or --compare, all for a folder."""
    delayed: bool = False
    """Take the codes out of the delayed sequence that the model sees, instead of the stored ones."""
    compare: Path | None = None
    """The source audio of one segment: print duration and log-spectral distance, and write a picture beside the wav."""
    audio_tokenizer_path: Path | None = None
    """Checkpoint of the codec; by default the one that the manifest remembers."""
    device: str = "auto"
    """Where the codec runs: auto, cpu, cuda, cuda:1."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> None:
        from higgs_tune.inspect.decode import decode_to_files

        shards = ShardSet(self.shards)
        checkpoints = Checkpoints(shards.provenance, None, self.audio_tokenizer_path, self.device)
        single = self.output.suffix == ".wav" or self.compare is not None
        kind = self.segment if self.segment != "auto" else "target" if single else "all"
        if self.compare is not None and not self.compare.is_file():
            raise UserError("no audio file here", where=self.compare)
        options = {"kind": kind, "delayed": self.delayed, "single": self.compare is not None}
        paths = decode_to_files(shards, checkpoints, self.keys, self.output, **options)
        if self.compare is not None:
            from higgs_tune.inspect.compare import compare_files

            compare_files(self.compare, paths[0])


@dataclass(frozen=True)
class Verify:
    """Every checksum, header, index row and rule of a local set. Exit code 0: sound, 1: something is wrong."""

    shards: Positional[Path]
    """Folder of the shard set."""
    jobs: int | None = None
    """Processes; by default one a core."""
    deep: bool = False
    """Also make every sample's tokens again from its messages, and decompress Whisper features."""
    json: bool = False
    """Print JSON."""
    repair_index: bool = False
    """Rebuild the index from intact shards, then verify. Shards are never touched."""
    model_path: Path | None = None
    """Checkpoint to compare the provenance with; by default the one that the manifest remembers, if it is there."""
    audio_tokenizer_path: Path | None = None
    """Codec to compare the provenance with; by default the one that the manifest remembers, if it is there."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> None:
        from higgs_tune.inspect.verify.repair import repair_index
        from higgs_tune.inspect.verify.verify import VerifyOptions, verify

        _at_least("jobs", self.jobs)
        jobs = self.jobs or os.cpu_count() or 1
        options = VerifyOptions(jobs, self.deep, self.model_path, self.audio_tokenizer_path)
        if self.repair_index:
            print(repair_index(self.shards, options), file=sys.stderr)
        verdict = verify(self.shards, options)
        if self.json:
            print(json.dumps(verdict.to_dict(), indent=1))
        else:
            print_verdict(verdict)
        sys.exit(1 if verdict.findings else 0)


@dataclass(frozen=True)
class Diff:
    """What two shard sets do not share. Exit code 0: nothing, 1: something."""

    a: Positional[str]
    """Folder or URL of the first set."""
    b: Positional[str]
    """Folder or URL of the second set."""
    json: bool = False
    """Print JSON."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> None:
        from higgs_tune.inspect.diff import diff

        found = diff(ShardSet(self.a), ShardSet(self.b))
        if self.json:
            print(json.dumps(found.to_dict(), indent=1))
        else:
            print_diff(found)
        sys.exit(0 if found.equal else 1)


@dataclass(frozen=True)
class Report:
    """One HTML page: summary, charts, samples with players, codes, labels; with --run also the training."""

    shards: Positional[str]
    """Folder or URL of the shard set."""
    output: Output
    """The page to write."""
    run_dir: Annotated[Path | None, arg(name="run")] = None
    """Output folder of a training run to show: curves, validation, generated samples."""
    max_samples: int = 2000
    """Samples on the page, taken evenly over the set; each clip is decoded, so on a CPU fewer are faster."""
    no_audio: bool = False
    """Leave the audio out; needs no codec."""
    model_path: Path | None = None
    """Checkpoint whose tokenizer made the set; by default the one that the manifest remembers."""
    audio_tokenizer_path: Path | None = None
    """Checkpoint of the codec; by default the one that the manifest remembers."""
    device: str = "auto"
    """Where the codec runs: auto, cpu, cuda, cuda:1."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> None:
        from higgs_tune.inspect.web.report import write_report
        from higgs_tune.inspect.web.run import read_run

        _at_least("max_samples", self.max_samples)
        shards = ShardSet(self.shards)
        checkpoints = Checkpoints(shards.provenance, self.model_path, self.audio_tokenizer_path, self.device)
        run = read_run(self.run_dir) if self.run_dir else None
        options = {"max_samples": self.max_samples, "run": run, "audio": not self.no_audio}
        shown = write_report(shards, checkpoints, self.output, **options)
        print(f"{self.output}: {shown} of {len(shards)} samples, {self.output.stat().st_size / 1e6:.1f} MB")


@dataclass(frozen=True)
class Serve:
    """The page of the report for a large set: a web server on this machine only, everything loaded on demand."""

    shards: Positional[str]
    """Folder or URL of the shard set."""
    run_dir: Annotated[Path | None, arg(name="run")] = None
    """Output folder of a training run to show."""
    port: int = 8732
    """Port on 127.0.0.1; 0: any free one."""
    no_audio: bool = False
    """Leave the audio out; needs no codec."""
    model_path: Path | None = None
    """Checkpoint whose tokenizer made the set; by default the one that the manifest remembers."""
    audio_tokenizer_path: Path | None = None
    """Checkpoint of the codec; by default the one that the manifest remembers."""
    device: str = "auto"
    """Where the codec runs: auto, cpu, cuda, cuda:1."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> None:
        from higgs_tune.inspect.web.run import read_run
        from higgs_tune.inspect.web.serve import HOST, open_server

        shards = ShardSet(self.shards)
        checkpoints = Checkpoints(shards.provenance, self.model_path, self.audio_tokenizer_path, self.device)
        checkpoints.model_folder()
        if not self.no_audio:
            checkpoints.codec_folder()
        run = read_run(self.run_dir) if self.run_dir else None
        server = open_server(shards, checkpoints, run, audio=not self.no_audio, port=self.port)
        print(f"http://{HOST}:{server.port}/  ({len(shards)} samples; Ctrl-C ends)", flush=True)
        server.serve_forever()


def main() -> None:
    run_command(_main)


def _main() -> None:
    commands = {
        "stats": Stats,
        "show": Show,
        "decode": Decode,
        "verify": Verify,
        "diff": Diff,
        "report": Report,
        "serve": Serve,
    }
    tyro.extras.subcommand_cli_from_dict(commands, prog="higgs-inspect", description=__doc__).run()

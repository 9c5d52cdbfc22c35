"""higgs-inspect verify: everything that can be wrong with a shard set, found and named.

In: a local folder. Out: findings (none for a sound set), and notes on what could not be checked.

1. manifest    its form, and the files it names: there, of the right size and SHA-256, nothing beside them
2. provenance  the checkpoint and the codec that the set was made for, where they are at hand
3. shards      in `jobs` processes: every header, checksum and sample, the rules of codes and labels (verify_shard)
4. index       every field of every row against what the shards ask for; totals, speakers, rejects

Never: a change to the set; a check left out without a note.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from higgs_tune.inspect.checkpoints import Checkpoints
from higgs_tune.inspect.verify.diagnose import Finding
from higgs_tune.inspect.verify.index import Index, against_shards, check_rejects, check_totals, read_index
from higgs_tune.inspect.verify.manifest import Manifest, read_manifest
from higgs_tune.inspect.verify.sample_checks import Rules
from higgs_tune.inspect.verify.shard import Checked, Task, verify_shard
from higgs_tune.preprocess.progress import ProgressBar
from higgs_tune.shards.durable import TEMP_PREFIX
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.writer import WORK

COMPARED = ("special_ids", "codebook_size", "tokenizer_sha256", "text_vocabulary")
HEADER_TOKEN = "<|start_header_id|>"  # opens every message of the Llama 3 template


@dataclass(frozen=True)
class VerifyOptions:
    """jobs: processes. deep: make tokens again from the messages, decompress features. The paths: as in Checkpoints."""

    jobs: int = 1
    deep: bool = False
    model_path: Path | None = None
    audio_tokenizer_path: Path | None = None


@dataclass
class Verdict:
    """What was found. manifest, index, checked: for the repair of an index."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    manifest: Manifest | None = None
    index: Index | None = None
    checked: list[Checked] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Intact samples."""
        return sum(len(one.rows) for one in self.checked)

    @property
    def kinds(self) -> dict[str, int]:
        """Findings by kind."""
        return dict(Counter(finding.kind for finding in self.findings))

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": not self.findings,
            "samples": self.samples,
            "shards": len(self.checked),
            "seconds": round(self.seconds, 3),
            "kinds": self.kinds,
            "findings": [finding.to_dict() for finding in self.findings],
            "notes": self.notes,
        }


def verify(folder: Path, options: VerifyOptions) -> Verdict:
    """Check a set.

    Raises:
        UserError: there is no shard set in the folder, or a checkpoint that was asked for is not there.
    """
    began, verdict = time.monotonic(), Verdict()
    verdict.manifest, problems = read_manifest(folder)
    verdict.findings += problems
    if verdict.manifest is None:
        verdict.notes.append("nothing else can be checked without a sound manifest")
    else:
        _verify_set(folder, verdict.manifest, options, verdict)
    verdict.seconds = time.monotonic() - began
    return verdict


def _verify_set(folder: Path, manifest: Manifest, options: VerifyOptions, verdict: Verdict) -> None:
    verdict.findings += unlisted_files(folder, manifest)
    verdict.notes += leftovers(folder)
    tokenizer = check_provenance(manifest, options, verdict)
    index = verdict.index = read_index(folder, manifest)
    verdict.findings += index.findings
    verdict.checked = run_tasks(make_tasks(folder, manifest, index, tokenizer, deep=options.deep), options.jobs)
    for checked in verdict.checked:
        verdict.findings += checked.findings
    verdict.findings += against_shards(index, verdict.checked, manifest)
    verdict.findings += check_totals(index, manifest)
    verdict.findings += check_rejects(folder, manifest)
    if unknown := sum(checked.unknown_turns for checked in verdict.checked):
        verdict.notes.append(
            f"{unknown} samples have no known template: their labels were not compared with their turns"
        )
    if manifest.split is None:
        verdict.notes.append("which samples are held out was not checked: the provenance does not tell the rule")


def unlisted_files(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """Shard files that the manifest does not name."""
    listed = {entry["name"] for entry in manifest.files}
    for path in sorted([*folder.glob("codes-*.tar"), *folder.glob("mel-*.tar")]):
        if path.name not in listed:
            yield Finding("unlisted_file", "the manifest does not name it", path.name)


def leftovers(folder: Path) -> list[str]:
    """A note on what a killed writer left."""
    found = sorted(path.name for path in folder.iterdir() if path.name.startswith(TEMP_PREFIX) or path.name == WORK)
    return [f"left by an interrupted run, and harmless: {', '.join(found)}"] if found else []


def check_provenance(manifest: Manifest, options: VerifyOptions, verdict: Verdict) -> Path | None:
    """Compare the provenance with the checkpoints that are named, or remembered and still there.

    Returns:
        The folder of the tokenizer that made the set; None where it is not at hand.

    Raises:
        UserError: a checkpoint that was named, or that --deep needs, is not there.
    """
    checkpoints = Checkpoints(manifest.provenance, options.model_path, options.audio_tokenizer_path)
    tokenizer = None
    if model := _find(checkpoints.model_folder, options.model_path is not None or options.deep, verdict):
        from higgs_tune.preprocess.checkpoints.checkpoint import describe_checkpoint  # imports transformers

        have = describe_checkpoint(model)
        wrong = _differing(manifest.model, have, COMPARED, "other_checkpoint", model)
        verdict.findings += wrong
        tokenizer = model if not any("tokenizer" in finding.detail for finding in wrong) else None
    if codec := _find(checkpoints.codec_folder, options.audio_tokenizer_path is not None, verdict):
        from higgs_tune.preprocess.codec.checkpoint import weights_sha256  # imports torch

        made_for = manifest.provenance.get("codec", {})
        have = {"weights_sha256": weights_sha256(codec)}
        verdict.findings += _differing(made_for, have, tuple(have), "other_codec", codec)
    return tokenizer


def _find(folder_of: Any, needed: bool, verdict: Verdict) -> Path | None:
    try:
        return folder_of()
    except UserError as error:
        if needed:
            raise
        verdict.notes.append(f"provenance not checked: {error}")
        return None


def _differing(
    made_for: dict[str, Any], have: dict[str, Any], names: tuple[str, ...], kind: str, where: Path
) -> list[Finding]:
    return [
        Finding(
            kind, f"{name}: the set was made with {made_for.get(name)}, {where} has {have.get(name)}", "manifest.json"
        )
        for name in names
        if made_for.get(name) != have.get(name)
    ]


def make_tasks(folder: Path, manifest: Manifest, index: Index, tokenizer: Path | None, *, deep: bool) -> list[Task]:
    """One task a shard."""
    model = manifest.model
    rules = Rules(
        ids=manifest.ids,
        codebook_size=model.get("codebook_size") or manifest.ids.stream_bos,
        vocabulary=model.get("text_vocabulary") or 0,
        header=_header_token(tokenizer),
    )
    others = {entry["sha256"]: entry["name"] for entry in manifest.files}
    mel_entries = manifest.mel_shards or [None] * len(manifest.shards)
    return [
        Task(
            folder=folder,
            number=number,
            entry=entry,
            mel_entry=mel_entry,
            rows=index.rows[index.rows["shard"] == number] if index.rows is not None and index.trusted else None,
            rules=rules,
            features=manifest.features,
            others=others,
            split=manifest.split,
            deep=deep,
            tokenizer=tokenizer,
        )
        for number, (entry, mel_entry) in enumerate(zip(manifest.shards, mel_entries, strict=True))
    ]


def _header_token(tokenizer: Path | None) -> int | None:
    if tokenizer is None:
        return None
    added = json.loads((tokenizer / "tokenizer.json").read_bytes())["added_tokens"]
    return next((token["id"] for token in added if token["content"] == HEADER_TOKEN), None)


def run_tasks(tasks: list[Task], jobs: int) -> list[Checked]:
    """Run the tasks in `jobs` processes; results in their order."""
    with ProgressBar() as progress:
        progress.start("verify", len(tasks), "shards")
        if jobs == 1 or len(tasks) < 2:
            done = []
            for task in tasks:
                done.append(verify_shard(task))
                progress.advance(1)
            return done
        with ProcessPoolExecutor(min(jobs, len(tasks)), get_context("spawn")) as pool:
            futures = [pool.submit(verify_shard, task) for task in tasks]
            for _ in as_completed(futures):
                progress.advance(1)
            return [future.result() for future in futures]

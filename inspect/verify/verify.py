"""Verification of a whole shard set: `higgs-inspect verify`.

In: a local folder. Out: a `Verdict`: findings (none for a sound set), and a note for each check that was left out.

1. manifest    its form, and the files it names: present, of the right size and SHA-256, no others beside them
2. provenance  the checkpoint and the codec that the set was made for, where they are at hand
3. shards      in `jobs` processes: every header, checksum and sample, the rules of codes and labels (shard.py)
4. index       every field of every row against the row computed from the shard; totals, speakers, rejects

Guarantees: a changed byte in any file but the manifest gives a finding (tests/test_verify.py).
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
from higgs_tune.inspect.verify.index import IndexFile, check_rejects, check_totals, compare_with_shards, read_index
from higgs_tune.inspect.verify.manifest import Manifest, read_manifest
from higgs_tune.inspect.verify.sample_checks import SampleRules
from higgs_tune.inspect.verify.shard import ShardResult, ShardTask, verify_shard
from higgs_tune.preprocess.checkpoints.checkpoint import describe_checkpoint
from higgs_tune.preprocess.codec.weights import weights_sha256
from higgs_tune.preprocess.progress import ProgressBar
from higgs_tune.shards.durable import TEMP_PREFIX
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.manifest import MANIFEST
from higgs_tune.shards.writer import WORK

COMPARED = ("special_ids", "codebook_size", "tokenizer_sha256", "text_vocabulary")
HEADER_TOKEN = "<|start_header_id|>"  # opens every message of the Llama 3 template


@dataclass(frozen=True)
class VerifyOptions:
    """jobs: processes. deep: tokenize the messages again, decompress features. The paths: as in Checkpoints."""

    jobs: int = 1
    deep: bool = False
    model_path: Path | None = None
    audio_tokenizer_path: Path | None = None


@dataclass
class Verdict:
    """The result of a verification. manifest, index, results: for the repair of an index."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    manifest: Manifest | None = None
    index: IndexFile | None = None
    results: list[ShardResult] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of intact samples."""
        return sum(len(result.rows) for result in self.results)

    @property
    def kinds(self) -> dict[str, int]:
        """Number of findings by kind."""
        return dict(Counter(finding.kind for finding in self.findings))

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": not self.findings,
            "samples": self.samples,
            "shards": len(self.results),
            "seconds": round(self.seconds, 3),
            "kinds": self.kinds,
            "findings": [finding.to_dict() for finding in self.findings],
            "notes": self.notes,
        }


def verify_set(folder: Path, options: VerifyOptions) -> Verdict:
    """Verify a shard set.

    Raises:
        UserError: there is no shard set in the folder, or a checkpoint that the user named is missing.
    """
    began, verdict = time.monotonic(), Verdict()
    verdict.manifest, problems = read_manifest(folder)
    verdict.findings += problems
    if verdict.manifest is None:
        verdict.notes.append("nothing else can be checked without a sound manifest")
    else:
        _verify_contents(folder, verdict.manifest, options, verdict)
    verdict.seconds = time.monotonic() - began
    return verdict


def _verify_contents(folder: Path, manifest: Manifest, options: VerifyOptions, verdict: Verdict) -> None:
    verdict.findings += unlisted_files(folder, manifest)
    verdict.notes += leftovers(folder)
    tokenizer = check_provenance(manifest, options, verdict)
    index = verdict.index = read_index(folder, manifest)
    verdict.findings += index.findings
    verdict.results = run_tasks(make_tasks(folder, manifest, index, tokenizer, deep=options.deep), options.jobs)
    for result in verdict.results:
        verdict.findings += result.findings
    verdict.findings += compare_with_shards(index, verdict.results, manifest)
    verdict.findings += check_totals(index, manifest)
    verdict.findings += check_rejects(folder, manifest)
    if unknown := sum(result.unknown_turns for result in verdict.results):
        verdict.notes.append(
            f"{unknown} samples have no known template: their labels were not compared with their turns"
        )
    if manifest.split is None:
        verdict.notes.append("the validation split was not checked: its rule is not in the provenance")


def unlisted_files(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """Shard files that the manifest does not name."""
    listed = {entry["name"] for entry in manifest.files}
    for path in sorted([*folder.glob("codes-*.tar"), *folder.glob("mel-*.tar")]):
        if path.name not in listed:
            yield Finding("unlisted_file", "the manifest does not name it", path.name)


def leftovers(folder: Path) -> list[str]:
    """A note on the files of a killed writer."""
    names = sorted(path.name for path in folder.iterdir() if path.name.startswith(TEMP_PREFIX) or path.name == WORK)
    return [f"left by an interrupted run, and harmless: {', '.join(names)}"] if names else []


def check_provenance(manifest: Manifest, options: VerifyOptions, verdict: Verdict) -> Path | None:
    """Compare the provenance with the checkpoints: those that the user named, else those of the manifest.

    Returns:
        The folder of the tokenizer of the set; None where it is not at hand.

    Raises:
        UserError: a checkpoint that the user named, or that --deep needs, is missing.
    """
    checkpoints = Checkpoints(manifest.provenance, options.model_path, options.audio_tokenizer_path)
    tokenizer = None
    if model := _folder_or_note(checkpoints.model_folder, options.model_path is not None or options.deep, verdict):
        actual = describe_checkpoint(model)
        differences = _differences(manifest.model, actual, COMPARED, "other_checkpoint", model)
        verdict.findings += differences
        tokenizer = model if not any("tokenizer" in finding.detail for finding in differences) else None
    if codec := _folder_or_note(checkpoints.codec_folder, options.audio_tokenizer_path is not None, verdict):
        made_for = manifest.provenance.get("codec", {})
        actual = {"weights_sha256": weights_sha256(codec)}
        verdict.findings += _differences(made_for, actual, tuple(actual), "other_codec", codec)
    return tokenizer


def _folder_or_note(folder_of: Any, needed: bool, verdict: Verdict) -> Path | None:
    try:
        return folder_of()
    except UserError as error:
        if needed:
            raise
        verdict.notes.append(f"provenance not checked: {error}")
        return None


def _differences(
    made_for: dict[str, Any], actual: dict[str, Any], names: tuple[str, ...], kind: str, where: Path
) -> list[Finding]:
    return [
        Finding(kind, f"{name}: the set was made with {made_for.get(name)}, {where} has {actual.get(name)}", MANIFEST)
        for name in names
        if made_for.get(name) != actual.get(name)
    ]


def make_tasks(
    folder: Path, manifest: Manifest, index: IndexFile, tokenizer: Path | None, *, deep: bool
) -> list[ShardTask]:
    """One task per shard."""
    model = manifest.model
    rules = SampleRules(
        ids=manifest.ids,
        codebook_size=model.get("codebook_size") or manifest.ids.stream_bos,
        vocabulary=model.get("text_vocabulary") or 0,
        header=_header_token(tokenizer),
    )
    others = {entry["sha256"]: entry["name"] for entry in manifest.files}
    mel_entries = manifest.mel_shards or [None] * len(manifest.shards)
    return [
        ShardTask(
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


def run_tasks(tasks: list[ShardTask], jobs: int) -> list[ShardResult]:
    """Run the tasks in `jobs` processes; results in the order of the tasks."""
    with ProgressBar() as progress:
        progress.start("verify", len(tasks), "shards")
        if jobs == 1 or len(tasks) < 2:
            results = []
            for task in tasks:
                results.append(verify_shard(task))
                progress.advance(1)
            return results
        with ProcessPoolExecutor(min(jobs, len(tasks)), get_context("spawn")) as pool:
            futures = [pool.submit(verify_shard, task) for task in tasks]
            for _ in as_completed(futures):
                progress.advance(1)
            return [future.result() for future in futures]

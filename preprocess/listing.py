"""Step 1: checks every entry, numbers the distinct clips, writes the lists of tasks.

In: the data. Out, in the work folder: `samples-*.jsonl`, one file a shard, whose lines hold `key`, `position`, `entry`
and the numbers of its `clips`, or `key`, `position` and `reject`; `clips-*.jsonl`, one file a unit; and their counts.
Links, relative and absolute paths to one file are one clip. Only the audio headers that the choice of references needs
are read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

from higgs_tune.preprocess.audio.clip import Clip
from higgs_tune.preprocess.config import Job
from higgs_tune.preprocess.input.arrow import arrow_cell
from higgs_tune.preprocess.input.audio_paths import exists
from higgs_tune.preprocess.input.chatml import ChatSample, audio_targets, key_of, parse_entry, storable
from higgs_tune.preprocess.input.conversations import as_chatml
from higgs_tune.preprocess.input.entries import read_entries
from higgs_tune.preprocess.input.manifest import DISTINCT
from higgs_tune.preprocess.reject import Reject
from higgs_tune.preprocess.workdir import WorkFolder, batches
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.split import named_side

PAIR = 2


class ClipNumbers:
    """Numbers the distinct clips in order of first use; writes them unit by unit."""

    def __init__(self, work: WorkFolder, clips_per_unit: int) -> None:
        self.work, self.clips_per_unit = work, clips_per_unit
        self.units = self.missing = 0
        self.whisper = bytearray()
        self._numbers: dict[bytes, int] = {}
        self._waiting: list[Clip] = []

    def number(self, clip: Clip, whisper: bool) -> int:
        """The clip's number; `whisper`: whether this use of the clip needs Whisper features."""
        name = _digest(repr(replace(clip, source="", path=_real_path(clip.path))))
        number = self._numbers.setdefault(name, len(self._numbers))
        if number == len(self.whisper):
            self.whisper.append(0)
            self.missing += bool(clip.path) and not arrow_cell(clip.path) and not exists(clip.path)
            self._waiting.append(clip)
            if len(self._waiting) == self.clips_per_unit:
                self.flush()
        self.whisper[number] |= whisper
        return number

    def flush(self) -> None:
        """Write the clips that are not in a unit yet as the last unit."""
        if self._waiting:
            self.work.write_lines("clips", self.units, [asdict(clip) for clip in self._waiting])
            self.units += 1
            self._waiting = []


class Seen:
    """What the accepted samples have between them.

    Attributes:
        keys: hashes of their keys.
        audio_targets: number of audios that are trained on.
        speakers: their names. sides: of the validation split, as they name them.
    """

    def __init__(self) -> None:
        self.keys, self.speakers, self.sides = set[bytes](), set[str](), set[str | None]()
        self.audio_targets = 0

    def add(self, key: str, sample: ChatSample) -> None:
        """Take in a sample.

        Raises:
            Reject: another has its key.
        """
        name = _digest(key)
        if name in self.keys:
            raise Reject("duplicate_id", f"another sample is named {key}")
        self.keys.add(name)
        self.audio_targets += audio_targets(sample)
        if sample.chat.speaker:
            self.speakers.add(sample.chat.speaker)
        self.sides.add(named_side(sample.chat.misc))

    def require(self, job: Job) -> None:
        """Refuse data that cannot be used as a whole.

        Raises:
            UserError: nothing to speak, too few speakers for `--val_by speaker`, or no sides for `--val_by split`.
        """
        if not self.audio_targets and not job.config.allow_text_only:
            hint = "An audio is a target in an assistant message. --allow_text_only builds a set of text alone."
            got = f"{len(self.keys)} samples without audio to train on"
            raise UserError("no sample has an audio target", where=job.data, got=got, hint=hint)
        if job.config.val_by == "speaker" and job.config.val_fraction and len(self.speakers) < PAIR:
            hint = "Name the speaker of each sample, or hold out single samples: --val_by sample."
            raise UserError("--val_by speaker cannot hold out a speaker", where=job.data,
                            expected="2 speakers or more", got=len(self.speakers), hint=hint)  # fmt: skip
        if job.config.val_by == "split" and self.sides == {None}:
            raise UserError("--val_by split: no sample names its side", where=job.data,
                            expected="a column split of train and val")  # fmt: skip


def list_work(job: Job, work: WorkFolder, go_on: Callable[[], None]) -> dict[str, int]:
    """Check every entry, number the clips, write the tasks.

    Args:
        go_on: called between shards; raises to stop.

    Returns:
        Numbers of samples, shards, clips and units; and `unsettled`, the number of rejected entries and missing files:
        unless it is 0, a restart lists again.

    Raises:
        UserError: the data cannot be read, holds no samples, no audio target, or too few speakers for `--val_by`.
    """
    numbers, seen = ClipNumbers(work, job.config.clips_per_unit), Seen()
    samples = shards = rejects = 0
    work.forget_listing()
    for batch in batches(enumerate(read_entries(job)), job.config.samples_per_shard):
        go_on()
        lines = [_line(entry, at, job, seen, numbers) for at, entry in batch]
        work.write_lines("samples", shards, lines)
        rejects += sum("reject" in line for line in lines)
        samples, shards = samples + len(batch), shards + 1
    if not samples:
        raise UserError("the data holds no samples", where=job.data)
    if samples > rejects:
        seen.require(job)
    numbers.flush()
    listing = {"samples": samples, "shards": shards, "clips": len(numbers.whisper), "units": numbers.units}
    listing["unsettled"] = rejects + numbers.missing
    work.commit_listing(listing, bytes(numbers.whisper))
    return listing


def _line(entry: Any, position: int, job: Job, seen: Seen, numbers: ClipNumbers) -> dict[str, Any]:
    key = key_of(entry, position)
    try:
        if isinstance(entry, dict) and DISTINCT not in entry:
            entry = as_chatml(entry)
        sample = parse_entry(entry, position, job.audio_paths, job.texts)
        seen.add(key, sample)
        used = zip(sample.clips, sample.roles, strict=True)
        clips = [numbers.number(clip, job.wants_whisper(role)) for clip, role in used]
        return {"key": key, "position": position, "entry": storable(entry, sample), "clips": clips}
    except Reject as reject:
        return {"key": key, "position": position, "reject": [reject.reason, reject.detail, reject.file]}


@lru_cache(maxsize=1 << 16)
def _real_path(path: str) -> str:
    """The path with its links resolved; unchanged where the file does not exist or the name has a NUL byte."""
    try:
        return os.path.realpath(path, strict=True) if path else ""
    except (OSError, ValueError):
        return path


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

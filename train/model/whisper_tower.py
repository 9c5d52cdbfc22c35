"""The Whisper tower that `--whisper_path` attaches to a base without one, and its reference beside the adapter.

In: a Whisper checkpoint, or an adapter that was trained with one. Out: a `WhisperTower`. The adapter holds the
projector, and the tower where it trained; a frozen tower is named in `whisper_tower.json` as the base is in
adapter_config.json, with a checksum. Guarantees (test_whisper_path.py): another Whisper than the adapter's is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from higgs_tune.preprocess.audio.whisper import tower_sha256
from higgs_tune.preprocess.checkpoints.hub import is_repository_name, local_checkpoint
from higgs_tune.preprocess.checkpoints.weights import read_header
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from higgs_tune.train.model.adapter import ADAPTER_FILE
from higgs_tune.train.model.base import base_reference, recorded_places

TOWER_FILE = "whisper_tower.json"
FLAG = "--whisper_path"


@dataclass(frozen=True)
class WhisperTower:
    """A Whisper checkpoint whose encoder is the model's audio tower.

    Attributes:
        folder: of the checkpoint. sha256: of the encoder's tensors.
    """

    folder: Path
    sha256: str

    def reference(self, adapter: Path) -> bytes:
        """The content of whisper_tower.json.

        Args:
            adapter: the folder that it is written to.
        """
        name, revision = base_reference(self.folder, adapter)
        return durable.to_json({"whisper_path": name, "revision": revision, "sha256": self.sha256}, indent=1) + b"\n"


def find_tower(given: Path | None, adapter: Path | None) -> WhisperTower | None:
    """The tower to attach; None where the model has none, or one of its own.

    Args:
        given: the checkpoint that the user names, whatever the adapter's file says.
        adapter: folder of the adapter that is continued, merged or resumed.

    Raises:
        UserError: the checkpoint is not there, or is not the one that the adapter was trained with.
    """
    file = adapter / TOWER_FILE if adapter else None
    if file is None or not file.is_file():
        return _tower(local_checkpoint(given)) if given else None
    record = durable.from_json(file.read_bytes(), "the adapter's reference to its Whisper tower", file)
    if not isinstance(record, dict) or not all(isinstance(record.get(n), str) for n in ("whisper_path", "sha256")):
        raise UserError("the adapter's reference to its Whisper tower is damaged", where=file,
                        expected="whisper_path and sha256")  # fmt: skip
    tower = _tower(local_checkpoint(given) if given else _recorded(file, record))
    if tower.sha256 != record["sha256"]:
        raise UserError("the adapter was trained with another Whisper tower", where=tower.folder,
                        expected=f"sha256 {record['sha256'][:16]}", got=tower.sha256[:16],
                        hint=f"{FLAG} PATH names the right one.")  # fmt: skip
    return tower


def _tower(folder: Path) -> WhisperTower:
    return WhisperTower(folder, tower_sha256(folder))


def _recorded(file: Path, record: dict[str, str]) -> Path:
    """The folder that an adapter's reference names."""
    named, revision = record["whisper_path"], record.get("revision")
    for place in (file.parent / named, Path(named), *recorded_places(file.parent, "whisper_path")):
        if (place / "config.json").is_file():
            return place.resolve()
    if is_repository_name(named):
        return local_checkpoint(Path(f"{named}@{revision}" if revision else named))
    raise UserError("the adapter's Whisper tower is not there", where=file, got=named,
                    hint=f"{FLAG} PATH names it.")  # fmt: skip


def holds_tower(adapter: Path) -> bool:
    """Whether an adapter holds weights of the tower, so that it is no longer the one of its checkpoint."""
    file = adapter / ADAPTER_FILE
    return file.is_file() and any("audio_tower." in name for name in read_header(file))

"""Saving in the background: training goes on while a snapshot is written; a failed save is loud and tried twice.

In: snapshots, on rank 0. Out: `checkpoint-STEP` and `best-STEP` folders. Never: two saves at a time, a failure that
nobody hears of.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..shards.errors import UserError
from .checkpoint import Snapshot, checkpoint_path, prune, remove, write_folder

RETRY_AFTER_S = 1.0


class Saver:
    """Writes snapshots one after the other.

    Args:
        folder: the run's output folder.
        keep: checkpoints that stay; None: all.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self.folder, self.keep = folder, keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pending: list[Future[None]] = []

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Save a checkpoint. Waits only if the one before it is still being written."""
        self._join()
        self._pending.append(self._writer.submit(self._write, checkpoint_path(self.folder, snapshot.step), snapshot))

    def best(self, snapshot: Snapshot) -> None:
        """Save the best adapter so far, and remove the best before it."""
        self._join()
        self._pending.append(self._writer.submit(self._write, self.folder / f"best-{snapshot.step}", snapshot))

    def failures(self) -> list[str]:
        """What has gone wrong since the last call."""
        done = [save for save in self._pending if save.done()]
        self._pending = [save for save in self._pending if not save.done()]
        return [str(error) for save in done if (error := save.exception())]

    def finish(self) -> list[str]:
        """Wait for every save; returns what went wrong."""
        self._join()
        return self.failures()

    def _join(self) -> None:
        for save in self._pending:
            save.exception()

    def _write(self, path: Path, snapshot: Snapshot) -> None:
        try:
            write_folder(path, snapshot)
        except UserError as error:
            print(f"warning: {error}; trying once more", file=sys.stderr, flush=True)
            time.sleep(RETRY_AFTER_S)
            write_folder(path, snapshot)
        if path.name.startswith("best-"):
            for older in self.folder.glob("best-*"):
                if older != path:
                    remove(older)
        else:
            prune(self.folder, self.keep)

"""Restart-safe rendezvous: each attempt uses its own key prefix.

torchrun restarts on the same store (https://github.com/pytorch/pytorch/issues/135712; torch 2.11 to 2.13), where the
addresses of the dead ranks still stand: a fast rank reads such an address and fails to connect. So the ranks first
agree on a prefix that no earlier attempt has used, and keep all their keys under it (test_faults.py).
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

_POLL_S = 0.02


def restart_safe_store(rank: int, size: int, timeout: timedelta) -> Store:
    """The store of this attempt, from torchrun's environment. All ranks call this together.

    Raises:
        TimeoutError: another rank did not arrive.
    """
    shared, rank, size = next(rendezvous("env://", rank, size, timeout=timeout))
    store = PrefixStore("higgs_tune", shared)
    deadline = time.monotonic() + timeout.total_seconds()
    prefix = _announce_prefix(store, size, deadline) if rank == 0 else _receive_prefix(store, rank, deadline)
    return PrefixStore(prefix, store)


def _announce_prefix(store: Store, size: int, deadline: float) -> str:
    """Rank 0: choose a prefix and announce it to the ranks that have registered, until all have confirmed it."""
    prefix, announced = uuid.uuid4().hex, {}
    while not all(store.check([f"{prefix}/confirmed/{rank}"]) for rank in range(1, size)):
        keys = {rank: f"registered/{rank}" for rank in range(1, size)}
        registered = {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
        if registered != announced:
            store.set("announced", json.dumps({"prefix": prefix, "processes": sorted(registered.values())}))
            announced = registered
        _sleep(deadline)
    return prefix


def _receive_prefix(store: Store, rank: int, deadline: float) -> str:
    """Another rank: register this process, and wait for an announcement that names it."""
    process = uuid.uuid4().hex
    store.set(f"registered/{rank}", process)
    while True:
        announced = json.loads(store.get("announced")) if store.check(["announced"]) else {"processes": []}
        if process in announced["processes"]:
            prefix = str(announced["prefix"])
            store.set(f"{prefix}/confirmed/{rank}", "")
            return prefix
        _sleep(deadline)


def _sleep(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("another rank did not arrive")
    time.sleep(_POLL_S)

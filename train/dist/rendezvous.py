"""How the ranks of one start find each other, and no rank of a start before it.

torchrun starts failed workers again on the same key-value store (torch 2.11 to 2.13), where the addresses of the dead
ones still stand: a quick worker reads such an address and fails to connect. So the ranks first agree on a name that no
other start has used, and keep everything of theirs under it.
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

_POLL_S = 0.02


def meet(rank: int, size: int, timeout: timedelta) -> Store:
    """The store of this start, from the environment that torchrun sets; all ranks have called this.

    Raises:
        TimeoutError: the other ranks have not come.
    """
    shared, rank, size = next(rendezvous("env://", rank, size, timeout=timeout))
    store = PrefixStore("higgs_tune", shared)
    deadline = time.monotonic() + timeout.total_seconds()
    name = _call_together(store, size, deadline) if rank == 0 else _answer(store, rank, deadline)
    return PrefixStore(name, store)


def _call_together(store: Store, size: int, deadline: float) -> str:
    """Rank 0: name the start, and repeat it to whoever has come until all have answered."""
    name, told = uuid.uuid4().hex, {}
    while not all(store.check([f"{name}/here/{rank}"]) for rank in range(1, size)):
        come = {rank: store.get(f"come/{rank}").decode() for rank in range(1, size) if store.check([f"come/{rank}"])}
        if come != told:
            store.set("called", json.dumps({"name": name, "ranks": sorted(come.values())}))
            told = come
        _wait(deadline)
    return name


def _answer(store: Store, rank: int, deadline: float) -> str:
    """Another rank: say that it has come, and wait to be called by what it said."""
    self_name = uuid.uuid4().hex
    store.set(f"come/{rank}", self_name)
    while True:
        called = json.loads(store.get("called")) if store.check(["called"]) else {"name": "", "ranks": []}
        if self_name in called["ranks"]:
            name = str(called["name"])
            store.set(f"{name}/here/{rank}", "")
            return name
        _wait(deadline)


def _wait(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("the other ranks have not come")
    time.sleep(_POLL_S)

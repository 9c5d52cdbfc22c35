"""The plan and the loader: every sample exactly once, in an order that nothing but the seed decides."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.build_set import build_set, synthetic_sample
from higgs_tune.shards import stream
from higgs_tune.shards.errors import ShardError, UserError
from higgs_tune.shards.plan import PlanInput, plan_epoch
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.data.batch import Batch
from higgs_tune.train.data.loader import Loader, LoaderOptions
from higgs_tune.train.data.sampler import Cursor, PackRequest, Schedule
from higgs_tune.train.dist.context import World
from hypothesis import given, settings
from hypothesis import strategies as st

BUDGET = 400


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    out = tmp_path_factory.mktemp("set")
    build_set(out)
    return ShardSet(out)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Fewer samples than any loader has workers."""
    out = tmp_path_factory.mktemp("tiny")
    build_set(out, shards=1, per_shard=3)
    return ShardSet(out)


def schedule(shards: ShardSet, world: int = 1, rank: int = 0, accumulation: int = 1, seed: int = 0) -> Schedule:
    place = World(rank, world, 0, 1)
    return Schedule([shards], tokens_per_pack=BUDGET, seed=seed, accumulation=accumulation, world=place)


def take_step(shards: ShardSet, world: int, accumulation: int, cursor: Cursor) -> tuple[list[PackRequest], Cursor]:
    """What all ranks take in one optimizer step, in the order of the plan, and the next cursor."""
    ranks = [schedule(shards, world, rank, accumulation) for rank in range(world)]
    taken = [list(itertools.islice(rank.requests(cursor), accumulation)) for rank in ranks]
    return [taken[rank][a] for a in range(accumulation) for rank in range(world)], ranks[0].after(cursor)


def train_rows(shards: ShardSet) -> Counter[int]:
    return Counter(shards.rows_of(validation=False).tolist())


@pytest.mark.fast
@settings(max_examples=30, deadline=None)
@given(world=st.integers(1, 16), accumulation=st.integers(1, 3), small=st.booleans())
def test_each_epoch_holds_every_sample_once(
    shards: ShardSet, tiny: ShardSet, world: int, accumulation: int, small: bool
) -> None:
    data = tiny if small else shards
    cursor, order = Cursor(), []
    for epoch in range(2):
        seen: Counter[int] = Counter()
        while cursor.epoch == epoch:
            requests, cursor = take_step(data, world, accumulation, cursor)
            assert len(requests) == world * accumulation
            seen.update(row for request in requests if request.weight for row in request.rows)
            order += [request.rows for request in requests if request.weight]
        assert seen == train_rows(data)
    one = schedule(data).requests(Cursor())
    assert order == [next(one).rows for _ in order]  # the same global sequence as one rank takes


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=2, max_size=8))
def test_elastic_history_loses_and_doubles_nothing(shards: ShardSet, worlds: list[int]) -> None:
    """The number of ranks changes after every step: 8 to 6 to 3 to 8, or any other history."""
    cursor, seen = Cursor(), Counter[int]()
    for world in itertools.cycle([8, 6, 3, 8, *worlds]):
        requests, cursor = take_step(shards, world, 1, cursor)
        seen.update(row for request in requests if request.weight for row in request.rows)
        if cursor.epoch == 1:
            break
    assert seen == train_rows(shards)


@pytest.mark.fast
def test_no_pack_is_over_budget(shards: ShardSet) -> None:
    plan = schedule(shards).plan(0)
    fills = [int(shards.index["tokens"][plan.pack(i)].sum()) for i in range(len(plan))]
    assert max(fills) <= BUDGET
    with pytest.raises(UserError, match=r"longer than a pack: \d{9}.*expected at most --tokens_per_pack 60, got"):
        Schedule([shards], tokens_per_pack=60, seed=0, accumulation=1, world=World(0, 1, 0, 1))


def test_fill_on_realistic_lengths() -> None:
    """99 % at 8,192 positions: clips of 2 to 15 s for reference and target."""
    rng = np.random.default_rng(0)
    lengths = (rng.lognormal(1.7, 0.5, (20_000, 2)).clip(1, 20).sum(1) * 25 + rng.integers(80, 250, 20_000)).astype(int)
    inputs = [PlanInput(np.arange(len(lengths)), lengths, "x")]
    plan = plan_epoch(inputs, tokens_per_pack=8192, seed=0, epoch=0, weighted=False)
    assert lengths.sum() / len(plan) / 8192 >= 0.99


def key_of(shards: ShardSet, row: int) -> str:
    return bytes(shards.index["key"][row]).decode()


def batches(shards: ShardSet, workers: int, cursor: Cursor = Cursor(), method: str = "fork") -> Iterator[Batch]:  # noqa: B008
    options = LoaderOptions(workers=workers, start_method=method)  # pyright: ignore[reportArgumentType]
    return Loader(schedule(shards, world=2, accumulation=2), options, cursor)


def equal(a: Batch, b: Batch) -> bool:
    same = (a.layout, a.lengths, a.keys, a.seconds, a.weight) == (b.layout, b.lengths, b.keys, b.seconds, b.weight)
    return same and torch.equal(a.flat, b.flat)


@pytest.mark.parametrize(("workers", "method"), [(1, "fork"), (3, "fork"), (16, "fork"), (2, "spawn")])
def test_workers_change_nothing(shards: ShardSet, tiny: ShardSet, workers: int, method: str) -> None:
    for data in (shards, tiny):
        one, other = batches(data, 0), batches(data, workers, method=method)
        assert all(equal(next(one), next(other)) for _ in range(20))


def test_resume_at_every_step_gives_the_same_batches(shards: ShardSet) -> None:
    """At each optimizer step of two epochs, tail and epoch edge among them, and right after a resume."""
    whole = list(itertools.islice(batches(shards, 0), 40))
    place, cursor = schedule(shards, world=2, accumulation=2), Cursor()
    steps = place.steps(place.plan(0))
    assert whole[2 * steps - 1].weight == 0 or len(place.plan(0)) % 4 == 0  # the tail is covered
    for step in range(2 * steps):
        again = itertools.islice(batches(shards, 0, cursor), 4)
        assert all(equal(a, b) for a, b in zip(again, whole[2 * step :], strict=False))
        cursor = place.after(cursor)
    assert cursor == Cursor(2, 0)


def test_mixing_by_weight_is_exact(shards: ShardSet) -> None:
    """An epoch holds the first set once; the replay set's share is right to a pack, and all of it comes in turn."""
    rng = np.random.default_rng(0)
    main = PlanInput(np.arange(1000), rng.integers(50, 300, 1000), "main", 0.8)
    replay = PlanInput(np.arange(1000, 1400), rng.integers(50, 300, 400), "replay", 0.2)
    seen: Counter[int] = Counter()
    for epoch in range(6):
        plan = plan_epoch([main, replay], tokens_per_pack=2000, seed=0, epoch=epoch, weighted=True)
        packs = [plan.pack(number) for number in range(len(plan))]
        from_replay = [pack for pack in packs if pack[0] >= 1000]
        assert all((pack >= 1000).all() or (pack < 1000).all() for pack in packs)
        assert abs(len(from_replay) - 0.2 * len(packs)) <= 1
        assert Counter(row for pack in packs for row in pack.tolist() if row < 1000) == Counter(range(1000))
        seen.update(row for pack in from_replay for row in pack.tolist())
    assert set(seen) == set(range(1000, 1400))
    assert max(seen.values()) - min(seen.values()) <= 1


def test_two_sets_without_weights_are_one(shards: ShardSet, tiny: ShardSet) -> None:
    both = Schedule([shards, tiny], tokens_per_pack=BUDGET, seed=0, accumulation=1, world=World(0, 1, 0, 1))
    loader = Loader(both, LoaderOptions())
    plan = both.plan(0)
    keys = Counter(key for batch in itertools.islice(loader, len(plan)) for key in batch.keys)
    rows = [(data, row) for data in (shards, tiny) for row in data.rows_of(validation=False)]
    assert keys == Counter(key_of(data, row) for data, row in rows)


def test_damaged_sample_stops_or_is_skipped_and_named(tmp_path: Path) -> None:
    build_set(tmp_path)
    shards = ShardSet(tmp_path)
    rows = shards.rows_of(validation=False)
    data = bytearray((tmp_path / "codes-000000.tar").read_bytes())
    bad = [int(row) for row in rows if shards.index["shard"][row] == 0][:2]
    for row in bad:
        data[int(shards.index["offset"][row]) + 600] ^= 1
    (tmp_path / "codes-000000.tar").write_bytes(data)
    place = schedule(shards)
    packs = len(place.plan(0))
    for workers in (0, 2):
        with pytest.raises(ShardError, match=r"wrong checksum .*codes-000000\.tar, key .*on_bad_sample skip"):
            list(itertools.islice(Loader(place, LoaderOptions(workers=workers)), packs))
    loader = Loader(place, LoaderOptions(on_bad_sample="skip"))
    keys = Counter(key for batch in itertools.islice(loader, packs) for key in batch.keys)
    assert keys == Counter(key_of(shards, row) for row in rows if row not in bad)
    assert len(loader.damaged) == 2
    with pytest.raises(ShardError, match="more than --max_bad_samples 1"):
        list(itertools.islice(Loader(place, LoaderOptions(on_bad_sample="skip", max_bad_samples=1)), packs))


def test_killed_worker_is_named(shards: ShardSet) -> None:
    loader = Loader(schedule(shards), LoaderOptions(workers=2))
    next(loader)
    workers = loader._loader._iterator._workers  # pyright: ignore
    os.kill(workers[0].pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"a loader process died: .*{workers[0].pid}"):
        for _ in range(100):
            next(loader)
    assert time.monotonic() - began < 120


def test_no_files_or_shared_memory_pile_up(shards: ShardSet) -> None:
    def usage() -> tuple[int, int]:
        own = [f"_{pid}_" for pid in (os.getpid(), *(child.pid for child in active_children()))]
        shared = [path for path in Path("/dev/shm").iterdir() if any(pid in path.name for pid in own)]
        return len(list(Path("/proc/self/fd").iterdir())), len(shared)

    place = schedule(shards)
    loader = Loader(place, LoaderOptions(workers=2))
    packs = len(place.plan(0))
    for _ in itertools.islice(loader, packs):
        pass
    first = usage()
    for _ in itertools.islice(loader, 10 * packs):
        pass
    assert usage()[0] <= first[0] + 4
    assert usage()[1] <= first[1] + 4
    summary = loader.waits.summary()
    assert summary["first_batch_s"] > 0
    assert summary["p50_s"] <= summary["p99_s"] <= summary["max_s"]


def test_webdataset_sees_what_the_index_says(shards: ShardSet) -> None:
    """Plain webdataset on the tar files, as docs/format.md shows it."""
    import webdataset

    urls = [str(shards.folder / shard["name"]) for shard in shards.manifest["shards"]]
    plain = list(webdataset.WebDataset(urls, shardshuffle=False))  # pyright: ignore
    assert [sample["__key__"] for sample in plain] == [key.decode() for key in shards.index["key"]]
    for row, sample in enumerate(plain):
        offset, length = (int(shards.index[name][row]) for name in ("offset", "length"))
        file = shards.folder / shards.manifest["shards"][int(shards.index["shard"][row])]["name"]
        block = file.read_bytes()[offset : offset + length]
        assert all(sample[name] in block for name in ("codes.npy", "json", "tokens.npy"))


def test_stream_is_a_webdataset_pipeline(shards: ShardSet) -> None:
    found = list(stream(shards.location))  # pyright: ignore[reportCallIssue]
    assert [sample["__key__"] for sample in found] == [key_of(shards, row) for row in shards.rows_of(validation=False)]
    for sample in found:
        np.testing.assert_array_equal(sample["codes.npy"], synthetic_sample(int(sample["__key__"])).codes_KT)
    shuffled = [s["__key__"] for s in stream(shards.location, shuffle=10, seed=1).compose()]  # pyright: ignore
    assert sorted(shuffled) == [s["__key__"] for s in found]
    assert shuffled != sorted(shuffled)

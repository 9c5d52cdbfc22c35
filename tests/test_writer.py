"""Writing: the same bytes however often the writer is killed, and clear errors where it cannot write."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import fsspec
import numpy as np
import pytest
from helpers.build_set import IDS, PER_SHARD, SHARDS, build_set, shard_samples, synthetic_sample
from higgs_tune.shards.errors import ShardError, UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.remote import Cache
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.shards.writer import SetWriter


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the work folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    build_set(out, mel=True)
    return out


@pytest.mark.fast
def test_every_sample_is_there(undisturbed: Path) -> None:
    shards = ShardSet(undisturbed)
    wanted = [number for number in range(SHARDS * PER_SHARD) if number % 7 != 6]
    assert len(shards) == len(wanted)
    for row, number in enumerate(wanted):
        stored, made = shards.read(row, mels=True), synthetic_sample(number, mel=True)
        assert (stored.key, stored.meta) == (made.key, made.meta)
        np.testing.assert_array_equal(stored.codes_KT, made.codes_KT)
        np.testing.assert_array_equal(stored.tokens_2L, made.tokens_2L)
        assert len(stored.mels) == 1
        np.testing.assert_array_equal(stored.mels[0], made.mels[0])
    assert shards.manifest["rejects"]["by_reason"] == {"made_up": SHARDS * PER_SHARD - len(wanted)}
    assert {path.name for path in undisturbed.iterdir()} == {
        *(f"{kind}-{number:06d}.tar" for kind in ("codes", "mel") for number in range(SHARDS)),
        *("index.npy", "manifest.json", "rejects.jsonl"),
    }


def test_killed_at_fifty_moments(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each kill -9 no final name holds anything but its final content; each restart ends with the same bytes."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the fork server finds build_set by nothing else
    expected, rng = files_of(undisturbed), np.random.default_rng(0)
    duration = min(run(tmp_path / str(i)) for i in "ab")
    killed = 0
    for number in range(200):
        if killed == 50:
            break
        out = tmp_path / str(number)
        process = start(out)
        time.sleep(rng.uniform(0, duration))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        duration *= 1 if process.exitcode else 0.95  # it was done before: the next are hit earlier
        found = files_of(out) if out.exists() else {}
        assert all(expected[name] == data for name, data in found.items() if not name.startswith(".tmp-"))
        run(out)
        assert files_of(out) == expected
        assert not (out / ".work").exists()
    assert killed == 50


def start(out: Path) -> BaseProcess:
    """Write a set in a process of its own."""
    context = get_context("forkserver")  # which has imported what is needed: a kill does not hit the imports
    context.set_forkserver_preload(["pytest", "build_set"])
    process = context.Process(target=build_set, args=(out,), kwargs={"mel": True})
    process.start()
    return process


def run(out: Path) -> float:
    """Write a set undisturbed; seconds that it took."""
    began = time.monotonic()
    process = start(out)
    process.join(60)
    assert process.exitcode == 0
    return time.monotonic() - began


def write_shard(folder: Path, number: int) -> None:
    rejects: list[dict[str, object]] = []
    writer = SetWriter(folder, IDS, ValidationSplit(0.2), features="mel")
    writer.write(number, shard_samples(number, rejects, mel=True, per_shard=PER_SHARD), rejects)


def test_processes_write_what_one_would(undisturbed: Path, tmp_path: Path) -> None:
    writer = SetWriter(tmp_path, IDS, ValidationSplit(0.2), features="mel")
    writer.begin()
    with ProcessPoolExecutor(3, get_context("spawn")) as pool:
        list(pool.map(write_shard, [tmp_path] * SHARDS, reversed(range(SHARDS))))
    writer.finish(SHARDS, ShardSet(undisturbed).provenance)
    assert files_of(tmp_path) == files_of(undisturbed)


@pytest.mark.fast
def test_restart_writes_only_what_is_missing(tmp_path: Path) -> None:
    writer = SetWriter(tmp_path, IDS, ValidationSplit())
    writer.begin()
    for number in range(2):
        writer.write(number, shard_samples(number, [], mel=False, per_shard=4), [])
    before = (tmp_path / "codes-000000.tar").stat().st_mtime_ns
    (tmp_path / ".tmp-1-codes-000001.tar").write_bytes(b"half")
    (tmp_path / "codes-000001.tar").write_bytes(b"cut")
    writer.begin()
    assert writer.committed(0) is not None
    assert writer.committed(1) is None
    assert not list(tmp_path.glob(".tmp-*"))
    with pytest.raises(ShardError, match="not committed"):
        writer.finish(2, {})
    writer.write(1, shard_samples(1, [], mel=False, per_shard=4), [])
    writer.finish(2, {})
    assert (tmp_path / "codes-000000.tar").stat().st_mtime_ns == before


def test_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the write fails in the middle of a shard."""
    code = f"""
import resource
from pathlib import Path
from helpers.build_set import build_set
from higgs_tune.shards.errors import run_command
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
run_command(lambda: build_set(Path({str(tmp_path)!r})))
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] < 0
    folder = Path(__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "error: cannot write" in result.stderr
    assert "codes-000000.tar" in result.stderr
    assert files_of(tmp_path) == {}


def test_too_little_space_is_found_before_the_run(tmp_path: Path) -> None:
    writer = SetWriter(tmp_path / "out", IDS, ValidationSplit())
    with pytest.raises(UserError, match=r"not enough free disk space .*expected 1000000000\.00 GB, got"):
        writer.begin(predicted_bytes=10**18)


@pytest.mark.parametrize("folder", ["/proc/higgs", "/dev/null/higgs"])
def test_unwritable_folder_is_a_clear_error(folder: str) -> None:
    with pytest.raises(UserError, match=f"cannot (make|write).*{folder}"):
        SetWriter(Path(folder), IDS, ValidationSplit()).begin()


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_remote_set_has_the_same_bytes(
    kind: str, undisturbed: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = "memory://sets/a" if kind == "memory" else f"{request.getfixturevalue('s3')}/a"
    build_set(tmp_path / "staging", mel=True, url=url)
    fs, path = fsspec.core.url_to_fs(url)
    remote = {name.rsplit("/", 1)[1]: fs.cat_file(name) for name in fs.ls(path, detail=False)}
    assert remote == files_of(undisturbed)
    assert not list((tmp_path / "staging").iterdir())
    local, shards = ShardSet(undisturbed), ShardSet(url, Cache(tmp_path / "cache"))
    for row in range(len(local)):
        assert shards.read(row, mels=True).meta == local.read(row).meta


def test_cache_is_verified_bounded_and_shared(undisturbed: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for name, data in files_of(undisturbed).items():
        fs.pipe_file(f"/bounded/{name}", data)
    size = (undisturbed / "codes-000000.tar").stat().st_size
    limit = int(2.5 * size)
    cache = Cache(tmp_path, max_bytes=limit)
    shards = ShardSet("memory://bounded", cache)
    first_of = [int(np.flatnonzero(shards.index["shard"] == number)[0]) for number in range(SHARDS)]
    for row in [*first_of, *first_of]:
        shards.read(row)
    kept = list(tmp_path.glob("*/*.tar"))
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*.*") if path.suffix != ".lock") <= limit
    assert kept
    again = ShardSet("memory://bounded", cache)
    fs.rm("/bounded/codes-000003.tar")
    again.read(first_of[3])  # from the cache that the first one filled
    fs.pipe_file("/bounded/codes-000000.tar", bytes(size))
    for path in kept:
        path.unlink()
    with pytest.raises(ShardError, match=r"not the manifest's file .*codes-000000\.tar"):
        ShardSet("memory://bounded", cache).read(first_of[0])
    assert not list(tmp_path.glob("*/codes-000000.tar"))

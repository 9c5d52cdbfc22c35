"""Run higgs-preprocess many times and kill it; the test that calls this compares what is left.

    python tests/helpers/killed_builds.py TOY DATA OUT COUNT SEED

Each build is a child of this process, which has everything imported and the checkpoints loaded: a fork costs nothing,
a start 8 seconds. The builds themselves fork their two workers, too; all else is the program as it is. Each build is
hit by the next of KILLS after a random part of the time that a build takes, then started again until it is done; COUNT
are hit in time. One that was done before is not counted, and the next are hit earlier.
Prints one JSON object a build: what hit it, after how long, its exit code, and what it said.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import tyro
from higgs_tune.preprocess import cli, engine, pipeline
from higgs_tune.preprocess.config import PreprocessConfig

KILLS = ("group", "parent", "worker", "stop")


def start(argv: list[str], log: Path) -> int:
    """Fork a build into its own process group; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    engine.get_context = lambda _method: multiprocessing.get_context("fork")  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv = ["higgs-preprocess", *argv]
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def hit(pid: int, how: str) -> None:
    """Kill the build, its parent process, one of its workers, or ask it to stop."""
    if how == "group":
        os.killpg(pid, signal.SIGKILL)
    elif how == "worker" and children(pid):
        os.kill(children(pid)[-1], signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGTERM if how == "stop" else signal.SIGKILL)


def group_is_gone(group: int, timeout_s: float) -> bool:
    """Whether no process of a group is left, within a time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def main() -> None:
    toy, data, out = (Path(path) for path in sys.argv[1:4])
    rng = random.Random(int(sys.argv[5]))
    options = ["--model_path", f"{toy}/model", "--audio_tokenizer_path", f"{toy}/codec", "--whisper_features", "mel"]
    options += ["--num_processes", "2", "--clips_per_unit", "2", "--samples_per_shard", "3", "--data", str(data)]
    torch.set_num_threads(1)  # a fork takes no threads along
    warm = ["--num_processes", "1", "--out", str(out / "warm")]
    pipeline.build_shards(tyro.cli(PreprocessConfig, args=[*options, *warm]))
    began = time.monotonic()
    pid = start([*options, "--out", str(out / "whole")], out / "whole.log")
    code, took = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic() - began
    print(json.dumps({"how": "none", "code": code, "seconds": took}), flush=True)
    count, killed = int(sys.argv[4]), 0
    for number in range(4 * count):
        if killed == count:
            break
        how, after, folder = KILLS[killed % len(KILLS)], rng.random() * took, out / str(number)
        pid = start([*options, "--out", str(folder)], out / f"{number}.log")
        time.sleep(after)
        done = os.waitpid(pid, os.WNOHANG)
        if not done[0]:
            hit(pid, how)
            done = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(done[1])
        killed, took = (killed + 1, took) if code else (killed, 0.9 * took)
        found = {"how": how, "after": after, "code": code, "gone": group_is_gone(pid, 60.0)}
        found["temporary"] = len([*folder.rglob(".tmp-*")])
        again = start([*options, "--out", str(folder)], out / f"{number}.log")
        found["again"] = os.waitstatus_to_exitcode(os.waitpid(again, 0)[1])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

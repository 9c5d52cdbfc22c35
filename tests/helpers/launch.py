"""Runs the training command on several ranks: one process imports everything, then forks the ranks of each run.

    python tests/helpers/launch.py '[[2, ["--training_stage", "single", …]], …]'

Cheaper than torchrun, which imports everything anew in every rank; that one is tested in test_train.py.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable

from higgs_tune.train.arguments import parse_arguments
from higgs_tune.train.loop import train


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a fork that then ends; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001  (this is the end of the process)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run(size: int, flags: list[str]) -> None:
    """One run on `size` ranks; ends the program where a rank fails."""
    port = free_port()

    def rank_work(rank: int) -> Callable[[], None]:
        def work() -> None:
            os.environ |= rank_environment(rank, size, port)
            train(parse_arguments(flags))

        return work

    pids = [fork(rank_work(rank)) for rank in range(size)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(codes):
        sys.exit(f"exit codes of the ranks: {codes}")


if __name__ == "__main__":
    for world, arguments in json.loads(sys.argv[1]):
        run(world, arguments)

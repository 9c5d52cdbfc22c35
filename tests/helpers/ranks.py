"""Runs the trainer on several ranks, quickly: everything is imported once, then every rank is a fork.

    python tests/helpers/ranks.py < request.json

The request: `options` of `TrainConfig`, `world`, and what is to go wrong. Prints what happened as JSON. torchrun starts
ranks in the same way, with the same environment, but imports torch anew for each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REQUEST_TIMEOUT_S = 900


def ask(options: dict[str, Any], world: int = 1, **wanted: Any) -> dict[str, Any]:
    """Run the trainer in a process of its own; returns `codes` (exit code of each rank), `stderr`, `stdout`, `s`.

    Args:
        options: of `TrainConfig`.
        wanted: see `serve`.
    """
    request = json.dumps({"options": options, "world": world, **wanted}, default=str)
    command = [sys.executable, __file__]
    done = subprocess.run(
        command, input=request, capture_output=True, text=True, timeout=REQUEST_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    answer, _, rest = done.stdout.rpartition("ANSWER ")
    return json.loads(rest) | {"stderr": done.stderr, "stdout": answer}


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """What a request may ask for beside a run:

    kills: so often, all ranks are killed (signal 9) and the run is resumed; saves: so many of these kills while a
    checkpoint is being written; stop_after: each rank gets SIGTERM after this step; kill_rank: kill one rank once there
    is a checkpoint; nan_at, fail_at, memory_at: [step, rank] whose loss becomes NaN, that raises, that runs out of
    memory; file_limit: largest file in bytes.
    """
    out = Path(request["options"]["output_dir"])
    killed, killed_saving = 0, 0
    rng = random.Random(0)
    while killed < request.get("kills", 0):
        pids = start(request)
        if killed_saving < request.get("saves", 0):  # these first: few steps are made in between
            killed_saving += wait_for(lambda: any(out.glob(".tmp-checkpoint-*")), pids)
        else:
            until = newest_step(out) + rng.randint(0, 2)  # steps, so that a fast machine gets no further in between
            wait_for(lambda until=until: newest_step(out) >= until, pids)
            wait_for(bool, pids, rng.uniform(0.0, 0.4))
        if not kill(pids):
            break  # the run is done; the caller sees that it was not killed as often as it asked for
        killed += 1
    began = time.monotonic()
    pids = start(request)
    if "kill_rank" in request:
        wait_for(lambda: any(out.glob("checkpoint-*")), pids)
        os.kill(pids[request["kill_rank"]], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return {"codes": codes, "killed": killed, "killed_saving": killed_saving, "s": time.monotonic() - began}


def newest_step(out: Path) -> int:
    """Of the checkpoints in a folder; 0 where there is none."""
    from higgs_tune.train.checkpoint.folder import checkpoint_step, list_checkpoints

    return next(map(checkpoint_step, list_checkpoints(out)), 0)


def shorten_the_selftest() -> None:
    """The trainer's self-test on 1,024 positions in place of 8,192."""
    from higgs_tune.train.monitor import selftest

    selftest.POSITIONS = 1024


def start(request: dict[str, Any]) -> list[int]:
    """Fork the ranks; returns their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [fork(request, rank, port) for rank in range(request["world"])]


def fork(request: dict[str, Any], rank: int, port: int) -> int:
    if pid := os.fork():
        return pid
    world = request["world"]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["train"]
    from higgs_tune.shards.errors import run_command
    from higgs_tune.train.config import TrainConfig
    from higgs_tune.train.loop import train

    options = dict(request["options"])
    for name in ("model_path", "output_dir", "audio_tokenizer_path", "whisper_path"):
        if options.get(name):
            options[name] = Path(options[name])
    options["train_data_dir"] = tuple(options["train_data_dir"])
    inject(request, rank)
    code = 1
    try:
        run_command(lambda: train(TrainConfig.of(**options)))
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:  # noqa: BLE001  (this is the end of the process)
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def inject(request: dict[str, Any], rank: int) -> None:
    """Make a rank's loss NaN, or raise, in a step; limit the size of files."""
    if "file_limit" in request:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], request["file_limit"]))
    if "stop_after" in request:
        _stop_after(request["stop_after"])
    for name in ("nan_at", "fail_at", "memory_at"):
        if name in request and request[name][1] == rank:
            _patch(name, request[name][0], request["options"].get("gradient_accumulation_steps", 1))


def _stop_after(step: int) -> None:
    from higgs_tune.train import loop

    original = loop.train_step

    def patched(run: Any, *args: Any) -> Any:
        norm = original(run, *args)
        if run.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    loop.train_step = patched  # pyright: ignore[reportPrivateLocalImportUsage]


def _patch(name: str, step: int, accumulation: int) -> None:
    import torch
    from higgs_tune.train.model import pack_model as module

    original, calls = module.pack_loss, [0]

    def patched(*args: Any, **named: Any) -> Any:
        parts = original(*args, **named)
        if torch.is_grad_enabled():
            calls[0] += 1
            if (calls[0] - 1) // accumulation + 1 == step:
                if name == "fail_at":
                    raise ValueError("injected failure")
                if name == "memory_at":
                    raise torch.OutOfMemoryError("injected")
                return parts._replace(total=parts.total * float("nan"))
        return parts

    module.pack_loss = patched  # pyright: ignore[reportPrivateLocalImportUsage]


def wait_for(condition: Any, pids: list[int], seconds: float = 60.0) -> bool:
    """Wait until a condition holds; False if the time is up or a process has ended before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        if any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids):
            return False
        time.sleep(0.001)
    return False


def kill(pids: list[int]) -> bool:
    """Kill every process; True if one was still running."""
    running = [pid for pid in pids if not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)]
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    return bool(running)


if __name__ == "__main__":
    import higgs_tune.train.loop  # noqa: F401  (before the first fork, so that no rank has to)
    import torch

    torch.set_num_threads(1)
    shorten_the_selftest()
    answer = serve(json.loads(sys.stdin.read()))
    print("ANSWER " + json.dumps(answer), flush=True)

"""Engines that run tasks: this process, processes of this machine, or a Ray cluster.

In: a task, which is a function of a number, and the numbers. Out: its results, in the order in which they finish.
Guarantees (tests/test_engine.py): results are the same on every engine; no task starts after a stop was requested; no
process stays behind when this one is killed.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, connection, get_context, parent_process
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch
from higgs_tune.shards.errors import UserError

Task = Callable[[int], Any]
MAX_AUTO_PROCESSES = 8
TASKS_PER_PROCESS = 2  # with fewer, another process costs more to start than it saves
PROCESSES_PER_GPU = 6  # one alone leaves a GPU idle: a clip is many small launches (docs/benchmarks.md, "On an H200")
GPU_GIB_PER_PROCESS = 4  # codec, tower and CUDA's own
CONNECT_TIMEOUT_S = 10.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
MAX_RETRIES = 10  # of a Ray task whose worker or node died


class EngineOptions(Protocol):
    """The options of where the work runs, of any command that has them."""

    @property
    def engine(self) -> str: ...
    @property
    def ray_address(self) -> str: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def device(self) -> str: ...


class Stopped(Exception):
    """A signal requested a stop, and the running tasks are committed."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """Turns the first SIGINT or SIGTERM into a request to stop after the running tasks; the second ends at once."""

    def __init__(self) -> None:
        self._requested: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._requested is not None:
            raise KeyboardInterrupt
        self._requested = number
        os.write(2, b"\nfinishing the running tasks; once more to end at once\n")  # print is unsafe here

    def check(self) -> None:
        """Raise Stopped if a stop was requested."""
        if self._requested is not None:
            raise Stopped(self._requested)


def run_tasks(task: Task, numbers: list[int], config: EngineOptions, stop: Stop) -> Iterator[Any]:
    """Run tasks; results come in the order in which they finish.

    Raises:
        Stopped: a signal came; the running tasks were finished and their results yielded first.
        UserError: a local worker died, or Ray cannot be reached.
    """
    if config.engine == "ray":
        yield from _run_ray(task, numbers, config, stop)
        return
    processes = min(config.num_processes or auto_processes(config.device, len(numbers)), len(numbers))
    if processes <= 1:
        for number in numbers:
            stop.check()
            yield task(number)
    else:
        yield from _run_pool(task, numbers, processes, stop)


def auto_processes(
    device: str, tasks: int, tasks_per_process: int = TASKS_PER_PROCESS, per_gpu: int = PROCESSES_PER_GPU
) -> int:
    """Processes on this machine: for each GPU up to `per_gpu`, as its memory and half of the cores allow.

    Without a GPU one for each core. No more than the tasks need, but one for each GPU. One for a device that is not
    there: its task says so.
    """
    cores, needed = len(os.sched_getaffinity(0)), max(1, tasks // tasks_per_process)
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return min(MAX_AUTO_PROCESSES, cores, needed)
    gpus = [gpu for gpu in range(torch.cuda.device_count()) if device in ("auto", "cuda", f"cuda:{gpu}")]
    if not gpus:
        return 1
    least_gib = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus) / 2**30
    fit = max(1, min(per_gpu, cores // (2 * len(gpus)), int(least_gib / GPU_GIB_PER_PROCESS)))
    return max(len(gpus), min(fit * len(gpus), needed))


def _run_pool(task: Task, numbers: list[int], processes: int, stop: Stop) -> Iterator[Any]:
    context = get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _init_worker, (context.Value("i", 0),))
    waiting, running = iter(numbers), set[Future[Any]]()
    with pool:
        try:
            while True:
                for number in _next_numbers(waiting, processes + 1 - len(running), stop):
                    with _signals_blocked():
                        running.add(pool.submit(task, number))  # starts a process while there are fewer than wanted
                if not running:
                    stop.check()
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            hint = "Was it killed for memory? Start the command again: committed work is kept."
            raise UserError("a worker process died", hint=hint) from error
        finally:
            for process in active_children():  # they are idle, except after an error or a second signal
                process.kill()


def _next_numbers(numbers: Iterator[int], count: int, stop: Stop) -> Iterator[int]:
    """Up to `count` more numbers; none once a stop was requested."""
    for _ in range(count):
        try:
            stop.check()
        except Stopped:
            return
        number = next(numbers, None)
        if number is None:
            return
        yield number


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM: here until the end of the block, and for good in processes that start within it.

    A terminal sends signals to the whole process group, but only the parent decides when to stop.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _init_worker(counter: Any) -> None:
    """Set up a worker process: choose its GPU, and make it exit when its parent exits."""
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with_parent, args=(parent.sentinel,), daemon=True).start()


def _exit_with_parent(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _check_reachable(address: str) -> None:
    """Connect to the address once, since Ray itself would retry for minutes.

    Raises:
        UserError: nothing listens at `host:port` or `ray://host:port`.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(f"cannot reach Ray: {error}", where=address) from error


def _run_ray(task: Task, numbers: list[int], config: EngineOptions, stop: Stop) -> Iterator[Any]:
    """Ray retries a task whose worker or node died; each GPU, or each core without GPUs, runs one task at a time."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError("--engine ray needs Ray", hint="Install it with: pip install higgs-tune[ray]") from error
    _check_reachable(config.ray_address)
    options: dict[str, Any] = {"address": config.ray_address or "local", "log_to_driver": False}
    if not config.ray_address:
        options |= {"include_dashboard": False, "num_cpus": config.num_processes or None}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot reach Ray: {error}", where=config.ray_address or "local") from error
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") and config.device != "cpu" else 0

        def run(number: int) -> Any:  # Ray takes no partial
            return task(number)

        remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=MAX_RETRIES)(run)
        slots = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1))
        waiting, running = iter(numbers), []
        while True:
            running += [remote.remote(number) for number in _next_numbers(waiting, 2 * slots - len(running), stop)]
            if not running:
                stop.check()
                return
            done, running = ray.wait(running)
            for result in done:
                yield ray.get(result)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise UserError(f"Ray failed: {error}", hint="Start the command again: committed work is kept.") from error
    finally:
        ray.shutdown()

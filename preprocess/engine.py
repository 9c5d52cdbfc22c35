"""Where tasks run: in this process, in processes of this machine, or on a Ray cluster.

In: a task, which knows only a number, and the numbers. Out: its results, as they finish. Never: a result that depends
on the engine; a task handed out after a stop was asked for; processes left behind when this one is killed.
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
from typing import Any

import torch
from higgs_tune.preprocess.config import PreprocessConfig
from higgs_tune.shards.errors import UserError

Task = Callable[[int], Any]
MAX_AUTO_PROCESSES = 8
TASKS_A_PROCESS = 2  # with fewer, starting another process costs more than it saves
KNOCK_S = 10.0
STOPPING = (signal.SIGINT, signal.SIGTERM)
RETRIES = 10  # of a Ray task whose worker or node died


class Stopped(Exception):
    """A signal asked for the end; all that was in hand is committed."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """Turns the first SIGINT or SIGTERM into a request to finish what is in hand; the second ends at once."""

    def __init__(self) -> None:
        self._asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._asked is not None:
            raise KeyboardInterrupt
        self._asked = number
        os.write(2, b"\nfinishing what is in hand; once more to end at once\n")  # print is not for signal handlers

    def go_on(self) -> None:
        """Raise Stopped where the end was asked for."""
        if self._asked is not None:
            raise Stopped(self._asked)


def run_tasks(task: Task, numbers: list[int], config: PreprocessConfig, stop: Stop) -> Iterator[Any]:
    """Run tasks; results come as they finish.

    Raises:
        Stopped: a signal came; running tasks were finished first, and their results given out.
        UserError: a worker died (locally), or Ray is not there.
    """
    processes = min(config.num_processes or auto_processes(config.device, len(numbers)), len(numbers))
    if config.engine == "ray":
        yield from _run_ray(task, numbers, config, stop)
    elif processes <= 1:
        for number in numbers:
            stop.go_on()
            yield task(number)
    else:
        yield from _run_pool(task, numbers, processes, stop)


def auto_processes(device: str, tasks: int) -> int:
    """One for each GPU; without a GPU one for each core, but only where there is work for them."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if device in ("auto", "cpu") else 1
    return max(1, min(MAX_AUTO_PROCESSES, cores, tasks // TASKS_A_PROCESS))


def _run_pool(task: Task, numbers: list[int], processes: int, stop: Stop) -> Iterator[Any]:
    context = get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _begin_worker, (context.Value("i", 0),))
    waiting, running = iter(numbers), set[Future[Any]]()
    with pool:
        try:
            while True:
                for number in _take(waiting, processes + 1 - len(running), stop):
                    with _signals_held():
                        running.add(pool.submit(task, number))  # starts a process while there are fewer than wanted
                if not running:
                    stop.go_on()
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            hint = "Was it killed for memory? Start the command again: what is committed is kept."
            raise UserError("a worker process died", hint=hint) from error
        finally:
            for process in active_children():  # idle ones, unless this is the end by an error or a second signal
                process.kill()


def _take(numbers: Iterator[int], count: int, stop: Stop) -> Iterator[int]:
    """Up to `count` more numbers; none once a stop was asked for."""
    for _ in range(count):
        try:
            stop.go_on()
        except Stopped:
            return
        number = next(numbers, None)
        if number is None:
            return
        yield number


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM: here until the end of the block, in processes that start within it for good.

    A terminal sends them to the whole group, but it is the parent that decides, also while a worker still imports.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(counter: Any) -> None:
    """Ready a worker process: its GPU, and its end when its parent ends."""
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _knock(address: str) -> None:
    """Refuse an address where nothing listens; Ray itself would try for minutes.

    Raises:
        UserError: nothing answers at `host:port` or `ray://host:port`.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), KNOCK_S).close()
    except OSError as error:
        raise UserError(f"cannot reach Ray: {error}", where=address) from error


def _run_ray(task: Task, numbers: list[int], config: PreprocessConfig, stop: Stop) -> Iterator[Any]:
    """Each task is retried by Ray when its worker or node dies; each GPU, else each core, runs one at a time."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError("--engine ray needs Ray", hint="Install it with: pip install higgs-tune[ray]") from error
    _knock(config.ray_address)
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

        remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(run)
        slots = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1))
        waiting, running = iter(numbers), []
        while True:
            running += [remote.remote(number) for number in _take(waiting, 2 * slots - len(running), stop)]
            if not running:
                stop.go_on()
                return
            done, running = ray.wait(running)
            for result in done:
                yield ray.get(result)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise UserError(f"Ray failed: {error}", hint="Start the command again: what is committed is kept.") from error
    finally:
        ray.shutdown()

"""Work on a Ray cluster, or on a local one: every worker holds a pipeline and hands back the bytes of its pictures, or their scores.

One process reads the requests and writes the results, so workers need no shared folder, only the model. A worker that dies is
replaced, and its batch is made again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from ..._quiet import quiet_imports
from ...errors import AttnCtrlError
from .requests import Request


if TYPE_CHECKING:
    from .run import Batch, Task

ENGINES = ("local", "ray")
PATIENCE = 3  # workers that may die over one batch, or before they have started
Item = TypeVar("Item")


def engine_problems(engine: str, workers: int | None) -> list[str]:
    """What is wrong with --engine and --workers."""
    wrong = [] if engine in ENGINES else [f"--engine {engine!r} is not one of {', '.join(ENGINES)}"]
    if workers is not None and workers < 1:
        wrong.append(f"--workers {workers} is less than 1")
    if workers is not None and engine != "ray":
        wrong.append("--workers needs --engine ray")
    return wrong


class Pool:
    """Ray actors of one class. Connects to the cluster of RAY_ADDRESS or of this machine, or starts one on this machine.

    Args:
        kind, arguments: every worker is ``kind(*arguments)``.
        count: workers; None for one a GPU, and at least one. More than the cluster has room for wait until it has.
    """

    def __init__(self, kind: type, *arguments: Any, count: int | None = None):
        try:
            with quiet_imports():
                import ray
        except ImportError:
            raise AttnCtrlError("--engine ray needs Ray\nHINT: pip install ray, or --engine local") from None
        self.ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self._kind, self._arguments = ray.remote(num_cpus=1, num_gpus=min(1, gpus))(kind), arguments
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._failed_starts = 0
        for _ in range(count or gpus or 1):
            self._start()

    def _start(self) -> Any:
        worker = self._kind.remote(*self._arguments)
        self._starting[worker.__ray_ready__.remote()] = worker
        return worker

    def _settle(self, ready: Any) -> None:
        """A worker that has started, or could not."""
        worker = self._starting.pop(ready)
        try:
            self.ray.get(ready)
        except self.ray.exceptions.RayActorError as error:
            self._failed_starts += 1
            if error.actor_init_failed or self._failed_starts == PATIENCE:
                lines = [line for line in str(error).splitlines() if line.strip()]
                raise AttnCtrlError(f"a Ray worker could not start: {lines[-1].strip()}") from None
            self._start()
        else:
            self._idle.append(worker)

    def ask(self, method: str, *arguments: Any) -> Any:
        """The answer of one worker."""
        for _ in range(PATIENCE):
            while not self._idle:
                self._settle(self.ray.wait(list(self._starting))[0][0])
            try:
                return self.ray.get(getattr(self._idle[-1], method).remote(*arguments))
            except self.ray.exceptions.RayActorError as error:
                died = error
                self._idle.pop()
                self._start()
        raise AttnCtrlError(f"{PATIENCE} Ray workers died over one question: {str(died).splitlines()[0]}")

    def run(
        self, queue: deque[Item], method: str, arguments: Callable[[Item], tuple]
    ) -> Iterator[tuple[Item, Any, float]]:
        """(item, what the method returned or an exception, seconds), in the order in which they get ready.

        The queue may grow and shrink meanwhile; an item that workers die of goes back to its head.
        """
        ray, deaths = self.ray, Counter()
        running: dict[Any, tuple[Any, Item, float]] = {}
        while queue or running:
            while queue and self._idle:
                worker, item = self._idle.pop(), queue.popleft()
                running[getattr(worker, method).remote(*arguments(item))] = (worker, item, time.perf_counter())
            ready = ray.wait([*running, *self._starting])[0][0]
            if ready in self._starting:
                self._settle(ready)
                continue
            worker, item, began = running.pop(ready)
            try:
                made = ray.get(ready)
            except ray.exceptions.RayActorError as error:
                made = error
                self._start()
                deaths[id(item)] += 1
                if deaths[id(item)] < PATIENCE:
                    queue.appendleft(item)
                    continue
            except ray.exceptions.RayTaskError as error:
                made = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
                self._idle.append(worker)
            else:
                self._idle.append(worker)
            deaths.pop(id(item), None)
            yield item, made, time.perf_counter() - began

    def close(self) -> None:
        for worker in (*self._idle, *self._starting.values()):
            self.ray.kill(worker)
        if self._ours:
            self.ray.shutdown()


class RayWorkers:
    """The engine "ray" of `attnctrl batch`."""

    def __init__(self, batch: Batch):
        from .run import Worker

        self._pool = Pool(Worker, batch.job, batch.image_format, count=batch.workers)
        self.close = self._pool.close

    def refuse(self, request: Request) -> str | None:
        return self._pool.ask("refuse", request.whole())

    def run(self, queue: deque[list[Task]]) -> Iterator[tuple[list[Task], list | Exception, float]]:
        """(batch, pictures' bytes with their requests or an error, seconds), in the order in which batches get ready."""
        return self._pool.run(
            queue, "encoded", lambda tasks: ([(entry.request.whole(), number) for entry, number in tasks],)
        )

"""Batches on a Ray cluster, or on a local one: every worker holds a pipeline and hands back the bytes of its pictures.

One process reads the requests and writes the results, so workers need no shared folder, only the model. A worker that dies is
replaced, and its batch is made again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..._quiet import quiet_imports
from ...errors import AttnCtrlError
from .requests import Request


if TYPE_CHECKING:
    from .run import Batch, Task

PATIENCE = 3  # workers that may die over one batch


class RayWorkers:
    """Workers as Ray actors. Connects to the cluster of RAY_ADDRESS or of this machine, or starts one on this machine."""

    def __init__(self, batch: Batch):
        try:
            with quiet_imports():
                import ray
        except ImportError:
            raise AttnCtrlError("--engine ray needs Ray\nHINT: pip install ray, or --engine local") from None
        from .run import Worker

        self.ray, self.batch = ray, batch
        self._ours = not ray.is_initialized()
        if self._ours:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self._actor = ray.remote(num_cpus=1, num_gpus=min(1, gpus))(Worker)
        self.idle = [self._start() for _ in range(batch.workers or gpus or 1)]

    def _start(self) -> Any:
        return self._actor.remote(self.batch.job, self.batch.image_format)

    def refuse(self, request: Request) -> str | None:
        try:
            return self.ray.get(self.idle[0].refuse.remote(request.whole()))
        except self.ray.exceptions.RayActorError as error:  # the pipeline could not be loaded
            cause = getattr(error, "cause", None)
            lines = [line for line in str(cause or error).splitlines() if line.strip()]
            raise AttnCtrlError(f"a Ray worker could not start: {lines[-1].strip() if lines else error}") from None

    def run(self, queue: deque[list[Task]]) -> Iterator[tuple[list[Task], list | Exception, float]]:
        """(batch, pictures' bytes with their requests or an error, seconds), in the order in which batches get ready."""
        ray, running, deaths = self.ray, {}, Counter()
        while queue or running:
            while queue and self.idle:
                worker, tasks = self.idle.pop(), queue.popleft()
                asked = [(entry.request.whole(), number) for entry, number in tasks]
                running[worker.encoded.remote(asked)] = (worker, tasks, time.perf_counter())
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            worker, tasks, began = running.pop(ready)
            key = (tasks[0][0].id, tasks[0][1])
            try:
                made: list | Exception = ray.get(ready)
            except ray.exceptions.RayActorError as error:
                worker, made = self._start(), error
                deaths[key] += 1
                if deaths[key] < PATIENCE:
                    self.idle.append(worker)
                    queue.appendleft(tasks)
                    continue
            except ray.exceptions.RayTaskError as error:
                made = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
            self.idle.append(worker)
            yield tasks, made, time.perf_counter() - began

    def close(self) -> None:
        for worker in self.idle:
            self.ray.kill(worker)
        if self._ours:
            self.ray.shutdown()

"""The run of `attnctrl batch`: rows are checked, pictures of one shape and one set of controls are made together, results are kept.

The batches follow from the file and the batch size alone, never from what exists already: a resumed run makes a batch that was cut
short whole again, and keeps what was missing, so that its pictures are those of an unbroken run.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..._quiet import quiet_imports
from ...errors import AttnCtrlError
from ..generate import Job, call_arguments, picture_facts, sample
from .cluster import RayWorkers, engine_problems
from .pictures import FORMATS, encode
from .remote import Address, RemoteResults
from .requests import Entry, Problem, Request, read_requests
from .results import Results, head
from .schema import told
from .shards import write_shards
from .table import need_pyarrow, write_table


Task = tuple[Entry, int]  # a row and the number of one of its pictures
RECORDS = ("jsonl", "webdataset", "parquet")
SHARD = 1000  # pictures of a shard of --format webdataset


class BatchFailed(Exception):
    """Some pictures could not be made; the run went through all the same."""


@dataclass(frozen=True)
class Batch:
    """One run of `attnctrl batch`.

    Args:
        job: model, device, output folder and batch size; what it draws is not used.
        address: where the output goes instead of the job's folder.
        defaults: what rows leave out, such as steps.
        format: what is written at the end beside results.jsonl: nothing more, tar shards, or a parquet table.
        shard_size: pictures of a tar shard (WebDataset); None for no shards, unless `format` asks for them.
        workers: of the engine "ray"; None for one a GPU.
    """

    requests: Path
    job: Job
    defaults: dict[str, Any] = field(default_factory=dict)
    address: Address | None = None
    image_format: str = "png"
    format: str = "jsonl"
    shard_size: int | None = None
    skip_invalid: bool = False
    fail_fast: bool = False
    engine: str = "local"
    workers: int | None = None

    def __post_init__(self) -> None:
        wrong = []
        if self.image_format not in FORMATS:
            wrong.append(f"--image-format {self.image_format!r} is not one of {', '.join(FORMATS)}")
        if self.format not in RECORDS:
            wrong.append(f"--format {self.format!r} is not one of {', '.join(RECORDS)}")
        if self.shard_size is not None and self.shard_size < 1:
            wrong.append(f"--shard-size {self.shard_size} is less than 1")
        wrong += engine_problems(self.engine, self.workers)
        if wrong:
            raise AttnCtrlError("; ".join(wrong))
        if self.format == "parquet":
            need_pyarrow()
        if self.format == "webdataset" and self.shard_size is None:
            object.__setattr__(self, "shard_size", SHARD)

    @property
    def options(self) -> dict[str, Any]:
        """What decides about pictures beside their rows."""
        names = ("model", "revision", "variant", "lora", "dtype", "attention_backend")
        return {name: getattr(self.job, name) for name in names}


class Worker:
    """A loaded pipeline that makes batches."""

    def __init__(self, job: Job, ending: str):
        with quiet_imports():
            from ..loading import load_pipeline
        self.job, self.ending = job, ending
        self.pipeline, self.made = load_pipeline(job)

    def refuse(self, request: Request) -> str | None:
        """Why this model cannot serve a request, as far as it can be told without making the picture."""
        with quiet_imports():
            from ...processors import Session
            from ...processors.phrases import with_phrases
        try:
            Session(self.pipeline, *with_phrases(request.make_controls(), request.prompt, self.pipeline))
            call_arguments(self._job(request), self.pipeline)
        except Exception as error:  # a control may raise anything on what no schema forbids
            return told(error)

    def make(self, asked: Sequence[tuple[Request, int]]) -> list[tuple[Image.Image, dict[str, Any]]]:
        """Pictures with their requests. `asked`: requests of one group, each with the number of the picture."""
        from ...processors import Session
        from ...processors.phrases import with_phrases

        first = asked[0][0]
        job, controls = self._job(first), first.make_controls()
        arguments = call_arguments(job, self.pipeline)
        for name in ("prompt", "negative_prompt"):
            if name in arguments:
                arguments[name] = [getattr(request, name) for request, _ in asked]
        seeds = [request.seed + number for request, number in asked]
        found = with_phrases(controls, first.prompt, self.pipeline)  # a group with phrases has one prompt
        with Session(self.pipeline, *found) if controls else nullcontext():
            images = sample(self.pipeline, arguments, seeds, None)
        common, made = job.request(controls, self.made), []
        for place, ((request, _), image) in enumerate(zip(asked, images)):
            own = {"id": request.id, "prompt": request.prompt, "negative_prompt": request.negative_prompt}
            made.append((image, {**common, **own, **picture_facts(image, seeds[place], place, len(seeds))}))
        return made

    def encoded(self, asked: Sequence[tuple[Request, int]]) -> list[tuple[bytes, dict[str, Any]]]:
        """`make`, with the pictures as their files' bytes."""
        return [(encode(image, self.ending, facts), facts) for image, facts in self.make(asked)]

    def _job(self, request: Request) -> Job:
        return dataclasses.replace(self.job, **request.job_arguments(), seed=request.seed)


class Local:
    """Batches one after another, in this process."""

    def __init__(self, batch: Batch):
        self.worker = Worker(batch.job, batch.image_format)
        self.refuse = self.worker.refuse

    def run(self, queue: deque[list[Task]]) -> Iterator[tuple[list[Task], list | Exception, float]]:
        """(batch, pictures with their requests or an error, seconds), until the queue is empty."""
        while queue:
            tasks, began = queue.popleft(), time.perf_counter()
            try:
                made: list | Exception = self.worker.make([(entry.request, number) for entry, number in tasks])
            except Exception as error:
                made = error.with_traceback(None)  # its frames hold what filled the memory
            yield tasks, made, time.perf_counter() - began

    def close(self) -> None:
        pass


def run(batch: Batch) -> Iterator[Path | Address | str]:
    """Makes what is missing. Yields messages, and at last the written files.

    Raises:
        AttnCtrlError: rows are wrong (then nothing was made), or the output cannot be written.
        BatchFailed: pictures failed.
    """
    rank, world = (int(os.environ.get(name, preset)) for name, preset in (("RANK", "0"), ("WORLD_SIZE", "1")))
    batch = dataclasses.replace(batch, job=_own_device(batch.job, world))
    at_address = None if batch.address is None else RemoteResults(batch.address, rank, world)
    with at_address or Results(batch.job.output, rank, world) as results:
        entries, problems = read_requests(
            batch.requests, batch.options, batch.defaults, batch.image_format, results.done
        )
        total = len(entries) + len(problems)
        yield from _judge(batch, results, problems, problems, total)
        failures = 0
        if not all(entry.finished for entry in entries):
            engine = _engine(batch)
            try:
                entries, refused = _ask_model(engine, entries)
                if refused:
                    every = sorted([*problems, *refused], key=lambda problem: problem.row.line)
                    yield from _judge(batch, results, refused, every, total)
                queue = deque(
                    tasks
                    for index, tasks in enumerate(plan(entries, batch.job.batch_size))
                    if index % world == rank and missing(tasks)
                )
                results.forget_failures()
                failures = _work(batch, engine, queue, results)
            finally:
                engine.close()
    yield results.written
    if world == 1 and results.done.by_id:
        if batch.shard_size is not None:
            yield from write_shards(results, batch.shard_size)
        if batch.format == "parquet":
            yield write_table(results)
    if failures:
        raise BatchFailed(
            f"{failures} pictures could not be made, see {str(results.failed)!r}; the same command tries again"
        )


def plan(entries: Iterable[Entry], size: int) -> Iterator[list[Task]]:
    """Every picture of every row, in batches of one group and at most `size`."""
    waiting: dict[str, list[Task]] = {}
    for entry in entries:
        for number in range(entry.images):
            tasks = waiting.setdefault(entry.group, [])
            tasks.append((entry, number))
            if len(tasks) == size:
                yield waiting.pop(entry.group)
    yield from waiting.values()


def missing(tasks: Iterable[Task]) -> int:
    return sum(number not in entry.have for entry, number in tasks)


def _own_device(job: Job, world: int) -> Job:
    """One of several processes on a machine takes the GPU of its number."""
    if world == 1 or job.device not in (None, "cuda"):
        return job
    with quiet_imports():
        import torch
    count = torch.cuda.device_count()
    return dataclasses.replace(job, device=f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}") if count else job


def _engine(batch: Batch) -> Any:
    return RayWorkers(batch) if batch.engine == "ray" else Local(batch)


def _judge(
    batch: Batch, results: Results | RemoteResults, new: Sequence[Problem], every: Sequence[Problem], total: int
) -> Iterator[str]:
    """Tells what is wrong, and ends the run unless wrong rows are to be left out."""
    for problem in new:
        yield str(problem)
    if new and not batch.skip_invalid:
        raise AttnCtrlError(
            f"{len(new)} of {total} requests are wrong; nothing was made\nHINT: --skip-invalid leaves them out"
        )
    results.reject(
        {"line": p.row.line, "errors": p.reasons, "row": p.row.raw.decode("utf-8", "replace")} for p in every
    )
    if new:
        yield f"{len(new)} of {total} requests are wrong and left out, see {str(results.rejected)!r}"


def _ask_model(engine: Any, entries: Sequence[Entry]) -> tuple[list[Entry], list[Problem]]:
    """Rows that the loaded model can serve, and those that it cannot. Rows of one group get one answer."""
    answers: dict[str, str | None] = {}
    fine, refused = [], []
    for entry in entries:
        if not entry.finished and entry.group not in answers:
            answers[entry.group] = engine.refuse(entry.request)
        reason = None if entry.finished else answers[entry.group]
        fine.append(entry) if reason is None else refused.append(Problem(entry.row, (reason,)))
    return fine, refused


def _work(batch: Batch, engine: Any, queue: deque[list[Task]], results: Results | RemoteResults) -> int:
    """Makes all batches; returns how many pictures failed. Files are written while the next batch is made."""
    from tqdm.auto import tqdm

    failures = 0
    pause = 0.5 if sys.stderr.isatty() else 10
    with (
        tqdm(total=sum(map(missing, queue)), unit="image", mininterval=pause) as bar,
        ThreadPoolExecutor(1) as writer,
    ):
        pending: Future | None = None
        for tasks, made, seconds in engine.run(queue):
            if pending is not None:
                pending.result()
                pending = None
            if not isinstance(made, Exception):
                pending = writer.submit(_store, results, batch.image_format, tasks, made, seconds, bar)
            elif _out_of_memory(made) and len(tasks) > 1:
                tqdm.write(
                    f"out of memory with {len(tasks)} pictures at a time: going on with {len(tasks) // 2}",
                    file=sys.stderr,
                )
                made = None
                _free_memory()
                _halve(queue, tasks)
            elif len({entry.id for entry, _ in tasks}) > 1:
                queue.extendleft(reversed([own for own in _by_request(tasks) if missing(own)]))
            else:
                failures += missing(tasks)
                results.fail(_failure(entry, number, made) for entry, number in tasks if number not in entry.have)
                if batch.fail_fast:
                    break
        if pending is not None:
            pending.result()
    return failures


def _store(
    results: Results | RemoteResults,
    ending: str,
    tasks: Sequence[Task],
    made: Sequence[tuple],
    seconds: float,
    bar: Any,
) -> None:
    lines = []
    for (entry, number), (picture, facts) in zip(tasks, made):
        if number in entry.have:
            continue
        data = picture if isinstance(picture, bytes) else encode(picture, ending, facts)
        file = entry.request.files(ending)[number]
        line = {
            **head(entry.id, number, entry.images, entry.mark, entry.group, entry.fingerprint, file),
            "seed": facts["seed"],
            "sha256": hashlib.sha256(data).hexdigest(),
            "seconds": round(seconds / len(tasks), 4),
            "request": _without_masks(facts),
        }
        lines.append((line, data))
    results.commit(lines)
    bar.update(len(lines))


def _without_masks(facts: dict[str, Any]) -> dict[str, Any]:
    """Masks stand in the picture; results keep their names."""
    controls = []
    for control in facts["controls"]:
        regions = [
            {key: value for key, value in region.items() if key != "mask_png"} for region in control.get("regions", ())
        ]
        controls.append({**control, **({"regions": regions} if "regions" in control else {})})
    return {**facts, "controls": controls}


def _failure(entry: Entry, number: int, error: Exception) -> dict[str, Any]:
    text = " ".join(str(error).split())[:2000]
    said = text if isinstance(error, AttnCtrlError) else f"{type(error).__name__}: {text}"
    return {"id": entry.id, "image": number, "line": entry.row.line, "error": said, "prompt": entry.request.prompt}


def _by_request(tasks: Iterable[Task]) -> list[list[Task]]:
    found: dict[str, list[Task]] = {}
    for entry, number in tasks:
        found.setdefault(entry.id, []).append((entry, number))
    return list(found.values())


def _out_of_memory(error: Exception) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    return any(sign in text for sign in ("outofmemory", "out of memory", "memoryerror", "can't allocate memory"))


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _halve(queue: deque[list[Task]], tasks: list[Task]) -> None:
    """Puts a batch back in parts of half its size, and cuts what waits of its group to that size."""
    size, group = len(tasks) // 2, tasks[0][0].group
    waiting = [tasks, *queue]
    queue.clear()
    for item in waiting:
        parts = [item[at : at + size] for at in range(0, len(item), size)] if item[0][0].group == group else [item]
        queue.extend(part for part in parts if missing(part))

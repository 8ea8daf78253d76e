"""`attnctrl hunt`: the head search, with a model, prompts and an objective given by name.

Nothing heavy is imported with this module: what can be said about a request without a model is said before torch is loaded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._quiet import quiet_imports
from ..errors import AttnCtrlError
from .batch.cluster import Pool, engine_problems
from .generate import Job


if TYPE_CHECKING:
    from ..search.hunt import Batch, Scored

WRITTEN = ("head_set.json", "head_map.png", "result.md", "result.json")


@dataclass(frozen=True)
class Search:
    """One run of `attnctrl hunt`. `options` are arguments of `hunt_heads`, `call` those of the pipeline, None for its own; `workers`
    are those of the engine "ray", None for one a GPU."""

    prompts: tuple[str, ...]
    file: Path | None = None
    objective: str = "icons"
    seeds: str | None = None
    model: str = "builtin:icons-t2i"
    dtype: str | None = None
    device: str | None = None
    variant: str | None = None
    revision: str | None = None
    lora: str | None = None
    attention_backend: str | None = None
    cpu_offload: bool = False
    output: Path = Path("hunt")
    engine: str = "local"
    workers: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if wrong := engine_problems(self.engine, self.workers):
            raise AttnCtrlError("; ".join(wrong))

    def all_prompts(self) -> list[str]:
        """Those of the command line, then those of the file; empty lines do not count."""
        found = list(self.prompts)
        if self.file is not None:
            try:
                found += [line.strip() for line in self.file.read_text(encoding="utf-8").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise AttnCtrlError(f"--prompts {str(self.file)!r} cannot be read: {error}") from None
        if not found:
            raise AttnCtrlError("there is no prompt\nHINT: --prompt 'a red cat', or --prompts FILE with one a line")
        return found

    def all_seeds(self) -> list[int] | None:
        if self.seeds is None:
            return None
        try:
            return [int(word) for word in self.seeds.split(",")]
        except ValueError:
            raise AttnCtrlError(f"--seeds {self.seeds!r} are no numbers\nHINT: --seeds 0,1,2") from None

    def job(self, prompt: str) -> Job:
        """The part of the request that `generate` knows too, checked."""
        shared = {name: self.options[name] for name in ("seed", "steps", "batch_size") if name in self.options}
        return Job(
            prompt=prompt,
            model=self.model,
            dtype=self.dtype,
            device=self.device,
            variant=self.variant,
            revision=self.revision,
            lora=self.lora,
            attention_backend=self.attention_backend,
            cpu_offload=self.cpu_offload,
            output=self.output,
            guidance_scale=self.options.get("guidance_scale") or 0.0,
            **shared,
            **self.call,
        )


class Scorer:
    """A loaded pipeline and objective that score batches of candidates."""

    def __init__(self, job: Job, objective: str):
        with quiet_imports():
            from ..search import objective_by_name
            from .loading import load_pipeline, pick_device
        self.objective = objective_by_name(objective, device=pick_device(job.device))
        self.pipeline, self.made = load_pipeline(job)

    def dtype(self) -> str:
        return self.made["dtype"]

    def score(self, batch: Batch) -> Scored:
        from ..search.hunt import score_batch

        return score_batch(self.pipeline, self.objective, batch)


def run_search(search: Search) -> Iterator[Path]:
    """Searches and yields the files that were written."""
    prompts, seeds = search.all_prompts(), search.all_seeds()
    job = search.job(prompts[0])
    with quiet_imports():
        from ..search import hunt_heads
        from ..search.objectives import asked_of

    if search.objective == "icons":  # it reads only captions of the icon world
        for prompt in prompts:
            asked_of(prompt)
    call = {name: value for name, value in search.call.items() if value is not None}
    with _engine(search, job) as (scorer, options):
        hunt_heads(
            scorer.pipeline,
            prompts,
            scorer.objective,
            seeds=seeds,
            output=search.output,
            call=call,
            **options,
            **search.options,
        )
    yield from (search.output / name for name in WRITTEN)


@contextmanager
def _engine(search: Search, job: Job) -> Iterator[tuple[Scorer, dict[str, Any]]]:
    """(a loaded scorer, arguments of `hunt_heads`). Beside workers the pipeline here only tells what is searched: it stays on the CPU."""
    if search.engine == "local":
        yield Scorer(job, search.objective), {}
        return
    pool = Pool(Scorer, job, search.objective, count=search.workers)
    try:
        here = replace(job, device="cpu", dtype=pool.ask("dtype"), attention_backend=None, cpu_offload=False)
        yield Scorer(here, search.objective), {"workers": partial(_in_order, pool)}
    finally:
        pool.close()


def _in_order(pool: Pool, batches: Sequence[Batch]) -> Iterator[Scored]:
    """Scores of all batches, in their order: the record is that of one process."""
    ready: dict[int, Scored] = {}
    told = 0
    for (number, _), made, _ in pool.run(deque(enumerate(batches)), "score", lambda item: (item[1],)):
        if isinstance(made, Exception):
            raise made
        ready[number] = made
        while told in ready:
            yield ready.pop(told)
            told += 1

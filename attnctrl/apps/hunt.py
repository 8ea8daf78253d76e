"""`attnctrl hunt`: the head search, with a model, prompts and an objective given by name.

Nothing heavy is imported with this module: what can be said about a request without a model is said before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AttnCtrlError
from .generate import Job


WRITTEN = ("head_set.json", "head_map.png", "result.md", "result.json")


@dataclass(frozen=True)
class Search:
    """One run of `attnctrl hunt`. `options` are arguments of `hunt_heads`, `call` those of the pipeline, None for its own."""

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
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

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


def run_search(search: Search) -> Iterator[Path]:
    """Searches and yields the files that were written."""
    prompts, seeds = search.all_prompts(), search.all_seeds()
    job = search.job(prompts[0])
    from .._quiet import quiet_imports

    with quiet_imports():
        from ..search import hunt_heads, objective_by_name
        from ..search.objectives import asked_of
        from .loading import load_pipeline, pick_device

    if search.objective == "icons":  # it reads only captions of the icon world
        for prompt in prompts:
            asked_of(prompt)
    objective = objective_by_name(search.objective, device=pick_device(job.device))
    pipeline, _ = load_pipeline(job)
    call = {name: value for name, value in search.call.items() if value is not None}
    hunt_heads(pipeline, prompts, objective, seeds=seeds, output=search.output, call=call, **search.options)
    yield from (search.output / name for name in WRITTEN)

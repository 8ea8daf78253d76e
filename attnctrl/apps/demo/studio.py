"""The loaded models of the demo and the one thread that owns them: pictures and answers in the order in which they were asked for."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..._quiet import quiet_imports
from ...errors import AttnCtrlError
from ...icons.models import PREFIX
from ..batch.pictures import encode
from ..batch.request import Request
from ..generate import Job, call_arguments, picture_facts, sample
from .progress import Step, Stopped, Watch


if TYPE_CHECKING:
    from ...controls import Control
    from .answers import Answer, Writing


@dataclass(frozen=True)
class Picture:
    """A finished picture. `file` is a PNG with its whole request. `maps`: where it attended to its regions, (regions, rows, columns), or why
    that is not known; None where it was not asked for."""

    title: str
    file: Path
    image: Image.Image
    facts: dict[str, Any]
    maps: Any = None


@dataclass(frozen=True)
class Model:
    """What is loaded. `layers`: heads of every layer that has a number. `size`: (width, height) of its pictures."""

    job: Job
    pipeline: Any
    made: dict[str, Any]
    layers: tuple[int, ...]
    size: tuple[int, int]

    @property
    def absent(self) -> dict[str, None]:
        """Parts that the pipeline was saved without and that diffusers asks for by name."""
        from ..loading import absent_parts

        optional = getattr(self.pipeline, "_optional_components", ())
        return {name: None for name in absent_parts(dict(self.pipeline.config)) if name not in optional}


@dataclass
class Visitor:
    """One open page or client: its pictures, and what its Stop button sets."""

    folder: Path
    stop: Event

    def begin(self) -> Event:
        """A new Stop for new work."""
        self.stop = Event()
        return self.stop


class Studio:
    """A model and its visitors.

    Args:
        job: model, device and the like; what it draws is not used.
        may_choose: visitors may load other models.
        vlm: hub id or folder of the vision-language model that answers questions; None for none.
    """

    def __init__(self, job: Job, may_choose: bool = False, vlm: str | None = None):
        self.vlm_name = vlm
        self.may_choose = may_choose
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="attnctrl-demo")
        self._lock = Lock()
        self._visitors: dict[str, Visitor] = {}
        self._root = Path(tempfile.mkdtemp(prefix="attnctrl-demo-"))
        self._loaded = self._worker.submit(_load, job)
        self._answering = None if vlm is None else self._worker.submit(_load_vlm, vlm, job)

    @property
    def model(self) -> Model:
        """Waits until it is there. Raises what went wrong."""
        return self._loaded.result()

    @property
    def vlm(self) -> Any:
        """The `GroundedVLM`; waits until it is there. Raises what went wrong."""
        if self._answering is None:
            raise AttnCtrlError("there is no vision-language model here\nHINT: attnctrl demo --vlm MODEL")
        return self._answering.result()

    def choose(self, name: str) -> Model:
        """Loads another model for everybody; the old one stays where that fails."""
        name = name.strip()
        if not self.may_choose:
            raise AttnCtrlError(
                "the model was fixed when this demo was started\nHINT: attnctrl demo --allow-model-choice"
            )
        if not name.startswith(PREFIX) and Path(name).expanduser().exists():
            raise AttnCtrlError("folders are not opened from here\nHINT: a built-in model or a hub id")
        job = dataclasses.replace(self.model.job, model=name, revision=None, variant=None, lora=None)
        loading = self._worker.submit(_load, job)
        loading.result()
        self._loaded = loading
        return self.model

    def visitor(self, key: str | None) -> Visitor:
        with self._lock:
            if key not in self._visitors:
                self._visitors[key] = Visitor(Path(tempfile.mkdtemp(dir=self._root)), Event())
            return self._visitors[key]

    def stop(self, key: str | None) -> None:
        """Ends what a visitor is waiting for, at the next step."""
        self.visitor(key).stop.set()

    def forget(self, key: str | None) -> None:
        """Ends what a visitor is waiting for, and removes its pictures."""
        with self._lock:
            visitor = self._visitors.pop(key, None)
        if visitor is not None:
            visitor.stop.set()
            shutil.rmtree(visitor.folder, ignore_errors=True)

    def close(self) -> None:
        for key in list(self._visitors):
            self.forget(key)
        self._worker.shutdown(cancel_futures=True)
        shutil.rmtree(self._root, ignore_errors=True)

    def job(self, request: Request) -> Job:
        """The model's job for a request. Built-in models have no long text encoder: one token of it is enough."""
        model, asked = self.model.job, request.job_arguments()
        if asked["max_sequence_length"] is None and model.model.startswith(PREFIX):
            asked["max_sequence_length"] = 1
        return dataclasses.replace(model, **asked, seed=request.seed)

    def refuse(self, request: Request) -> None:
        """Raises AttnCtrlError where the model cannot serve a request, as far as it can be told without a picture."""
        self._worker.submit(self._check, request).result()

    def draw(
        self,
        asked: Sequence[tuple[str, Request]],
        folder: Path,
        stop: Event,
        previews: bool = False,
        maps: bool = False,
    ) -> Iterator[Step | Picture]:
        """Makes one picture for each (title, request), with files below `folder`. Raises Stopped after `stop` was set.

        Args:
            maps: record where the first picture attends to its regions.
        """
        for number, (title, request) in enumerate(asked):
            first = maps and number == 0
            yield from self._turn(partial(self._make, title, request, folder, stop, previews, first), stop)

    def ask(
        self,
        asked: Sequence[tuple[str, Sequence[Control]]],
        image: Image.Image,
        question: str,
        tokens: int,
        stop: Event,
    ) -> Iterator[Writing | Answer]:
        """Answers a question about a picture once for each (title, controls). Raises Stopped after `stop` was set.

        Args:
            tokens: of the longest answer.
        """
        from .answers import write_answer

        vlm = self.vlm
        for title, controls in asked:
            yield from self._turn(partial(write_answer, vlm, title, controls, image, question, tokens, stop), stop)

    def _turn(self, work: Callable[[Callable[[Any], None]], Any], stop: Event) -> Iterator[Any]:
        """What some work tells, then its result. It waits for its turn behind what others asked for."""
        told: SimpleQueue[Any] = SimpleQueue()
        making = self._worker.submit(work, told.put)
        making.add_done_callback(lambda _: told.put(None))
        try:
            while (event := told.get()) is not None:
                yield event
            yield making.result()
        except GeneratorExit:  # the page is gone, or Stop was pressed
            stop.set()
            raise

    def _check(self, request: Request) -> None:
        with quiet_imports():
            from ...processors import Session
            from ...processors.phrases import with_phrases
        Session(self.model.pipeline, *with_phrases(request.make_controls(), request.prompt, self.model.pipeline))
        call_arguments(self.job(request), self.model.pipeline)

    def _make(
        self,
        title: str,
        request: Request,
        folder: Path,
        stop: Event,
        previews: bool,
        maps: bool,
        tell: Callable[[Step], None],
    ) -> Picture:
        from ...processors import Session
        from ...processors.phrases import with_phrases
        from .attention import region_maps

        if stop.is_set():
            raise Stopped
        model, job, controls = self.model, self.job(request), request.make_controls()
        arguments = call_arguments(job, model.pipeline)
        known = inspect.signature(model.pipeline.__call__).parameters
        size = job.width or model.size[0], job.height or model.size[1]

        def run(*recorders: Any) -> Image.Image:
            tell(Step(title, 0, job.steps))
            watch = Watch(title, job.steps, stop, tell, size if previews else None)
            callback = {"callback_on_step_end": watch} if "callback_on_step_end" in known else {}
            placed = with_phrases(controls, job.prompt, model.pipeline)
            with Session(model.pipeline, *placed, *recorders) if controls else nullcontext():
                return sample(model.pipeline, arguments | callback, [job.seed], None)[0]

        recorder = region_maps(model.pipeline, controls) if maps else None
        found = None
        if recorder is None:
            image = run()
        else:
            try:
                image = run(recorder)
                found = recorder.maps()[0]
            except AttnCtrlError as error:  # of the recorder, or the picture fails again
                image, found = run(), str(error).splitlines()[0]
        facts = {**job.request(controls, model.made), **picture_facts(image, job.seed, 0, 1)}
        file = Path(tempfile.mkdtemp(dir=folder)) / f"{job.stem(facts)}-{job.seed}.png"
        file.write_bytes(encode(image, "png", facts))
        return Picture(title, file, image, facts, found)


def _load(job: Job) -> Model:
    with quiet_imports():
        from ...families import find_family
        from ..loading import denoiser, load_pipeline

    pipeline, made = load_pipeline(job)
    core = denoiser(pipeline)
    layers = {site.layer: site.heads for site in find_family(core).sites(core) if site.primary}
    factor = getattr(pipeline, "vae_scale_factor", 8)
    side = getattr(core.config, "sample_size", None) or getattr(pipeline, "default_sample_size", 128)
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return Model(job, pipeline, made, tuple(layers[n] for n in sorted(layers)), (width * factor, height * factor))


def _load_vlm(name: str, job: Job) -> Any:
    with quiet_imports():
        import torch

        from ...loading import pick_device, quiet_loading
        from ...pipelines.vlm import GroundedVLM
        from ..loading import pick_dtype

    device = pick_device(job.device)
    dtype = getattr(torch, pick_dtype(job.dtype, device))
    with quiet_loading():
        return GroundedVLM.from_pretrained(name, device=str(device), dtype=dtype)

"""`MultiSubjectPipeline`: any pipeline with an IP-Adapter, called with pictures of subjects and where each belongs.

Yu et al., "AnyMS: Bottom-up Attention Decoupling for Layout-guided and Training-free Multi-subject Customization", 2025, arXiv
2512.23537; see `SubjectLayout`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffusers.utils import load_image

from ..controls import Control, SubjectLayout
from ..controls.spec import make_control
from ..controls.subject_masks import as_regions
from ..errors import AttnCtrlError
from ..families import find_denoiser
from ..loading import one_line
from ..processors import Session
from ..processors.adapters import adapter_count, reads_one_by_one
from ..regions import Region
from ..requests import EARLY
from .base import ControlledPipeline


_SOURCE = "pretrained_model_name_or_path_or_dict"
_GIVEN = ("ip_adapter_image", "ip_adapter_image_embeds")
_SUBJECTS = "HINT: subjects=[(picture, (x0, y0, x1, y1)), (picture, 'a red cat@0.5,0,1,1')]"


class MultiSubjectPipeline(ControlledPipeline):
    """A pipeline whose call takes `subjects`: pictures, each with the place where its subject is to be.

        pipeline = ac.pipelines.MultiSubjectPipeline.from_pretrained(
            "stabilityai/stable-diffusion-xl-base-1.0",
            ip_adapter={
                "pretrained_model_name_or_path_or_dict": "h94/IP-Adapter",
                "subfolder": "sdxl_models",
                "weight_name": "ip-adapter_sdxl.bin",
            },
            ip_adapter_scale=0.7,
        )
        image = pipeline("a cat and a dog", subjects=[("cat.png", (0, 0.2, 0.5, 1)), ("dog.png", (0.5, 0.2, 1, 1))]).images[0]

    Settings are the arguments of `SubjectLayout` but `subjects`, and

    - `isolate`: image tokens of one subject do not see those of another (`Isolation`, or that of `RegionalPrompts`); False.
    - `base_weight`: share of the whole prompt in subjects that have a description, as in `RegionalPrompts`.
    - `regions_stop`: fraction of the steps at which descriptions and isolation end; None for 0.3 with `isolate`, else 1.
    - `ip_adapter`: arguments of the pipeline's `load_ip_adapter`, by name, and `ip_adapter_scale` of its `set_ip_adapter_scale`; in the
      constructor. Without them both calls are yours, on this pipeline or before.
    """

    _LOADING = {"ip_adapter": "load_ip_adapter", "ip_adapter_scale": "set_ip_adapter_scale"}
    _REGIONS = ("isolate", "base_weight", "regions_stop")

    def __init__(self, pipe: Any, controls: Control | Sequence[Control] = (), **settings: Any):
        super().__init__(pipe, controls, **settings)
        adapter = settings.get("ip_adapter")
        if adapter is not None:
            source = adapter.get(_SOURCE)
            named = isinstance(source, (str, os.PathLike))
            if named and Path(source).expanduser().is_dir():
                source = str(Path(source).expanduser().resolve())
                adapter = {**adapter, _SOURCE: source}
                self.settings = {**settings, "ip_adapter": adapter}
            what = f"the IP-Adapter {os.fspath(source)!r}" if named else "the IP-Adapter"
            with one_line(f"{what} cannot be loaded", os.fspath(source) if named else "."):
                pipe.load_ip_adapter(**adapter)
        if settings.get("ip_adapter_scale") is not None:
            self._adapters()
            pipe.set_ip_adapter_scale(settings["ip_adapter_scale"])

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        own = (item.name for item in fields(SubjectLayout) if item.name != "subjects")
        return (*own, *cls._REGIONS, *cls._LOADING)

    def _check(self) -> None:
        if not hasattr(self.pipe, "load_ip_adapter"):
            raise AttnCtrlError(
                f"{type(self.pipe).__name__} knows no IP-Adapters\n"
                "HINT: the pipelines of Stable Diffusion, SDXL, SD3 and FLUX.1 have load_ip_adapter"
            )
        adapter = self.settings.get("ip_adapter")
        if not (adapter is None or isinstance(adapter, Mapping)):
            raise AttnCtrlError(f"ip_adapter={adapter!r} is no mapping of the arguments of load_ip_adapter")
        halves = [Region("left", box=(0, 0, 0.5, 1)), Region("right", box=(0.5, 0, 1, 1))]
        self._controls(halves, described=True, settings=self.settings)
        Session(self.pipe, *self.controls)  # not attached: it only checks

    def _controls(self, places: Sequence[Region], described: bool, settings: dict[str, Any]) -> list[Control]:
        """The layout, and what keeps descriptions in their places and subjects apart."""
        own = {name: value for name, value in settings.items() if name not in (*self._LOADING, *self._REGIONS)}
        found = [make_control("SubjectLayout", {**own, "subjects": places})]
        isolate, stop = settings.get("isolate", False), settings.get("regions_stop")
        window = {"stop": (EARLY if isolate else 1.0) if stop is None else stop}
        if described:
            weight = {"base_weight": settings["base_weight"]} if "base_weight" in settings else {}
            found.append(make_control("RegionalPrompts", {"regions": places, "isolate": isolate, **weight, **window}))
        elif isolate and len(places) > 1:
            overlap = "priority" if found[0].overlap == "priority" else "union"
            found.append(make_control("Isolation", {"subjects": places, "overlap": overlap, **window}))
        return found

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        subjects: Sequence[Any] = (),
        *,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Any = None,
        num_images_per_prompt: int | None = None,
        output_type: str | None = None,
        callback_on_step_end: Callable | None = None,
        return_dict: bool = True,
        **more: Any,
    ) -> Any:
        """Makes pictures; returns what the wrapped pipeline returns.

        Args:
            prompt: of the whole picture, or one per picture; all have the same subjects.
            subjects: pairs (picture, place). Pictures are PIL images, files or whatever the pipeline's own `ip_adapter_image`
                takes. Places are boxes in fractions, masks, `Region`s or texts such as ``"a red cat@0,0,0.5,1"``; either all or none have a
                description. With `ip_adapter_image` or `ip_adapter_image_embeds` among the arguments, places alone. One adapter
                reads all pictures, as many adapters as subjects one each.
            more: settings for this call, and the pipeline's own arguments.

        Named arguments that are None are left to the pipeline's defaults.
        """
        named = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "generator": generator,
            "num_images_per_prompt": num_images_per_prompt,
            "output_type": output_type,
            "callback_on_step_end": callback_on_step_end,
        }
        arguments, settings = self._part({k: v for k, v in named.items() if v is not None} | more)
        if wrong := [name for name in self._LOADING if name in settings]:
            raise AttnCtrlError(f"{wrong[0]} belongs to the constructor\nHINT: pipeline.{self._LOADING[wrong[0]]}(…)")
        adapters = self._adapters()
        given = any(arguments.get(name) is not None for name in _GIVEN)
        pictures, places, described = _parted(subjects, given)
        if not given:
            arguments |= self._pictures(pictures, adapters)
        controls = self._controls(places, described, self.settings | settings)
        with Session(self.pipe, *self.controls, *controls) as self.session:
            output = self.pipe(**arguments)
        return output if return_dict else output.to_tuple()

    def _adapters(self) -> int:
        count = adapter_count(find_denoiser(self.pipe)[0])
        if count == 0:
            raise AttnCtrlError(
                "no IP-Adapter is loaded\nHINT: pipeline.load_ip_adapter(…), or MultiSubjectPipeline(…, ip_adapter={…})"
            )
        return count

    def _pictures(self, pictures: list[Any], adapters: int) -> dict[str, Any]:
        """The pictures as the wrapped pipeline takes them."""
        if getattr(self.pipe, "image_encoder", None) is None:
            raise AttnCtrlError(
                f"this {type(self.pipe).__name__} has no image encoder to read pictures with\n"
                "HINT: load_ip_adapter with an image encoder, or ip_adapter_image_embeds=… and places alone"
            )
        if reads_one_by_one(find_denoiser(self.pipe)[0]):
            return {"ip_adapter_image": pictures}
        if adapters == 1:
            return {"ip_adapter_image": [pictures]}
        if adapters == len(pictures):
            return {"ip_adapter_image": [[picture] for picture in pictures]}
        raise AttnCtrlError(
            f"{len(pictures)} subjects and {adapters} IP-Adapters, so it is open which adapter reads which picture\n"
            "HINT: ip_adapter_image=[[…], […]], a list per adapter, and subjects=[place, …] in that order"
        )

    def save_pretrained(self, folder: str | os.PathLike, copy_model: bool = False, **options: Any) -> Path:
        if copy_model and self.settings.get("ip_adapter") is None and adapter_count(find_denoiser(self.pipe)[0]):
            raise AttnCtrlError(
                "a copy of the model does not hold the IP-Adapter that was loaded on it\n"
                "HINT: MultiSubjectPipeline(pipe, ip_adapter={…}), which from_pretrained loads again"
            )
        return super().save_pretrained(folder, copy_model, **options)


def _parted(subjects: Any, given: bool) -> tuple[list[Any], list[Region], bool]:
    """(pictures, places, whether these have descriptions). `given`: the pictures are arguments of their own."""
    if isinstance(subjects, (str, Region)) or not len(subjects):
        raise AttnCtrlError(f"subjects={subjects!r} is no list of subjects\n{_SUBJECTS}")
    pictures, places, described = [], [], []
    for number, subject in enumerate(subjects, 1):
        place = subject
        if not given:
            if not isinstance(subject, (list, tuple)) or len(subject) != 2:
                raise AttnCtrlError(f"subject {number} is no pair of picture and place: {subject!r:.80}\n{_SUBJECTS}")
            picture, place = subject
            with one_line(f"the picture of subject {number} cannot be read"):
                pictures.append(load_image(os.fspath(picture)) if isinstance(picture, (str, os.PathLike)) else picture)
        found = as_regions(place, f"subject {number}")
        if len(found) > 1:
            raise AttnCtrlError(f"subject {number} has {len(found)} places\nHINT: one mask of them all")
        places.append(found[0])
        told = isinstance(place, (Region, str)) and (found[0].prompt.strip() or found[0].prompt_embeds is not None)
        described.append(bool(told))
    if any(described) and not all(described):
        raise AttnCtrlError(
            f"subject {described.index(False) + 1} has no description, and others have\nHINT: all or none, e.g. 'a red cat@0,0,0.5,1'"
        )
    return pictures, places, all(described)

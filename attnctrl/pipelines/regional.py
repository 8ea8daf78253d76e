"""`RegionalPipeline`: any text-to-image pipeline, called with regions.

Chen et al., "Training-free Regional Prompting for Diffusion Transformers", 2024, arXiv 2411.02395; see `RegionalPrompts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from ..controls import RegionalPrompts
from ..controls.spec import make_control
from ..errors import AttnCtrlError
from ..processors import Session
from ..processors.phrases import find_phrases
from ..regions import Region
from ..requests import EARLY
from .base import ControlledPipeline, joined, of_prompt


Regions = Sequence[Region | str]


class RegionalPipeline(ControlledPipeline):
    """A pipeline whose call takes `regions`, each with a prompt of its own.

        pipeline = ac.pipelines.RegionalPipeline.from_pretrained("builtin:icons-t2i", base_weight=0.2)
        image = pipeline("a cat and a car", regions=["a red cat@0,0,0.5,1", "a blue car@0.5,0,1,1"]).images[0]

    A region can be a phrase of the prompt, `ac.Region.phrase("a red cat", box=…)`, and can have a `negative_prompt`. Settings are the
    arguments of `RegionalPrompts` but `regions`, for every call in the constructor or for one in the call. Two
    notes: without `stop`, isolated regions rule the first 0.3 of the steps (to the end they would tear the picture apart); and a
    name that the pipeline's own call has too (`strength` of image-to-image pipelines) means the pipeline's in a call.
    """

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        return tuple(item.name for item in fields(RegionalPrompts) if item.name != "regions")

    def _control(self, regions: Regions, settings: dict[str, Any]) -> RegionalPrompts:
        settings = self.settings | settings
        if settings.get("isolate", True) and settings.get("start", 0.0) < EARLY:
            settings = {"stop": EARLY} | settings
        return make_control("RegionalPrompts", {"regions": regions, **settings})

    def _located(self, regions: tuple[Region, ...], prompt: str | list[str] | None) -> tuple[Region, ...]:
        """The regions with their phrases looked up in the prompt."""
        return find_phrases(regions, prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt, self.pipe)

    def _check(self) -> None:
        if "regions" in self.settings:
            raise AttnCtrlError("regions belong to the call\nHINT: pipeline(prompt, regions=[…])")
        everywhere = Region("everything", box=(0, 0, 1, 1))
        Session(self.pipe, *self.controls, self._control([everywhere], {}))  # not attached: it only checks

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        regions: Regions | Sequence[Regions] = (),
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
            prompt: of the whole picture, or one per picture.
            regions: `Region`s or texts such as ``"a red cat@0,0,0.5,1"``, the same for every prompt; or one list of them per
                prompt. Then prompts run one after the other, and each gives what a call of its own would give. Without any, the
                pipeline runs untouched.
            generator: one, or a list with one per picture.
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
        per_prompt = _per_prompt(regions, prompt)
        if per_prompt is None and isinstance(prompt, list) and any(region.of_prompt for region in _parsed(regions)):
            per_prompt = [regions] * len(prompt)  # each prompt has its phrases at other tokens
        if per_prompt is None:
            output = self._run(self._control(self._located(_parsed(regions), prompt), settings), arguments)
        else:
            output = joined(list(self._one_by_one(per_prompt, settings, arguments)))
        return output if return_dict else output.to_tuple()

    def _one_by_one(self, per_prompt: Sequence[Regions], settings: dict[str, Any], arguments: dict[str, Any]):
        """The outputs of one call per prompt."""
        count = len(per_prompt)
        images = arguments.get("num_images_per_prompt", arguments.get("num_videos_per_prompt", 1))
        calls = []
        for index, regions in enumerate(per_prompt):
            where = f"prompt {index + 1} of {count}"
            own = of_prompt(arguments, index, count, images)
            try:
                places = self._located(_parsed(regions, where), own.get("prompt"))
            except AttnCtrlError as error:
                raise AttnCtrlError(str(error) if where in str(error) else f"{where}: {error}") from None
            calls.append((where, self._control(places, settings), own))
        for where, control, own in calls:
            try:
                output = self._run(control, own)
            except AttnCtrlError as error:
                raise AttnCtrlError(f"{where}: {error}") from None
            yield output


def _per_prompt(regions: Any, prompt: str | list[str] | None) -> list[Regions] | None:
    """One list of regions per prompt; None when all prompts share them."""
    if isinstance(regions, (str, Region)) or not any(
        isinstance(item, (list, tuple)) or item is None for item in regions
    ):
        return None
    wrong = [item for item in regions if not (item is None or isinstance(item, (list, tuple)))]
    if wrong:
        raise AttnCtrlError(
            f"regions mix lists with {_shown(wrong[0])}\nHINT: regions for all prompts, or one list of them per prompt"
        )
    count = len(prompt) if isinstance(prompt, list) else len(regions) if prompt is None else 1
    if len(regions) != count or isinstance(prompt, str):
        raise AttnCtrlError(
            f"{len(regions)} lists of regions for {'one prompt' if count == 1 else f'{count} prompts'}\n"
            "HINT: a list of prompts, and one list of regions for each (an empty one for none)"
        )
    return [item or () for item in regions]


def _parsed(regions: Any, where: str = "") -> tuple[Region, ...]:
    """Regions from what people write. Raises for one that cannot be read, or has no prompt, with its number."""
    if isinstance(regions, (str, Region)):
        regions = (regions,)
    found = []
    for number, item in enumerate(regions, 1):
        name = f"region {number} of {where}" if where else f"region {number}"
        if not isinstance(item, (str, Region)):
            raise AttnCtrlError(
                f"{name} is {_shown(item)}\nHINT: ac.Region('a red cat', box=(0, 0, 0.5, 1)) or 'a red cat@0,0,0.5,1'"
            )
        region = Region.parse(item) if isinstance(item, str) else item
        if not region.prompt.strip() and region.prompt_embeds is None:
            raise AttnCtrlError(f"{name} has no prompt\nHINT: what it shows, e.g. 'a red cat@0,0,0.5,1'")
        found.append(region)
    return tuple(found)


def _shown(item: Any) -> str:
    return item.describe() if isinstance(item, Region) else f"{item!r:.80}"

"""`StoryPipeline`: the same cast in several scenes, made as one batch whose pictures share what their subjects look like.

Tewel et al., "Training-Free Consistent Text-to-Image Generation" (ConsiStory), 2024, arXiv 2402.03286; Zhou et al., "StoryDiffusion:
Consistent Self-Attention for Long-Range Image and Video Generation", 2024, arXiv 2405.01434; see `SharedAttention`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from string import Formatter
from typing import Any

import torch

from ..controls import SharedAttention, SubjectMasks
from ..controls.spec import make_control
from ..errors import AttnCtrlError
from ..families import find_denoiser, find_family
from ..processors import Session
from ..regions import Region
from .base import ControlledPipeline, of_prompt


FIND = 0.2  # share of the steps after which subjects are looked for
# whose tokens the text stream starts with
_TOKENIZERS = {"sd3": "tokenizer", "unet": "tokenizer", "flux": "tokenizer_2"}
_ARTICLE = re.compile(r"^(an?|the)\s+", re.IGNORECASE)


class StoryPipeline(ControlledPipeline):
    """A pipeline whose call takes a cast and scenes; every picture also attends to the cast in the others.

        pipeline = ac.pipelines.StoryPipeline.from_pretrained("builtin:icons-t2i")
        images = pipeline(
            cast={"hero": "a cat"}, scenes=["{hero} on a striped background", "{hero} left of a red car"]
        ).images

    Where the cast is, is found first: every scene runs alone for the first steps, with its own noise, and the image tokens that attend
    to the words of the cast are its mask. Then all scenes run as one batch with `SharedAttention`: each sees the cast of the others,
    and not their backgrounds. `strength` 0 leaves the pictures as they would be.

    Settings are the arguments of `SharedAttention` but `subjects`; `find`, the share of the steps after which subjects are looked
    for; and `watch` (layers), `blur`, `threshold`, `speck`, `exclusive` for `SubjectMasks`. After a call `found` holds the
    regions that were found in every scene.
    """

    _OWN = (*ControlledPipeline._OWN, "found")
    _FINDING = ("find", "watch", "blur", "threshold", "speck", "exclusive")

    def __init__(self, pipe: Any, controls: Any = (), **settings: Any):
        self.found: list[tuple[Region, ...]] = []
        super().__init__(pipe, controls, **settings)

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        return (*(item.name for item in fields(SharedAttention) if item.name != "subjects"), *cls._FINDING)

    def _control(self, subjects: Sequence[Any] | None, settings: dict[str, Any]) -> SharedAttention:
        sharing = {name: value for name, value in settings.items() if name not in self._FINDING}
        return make_control("SharedAttention", {"subjects": subjects, **sharing})

    def _masks(self, phrases: dict[str, Sequence[int]], settings: dict[str, Any]) -> SubjectMasks:
        names = {"find": "stop", "watch": "layers"}
        finding = {names.get(name, name): settings[name] for name in self._FINDING if name in settings}
        return make_control("SubjectMasks", {"phrases": phrases, "stop": FIND, **finding})

    def _check(self) -> None:
        if "subjects" in self.settings:
            raise AttnCtrlError("subjects belong to the call\nHINT: pipeline(cast, scenes, subjects=[…])")
        Session(self.pipe, *self.controls, self._control(None, self.settings))  # not attached: it only checks
        self._masks({"anything": [0]}, self.settings)

    def __call__(
        self,
        cast: Mapping[str, str],
        scenes: Sequence[str],
        *,
        subjects: Sequence[Any] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **more: Any,
    ) -> Any:
        """Makes one picture per scene; returns what the wrapped pipeline returns.

        Args:
            cast: what each name stands for: ``{"hero": "a red cat"}``.
            scenes: prompts with the names in braces: ``"{hero} on a striped background"``.
            subjects: where the cast is, one entry per scene: a `Region`, a box, a mask, or a list of these. None to find it.
            generator: a list with one per scene, or one from which a seed per scene is drawn.
            more: settings for this call, and the pipeline's own arguments.
        """
        prompts, phrases = _written(cast, scenes)
        arguments, own = self._part(more)
        settings = self.settings | own
        for name in ("num_images_per_prompt", "num_videos_per_prompt"):
            if arguments.get(name, 1) != 1:
                raise AttnCtrlError(f"{name}={arguments[name]}: a scene is one picture\nHINT: several calls")
        generators = _generators(generator, len(prompts))
        self.found = []
        if subjects is None:
            subjects = self.found = [
                self._find(index, prompts, phrases[index], generators, settings, arguments)
                for index in range(len(prompts))
            ]
        elif len(subjects) != len(prompts):
            raise AttnCtrlError(f"subjects have {len(subjects)} entries for {len(prompts)} scenes")
        control = self._control(subjects, settings)
        output = self._run(control, {**arguments, "prompt": prompts, "generator": generators})
        return output if return_dict else output.to_tuple()

    def _find(
        self,
        index: int,
        prompts: list[str],
        phrases: list[str],
        generators: list[torch.Generator],
        settings: dict[str, Any],
        arguments: dict[str, Any],
    ) -> tuple[Region, ...]:
        """The cast's regions in one scene, from the first steps of a run of its own."""
        where = f"scene {index + 1} of {len(prompts)}, {prompts[index]!r}"
        try:
            tokens = SubjectMasks.in_prompt(phrases, prompts[index], self._tokenizer()).phrases
            finder = self._masks(tokens, settings)

            def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                pipe._interrupt = (step + 1) / pipe.num_timesteps >= finder.stop
                return {}

            own = of_prompt(arguments, index, len(prompts))
            copy = torch.Generator(generators[index].device).set_state(generators[index].get_state())
            own |= {"prompt": prompts[index], "generator": copy, "output_type": "latent", "callback_on_step_end": stop}
            with Session(self.pipe, *self.controls, finder):
                self.pipe(**own)
        except AttnCtrlError as error:
            raise AttnCtrlError(f"{where}: {error}") from None
        try:
            return finder.regions()
        except AttnCtrlError as error:
            reason = str(error).partition("\nHINT")[0]
            raise AttnCtrlError(
                f"{where}: {reason}\nHINT: a later find, other layers to watch, exclusive=False, or subjects=[…], one place per scene"
            ) from None

    def _tokenizer(self) -> Any:
        family = find_family(find_denoiser(self.pipe)[0]).name
        if family not in _TOKENIZERS:
            raise AttnCtrlError(
                f"which token of a prompt of {family} is which word is not known; it is for {', '.join(_TOKENIZERS)}\n"
                "HINT: subjects=[…], one box or mask per scene"
            )
        return getattr(self.pipe, _TOKENIZERS[family])


def _written(cast: Mapping[str, str], scenes: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(prompts, the phrases of the cast in each). Raises for a scene without anybody or with somebody unknown."""
    if isinstance(scenes, str) or len(scenes) < 2:
        raise AttnCtrlError("a story has at least two scenes\nHINT: scenes=['{hero} on a beach', '{hero} in a wood']")
    nameless = [name for name, text in cast.items() if not text.strip()]
    if nameless:
        raise AttnCtrlError(
            f"{nameless[0]!r} of the cast has no description\nHINT: cast={{{nameless[0]!r}: 'a red cat'}}"
        )
    prompts, phrases = [], []
    for number, scene in enumerate(scenes, 1):
        try:
            names = [name for _, name, _, _ in Formatter().parse(scene) if name is not None]
        except ValueError as error:
            raise AttnCtrlError(f"scene {number}, {scene!r}: {error}") from None
        unknown = [name for name in names if name not in cast]
        if unknown or not names:
            who = f"names {{{unknown[0]}}}, who is not in the cast" if unknown else "names nobody of the cast"
            known = ", ".join(f"{{{name}}}" for name in cast) or "nobody"
            raise AttnCtrlError(f"scene {number}, {scene!r}, {who}\nHINT: the cast is {known}")
        prompts.append(scene.format(**cast))
        phrases.append([_ARTICLE.sub("", cast[name].strip()) for name in dict.fromkeys(names)])
    return prompts, phrases


def _generators(given: torch.Generator | list[torch.Generator] | None, count: int) -> list[torch.Generator]:
    if isinstance(given, list):
        if len(given) != count:
            raise AttnCtrlError(f"generator has {len(given)} entries for {count} scenes")
        return given
    device = "cpu" if given is None else given.device
    seeds = torch.randint(2**62, (count,), generator=given, device=device).tolist()
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]

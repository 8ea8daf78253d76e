"""Prompts of regions, encoded once and appended to the text of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import AttnCtrlError
from ..regions import Region


if TYPE_CHECKING:
    from ..controls import Control
    from .session import Session


class RegionTexts:
    """The texts that a session appends."""

    def __init__(self, session: Session):
        self.session = session
        self._known: dict[tuple, list[torch.Tensor]] = {}

    def clear(self) -> None:
        self._known.clear()

    def add(
        self, bound: dict[str, Any], controls: tuple[Control, ...], cond: tuple[int, ...] | None
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        """The call with the texts of the controls' regions, and their lengths: those of the prompts, one per region, then those of
        negative prompts, one per region that has one. `cond` are the conditional rows, None for all."""
        family = self.session.family
        found = [(region, getattr(c, "trim_text", None)) for c in controls for region in c.regions_in_use()]
        if not any(region.encoded for region, _ in found):
            return bound, ()
        text, batch = bound[family.text], family.rows(bound)
        alone = cond is not None and len(cond) == batch and family.cfg != "separate" and not bound.get("skip_layers")
        if alone and any(region.has_negative for region, _ in found):
            self.session._note(
                "regions have negative prompts, which nothing follows without the unconditional rows of classifier-free guidance"
            )
        cond = tuple(range(batch)) if cond is None else cond
        key = (text.shape[1], text.dtype, text.device, controls, cond, batch)
        if key not in self._known:
            self._known[key] = self._states(found, text, cond, batch)
        states = self._known[key]
        return family.add_text(bound, states), tuple(state.shape[1] for state in states)

    def _states(
        self, found: list[tuple[Region, int | None]], text: torch.Tensor, cond: tuple[int, ...], batch: int
    ) -> list[torch.Tensor]:
        """Text states (batch, T, C). A negative prompt as long as its region's prompt takes its place in unconditional rows, and
        leaves an empty entry."""
        prompts, behind, nothing = [], [], text.new_zeros(1, 0, text.shape[-1])
        uncond = torch.tensor([row not in cond for row in range(batch)], device=text.device)
        for region, trim in found:
            name, own, against = f"region {region.prompt!r}", nothing, nothing
            if cond and not region.of_prompt:
                own = self._encode(name, region.prompt, region.prompt_embeds, text)[:, :trim]
            if region.has_negative and len(cond) < batch:
                name, embeds = f"{name}, negative prompt", region.negative_prompt_embeds
                against = self._encode(name, region.negative_prompt, embeds, text)[:, :trim]
            if 0 < own.shape[1] == against.shape[1]:
                own, against = torch.where(uncond[:, None, None], against, own), nothing
            prompts.append(own)
            behind += [against] if region.has_negative else []
        return [states.expand(batch, -1, -1) for states in (*prompts, *behind)]

    def _encode(self, name: str, prompt: str | None, embeds: torch.Tensor | None, text: torch.Tensor) -> torch.Tensor:
        """(1, T, C) text states."""
        pipeline, family = self.session.pipeline, self.session.family
        if embeds is not None:
            if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[-1] != text.shape[-1]:
                raise AttnCtrlError(
                    f"{name}: prompt_embeds is {tuple(embeds.shape)}, the model takes (1, T, {text.shape[-1]})"
                )
            return embeds.to(text)
        if pipeline is None:
            raise AttnCtrlError(
                f"{name}: a bare denoiser has no text encoder\nHINT: attach to the pipeline, or give Region(prompt_embeds=…)"
            )
        with torch.no_grad():
            return family.encode(pipeline, [prompt], text.shape[1], text.device).to(text)

"""The IP-Adapter of a pipeline under a `SubjectLayout`: which attention calls are its, and whose pictures they carry.

Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models", 2023, arXiv 2308.06721. In diffusers an
adapter's processor makes the model's own attention call and then one for each adapter: the keys are the tokens of its pictures, in SD3
behind the keys of the image. Which adapter a call is for is known from the projection of keys that ran before it, as UNets leave out
adapters whose scale is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..controls import SubjectLayout
from ..errors import AttnCtrlError
from ..sites import Site
from .gates import Gate


_ARGUMENTS = (("added_cond_kwargs", "image_embeds"), ("joint_attention_kwargs", "ip_adapter_image_embeds"))


class Adapters:
    """The IP-Adapters of a denoiser, whose pictures one control places."""

    def __init__(self, control: SubjectLayout, model: nn.Module, touched: dict[str, torch.Tensor], sites: list[Site]):
        there = {site.path: site.layer for site in sites if has_adapter(model.get_submodule(site.path))}
        if not there:
            raise AttnCtrlError(
                f"SubjectLayout places the pictures of an IP-Adapter, and this {type(model).__name__} has none\n"
                "HINT: pipe.load_ip_adapter(…), then attach"
            )
        self.control, self.model = control, model
        self.touched = {path: heads for path, heads in touched.items() if path in there}
        if not self.touched:
            layers = ", ".join(map(str, sorted(set(there.values()))))
            raise AttnCtrlError(
                f"SubjectLayout: no IP-Adapter is in layers {control.layers!r}\nHINT: it is in {layers}"
            )
        self._subjects: list[range] = []  # of every adapter
        self._pictures: list[int] = []  # that this call of the denoiser brings to every adapter

    def gates(self) -> list[Gate]:
        """SD3 reads one picture per row of the batch; a gate lets it read several, one by one."""
        return [Gate("image_proj", self.model.image_proj, _read_each)] if reads_one_by_one(self.model) else []

    def read(self, bound: dict[str, Any], batch: int, repeats: bool) -> dict[str, Any]:
        """Notes the pictures of a call; returns the call, with those of SD3 as (batch, pictures, tokens, channels).

        Args:
            repeats: the unconditional call of a step that has two; it may bring one picture to each adapter.
        """
        masks = [
            name
            for name in ("cross_attention_kwargs", "joint_attention_kwargs")
            if "ip_adapter_masks" in (bound.get(name) or {})
        ]
        if masks:
            raise AttnCtrlError(
                f"{masks[0]} has ip_adapter_masks, and SubjectLayout places the pictures already\nHINT: leave one of them out"
            )
        count = len(self.control.subjects)
        found = [(name, key) for name, key in _ARGUMENTS if (bound.get(name) or {}).get(key) is not None]
        if not found:
            raise AttnCtrlError(
                f"SubjectLayout has {count} subjects, and the call brings no pictures\n{self._hint()}"
                + "; the pipeline leaves pictures out while the adapter's scale is 0" * reads_one_by_one(self.model)
            )
        ((name, key),) = found
        embeds = bound[name][key]
        if isinstance(embeds, torch.Tensor):
            if reads_one_by_one(self.model) and embeds.ndim == 3 and len(embeds) % batch == 0:
                embeds = embeds.unflatten(0, (batch, -1))
                bound = {**bound, name: {**bound[name], key: embeds}}
            pictures, rows = [embeds.shape[1] if embeds.ndim == 4 else 1], {len(embeds)}
        else:
            pictures, rows = [one.shape[1] for one in embeds], {len(one) for one in embeds}
        if rows != {batch}:
            raise AttnCtrlError(
                f"the pictures of the IP-Adapter have {max(rows)} rows, and the batch has {batch}\n"
                "HINT: embeddings are (rows of the batch, pictures, …), also where these are equal"
            )
        if not repeats:
            if sum(pictures) != count:
                told = " + ".join(map(str, pictures))
                raise AttnCtrlError(
                    f"SubjectLayout has {count} subjects, and the call brings {told} pictures\n{self._hint()}"
                )
            ends = torch.tensor([0, *pictures]).cumsum(0).tolist()
            self._subjects = [range(*pair) for pair in zip(ends, ends[1:])]
        elif any(one not in (1, len(subjects)) for one, subjects in zip(pictures, self._subjects, strict=True)):
            raise AttnCtrlError(
                f"the IP-Adapter has {' + '.join(map(str, pictures))} negative pictures for {count} subjects\n"
                "HINT: one per adapter, or one per subject"
            )
        self._pictures = pictures
        return bound

    def _hint(self) -> str:
        pictures = "[first, second]" if reads_one_by_one(self.model) else "[[first, second]]"
        return f"HINT: one picture per subject, in order, pipe(…, ip_adapter_image={pictures})"

    def calls(self, site: Site, inner: Any, grid: Callable[[int], tuple[int, ...]]) -> AdapterCalls:
        """What catches the adapters' calls in one run of a processor. `grid` is that of a number of image tokens."""
        return AdapterCalls(self.control, site, inner, grid, self._subjects, self._pictures)


class AdapterCalls:
    """Inside it, an adapter's attention calls at a site are those of the control."""

    def __init__(
        self, control: SubjectLayout, site: Site, inner: Any, grid, subjects: list[range], pictures: list[int]
    ):
        self.control, self.site, self.inner, self.grid = control, site, inner, grid
        self.subjects, self.pictures = subjects, pictures
        self.ran: list[tuple[int, int]] = []  # adapters whose attention comes next, and their numbers of keys
        self.taken = 0

    def __enter__(self) -> AdapterCalls:
        keys = self.inner.to_k_ip
        keys = list(keys) if isinstance(keys, nn.ModuleList) else [keys]
        self._hooks = [one.register_forward_hook(partial(self._projected, number)) for number, one in enumerate(keys)]
        return self

    def __exit__(self, kind, error, trace) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is None and self.ran:
            raise AttnCtrlError(
                f"{self.site.path}: {type(self.inner).__name__} attends to its pictures in a way that SubjectLayout cannot catch"
            )

    def _projected(self, number: int, module: nn.Module, args: tuple, keys: torch.Tensor) -> None:
        self.ran.append((number, keys[0].numel() // keys.shape[-1]))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor | None:
        """The output of an adapter's call; None when the call is not an adapter's."""
        if not self.ran:
            return None
        number, length = self.ran.pop()
        self.taken += 1
        return self.control.confine(
            *(q, k, v),
            grid=self.grid(q.shape[2]),
            subjects=self.subjects[number],
            pictures=self.pictures[number],
            common=k.shape[2] - length,
            scale=scale,
        )


def has_adapter(module: nn.Module) -> bool:
    """Whether the processor of an attention module carries an IP-Adapter."""
    processor = getattr(module, "processor", None)
    return hasattr(getattr(processor, "inner", processor), "to_k_ip")


def adapter_count(model: nn.Module) -> int:
    """How many IP-Adapters a denoiser has loaded."""
    module = next((module for module in model.modules() if has_adapter(module)), None)
    keys = module.processor.to_k_ip if module is not None else ()
    return 1 if isinstance(keys, nn.Linear) else len(keys)


def reads_one_by_one(model: nn.Module) -> bool:
    """Whether the model itself reads pictures as rows of the batch, one each (SD3)."""
    return isinstance(getattr(model, "image_proj", None), nn.Module)


def _read_each(gate: Gate, args: tuple, kwargs: dict):
    """Several pictures per row, (B, S, tokens, channels), read one by one: tokens side by side, and the embedding of the time."""
    pictures, *rest = args
    if pictures.ndim != 4:
        return gate.inner(args, kwargs)
    read = [gate.inner((one, *rest), kwargs) for one in pictures.unbind(1)]
    return torch.cat([tokens for tokens, _ in read], 1), read[0][1]

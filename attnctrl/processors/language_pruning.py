"""`TokenPruning` in a session: a sequence that is shorter from one layer on.

Before the first of these layers the hidden states are gathered, before each of them the rotary embeddings and the mask; behind the last
one the hidden states take their places again. Caches of these layers hold what was kept, those before hold everything, so that the
model's own positions go on as ever. Other controls at these layers are shown what is left of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..controls.base import Control
from ..controls.language import Prompt
from ..controls.token_pruning import TokenPruning
from ..errors import AttnCtrlError
from ..sites import Site


if TYPE_CHECKING:
    from .language import LanguageSession

PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "qwen2_vl_text", "qwen2_5_vl_text")
"""Language models whose layers take hidden states, rotary embeddings, mask and cache, and nothing else with a place per token."""
WHOLE = {
    "ConcentricCausal": "it places whole images",
    "GIFT": "it compares whole questions with whole images",
    "PINE": "it places whole parts of the prompt",
    "RecordAttention": "it maps whole images",
}
"""Controls that cannot act where tokens are missing, and why."""


@dataclass(eq=False)
class PrunedPrompt(Prompt):
    """What is left of a prompt. Positions are those of the shortened sequence; `keys` also takes masks over the whole prompt.

    Args:
        full: the whole prompt. index: (B, n) positions in it; where `valid` is False, nothing is meant.
        read: how many positions the whole prompt had. padded: some are not `valid`.
    """

    full: Prompt | None = None
    index: Tensor | None = None
    read: int = 0
    padded: bool = False

    @classmethod
    def of(cls, full: Prompt, index: Tensor, seen: Tensor) -> PrunedPrompt:
        ids, image, generated = (
            x if x is None else x.gather(1, index) for x in (full.ids, full.image, full.generated)
        )
        found = cls(ids, seen, image & seen, generated & seen, copies=full.copies, full=full, index=index)
        found.beams, found.given, found.notes, found.read = full.beams, full.given, full.notes, full.image.shape[1]
        places = [row[here].tolist() for row, here in zip(index.cpu(), seen.cpu(), strict=True)]
        ends = zip(places, full.first_image, full.after_image, strict=True)
        found.padded, width = not bool(seen.all()), index.shape[1]
        both = [
            tuple(None if end is None else width - sum(at >= end for at in row) for end in (first, after))
            for row, first, after in ends
        ]
        found.first_image, found.after_image = [list(one) for one in zip(*both, strict=True)]
        return found

    @property
    def whole(self) -> Prompt:
        return self.full

    def keys(self, mask: Tensor, n_k: int, beyond: bool = False) -> Tensor:
        if mask.shape[1] == self.full.image.shape[1]:
            mask = mask.gather(1, self.index.to(mask.device))
        return super().keys(mask, n_k, beyond)


class Pruning:
    """The shortened sequence of one session: `view` is what is left of the prompt while layers from `layer` on run, else None."""

    def __init__(self, session: LanguageSession, control: TokenPruning):
        self.session, self.control, self.layer = session, control, control.layer
        self.end()

    def end(self) -> None:
        """The call is over."""
        self.view: PrunedPrompt | None = None
        self._rows: Tensor | None = None  # (B, length) of the call's tokens that stay; None where all of them do
        self._left: Tensor | None = None
        self._made: dict[tuple, tuple[Any, Any]] = {}

    def hooks(self, modules: Mapping[str, nn.Module]) -> list:
        """Hooks on the layers; to be registered before those that look at what enters them."""
        sites = sorted((site for site in self.session.sites if site.layer >= self.layer), key=lambda site: site.layer)
        layers = [modules[site.path.rpartition(".")[0]] for site in sites]
        found = [
            layer.register_forward_pre_hook(self._entering(site, modules[site.path]), with_kwargs=True)
            for layer, site in zip(layers, sites, strict=True)
        ]
        return [*found, layers[-1].register_forward_hook(self._leaving)]

    def _entering(self, site: Site, attention: nn.Module):
        @torch.compiler.disable
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            now = self.session._now
            if now is None or self.session._asides.running:
                return None
            if site.layer == self.layer:
                self._begin(now)
            if self.view is None:
                return None
            kwargs = self._shorten(kwargs, site, attention)
            if site.layer > self.layer or self._rows is None:
                return args, kwargs
            self._left = args[0] if args else kwargs["hidden_states"]
            hidden = self._left.gather(1, self._rows[..., None].expand(-1, -1, self._left.shape[2]))
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    @torch.compiler.disable
    def _leaving(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Puts the hidden states back to their places, between those that left."""
        if self._left is None or self.session._asides.running:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        seen = self._columns(self.view, self.session._now)[1][:, self.view.past : self.view.total]
        row, at = seen.nonzero(as_tuple=True)
        whole = self._left.clone()
        whole[row, self._rows[row, at]] = hidden[row, at]
        self._left = None
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    def _begin(self, now: Prompt) -> None:
        """What is left in this call, once the score is known."""
        key = (self.control, "kept")
        view, chosen = now.notes.get(key), None
        if now.reads:
            leave = self.control.pruned(now)
            cut = bool(leave.any())
            if view is None and not cut:
                return
            stay = now.valid[:, now.past :] & ~leave if cut else torch.ones_like(leave)
            width = int(stay.sum(1).max())
            chosen = stay.int().argsort(dim=1, stable=True)[:, -width:]  # what stays comes last, in its order
            before, seen = self._before(view, now)
            seen = torch.cat([seen, stay.gather(1, chosen)], 1)
            view = now.notes[key] = PrunedPrompt.of(now, torch.cat([before, chosen + now.past], 1), seen)
        elif view is None:
            return
        total = view.index.shape[1] + now.total - now.image.shape[1]
        if chosen is None and now.past == 0:  # written without a cache: everything is read again
            chosen = self._columns(view, now)[0]
        self._rows = chosen
        view.length = now.length if chosen is None else chosen.shape[1]
        view.past, view.reads, self.view = total - view.length, now.reads, view

    @staticmethod
    def _before(view: PrunedPrompt | None, now: Prompt) -> tuple[Tensor, Tensor]:
        """Positions (B, m) that the caches of these layers hold before a prompt, or more of it, is read, and which of them count."""
        device = now.image.device
        if view is None:
            return torch.arange(now.past, device=device).expand(now.batch, -1), now.valid[:, : now.past]
        written = torch.arange(view.read, now.past, device=device).expand(now.batch, -1)
        return torch.cat([view.index, written], 1), torch.cat([view.valid, torch.ones_like(written).bool()], 1)

    @staticmethod
    def _columns(view: PrunedPrompt, now: Prompt) -> tuple[Tensor, Tensor]:
        """Positions (B, m) of all keys of the running call, and which of them count."""
        n = now.image.shape[1]
        written = torch.arange(n, now.total, device=view.index.device).expand(now.batch, -1)
        return torch.cat([view.index, written], 1), torch.cat([view.valid, torch.ones_like(written).bool()], 1)

    def _shorten(self, kwargs: dict, site: Site, attention: nn.Module) -> dict:
        turn, mask, cache = (kwargs.get(name) for name in ("position_embeddings", "attention_mask", "past_key_values"))
        if turn is None:
            raise AttnCtrlError(
                f"TokenPruning on {self.session.family.name}: its layers are called without position_embeddings"
            )
        view, now = self.view, self.session._now
        kwargs = {**kwargs, "position_embeddings": self._once(turn, self._turned)}
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = None  # of no use beside the embeddings, and gaps would pass for packed sequences
        size = view.total if cache is None else int(cache.get_mask_sizes(view.length, site.layer)[0])
        causal = bool(getattr(attention, "is_causal", True))

        def make(mask: Any) -> Any:
            if mask is None and not view.padded:
                return None
            columns, seen = self._columns(view, now)
            if mask is None:
                return _mask_of(seen, view.past, view.length, size, causal)
            return _shorten_mask(mask, self._rows, columns, seen, size)

        kwargs["attention_mask"] = self._once(mask, make, (size, causal))
        return kwargs

    def _once(self, given: Any, make: Any, *also: Any) -> Any:
        """Layers are given the same objects: each is made once a call."""
        key = (id(given), make.__name__, *also)
        if key not in self._made:
            self._made[key] = (given, make(given))
        return self._made[key][1]

    def _turned(self, turn: Any) -> Any:
        """Rotary embeddings (…, B|1, T, D) of the tokens that stay."""
        if self._rows is None:
            return turn
        if not (isinstance(turn, Sequence) and all(isinstance(x, Tensor) and x.ndim >= 3 for x in turn)):
            raise AttnCtrlError(
                f"TokenPruning on {self.session.family.name}: position_embeddings of an unknown form, a {type(turn).__name__}"
            )

        def gather(x: Tensor) -> Tensor:
            shape = (*x.shape[:-3], *self._rows.shape, x.shape[-1])
            x = x.expand(*x.shape[:-3], len(self._rows), *x.shape[-2:])
            return x.gather(-2, self._rows[..., None].to(x.device).expand(shape))

        return tuple(gather(x) for x in turn)


def _mask_of(seen: Tensor, past: int, length: int, size: int, causal: bool) -> Tensor:
    """(B, 1, length, size) bool, where a model gives no mask: rows from `past` on, keys that are `seen` (B, m)."""
    keys = F.pad(seen, (0, size - seen.shape[1]))[:, None, None]
    if not causal or length == 1:
        return keys.expand(-1, -1, length, -1)
    at = torch.arange(size, device=seen.device)
    return keys & (at <= at[past : past + length, None])


def _shorten_mask(mask: Any, rows: Tensor | None, columns: Tensor, seen: Tensor, size: int) -> Tensor:
    """A mask (B, n_k) with True for seen keys, or (B|1, H|1, n_q, n_k), bool or added, for chosen rows and columns; keys up to `size` are masked."""
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise AttnCtrlError(
            f"TokenPruning cannot shorten an attention mask of type {type(mask).__name__}\nHINT: model.set_attn_implementation('sdpa')"
        )
    more = (0, size - columns.shape[1])
    if mask.ndim == 2:
        return F.pad(mask.gather(1, columns) * seen.to(mask.dtype), more)
    mask = mask.expand(len(columns), -1, -1, -1)
    if rows is not None:
        mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return F.pad(mask.masked_fill(~seen[:, None, None], hidden), more, value=hidden)


def find_pruning(session: LanguageSession, fitted: Mapping[Control, Any], weights: Mapping[Control, Any]) -> Any:
    """The `Pruning` of a session, or None. Raises AttnCtrlError, with every reason, where tokens cannot leave."""
    found = [one for one in fitted.values() if isinstance(one, TokenPruning)]
    if not found:
        return None
    first, config = found[0].layer, session.language.decoder.config
    wrong = ["there are two of it"] * (len(found) > 1)
    if config.model_type not in PLAIN:
        wrong.append(f"the layers of {config.model_type} do more than those of {', '.join(PLAIN)}")
    types = getattr(config, "layer_types", None)
    if any(kind != "full_attention" for kind in types[first:]) if types else getattr(config, "sliding_window", None):
        wrong.append(f"layers behind layer {first} see a sliding window, which counts tokens that are missing")
    layers = {site.path: site.layer for site in session.sites}
    for control in weights:
        if control.name in WHOLE and max(layers[path] for path in weights[control]) >= first:
            wrong.append(f"{control.name} acts at layers from {first} on, and {WHOLE[control.name]}")
    if wrong:
        raise AttnCtrlError(
            f"TokenPruning cannot work on {session.family.name}: {'; '.join(wrong)}\n"
            f"HINT: one TokenPruning, on a plain decoder; with controls of whole images in layers below {first} only"
        )
    return Pruning(session, found[0])

"""`LanguageSession`: controls enter a transformers model that generates text, from images or not, and leave it without a trace."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..controls.base import Control
from ..controls.language import LanguageControl, Prompt
from ..errors import AttnCtrlError
from ..families.language import IMAGE_SIZES, class_token_attention, find_language, image_views
from ..sites import Site
from . import transformers as interface
from .language_arranging import find_arranging
from .language_aside import Asides
from .language_calls import AttentionCalls
from .language_checks import check_control, refuse_assisted
from .language_contrast import with_contrast
from .language_prompts import Generation, find_prompt
from .language_pruning import find_pruning
from .maps import attention_values, heat_map, sink_values


class LanguageSession:
    """Controls attached to one language model. Use it as a context manager, or call `detach`.

    The model's own attention implementation stays the kernel of all layers and rows without an edit. Positions of images are read
    from `input_ids`; prompts may be padded on either side, have several images each, and be continued with a cache. Inside
    `generate`, with a cache or without, the prompt is what was there before the first new token.

    Args:
        model: a transformers model with a language model in it.
        controls: language controls, and `HeadScale` without `scale`; neutral ones are not attached.
    """

    def __init__(self, model: nn.Module, *controls: Control):
        wrong = [repr(control) for control in controls if not isinstance(control, Control)]
        if wrong:
            raise AttnCtrlError(f"not a control: {', '.join(wrong)}\nHINT: attach(model, ac.PAI(alpha=0.2), …)")
        self.model = model = getattr(model, "_orig_mod", model)  # a compiled model is controlled as it is
        self.language = find_language(model)
        self.family, self.sites = self.language.family, self.language.sites
        self.controls = tuple(controls)
        self.records: list = []
        self.notes: list[str] = []
        self.calls: Counter = Counter()
        self.kernels: Counter = Counter()
        self.hits: dict[Control, Counter] = {control: Counter() for control in controls}
        self._fitted: dict[Control, Control] = {}
        self._weights: dict[Control, dict[str, Tensor]] = {}
        self._alike: dict[Control, dict[str, tuple]] = {}  # the weights as values: equal ones share their edits
        for control in controls:
            check_control(control, self.family)
            fitted = control.fit(self.language.facts) if isinstance(control, LanguageControl) else control
            touched = fitted.touches(self.sites)
            if not control.neutral:
                if not touched:
                    raise AttnCtrlError(f"{control.name} touches no attention of {self.family.name}")
                self._fitted[control], self._weights[control] = fitted, touched
                self._alike[control] = {path: tuple(weights.flatten().tolist()) for path, weights in touched.items()}
        self._spoken = {c: f for c, f in self._fitted.items() if isinstance(f, LanguageControl)}  # all but HeadScale
        self._arranging = find_arranging(self._fitted, self.language.decoder)
        self._pruning = find_pruning(self, self._fitted, self._weights)
        self._given = IMAGE_SIZES + ("pixel_values",) * any(f.needs_pixels for f in self._spoken.values())
        self._modules: dict[str, nn.Module] = {}
        self._by_module: dict[nn.Module, Site] = {}
        self._configs: list[Any] = []
        self._hooks: list = []
        self._attached = False
        self.last_prompt: Prompt | None = None
        self._forget()

    def _forget(self) -> None:
        self._now: Prompt | None = None
        self._generating: Generation | None = None
        self._prompts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # cache -> prompt
        self._seen: set[str] = set()
        self._calls = AttentionCalls(self)
        self._asides = Asides(self)
        self._early: dict[
            int, list[Tensor]
        ] = {}  # seen by the vision tower before the call: `generate` may run it first

    # -- entering and leaving ------------------------------------------------------------------------------------------

    def attach(self) -> LanguageSession:
        if self._attached:
            raise AttnCtrlError("this session is attached already")
        modules = dict(self.model.named_modules())
        paths = sorted({path for touched in self._weights.values() for path in touched})
        with interface.LOCK:
            busy = {other for site in self.sites if (other := interface.holder(modules[site.path])) is not None}
            if busy and paths:
                names = ", ".join(name for other in busy for name in other.names())
                raise AttnCtrlError(
                    f"{names} is attached to this model already\nHINT: attach all controls together: attach(model, first, second)"
                )
            self._attached = True
            if not paths:
                return self
            try:
                self._modules = {path: modules[path] for path in paths}
                self._by_module = {modules[site.path]: site for site in self.sites if site.path in self._modules}
                for config in {
                    id(c): c for c in (self.language.decoder.config, *(m.config for m in self._modules.values()))
                }.values():
                    interface.switch_on(config)
                    self._configs.append(config)
                interface.hold(list(self._modules.values()), self)
                base = self.language.base
                self._names = list(inspect.signature(base.forward).parameters)
                self._hooks = [
                    base.register_forward_pre_hook(self._before, with_kwargs=True),
                    base.register_forward_hook(self._after, with_kwargs=True, always_call=True),
                ]
                if any(fitted.previews for fitted in self._spoken.values()):
                    self._hooks.append(
                        self.model.register_forward_pre_hook(self._asides.preview, with_kwargs=True, prepend=True)
                    )
                if self._arranging is not None:
                    self._hooks.append(self._arranging[1].register_forward_pre_hook(self._placing, with_kwargs=True))
                if self._pruning is not None:
                    self._hooks += self._pruning.hooks(modules)
                watched = {path for c, fitted in self._spoken.items() if fitted.watches for path in self._weights[c]}
                for path in sorted(watched):
                    layer = modules[path.rpartition(".")[0]]
                    hook = self._watching(next(site for site in self.sites if site.path == path))
                    self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
                for layer in sorted({at for fitted in self._spoken.values() for at in fitted.tower_layers}):
                    module = self.language.tower[layer]
                    self._hooks.append(module.register_forward_pre_hook(self._seeing(layer), with_kwargs=True))
                if hasattr(self.model, "generate"):
                    self._had_generate = self.model.__dict__.get("generate")
                    self._inner_generate = self.model.generate
                    self.model.generate = self._generate
            except BaseException:
                self._remove()
                raise
        return self

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if getattr(self, "_inner_generate", None) is not None:
            self.model.__dict__.pop("generate", None)
            if self._had_generate is not None:
                self.model.__dict__["generate"] = self._had_generate
            self._inner_generate = None
        interface.release(list(self._modules.values()))
        for config in self._configs:
            interface.switch_off(config)
        self._configs, self._modules, self._by_module = [], {}, {}
        self._attached = False
        self._forget()

    def detach(self) -> None:
        """Restores the attention implementation and removes every hook. Calling it twice is harmless."""
        with interface.LOCK:
            if self._attached:
                self._remove()

    def __enter__(self) -> LanguageSession:
        return self if self._attached else self.attach()

    def __exit__(self, *exc) -> None:
        self.detach()

    @property
    def attached(self) -> bool:
        return self._attached

    def names(self) -> list[str]:
        return [control.name for control in self._fitted]

    # -- one call of the model -------------------------------------------------------------------------------------------

    def _generate(self, *args, **kwargs):
        """The model's `generate`, with the prompt told from what is written."""
        config = (
            kwargs.get("generation_config")
            or (args[1] if len(args) > 1 else None)
            or getattr(self.model, "generation_config", None)
        )
        refuse_assisted(self.names(), kwargs, config)
        count = [
            kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")
        ]
        given = {name: kwargs[name] for name in self._given if name in kwargs}
        self._generating = Generation(copies=max(count[0], count[1]), beams=count[0] > 1, given=given)
        self._early = {}
        try:
            args, kwargs = with_contrast(self, args, kwargs)
            return self._inner_generate(*args, **kwargs)
        finally:
            self._generating = None

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Finds out what the call reads: a new prompt, more of one, or what the model has just written."""
        if self._asides.running == "text":
            return
        bound = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids, embeds, cache = (bound.get(name) for name in ("input_ids", "inputs_embeds", "past_key_values"))
        self._seen.clear()
        self._calls.end()
        self._now = None
        if ids is None and embeds is None:
            raise AttnCtrlError(f"{', '.join(self.names())}: {type(module).__name__} was called without input_ids")
        try:
            now = find_prompt(
                *(ids, embeds, bound.get("attention_mask"), cache),
                *(self._prompts, self._generating, self.language.facts.image_ids),
            )
        except AttnCtrlError as error:
            raise AttnCtrlError(f"{', '.join(self.names())}: {error}") from None
        if now.reads:
            for name in self._given:
                new = (bound if self._generating is None else self._generating.given).get(name)
                if isinstance(new, Tensor):
                    known = now.given.get(name)
                    now.given[name] = new if known is None else torch.cat([known, new])
        if cache is not None:
            self._prompts[cache] = now
        if self._generating is not None and not self._asides.running:
            self._generating.prompt = now
        if now.past == 0 and now.reads:
            self._asides.carry_over(now)
        if now.reads and not self._asides.running:
            for layer, seen in self._early.items():
                now.notes.setdefault(("class token", layer), []).extend(seen)
            self._early = {}
        if now.reads:
            for control, fitted in self._spoken.items():
                fitted.read(now)
                if fitted.needs_image and None in now.first_image:
                    self._note(
                        f"{control.name}: rows {_rows(now.first_image)} of a batch hold no image and stay as they are"
                    )
        if now.reads and self._arranging is not None and self._arranging[0].needs_views:
            each, images = now.copies, now.image[:: now.copies]
            of = (self.family, self.model.config, images)
            self._arranging[0].place(now, [image_views(*of, i // each, now.given)[0] for i in range(now.batch)])
        self._asides.end()
        if now.past == 0 and now.reads and not self._asides.running:
            self._asides.begin(module, now, bound.get("token_type_ids"))
        self._now = now

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Also runs after an exception; then there is no output."""
        if self._asides.running == "text":
            return
        now, self._now = self._now, None
        self._asides.end()
        if self._pruning is not None:
            self._pruning.end()
        self._calls.end()
        if output is None or now is None:
            return
        if self._asides.running:
            self._asides.read = now
            return
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._prompts[cache] = now
        self.last_prompt = now
        self.calls["calls that read" if now.reads else "calls that write"] += 1
        for control, touched in self._weights.items():
            missed = set(touched) - self._seen
            if missed:
                raise AttnCtrlError(
                    f"{control.name} did not take effect at {len(missed)} of {len(touched)} layers, e.g. {min(missed)}: "
                    "they did not go through the attention interface\nHINT: leave the attention implementation alone while attached"
                )

    @torch.compiler.disable
    def _placing(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Gives the tokens of a call other positions, behind the mask, which is made from the model's own."""
        if self._now is None or self._asides.running == "text":
            return None
        control, now = self._arranging[0], self._now
        if len(args) > 1:
            return (args[0], control.positions(now, args[1]), *args[2:]), kwargs
        return args, {**kwargs, "position_ids": control.positions(now, kwargs["position_ids"])}

    def _watching(self, site: Site):
        @torch.compiler.disable
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._now is None or not self._now.reads or self._asides.running:
                return
            now = self._at(site)
            hidden = args[0] if args else kwargs["hidden_states"]
            for control, fitted in self._spoken.items():
                if fitted.watches and site.path in self._weights[control]:
                    fitted.watch(site, now, hidden)

        return hook

    def _seeing(self, layer: int):
        """Notes what the class token of the vision tower attends to."""

        @torch.compiler.disable
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._asides.running or not (self._now is None or self._now.reads):
                return
            with torch.no_grad():
                seen = class_token_attention(module, args[0] if args else kwargs["hidden_states"])
            key = layer if self._now is None else ("class token", layer)
            (self._early if self._now is None else self._now.notes).setdefault(key, []).append(seen)

        return hook

    def attend(self, inner, module: nn.Module, *args, **kwargs):
        """One attention call of a held module, for the attention interface."""
        return self._calls.attend(inner, module, *args, **kwargs)

    def _at(self, site: Site) -> Prompt | None:
        """The prompt as a site sees it: what is left of it, where tokens were pruned."""
        pruning = self._pruning
        return self._now if pruning is None or pruning.view is None or site.layer < pruning.layer else pruning.view

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    # -- what people ask -----------------------------------------------------------------------------------------------------

    @property
    def written(self) -> int:
        """How many tokens were written after the last prompt."""
        prompt = self.last_prompt
        return 0 if prompt is None else prompt.total - prompt.image.shape[1] + 1

    def attention_values(
        self, token: int, index: int | None = None, *, row: int = 0, layers: Any = None, heads: Any = None
    ) -> Tensor:
        """Where the model looked while it wrote a token: the attention of its row to one image, (rows, columns) of image tokens, float32.

        `RecordAttention` must have been attached. The value of an image token is its probability, averaged over the chosen heads that
        were recorded; all values together are the attention that the image received, unless the family shows the image in several
        views.

        Args:
            token: 0 for the first token after the last prompt; negative from the last one.
            index: which image; None the first one. Families that cut an image into tiles count tiles, and None is the last one: the whole
                image, after its tiles.
            row: of the batch.
            layers, heads: restrict to these.
        """
        return attention_values(self, token, index, row, layers, heads)

    def attention_map(
        self, token: int, image: Any, index: int | None = None, *, row: int = 0, layers: Any = None, heads: Any = None
    ) -> Any:
        """`attention_values` as heat over a picture: a PIL image of the size of `image`, its largest value white."""
        return heat_map(self.attention_values(token, index, row=row, layers=layers, heads=heads), image)

    def sink_values(self, index: int | None = None, *, row: int = 0, layers: Any = None) -> Tensor:
        """In which share of the layers that `VAR` looked at each token of an image is an attention sink, (rows, columns) float32.

        Of the prompt that was read last; arguments as those of `attention_values`.
        """
        if self._pruning is not None:
            raise AttnCtrlError("sinks are mapped over whole images, and TokenPruning is attached\nHINT: VAR alone")
        return sink_values(self, index, row, layers)

    def sink_map(self, image: Any, index: int | None = None, *, row: int = 0, layers: Any = None) -> Any:
        """`sink_values` as heat over a picture, as `attention_map`."""
        return heat_map(self.sink_values(index, row=row, layers=layers), image)

    def report(self) -> str:
        """What was attached where, how often it acted, and what it did."""
        lines = [f"{self.family.name}: {type(self.model).__name__}, {len(self.sites)} attention layers"]
        for control in self.controls:
            if control not in self._fitted:
                lines.append(f"  {control.name}: neutral, not attached")
                continue
            hits = sum(self.hits[control].values())
            acted = f"acted {hits} times" if hits else "has not acted yet"
            lines.append(f"  {control.name}: {len(self._weights[control])} layers, {acted}")
            if control in self._spoken:
                lines += [f"  {line}" for line in self._spoken[control].says()]
        if self.calls:
            lines.append("  model: " + ", ".join(f"{count} {name}" for name, count in self.calls.items()))
        lines += [f"  note: {note}" for note in self.notes]
        if self.kernels:
            lines.append("  kernels: " + ", ".join(f"{name} × {count}" for name, count in self.kernels.most_common()))
        return "\n".join(lines)


def _rows(found: list) -> str:
    return ", ".join(str(row) for row, at in enumerate(found) if at is None)

"""`LanguageSession`: controls enter a transformers model that generates text, from images or not, and leave it without a trace."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import record_kernels
from ..attention.kernels import count_kernel
from ..attention.rows import Mask, RowEdit, edit_rows
from ..controls.base import Control
from ..controls.language import LanguageControl, Prompt
from ..errors import AttnCtrlError
from ..families.language import IMAGE_SIZES, class_token_attention, find_language, image_views
from ..sites import Site, Tokens
from . import transformers as interface
from .language_arranging import check_arranged, find_arranging
from .language_aside import Asides, times
from .language_prompts import Generation, find_prompt
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
            self._check_family(control)
            fitted = control.fit(self.language.facts) if isinstance(control, LanguageControl) else control
            touched = fitted.touches(self.sites)
            if not control.neutral:
                if not touched:
                    raise AttnCtrlError(f"{control.name} touches no attention of {self.family.name}")
                self._fitted[control], self._weights[control] = fitted, touched
                self._alike[control] = {path: tuple(weights.flatten().tolist()) for path, weights in touched.items()}
        self._arranging = find_arranging(self._fitted, self.language.decoder)
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
        self._edits: dict[tuple, tuple] = {}
        self._masks: dict[tuple, tuple[Any, Mask]] = {}
        self._asides = Asides(self)
        self._early: dict[
            int, list[Tensor]
        ] = {}  # what the vision tower saw before the call: `generate` runs it first

    def _check_family(self, control: Control) -> None:
        found = getattr(getattr(control, "heads", None), "family", None)
        if found not in (None, self.family.name):
            raise AttnCtrlError(
                f"{control.name}: the head set was found on family {found!r}, this model is {self.family.name!r}"
            )
        reasons = dict(self.family.refuses)
        image = isinstance(control, LanguageControl) and control.needs_image
        if reason := reasons.get(control.name, reasons.get("image") if image else None):
            raise AttnCtrlError(f"{control.name} cannot work on {self.family.name}: {reason}")
        if isinstance(control, LanguageControl):
            return
        if control.guides or control.shapes or not hasattr(control, "heads") or control.name != "HeadScale":
            raise AttnCtrlError(
                f"{control.name} is for diffusion models\nHINT: on language models PAI, PASTA, VAR, VHR and the like, and HeadScale without scale"
            )
        if not control.schedule.everywhere:
            raise AttnCtrlError(
                f"{control.name}: a language model has no denoising steps, so start and stop mean nothing"
            )

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
                if any(getattr(fitted, "previews", False) for fitted in self._fitted.values()):
                    self._hooks.append(
                        self.model.register_forward_pre_hook(self._asides.preview, with_kwargs=True, prepend=True)
                    )
                if self._arranging is not None:
                    self._hooks.append(self._arranging[1].register_forward_pre_hook(self._placing, with_kwargs=True))
                watched = {
                    path for c, touched in self._weights.items() if getattr(c, "watches", False) for path in touched
                }
                for path in sorted(watched):
                    layer = modules[path.rpartition(".")[0]]
                    hook = self._watching(next(site for site in self.sites if site.path == path))
                    self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
                for layer in sorted({at for f in self._fitted.values() for at in getattr(f, "tower_layers", ())}):
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
        assisted = kwargs.get("assistant_model") is not None or any(
            (kwargs.get(name) or getattr(config, name, None))
            for name in ("prompt_lookup_num_tokens", "assistant_early_exit")
        )
        if assisted:
            raise AttnCtrlError(
                f"{', '.join(self.names())}: assisted generation reads several guessed tokens a call, which would pass for prompt\n"
                "HINT: generate without assistant_model and prompt_lookup_num_tokens"
            )
        count = [
            kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")
        ]
        given = {name: kwargs[name] for name in IMAGE_SIZES if name in kwargs}
        self._generating = Generation(copies=max(count[0], count[1]), beams=count[0] > 1, given=given)
        self._early = {}
        try:
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
        self._edits.clear()
        self._masks.clear()
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
            for name in IMAGE_SIZES:
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
            for control, fitted in self._fitted.items():
                if isinstance(fitted, LanguageControl):
                    fitted.read(now)
                    if fitted.needs_image and None in now.first_image:
                        self._note(
                            f"{control.name}: rows {_rows(now.first_image)} of a batch hold no image and stay as they are"
                        )
        if now.reads and getattr(self._arranging and self._arranging[0], "needs_views", False):
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
        self._masks.clear()
        self._edits.clear()
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
            now = self._now
            if now is None or not now.reads or self._asides.running:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            for control, fitted in self._fitted.items():
                if getattr(fitted, "watches", False) and site.path in self._weights[control]:
                    fitted.watch(site, now, hidden)

        return hook

    def _seeing(self, layer: int):
        """Notes what the class token of the vision tower attends to."""

        @torch.compiler.disable
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._asides.running:
                return
            with torch.no_grad():
                seen = class_token_attention(module, args[0] if args else kwargs["hidden_states"])
            key = layer if self._now is None else ("class token", layer)
            (self._early if self._now is None else self._now.notes).setdefault(key, []).append(seen)

        return hook

    def attend(self, inner, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *args, **kwargs):
        """One attention call of a held module: q (B, H, T, D), k and v (B, H_kv, S, D); returns ((B, T, H, D), None)."""
        site, now = self._by_module[module], self._now
        if self._asides.running == "text":
            return self._asides.attend(site, inner, module, q, k, v, mask, *args, **kwargs)
        if now is None:
            raise AttnCtrlError(
                f"{', '.join(self.names())}: {type(self.language.decoder).__name__} was called past {type(self.language.base).__name__}, "
                "which is given the token ids\nHINT: call the model that the controls are attached to"
            )
        self._refuse(module, now, q, kwargs)
        edits = self._edits_at(site, now, k.shape[2])

        def plain() -> Tensor:
            count_kernel("the model's own")
            return inner(module, q, k, v, mask, *args, **kwargs)[0].transpose(1, 2)

        n_k = min(k.shape[2], now.total)
        with record_kernels() as log:
            keys, values = (x[:, :, :n_k] if x.shape[2] > n_k else x for x in (k, v))
            named = {"scale": kwargs.get("scaling"), "softcap": kwargs.get("softcap")}
            seen = self._mask(mask, module, q.shape[2], n_k, kwargs) if edits or self._arranging is not None else None

            def edited() -> Tensor:
                return edit_rows(q, keys, values, edits, plain, mask=seen, **named) if edits else plain()

            with self._named(site):
                if self._arranging is None:
                    out = edited()
                else:
                    check_arranged(now, q, n_k, seen, edits, named["softcap"])
                    out = self._arranging[0].arrange(now, q, keys, values, kwargs["scaling"], edited)
            if self._asides.running:
                return out.transpose(1, 2).contiguous(), None
            self._asides.compare(site, now, out)
            out = times(out, self._head_scale(site, now))
        self.kernels.update(log)
        self._seen.add(site.path)
        for control, touched in self._weights.items():
            if site.path in touched:
                self.hits[control][site.path] += 1
        return out.transpose(1, 2).contiguous(), None

    def _refuse(self, module: nn.Module, now: Prompt, q: Tensor, kwargs: dict) -> None:
        wrong = []
        if kwargs.get("dropout"):
            wrong.append("attention dropout is on, and edited rows have none: call model.eval()")
        wrong += [
            f"the model passes {name}" for name in ("s_aux", "position_bias", "cache") if kwargs.get(name) is not None
        ]
        if q.shape[2] != now.length or q.shape[0] != now.batch:
            wrong.append(
                f"{q.shape[0]} x {q.shape[2]} queries, of {now.batch} x {now.length} tokens that the model was given"
            )
        if wrong:
            raise AttnCtrlError(
                f"{', '.join(self.names())} on {self.family.name}, {type(module).__name__}: {'; '.join(wrong)}"
            )

    def _edits_at(self, site: Site, now: Prompt, n_k: int) -> tuple[RowEdit, ...]:
        """Edits of a call at a site. Layers that are edited alike share one value."""
        n_k = min(n_k, now.total)
        edits: list[RowEdit] = []
        for control, touched in self._weights.items():
            weights, fitted = touched.get(site.path), self._fitted[control]
            if weights is None or not isinstance(fitted, LanguageControl):
                continue
            key = (control, n_k, self._alike[control][site.path], site.layer if fitted.per_layer else None)
            if key not in self._edits:
                with self._named(site):
                    if self._asides.running:
                        found = fitted.preview_edits(site, now, n_k) if fitted.previews else ()
                    else:
                        found = fitted.row_edits(site, now, weights, n_k)
                self._edits[key] = tuple(e for e in found if e.start is None or min(e.start) < now.length)
            edits += self._edits[key]
        return tuple(edits)

    def _head_scale(self, site: Site, now: Prompt) -> Tensor | None:
        """What multiplies the heads of a site, (B|1, H); None for nothing."""
        total = None
        for control, touched in self._weights.items():
            weights, fitted = touched.get(site.path), self._fitted[control]
            if weights is None:
                continue
            if isinstance(fitted, LanguageControl):
                factor = fitted.head_scale(site, now, weights)
                if factor is None:
                    continue
            else:
                tokens = Tokens((("tokens", 0, now.length),), (now.length,))
                factor = fitted.edit(site, tokens, weights).head_scale
                factor = factor[None] if factor.ndim == 1 else factor
                if factor.shape[0] not in (1, now.batch // now.copies):
                    raise AttnCtrlError(
                        f"{control.name} has head sets for {factor.shape[0]} prompts, the batch has {now.batch // now.copies}"
                    )
                factor = factor.repeat_interleave(now.copies, 0) if factor.shape[0] > 1 else factor
            total = factor if total is None else total * factor
        return total

    def _mask(self, mask: Any, module: nn.Module, n_q: int, n_k: int, kwargs: dict) -> Mask:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if mask is not None and not isinstance(mask, Tensor):
            raise AttnCtrlError(
                f"the attention mask is a {type(mask).__name__}, which rows cannot be read from\nHINT: model.set_attn_implementation('sdpa')"
            )
        window = kwargs.get("sliding_window")
        if (mask is None or mask.ndim == 2) and n_q < n_k and n_q > 1 and not self._now.past == n_k - n_q:
            raise AttnCtrlError(f"{n_q} queries and {n_k} keys without a mask that says which rows they are")
        if mask is not None and mask.ndim == 2 and window is not None and n_k > window:
            raise AttnCtrlError("a sliding window without a mask of it\nHINT: model.set_attn_implementation('sdpa')")
        key = (id(mask), n_q, n_k, bool(causal))
        if key not in self._masks:
            part = mask if mask is None else mask[..., :n_k]
            self._masks[key] = (mask, Mask.read(part, n_q, n_k, bool(causal)))
        return self._masks[key][1]

    @contextmanager
    def _named(self, site: Site):
        try:
            yield
        except AttnCtrlError as error:
            raise AttnCtrlError(f"{', '.join(self.names())} on {self.family.name}, {site.path}: {error}") from None

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
            fitted = self._fitted[control]
            if isinstance(fitted, LanguageControl):
                lines += [f"  {line}" for line in fitted.says()]
        if self.calls:
            lines.append("  model: " + ", ".join(f"{count} {name}" for name, count in self.calls.items()))
        lines += [f"  note: {note}" for note in self.notes]
        if self.kernels:
            lines.append("  kernels: " + ", ".join(f"{name} × {count}" for name, count in self.kernels.most_common()))
        return "\n".join(lines)


def _rows(found: list) -> str:
    return ", ".join(str(row) for row, at in enumerate(found) if at is None)

"""One attention call of a language model under the controls of a session: what is edited, under which mask, around which kernel."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..attention import record_kernels
from ..attention.kernels import count_kernel
from ..attention.row_engine import Mask, edit_rows
from ..attention.rows import RowEdit
from ..controls.language import LanguageControl, Prompt
from ..errors import AttnCtrlError
from ..sites import Site, Tokens
from .language_arranging import check_arranged
from .language_aside import times


if TYPE_CHECKING:
    from .language import LanguageSession


class AttentionCalls:
    """The attention calls of one session. Edits and masks are kept for the running call of the model, since layers share them."""

    def __init__(self, session: LanguageSession):
        self.session = session
        self._edits: dict[tuple, tuple[RowEdit, ...]] = {}
        self._masks: dict[tuple, tuple[Any, Mask]] = {}

    def end(self) -> None:
        """The call of the model is over, or another one begins."""
        self._edits.clear()
        self._masks.clear()

    def attend(self, inner, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *args, **kwargs):
        """One attention call of a held module: q (B, H, T, D), k and v (B, H_kv, S, D); returns ((B, T, H, D), None)."""
        session = self.session
        site = session._by_module[module]
        now = session._at(site)
        if session._asides.running == "text":
            return session._asides.attend(site, inner, module, q, k, v, mask, *args, **kwargs)
        if now is None:
            raise AttnCtrlError(
                f"{', '.join(session.names())}: {type(session.language.decoder).__name__} was called past "
                f"{type(session.language.base).__name__}, which is given the token ids\nHINT: call the model that the controls are attached to"
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
            seen = None
            if edits or session._arranging is not None:
                seen = self._mask(now, mask, module, q.shape[2], n_k, kwargs)

            def edited() -> Tensor:
                return edit_rows(q, keys, values, edits, plain, mask=seen, **named) if edits else plain()

            with self._named(site):
                if session._arranging is None:
                    out = edited()
                else:
                    check_arranged(now, q, n_k, seen, edits, named["softcap"])
                    out = session._arranging[0].arrange(now, q, keys, values, kwargs["scaling"], edited)
            if session._asides.running:
                return out.transpose(1, 2).contiguous(), None
            session._asides.compare(site, now, out)
            out = times(out, self._head_scale(site, now))
        session.kernels.update(log)
        session._seen.add(site.path)
        for control, touched in session._weights.items():
            if site.path in touched:
                session.hits[control][site.path] += 1
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
                f"{', '.join(self.session.names())} on {self.session.family.name}, {type(module).__name__}: {'; '.join(wrong)}"
            )

    def _edits_at(self, site: Site, now: Prompt, n_k: int) -> tuple[RowEdit, ...]:
        """Edits of a call at a site. Layers that are edited alike share one value."""
        session = self.session
        n_k = min(n_k, now.total)
        edits: list[RowEdit] = []
        for control, touched in session._weights.items():
            weights, fitted = touched.get(site.path), session._fitted[control]
            if weights is None or not isinstance(fitted, LanguageControl):
                continue
            kind = (now is session._now, session._alike[control][site.path], site.layer if fitted.per_layer else None)
            key = (control, n_k, *kind)
            if key not in self._edits:
                with self._named(site):
                    if session._asides.running:
                        found = fitted.preview_edits(site, now, n_k) if fitted.previews else ()
                    else:
                        found = fitted.row_edits(site, now, weights, n_k)
                self._edits[key] = tuple(e for e in found if e.start is None or min(e.start) < now.length)
            edits += self._edits[key]
        return tuple(edits)

    def _head_scale(self, site: Site, now: Prompt) -> Tensor | None:
        """What multiplies the heads of a site, (B|1, H); None for nothing."""
        total = None
        for control, touched in self.session._weights.items():
            weights, fitted = touched.get(site.path), self.session._fitted[control]
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

    def _mask(self, now: Prompt, mask: Any, module: nn.Module, n_q: int, n_k: int, kwargs: dict) -> Mask:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if mask is not None and not isinstance(mask, Tensor):
            raise AttnCtrlError(
                f"the attention mask is a {type(mask).__name__}, which rows cannot be read from\nHINT: model.set_attn_implementation('sdpa')"
            )
        window = kwargs.get("sliding_window")
        if (mask is None or mask.ndim == 2) and n_q < n_k and n_q > 1 and not now.past == n_k - n_q:
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
            raise AttnCtrlError(
                f"{', '.join(self.session.names())} on {self.session.family.name}, {site.path}: {error}"
            ) from None

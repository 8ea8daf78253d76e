"""Which dimensions of the hidden state mark attention sinks in a model: found by measuring, for VAR.

Massive activations as in Sun et al., "Massive Activations in Large Language Models", 2024, arXiv 2402.17762; their use as the mark of
visual sinks in Kang et al., 2025, arXiv 2503.03321, which publishes dimensions for single models and no rule.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention.rows import Columns, RowEdit
from ..controls.language import LanguageControl, Prompt
from ..errors import AttnCtrlError
from ..sites import Site
from .language import LanguageSession


@dataclass(frozen=True)
class SinkDims:
    """Sink dimensions of a model: `VAR(dims=found.dims, tau=found.tau)`.

    `evidence` tells the median of |x_d|/RMS(x) at the first token per dimension, the share of layers whose first token is flagged
    ("first"), the share of all tokens that are ("flagged"), how many image tokens are ("image"), and in which share of layers the
    flagged image tokens receive more attention than the median image token ("attended"; None where no image token is flagged).
    """

    family: str
    base_model: str
    dims: tuple[int, ...]
    tau: float
    evidence: dict[str, Any]

    def report(self) -> str:
        """What was found, in words."""
        evidence = self.evidence
        dims = ", ".join(f"{dim} ({median:g} × RMS)" for dim, median in evidence["median"].items())
        lines = [
            f"{self.base_model} ({self.family}): sink dimensions {dims}, tau {self.tau:g}",
            f"  flags the first token in {evidence['first']:.0%} of the layers, {evidence['flagged']:.1%} of all tokens, "
            f"image tokens {evidence['image']} times",
        ]
        if evidence["attended"] is not None:
            lines.append(
                f"  flagged image tokens receive more attention than the median one in {evidence['attended']:.0%} of the layers"
            )
        lines.append(f"  VAR(dims={self.dims}, tau={self.tau:g})")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON (atomic)."""
        temporary = f"{os.fspath(path)}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self), indent=2) + "\n")
        os.replace(temporary, path)


@dataclass(frozen=True, eq=False)
class _Probe(LanguageControl):
    """Looks at the hidden states that enter layers, and with `dims` at the attention that each token receives."""

    layers: tuple[int, ...]
    dims: tuple[int, ...] | None = None
    first: list[tuple[int, Tensor]] = field(default_factory=list)  # (layer, (B, C)): |x|/RMS(x) at the first token
    marks: list[tuple[int, Tensor, Prompt]] = field(default_factory=list)  # (layer, (B, n, dims), prompt)
    columns: list[Columns] = field(default_factory=list)  # parallel to marks

    needs_image = False
    watches = True
    per_layer = True

    def watch(self, site: Site, prompt: Prompt, hidden: Tensor) -> None:
        x = hidden.detach().float()
        ratio = x.abs() / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if self.dims is None:
            start = prompt.valid.int().argmax(1)
            self.first.append((site.layer, ratio[torch.arange(len(ratio), device=ratio.device), start].cpu()))
        else:
            self.marks.append((site.layer, ratio[..., list(self.dims)].cpu(), prompt))

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        if self.dims is None:
            return ()
        self.columns.append(Columns())
        return (RowEdit(self.columns[-1]),)


def find_sink_dims(model: Any, prompts: Iterable[Mapping[str, Any]], *, tau: float = 20.0) -> SinkDims:
    """Finds the dimensions whose outstanding activations mark the first token, the one sink that every prompt has.

    Layers 2 to L − 2 are asked. A candidate is among the four largest |x_d|/RMS(x) of the first token in at least 80 % of layers and
    prompts, with a median of at least tau. Candidates are taken, largest median first, until the first token is flagged in 95 % of
    layers and prompts; together they may flag no more than 5 % of all tokens (or one a prompt).

    Args:
        model: a transformers language model, with or without images.
        prompts: arguments of single calls: `{"input_ids": …, "attention_mask": …, "pixel_values": …}`; a few with an image and a few
            without. None may be padded on the right.
        tau: what counts as outstanding.

    Raises:
        AttnCtrlError: no dimension qualifies, as in models without massive activations.
    """
    prompts = [dict(prompt) for prompt in prompts]
    if not prompts:
        raise AttnCtrlError("find_sink_dims needs prompts\nHINT: a list of what the processor returns")
    probe, session = _run(model, prompts, None)
    ratio = torch.cat([values for _, values in probe.first])  # (layers and prompts, C)
    top = torch.zeros_like(ratio).scatter_(1, ratio.topk(4, 1).indices, 1.0).mean(0)
    median = ratio.median(0).values
    candidates = sorted(((top >= 0.8) & (median >= tau)).nonzero().flatten().tolist(), key=lambda d: -float(median[d]))
    best = int(median.argmax())
    no = (
        f"{session.family.name}: no sink dimension found; at the first token dimension {best} stands out most, with a median of "
        f"{float(median[best]):.3g} times the RMS, and tau is {tau:g}"
    )
    if not candidates:
        raise AttnCtrlError(f"{no}\nHINT: models with normalised queries and keys may have no massive activations")
    chosen: list[int] = []
    for dim in candidates:
        chosen.append(dim)
        covered = float((ratio[:, chosen].amax(1) > tau).float().mean())
        if covered >= 0.95:
            break
    else:
        raise AttnCtrlError(f"{no}; {chosen} together flag it in {covered:.0%} of the layers, 95 % are asked for")
    dims = tuple(sorted(chosen))
    probe, _ = _run(model, prompts, dims)
    flagged = tokens = rows = image = 0
    attended = []
    for (_, marks, prompt), column in zip(probe.marks, probe.columns, strict=True):
        valid, picture = prompt.valid.cpu(), prompt.image.cpu()
        sink = (marks.amax(-1) > tau) & valid
        flagged, tokens, rows = flagged + int(sink.sum()), tokens + int(valid.sum()), rows + len(sink)
        image += int((sink & picture).sum())
        for row, mass in enumerate(column.total.cpu()):
            if (sink & picture)[row].any():
                attended.append(bool(mass[(sink & picture)[row]].mean() > mass[picture[row]].median()))
    if flagged > max(0.05 * tokens, rows):
        raise AttnCtrlError(f"{no}; {list(dims)} flag {flagged / tokens:.0%} of all tokens, 5 % are allowed")
    evidence = {
        "median": {str(dim): round(float(median[dim]), 3) for dim in dims},
        "first": round(covered, 4),
        "flagged": round(flagged / tokens, 4),
        "image": image,
        "attended": round(sum(attended) / len(attended), 4) if attended else None,
    }
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return SinkDims(session.family.name, name, dims, tau, evidence)


def _run(model: Any, prompts: list[dict], dims: tuple[int, ...] | None) -> tuple[_Probe, LanguageSession]:
    count = len(LanguageSession(model).sites)
    probe = _Probe(tuple(range(2, count - 1)) or tuple(range(count)), dims)
    with LanguageSession(model, probe) as session, torch.no_grad():
        for prompt in prompts:
            model(**prompt)
    return probe, session

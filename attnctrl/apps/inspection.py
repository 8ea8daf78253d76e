"""`attnctrl inspect`: the attention sites of a model and the controls that it carries. Needs the configuration, no weights."""

from __future__ import annotations

from typing import Any

from .._quiet import quiet_imports
from ..errors import AttnCtrlError
from ..icons.models import resolve_model
from ..loading import one_line, quiet_loading


HEADINGS = ("layer", "path", "kind", "heads", "streams")


def inspect_model(model: str, revision: str | None = None) -> str:
    """A table of the model's attention sites, then the controls with what each would touch."""
    folder = resolve_model(model)
    with quiet_imports():
        from ..controls import LanguageControl, SubjectLayout
        from ..controls.spec import control_types
        from ..families import find_family

    with quiet_imports(), quiet_loading(), one_line(f"model {model!r} cannot be inspected", folder):
        skeleton, pipeline = _skeleton(folder, revision)
    family = find_family(skeleton)
    sites = family.sites(skeleton)
    rows = [
        (str(site.layer) if site.primary else "-", site.path, site.kind, str(site.heads), " + ".join(site.streams))
        for site in sites
    ]
    lines = [f"{model}: {pipeline}, {type(skeleton).__name__}, family {family.name}", ""]
    widths = [max(len(row[i]) for row in (HEADINGS, *rows)) for i in range(len(HEADINGS))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (HEADINGS, *rows)]
    if any(not site.primary for site in sites):
        lines += ["", "-: no layer number selects this site; a head set names it by its path"]
    lines += ["", "controls:"]
    reasons = dict(family.refuses)
    for name, kind in control_types().items():
        if issubclass(kind, LanguageControl):
            continue
        try:
            if reason := reasons.get(name, reasons.get("*")):
                raise AttnCtrlError(reason)
            control = kind.example(sites)
            places = len(control.touches(sites)) + len(control.touches_blocks(family.blocks(skeleton)))
            if control.regions_in_use() and family.encode is None:
                raise AttnCtrlError("this family's text cannot be appended to yet")
            if isinstance(control, SubjectLayout) and not family.adapters:
                raise AttnCtrlError("diffusers loads no IP-Adapter into this family")
            if control.moves and family.image_ids is None:
                raise AttnCtrlError("this family's image tokens have no table of positions")
            adapter = " that an IP-Adapter is loaded into" if isinstance(control, SubjectLayout) else ""
            lines.append(f"  {name}: yes" + (f", at up to {places} places{adapter}" if places else ""))
        except AttnCtrlError as error:
            lines.append(f"  {name}: no: {str(error).splitlines()[0]}")
    return "\n".join(lines)


def _skeleton(folder: str, revision: str | None) -> tuple[Any, str]:
    """(the denoiser without weights, the pipeline's class name)."""
    import diffusers
    import torch

    index = diffusers.DiffusionPipeline.load_config(folder, revision=revision)
    for component in ("transformer", "unet"):
        library, name = index.get(component) or (None, None)
        if library == "diffusers" and hasattr(diffusers, name):
            kind = getattr(diffusers, name)
            with torch.device("meta"):
                return kind.from_config(kind.load_config(folder, subfolder=component, revision=revision)), index[
                    "_class_name"
                ]
    raise AttnCtrlError(f"model {folder!r} has no diffusers transformer or unet")

"""What a head search asks of pictures: `objective(images, prompts)` returns one number per picture, more is better.

Any callable will do. Here are the ready ones: image-text similarity of an open_clip model (Radford et al., 2021,
arXiv 2103.00020), an aesthetic head on its picture embedding, a torchmetrics metric, and the judge of the icon world.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from ..errors import AttnCtrlError
from ..icons.models import resolve_open_clip


Score = Callable[[list[Image.Image], list[str]], Any]
FORMS = "'icons', 'open_clip:MODEL:PRETRAINED', 'aesthetic:HEAD_FILE:MODEL:PRETRAINED', 'torchmetrics:METRIC:MODEL' or 'package.module:function'"
_OBJECT = re.compile(r"(?:a )?(?:(?:small|big) )?(\w+) (\w+)")


@dataclass(frozen=True)
class Objective:
    """A score with the name that head sets and fingerprints carry."""

    name: str
    score: Score

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Any:
        return self.score(images, prompts)


def open_clip_score(
    model: str,
    pretrained: str | os.PathLike | None = None,
    tokenizer: str | Callable[[list[str]], torch.Tensor] | None = None,
    *,
    device: str | torch.device = "cpu",
) -> Objective:
    """100 x cosine similarity of picture and prompt.

    Args:
        model: an architecture that open_clip knows, or "hf-hub:owner/name", a folder or "builtin:icons-clip", which bring their
            weights.
        pretrained: a tag of that architecture's weights, or a checkpoint file.
        tokenizer: the name of the model whose tokenizer is used, or a function of texts; None for `model`'s own.
    """
    clip, see, tokenize = _open_clip(model, pretrained, tokenizer, device)

    @torch.no_grad()
    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        read = clip.encode_text(tokenize(list(prompts)).to(device), normalize=True)
        return 100 * (see(images) * read).sum(-1)

    return Objective(f"open_clip:{_with_weights(model, pretrained)}", score)


def aesthetic_score(
    head: str | os.PathLike,
    model: str,
    pretrained: str | os.PathLike | None = None,
    *,
    device: str | torch.device = "cpu",
) -> Objective:
    """A number that linear layers read off the normalised picture embedding of an open_clip model, whatever the prompt.

    That is the form of LAION's aesthetic predictors, of one linear layer or of several without activations between them.

    Args:
        head: a .safetensors file, or a torch checkpoint of tensors alone, with `weight` and `bias` or `NAME.0.weight`, …; the last layer
            has one output, the first takes the embedding.
        model, pretrained: as in `open_clip_score`; the model that the head was trained on.
    """
    layers = _linear_layers(Path(head))
    _, see, _ = _open_clip(model, pretrained, None, device)
    layers = [(weight.to(device), bias.to(device)) for weight, bias in layers]

    @torch.no_grad()
    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        values = see(images).float()
        if values.shape[-1] != layers[0][0].shape[1]:
            raise AttnCtrlError(
                f"the head {os.fspath(head)!r} reads embeddings of {layers[0][0].shape[1]} numbers; {model!r} gives {values.shape[-1]}"
            )
        for weight, bias in layers:
            values = torch.nn.functional.linear(values, weight, bias)
        return values.squeeze(-1)

    return Objective(f"aesthetic:{Path(head).name}:{_with_weights(model, pretrained)}", score)


def _open_clip(model: str, pretrained: Any, tokenizer: Any, device: Any) -> tuple[Any, Callable, Callable]:
    """An open_clip model, a function that gives the normalised embeddings of pictures, and its tokenizer."""
    open_clip = _needed("open_clip", "open-clip-torch")
    name = os.fspath(pretrained) if pretrained is not None else None
    source = resolve_open_clip(model)
    try:
        clip, _, prepare = open_clip.create_model_and_transforms(
            source, pretrained=name, device=device, require_pretrained=True
        )
        tokenize = tokenizer if callable(tokenizer) else open_clip.get_tokenizer(tokenizer or source)
    except Exception as error:  # open_clip raises anything from RuntimeError to the hub's own errors
        raise AttnCtrlError(
            f"open_clip model {model!r} with weights {name!r} cannot be loaded: {' '.join(str(error).split())[:300]}\n"
            "HINT: open_clip.list_pretrained() lists models and weights; weights may be a checkpoint file"
        ) from error
    clip.eval()

    def see(images: list[Image.Image]) -> torch.Tensor:
        pixels = torch.stack([prepare(image.convert("RGB")) for image in images]).to(device)
        return clip.encode_image(pixels, normalize=True)

    return clip, see, tokenize


def _with_weights(model: str, pretrained: Any) -> str:
    return _short(model) + (f":{os.path.basename(os.fspath(pretrained))}" if pretrained is not None else "")


def _linear_layers(path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight, bias) of each linear layer in a file, in the order of the numbers in their names."""
    try:
        tensors = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # a missing file, a pickle of other things, a cut file
        raise AttnCtrlError(
            f"aesthetic head {os.fspath(path)!r} cannot be read: {' '.join(str(error).split())[:200]}"
        ) from error
    names = sorted(
        (name.removesuffix("weight") for name in tensors if name.endswith("weight")),
        key=lambda name: [int(number) for number in re.findall(r"\d+", name)],
    )
    layers = [(tensors[f"{name}weight"].float(), tensors.get(f"{name}bias")) for name in names]
    sizes = [tuple(weight.shape) for weight, _ in layers]
    chained = all(len(size) == 2 for size in sizes) and all(a[0] == b[1] for a, b in zip(sizes, sizes[1:]))
    if not layers or not chained or sizes[-1][0] != 1:
        raise AttnCtrlError(
            f"aesthetic head {os.fspath(path)!r} holds layers of sizes {sizes}, no chain of linear layers that ends in one number"
        )
    return [(weight, torch.zeros(len(weight)) if bias is None else bias.float()) for weight, bias in layers]


def torchmetrics_score(metric: Any = "CLIPScore", model: str | None = None, **options: Any) -> Objective:
    """An image-text metric of torchmetrics, called as `metric(picture, prompt)` with one (3, H, W) uint8 tensor at a time.

    Args:
        metric: a class of `torchmetrics.multimodal` by name, or an object that is called so.
        model: `model_name_or_path` of the class. options: its other arguments.
    """
    if isinstance(metric, str):
        found = getattr(_needed("torchmetrics.multimodal", "torchmetrics"), metric, None)
        if found is None:
            raise AttnCtrlError(f"torchmetrics.multimodal has no {metric!r}\nHINT: 'CLIPScore'")
        name = ":".join(["torchmetrics", metric, *([_short(model)] if model else [])])
        metric = found(**({"model_name_or_path": model} if model else {}), **options)
    else:
        name = f"torchmetrics:{type(metric).__name__}"

    @torch.no_grad()
    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        values = []
        for image, prompt in zip(images, prompts):
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            values.append(float(metric(pixels, prompt)))
            metric.reset()
        return values

    return Objective(name, score)


def icon_judge() -> Objective:
    """Share of what a caption of the icon world asks for that its picture shows: objects with noun and colour, and the relation."""
    from ..evaluate.icons import IconJudge
    from ..evaluate.scoring import objects_right, relation_right

    judge = IconJudge()

    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        asked = [asked_of(prompt) for prompt in prompts]
        values = []
        for read, (objects, relation) in zip(judge.read_many(images), asked):
            right = objects_right(read, objects)
            if relation is not None:
                right.append(relation_right(read, objects[0], relation, objects[1]))
            values.append(sum(right) / len(right))
        return values

    return Objective("icons", score)


def asked_of(caption: str) -> tuple[list[tuple[str, str]], str | None]:
    """(noun, colour) of every object of an icon-world caption, and the relation of the first to the second, if it names one."""
    from ..icons.world import COLORS, NOUNS, RELATIONS

    text = re.sub(r"^an? (?:picture|icon|drawing) of ", "", caption.strip().lower())
    text = re.sub(r" on a (?:\w+ ){1,2}background$", "", text)
    relation, parts = None, re.split(r", (?:and )?| and ", text)
    for name in RELATIONS:
        halves = re.split(rf" (?:is )?(?:to the )?{name} ", text)
        if len(halves) == 2:
            relation, parts = name, halves
    found = [_OBJECT.fullmatch(part.strip()) for part in parts]
    if not all(match and match[1] in COLORS and match[2] in NOUNS for match in found):
        raise AttnCtrlError(
            f"the icon judge cannot read what {caption!r} asks for\nHINT: captions like 'a red cat above a blue car' or "
            f"'a red cat and a blue car'; colours: {', '.join(COLORS)}; nouns: {', '.join(NOUNS)}"
        )
    return [(match[2], match[1]) for match in found if match], relation


def objective_by_name(text: str, *, device: str | torch.device = "cpu") -> Objective:
    """The objective that the command line names: "icons", "open_clip:MODEL:PRETRAINED", "aesthetic:HEAD_FILE:MODEL:PRETRAINED",
    "torchmetrics:METRIC:MODEL" or "package.module:function"."""
    kind, _, rest = text.partition(":")
    if text == "icons":
        return icon_judge()
    if kind == "open_clip" and rest:
        if rest.startswith(("hf-hub:", "local-dir:", "builtin:")):
            return open_clip_score(rest, device=device)
        model, _, pretrained = rest.partition(":")
        return open_clip_score(model, pretrained or None, device=device)
    if kind == "aesthetic" and rest.count(":"):
        head, _, rest = rest.partition(":")
        if rest.startswith(("hf-hub:", "local-dir:", "builtin:")):
            return aesthetic_score(head, rest, device=device)
        model, _, pretrained = rest.partition(":")
        return aesthetic_score(head, model, pretrained or None, device=device)
    if kind == "torchmetrics" and rest:
        metric, _, model = rest.partition(":")
        return torchmetrics_score(metric, model or None)
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        raise AttnCtrlError(f"objective {text!r} is not known\nHINT: {FORMS}")
    sys.path.insert(0, os.getcwd())  # a module beside the user is found, as with `python -m`
    try:
        score = getattr(importlib.import_module(kind), rest)
    except (ImportError, AttributeError) as error:
        raise AttnCtrlError(f"objective {text!r} cannot be imported: {error}\nHINT: {FORMS}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(score):
        raise AttnCtrlError(
            f"objective {text!r} is no function but {type(score).__name__}\nHINT: f(images, prompts) -> floats"
        )
    return Objective(text, score)


def name_of(objective: Score) -> str:
    """The name of an objective, or module and name of a function."""
    if isinstance(objective, Objective):
        return objective.name
    of = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{of.__module__}:{of.__qualname__}"


def _needed(module: str, package: str) -> Any:
    from .._quiet import quiet_imports

    try:
        with quiet_imports():
            return importlib.import_module(module)
    except ImportError as error:
        raise AttnCtrlError(f"this objective needs {package}: {error}\nHINT: pip install {package}") from error


def _short(model: str) -> str:
    """Without the folders of a local path, which say nothing on another machine."""
    kind, _, path = model.rpartition(":")
    return (
        f"{kind}:{os.path.basename(path.rstrip('/'))}"
        if kind == "local-dir"
        else os.path.basename(model)
        if os.path.isabs(model)
        else model
    )

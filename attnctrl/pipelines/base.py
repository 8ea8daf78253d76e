"""What the ready compositions share: a diffusers pipeline, kept as `.pipe`, and controls that are in force while it is called."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from .._quiet import quiet_imports
from ..controls import Control
from ..controls.spec import plain_value
from ..errors import AttnCtrlError
from ..icons.models import resolve_model
from ..loading import absent_parts, one_line
from ..processors import Session
from ..requests import describe, restore


FILE_NAME = "attnctrl_pipeline.json"
FORMAT_VERSION = 1
_REFERRED = ("revision", "variant")  # what a reference to a model says besides its name
_PICTURES = ("image", "mask_image", "control_image")  # arguments with one picture per prompt, or one for all
_READING = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")


class ControlledPipeline:
    """A diffusers pipeline under controls. Subclasses say with `__call__` which.

    What it does not know itself is asked of and set on the wrapped pipeline, so `pipeline.scheduler = …`, `load_lora_weights`,
    `enable_model_cpu_offload` and the like work as ever; `.pipe` is that pipeline.

    Args:
        pipe: a diffusers pipeline.
        controls: controls in force in every call, besides those that the class makes.
        settings: the class's own settings, by name; a call may give others.

    Raises:
        AttnCtrlError: a model whose family cannot do it, an unknown setting, a control that excludes the class's own.
    """

    _OWN = ("pipe", "controls", "settings", "session", "_source")

    def __init__(self, pipe: Any, controls: Control | Sequence[Control] = (), **settings: Any):
        if not isinstance(pipe, DiffusionPipeline):
            raise AttnCtrlError(
                f"{type(self).__name__} wraps a diffusers pipeline, not a {type(pipe).__name__}\n"
                f"HINT: ac.pipelines.{type(self).__name__}.from_pretrained('builtin:icons-t2i')"
            )
        self.pipe = pipe
        self.controls = (controls,) if isinstance(controls, Control) else tuple(controls)
        self.settings = settings
        self.session: Session | None = None
        self._source: dict[str, str] | None = None
        self._check()

    def _check(self) -> None:
        """Raises for settings, controls or a model that no call could work with."""
        raise NotImplementedError

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """Names of the settings that the constructor takes."""
        raise NotImplementedError

    # -- the wrapped pipeline ----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        try:
            return getattr(self.pipe, name)
        except AttributeError:
            message = f"neither {type(self).__name__} nor {type(self.pipe).__name__} has an attribute {name!r}"
            raise AttributeError(message) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.pipe, name, value)

    def __repr__(self) -> str:
        parts = [type(self.pipe).__name__, *(control.name for control in self.controls)]
        return f"{type(self).__name__}({', '.join(parts + [f'{k}={v!r}' for k, v in self.settings.items()])})"

    def to(self, *args: Any, **kwargs: Any) -> ControlledPipeline:
        """Moves the wrapped pipeline, as its own `to`."""
        self.pipe.to(*args, **kwargs)
        return self

    # -- calling -----------------------------------------------------------------------------------------------------------

    def _accepted(self) -> frozenset[str] | None:
        """Arguments that the wrapped pipeline's call takes; None when it takes any."""
        parameters = inspect.signature(type(self.pipe).__call__).parameters
        if any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
            return None
        return frozenset(parameters) - {"self"}

    def _part(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(arguments of the wrapped pipeline, settings of this call); a name that both have belongs to the pipeline.

        Raises for a name that neither has.
        """
        accepted = self._accepted()
        own = [name for name in arguments if name in self.setting_names() and name not in (accepted or ())]
        unknown = [name for name in arguments if accepted is not None and name not in (*own, *accepted)]
        if unknown:
            raise AttnCtrlError(
                f"{', '.join(unknown)}: neither an argument of {type(self.pipe).__name__} nor a setting of {type(self).__name__}\n"
                f"HINT: settings: {', '.join(self.setting_names())}; arguments: {', '.join(sorted(accepted))}"
            )
        return {k: v for k, v in arguments.items() if k not in own}, {name: arguments[name] for name in own}

    def _run(self, control: Control, arguments: dict[str, Any]) -> Any:
        """One call of the wrapped pipeline under the class's own control and all others."""
        with Session(self.pipe, *self.controls, control) as self.session:
            return self.pipe(**arguments)

    def report(self) -> str:
        """What the controls did in the last call, and which kernels ran."""
        if self.session is None:
            raise AttnCtrlError(f"{type(self).__name__} has not been called yet, so there is nothing to report")
        return self.session.report()

    # -- files ---------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike, controls: Control | Sequence[Control] | None = None, **options: Any
    ) -> Any:
        """Loads a pipeline and wraps it.

        Args:
            model: a hub id, a folder, a built-in model such as ``"builtin:icons-t2i"``, or a folder written by `save_pretrained`.
            controls: as for the constructor; None for those that were saved, if any were.
            options: settings of the class; everything else goes to `DiffusionPipeline.from_pretrained`.
        """
        saved = _read(Path(os.fspath(model)).expanduser() / FILE_NAME, cls)
        settings = saved.get("settings", {}) | {k: options[k] for k in cls.setting_names() if k in options}
        loading = saved.get("loading", {}) | {k: v for k, v in options.items() if k not in settings}
        source = saved.get("model", os.fspath(model))
        copied = source == "."
        folder = resolve_model(os.fspath(model) if copied else source)
        with quiet_imports(), one_line(f"model {source!r} cannot be loaded", folder):
            index = DiffusionPipeline.load_config(folder, **{k: loading[k] for k in _READING if k in loading})
            pipe = DiffusionPipeline.from_pretrained(folder, **{**absent_parts(index), **loading})
        if controls is None:
            controls = [restore(facts) for facts in saved.get("controls", ())]
        made = cls(pipe, controls, **settings)
        if not copied:
            reference = str(Path(folder).resolve()) if Path(source).expanduser().is_dir() else source
            made._source = {"model": reference} | {k: loading[k] for k in _REFERRED if loading.get(k) is not None}
        return made

    def save_pretrained(self, folder: str | os.PathLike, copy_model: bool = False, **options: Any) -> Path:
        """Writes settings and controls to a folder that `from_pretrained` reads; returns the file.

        Args:
            copy_model: save the wrapped pipeline in the folder too, as it is now. Otherwise the file refers to the model that
                was loaded, without what has been changed on it since (adapters, another scheduler).
            options: for the wrapped pipeline's `save_pretrained`.

        Raises:
            AttnCtrlError: a control with a function or a tensor, or a reference to a pipeline that was not loaded by name.
        """
        if not copy_model and self._source is None:
            raise AttnCtrlError(
                f"this {type(self).__name__} was not loaded by a model's name, so there is nothing to refer to\n"
                "HINT: save_pretrained(folder, copy_model=True)"
            )
        if options and not copy_model:
            raise AttnCtrlError(f"{', '.join(options)}: only with copy_model=True")
        from .. import __version__

        source = {"model": "."} if copy_model else dict(self._source)
        facts = {
            "format_version": FORMAT_VERSION,
            "attnctrl_version": __version__,
            "pipeline": type(self).__name__,
            "model": source.pop("model"),
            "loading": source,
            "settings": {name: plain_value(value) for name, value in self.settings.items()},
            "controls": [_described(control) for control in self.controls],
        }
        try:
            text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AttnCtrlError(f"{type(self).__name__} cannot be saved: {error}") from None
        folder = Path(folder)
        if copy_model:
            self.pipe.save_pretrained(folder, **options)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")
        return folder / FILE_NAME


def _read(path: Path, cls: type) -> dict[str, Any]:
    """What `save_pretrained` wrote, or nothing where there is no such file."""
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AttnCtrlError(f"{str(path)!r} is no JSON: {error}") from None
    shape = {"pipeline": str, "model": str, "loading": dict, "settings": dict, "controls": list}
    if not isinstance(facts, dict) or not all(isinstance(facts.get(k), kind) for k, kind in shape.items()):
        raise AttnCtrlError(f"{str(path)!r} is not as save_pretrained writes it: it needs {', '.join(shape)}")
    if facts.get("format_version") != FORMAT_VERSION:
        raise AttnCtrlError(
            f"{str(path)!r} has format {facts.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    if facts["pipeline"] != cls.__name__:
        raise AttnCtrlError(
            f"{str(path)!r} holds a {facts['pipeline']}\nHINT: ac.pipelines.{facts['pipeline']}.from_pretrained(…)"
        )
    return facts


def _described(control: Control) -> dict[str, Any]:
    """A control as JSON. Raises for what JSON cannot hold."""
    for region in control.regions_in_use():
        if region.prompt_embeds is not None:
            raise AttnCtrlError(
                f"{control.name} cannot be saved: region {region.prompt!r} has prompt_embeds instead of a text"
            )
    for item in fields(control):
        value = getattr(control, item.name)
        if callable(value) or isinstance(value, torch.Tensor):
            kind = "a tensor" if isinstance(value, torch.Tensor) else "a function"
            raise AttnCtrlError(
                f"{control.name} cannot be saved: {item.name} is {kind}\nHINT: from_pretrained(folder, controls=[…])"
            )
    return describe(control)


def of_prompt(arguments: dict[str, Any], index: int, count: int, images: int = 1) -> dict[str, Any]:
    """The arguments of a batch of `count` prompts, with `images` pictures each, as prompt `index` alone would have them."""

    def rows(name: str, value: Any) -> Any:
        if name in ("generator", "latents") and not isinstance(value, torch.Generator):  # one entry per picture
            if len(value) != count * images:
                raise AttnCtrlError(f"{name} has {len(value)} entries for {count * images} pictures ({count} prompts)")
            return value[index * images : (index + 1) * images]
        of_text = "prompt" in name and isinstance(value, (list, torch.Tensor))
        if of_text and len(value) != count:
            raise AttnCtrlError(f"{name} has {len(value)} entries for {count} prompts")
        if isinstance(value, torch.Tensor) and (of_text or name in _PICTURES and len(value) == count):
            return value[index : index + 1]
        if isinstance(value, list) and (of_text or name in _PICTURES and len(value) == count):
            return value[index : index + 1] if isinstance(value[index], torch.Tensor) else value[index]
        return value

    return {name: rows(name, value) for name, value in arguments.items()}


def joined(outputs: Sequence[Any]) -> Any:
    """Outputs of several calls as one of the same class, one after the other."""
    parts = {item.name: [getattr(output, item.name) for output in outputs] for item in fields(outputs[0])}
    return type(outputs[0])(**{name: _chain(values) for name, values in parts.items()})


def _chain(values: list[Any]) -> Any:
    first = values[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return torch.cat(values)
    if isinstance(first, np.ndarray):
        return np.concatenate(values)
    return [item for value in values for item in value]

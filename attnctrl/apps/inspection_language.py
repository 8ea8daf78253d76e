"""`attnctrl inspect` for language models: their attention layers, the controls that they carry, and their sink dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._quiet import quiet_imports
from ..errors import AttnCtrlError
from ..fetch import MODELS as FETCHED
from ..icons.models import PREFIX, builtin_vlms
from ..loading import one_line, pick_device, quiet_loading
from .loading import pick_dtype


if TYPE_CHECKING:
    from ..controls import Control

TEXTS = (  # what the sink dimensions are measured on: the first token is the same sink in all of them, the rest differs
    "The river rises in the mountains, passes three towns, and reaches the sea after two hundred miles.",
    "To bake bread, mix flour, water, salt and yeast, let the dough rest for an hour, and heat the oven well.",
    "A train leaves the station at nine and arrives at noon; another one follows it half an hour later.",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))  # twelve",
)


def is_language_model(model: str, revision: str | None = None) -> bool:
    """A built-in one, or a folder or hub id with a configuration of transformers and no diffusion pipeline."""
    if model.startswith(PREFIX):
        return model.removeprefix(PREFIX) in builtin_vlms().keys() | FETCHED.keys()
    folder = Path(model).expanduser()
    if folder.exists():
        return (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()
    with quiet_imports():
        from transformers.utils import cached_file

    def there(name: str) -> bool:
        try:
            return cached_file(model, name, revision=revision) is not None
        except (OSError, ValueError):
            return False

    return not there("model_index.json") and there("config.json")


def inspect_language(model: str, revision: str | None = None) -> str:
    """The attention layers of a language model, then the controls with what each would touch. Loads no weights."""
    with quiet_imports():
        import torch

        from ..controls import HeadScale, LanguageControl
        from ..controls.spec import control_types
        from ..pipelines.vlm import resolve_language_model
        from ..processors import LanguageSession

    folder = resolve_language_model(model)
    with quiet_imports(), quiet_loading(), one_line(f"model {model!r} cannot be inspected", folder):
        kind, config = _kind(folder, revision)
        with torch.device("meta"):
            skeleton = kind.from_config(config)
    session = LanguageSession(skeleton)
    facts, sites = session.language.facts, session.sites
    lines = [
        f"{model}: {type(skeleton).__name__}, family {facts.name}, {facts.layers} layers, hidden size {facts.hidden}",
        f"image tokens: {', '.join(str(token) for token in facts.image_ids) or 'none, text only'}",
        "",
    ]
    width = max(len(site.path) for site in sites)
    lines += [f"layer  {'path'.ljust(width)}  heads"]
    lines += [f"{site.layer:<5}  {site.path.ljust(width)}  {site.heads}" for site in sites]
    lines += ["", "controls:"]
    for name, control_type in control_types().items():
        if not issubclass(control_type, (LanguageControl, HeadScale)):
            continue
        try:
            control = _example(control_type, sites)
            found = LanguageSession(skeleton, control)
            lines.append(f"  {name}: yes, at up to {len(found._weights[control])} layers")
        except AttnCtrlError as error:
            lines.append(f"  {name}: no: {str(error).splitlines()[0]}")
    return "\n".join(lines)


def _example(kind: type[Control], sites: Sequence[Any]) -> Control:
    """The control with its defaults, and every head where it needs to be told heads."""
    heads = [(site.layer, head) for site in sites for head in range(site.heads)]
    needed = {
        "ACT": {"heads": heads},
        "HeadScale": {"heads": heads},
        "PASTA": {"spans": (0, 1)},
        "PINE": {"segments": [(0, 1), (1, 2)]},
    }
    return kind(**needed.get(kind.__name__, {}))


def inspect_sinks(
    model: str, revision: str | None = None, images: Sequence[Path] = (), tau: float = 20.0, device: str | None = None
) -> str:
    """The dimensions that mark attention sinks, measured on a few texts, and on pictures where there are some. Loads the weights."""
    with quiet_imports():
        import torch

        from ..pipelines.vlm import resolve_language_model
        from ..processors import find_sink_dims

    folder = resolve_language_model(model)
    pictures = [_open(path) for path in images]
    place = pick_device(device)
    dtype = getattr(torch, pick_dtype(None, place))
    with quiet_imports(), quiet_loading(), one_line(f"model {model!r} cannot be loaded", folder):
        kind, _ = _kind(folder, revision)
        loaded = kind.from_pretrained(folder, revision=revision, dtype=dtype).to(place).eval()
        prompts = [
            {name: x.to(place, dtype) if x.is_floating_point() else x.to(place) for name, x in prompt.items()}
            for prompt in _prompts(folder, revision, kind, pictures)
        ]
    return find_sink_dims(loaded, prompts, tau=tau).report()


def _prompts(folder: str, revision: str | None, kind: Any, pictures: Sequence[Any]) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
    prompts = [dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False)) for text in TEXTS]
    if not pictures:
        return prompts
    if kind is AutoModelForCausalLM:
        raise AttnCtrlError(f"model {folder!r} reads no images\nHINT: leave out --image")
    processor = AutoProcessor.from_pretrained(folder, revision=revision)
    if getattr(processor, "chat_template", None) is None:
        raise AttnCtrlError(f"model {folder!r} has no chat template to put an image into\nHINT: leave out --image")
    for picture in pictures:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "Describe the picture in detail."}]
        prompts.append(
            dict(
                processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                )
            )
        )
    return prompts


def _kind(folder: str, revision: str | None) -> tuple[Any, Any]:
    """(the auto class that loads it, its configuration)."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT_MODELS
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_MODELS

    config = AutoConfig.from_pretrained(folder, revision=revision)
    if config.model_type in IMAGE_MODELS:
        return AutoModelForImageTextToText, config
    if config.model_type in TEXT_MODELS:
        return AutoModelForCausalLM, config
    raise AttnCtrlError(
        f"model {folder!r} is a {config.model_type}, which writes no text\nHINT: a language model, or a vision-language model"
    )


def _open(path: Path) -> Any:
    from .ask import open_image

    return open_image(path)

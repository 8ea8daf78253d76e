"""Assembles the trained parts into the pipeline folder that is shipped."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from ...errors import AttnCtrlError
from .common import load_checkpoint
from .denoiser import assemble, build


def export(output: Path, to: Path) -> None:
    """Writes the `StableDiffusion3Pipeline` of a run in half precision, safetensors, loadable by `from_pretrained`."""
    state = load_checkpoint(output / "denoiser.pt")
    missing = [name for name in ("vae", "tokenizer", "text_encoder") if not (output / name).is_dir()]
    if state is None or missing:
        missing += ["denoiser.pt"] if state is None else []
        raise AttnCtrlError(f"{output} lacks {', '.join(missing)}\nHINT: run the recipes text, vae and denoiser first")
    model = build()
    model.load_state_dict(state["model"])
    encoder = CLIPTextModelWithProjection.from_pretrained(output / "text_encoder")
    encoder.load_state_dict(state["encoder"])
    vae = AutoencoderKL.from_pretrained(output / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
    assemble(vae, tokenizer, encoder, model).to(torch.float16).save_pretrained(to, safe_serialization=True)
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file()) / 1e6
    print(f"{to}: {size:.1f} MB after {state['step']} steps")

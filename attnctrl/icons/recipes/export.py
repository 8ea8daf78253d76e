"""Assembles the trained parts into the pipeline folder that is shipped."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tokenizers import Regex, Tokenizer, models, normalizers
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ...errors import AttnCtrlError
from .common import load_checkpoint
from .denoiser import assemble, build


def silent_t5(width: int) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 encoder that says nothing: its last norm has weight 0, so its states are the zeros that the pipeline puts in place
    of an absent third encoder.

    diffusers (0.42) saves a pipeline without T5 and then refuses to load the folder unless told ``text_encoder_3=None``; with
    this encoder of a few kilobytes in the folder a plain `from_pretrained` loads it, and telling it so gives the same pictures.
    Its tokenizer turns every text into padding, so that no `max_sequence_length` is too short for it.
    """
    model = T5EncoderModel(T5Config(vocab_size=2, d_model=width, d_ff=8, d_kv=8, num_heads=1, num_layers=1)).eval()
    torch.nn.init.zeros_(model.encoder.final_layer_norm.weight)
    nothing = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    nothing.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    return model, PreTrainedTokenizerFast(
        tokenizer_object=nothing, pad_token="<pad>", unk_token="<unk>", model_max_length=512
    )


def export(output: Path, to: Path) -> None:
    """Writes the `StableDiffusion3Pipeline` of a run as safetensors: denoiser and VAE in half precision, text encoders in single."""
    state = load_checkpoint(output / "denoiser.pt")
    missing = [name for name in ("vae", "tokenizer", "text_encoder") if not (output / name).is_dir()]
    if state is None or missing:
        missing += ["denoiser.pt"] if state is None else []
        raise AttnCtrlError(f"{output} lacks {', '.join(missing)}\nHINT: run the recipes text, vae and denoiser first")
    model = build()
    model.load_state_dict(state["model"])
    encoder = CLIPTextModelWithProjection.from_pretrained(output / "text_encoder")
    encoder.load_state_dict(state["encoder"])
    trained = AutoencoderKL.from_pretrained(output / "vae")
    vae = AutoencoderKL.from_config(
        {name: value for name, value in trained.config.items() if name[0] != "_"}
    )  # without its folder's path
    vae.load_state_dict(trained.state_dict())
    tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
    pipeline = assemble(vae, tokenizer, encoder, model)
    third, nothing = silent_t5(model.config.joint_attention_dim)
    pipeline.register_modules(text_encoder_3=third, tokenizer_3=nothing)
    # diffusers loads half-precision files as float32 unless told otherwise, transformers loads them as they are: with the text
    # encoders in half precision a plain `from_pretrained` would mix the two
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(to, safe_serialization=True)
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file()) / 1e6
    print(f"{to}: {size:.1f} MB after {state['step']} steps")

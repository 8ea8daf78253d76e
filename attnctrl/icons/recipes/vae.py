"""Recipe of the icon world's `AutoencoderKL`: factor 8, 8 latent channels, trained on scenes drawn as it goes.

Squared error + 0.2 absolute error + a small KL term, first on 64-pixel crops, then on whole pictures (the group norms see
other statistics there). At the end the latents are normalised per channel by folding mean and standard deviation into the
two 1x1 quantisation convolutions, so that `scaling_factor` is 1 and the denoiser sees unit variance in every channel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from ..world import CANVAS, sample_scene
from .common import autocast, load_checkpoint, pick_device, save_checkpoint, warmup_cosine


def build() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 48, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=True,
        use_post_quant_conv=True,
        sample_size=CANVAS,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def batch(rng: np.random.Generator, count: int, size: int) -> torch.Tensor:
    """(count, 3, size, size) float32 in [-1, 1]: whole scenes, or random crops on any pixel."""
    out = np.empty((count, size, size, 3), dtype=np.uint8)
    for index in range(count):
        pixels = np.asarray(sample_scene(rng).render())
        y, x = rng.integers(0, CANVAS - size + 1, size=2)
        out[index] = pixels[y : y + size, x : x + size]
    return (
        torch.from_numpy(out)
        .permute(0, 3, 1, 2)
        .float()
        .div_(127.5)
        .sub_(1)
        .contiguous(memory_format=torch.channels_last)
    )


@torch.no_grad()
def normalise_latents(model: AutoencoderKL, scenes: int = 512, seed: int = 7) -> None:
    """Folds per-channel mean and deviation of the latents into `quant_conv` and `post_quant_conv` (exact: both are 1x1)."""
    rng = np.random.default_rng(seed)
    means = torch.cat([model.encode(batch(rng, 32, CANVAS)).latent_dist.mean for _ in range(scenes // 32)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = model.config.latent_channels
    quant, post = model.quant_conv, model.post_quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def psnr(model: AutoencoderKL, scenes: int = 128, seed: int = 11) -> float:
    """Mean peak signal-to-noise ratio (dB) of reconstructed held-out scenes from the posterior mean."""
    rng = np.random.default_rng((seed, 10**6))
    values = []
    for _ in range(scenes // 16):
        pixels = batch(rng, 16, CANVAS)
        decoded = model.decode(model.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((decoded - pixels) / 2).pow(2).mean((1, 2, 3))
        values.append(-10 * error.log10())
    return torch.cat(values).mean().item()


def sample_grid(model: AutoencoderKL, path: Path) -> None:
    from torchvision.utils import save_image

    pixels = batch(np.random.default_rng(3), 8, CANVAS)
    with torch.no_grad():
        decoded = model.decode(model.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    save_image(torch.cat([pixels, decoded]) / 2 + 0.5, path, nrow=8)


def train(
    output: Path,
    steps: int = 3000,
    crop_steps: int = 2000,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    kl_weight: float = 1e-4,
    seed: int = 0,
    device: str | None = None,
    compile: bool = True,
    save_every: int = 250,
    final_scenes: int = 512,
) -> None:
    """Trains, checkpoints to `output/vae.pt` and saves the finished model to `output/vae`. Run again to resume.

    Args:
        crop_steps: steps on 64-pixel crops, before the whole pictures.
        final_scenes: scenes that the latents' mean and deviation are taken from at the end.
    """
    output.mkdir(parents=True, exist_ok=True)
    where = pick_device(device)
    torch.manual_seed(seed)
    model = build().to(where, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    first = 0
    if (state := load_checkpoint(output / "vae.pt")) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    def loss_of(pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(where):
            moments = model.quant_conv(model.encoder(pixels)).float()
            mean, logvar = moments.chunk(2, dim=1)
            logvar = logvar.clamp(-20, 10)
            latents = mean + noise * (0.5 * logvar).exp()
            decoded = model.decoder(model.post_quant_conv(latents)).float()
        difference = decoded - pixels
        squared = difference.pow(2).mean()
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        return squared + 0.2 * difference.abs().mean() + kl_weight * kl, squared

    step_loss = torch.compile(loss_of, dynamic=False) if compile else loss_of
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="vae", mininterval=5)
    for step in bar:
        rng = np.random.default_rng((seed, step))
        size = 64 if step < crop_steps else CANVAS
        pixels = batch(rng, batch_size, size).to(where)
        noise = torch.randn(batch_size, 8, size // 8, size // 8, generator=torch.Generator().manual_seed(step)).to(
            where
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup_cosine(step, steps)
        loss, squared = step_loss(pixels, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", dB=f"{6.02 - 10 * squared.log10().item():.1f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_checkpoint(
                output / "vae.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            )
            sample_grid(model, output / f"vae-{step + 1:05d}.png")
    finish(model, output, final_scenes)


def finish(model: AutoencoderKL, output: Path, scenes: int = 512) -> None:
    """Folds the normalisation into the model, tells its quality and saves it."""
    model = model.eval().to("cpu")
    before = psnr(model, scenes // 4)
    normalise_latents(model, scenes)
    print(
        f"vae: {before:.2f} dB, {psnr(model, scenes // 4):.2f} dB after folding, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    )
    model.save_pretrained(output / "vae", safe_serialization=True)

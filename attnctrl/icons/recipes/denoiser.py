"""Recipe of the icon world's `SD3Transformer2DModel`, trained together with the text encoder on cached latents.

Rectified flow with logit-normal times. Four things make it learnable on two CPU cores:

* half of the times are drawn near pure noise, where the layout is decided. With times around 0.55 alone the model drew both
  objects after 5,000 steps and placed them at random: the loss below t = 0.7 was 0.02, above 0.9 it was 0.4 to 0.8.
* a linear reader after the fourth block predicts, per image token, the noun, colour and part of the object and the
  background under it (the scenes' truth is free); representation supervision of this kind speeds up diffusion transformers
  (REPA, Yu et al. 2024, arXiv 2410.06940, there with DINOv2 features). It also names the nearest object, which every token can
  answer from the caption's relation while the picture is still noise. The reader is thrown away.
* Muon for the matrices of the blocks, AdamW for the rest.
* `StableDiffusion3Pipeline` without a third text encoder appends up to 256 all-zero text tokens. They are identical and SD3
  text has no positions, so n of them equal one token whose key carries the bias log n: the model sees every length at
  the price of one token.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from ..world import BACKGROUNDS, CANVAS, COLORS, GRID, NOUNS, PATTERNS, SIZES, Scene, caption, sample_scene
from .common import autocast, load_checkpoint, pick_device, save_checkpoint
from .text import tokenize


READ_AFTER = 3
CELLS = CANVAS // GRID
PARTS = [
    (size, row, column) for size in SIZES.values() for row in range(size // GRID) for column in range(size // GRID)
]


def build() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=CANVAS // 8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=8,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=256,
        caption_projection_dim=256,
        pooled_projection_dim=256,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
    )


class _PaddingWeight(TorchFunctionMode):
    """Adds a per-sample bias (B, 1, 1, N) to the keys of every attention call inside.

    The scores are explicit: at 97 tokens the backward pass of the CPU's fused kernel takes four times as long.
    """

    def __init__(self, bias: torch.Tensor):
        super().__init__()
        self.bias = bias

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + self.bias.to(q.dtype)
            return scores.softmax(-1).to(v.dtype) @ v
        return func(*args, **(kwargs or {}))


class _Reader(nn.Module):
    """Per-token truth from the hidden states after block `READ_AFTER`; only for training."""

    def __init__(self, width: int = 256, nearest: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(
            nn.Linear(width, classes)
            for classes in (
                *(len(NOUNS) + 1, len(COLORS) + 1, len(PARTS) + 1, len(PATTERNS), len(BACKGROUNDS)),
                *((len(NOUNS), len(COLORS)) if nearest else ()),
            )
        )

    def loss(self, states: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """states (B, N, C), truth (B, N, 7), or 5 without the nearest object -> mean cross-entropy per sample, (B,)"""
        states = self.norm(states)
        losses = [
            F.cross_entropy(head(states).flatten(0, 1).float(), truth[..., i].flatten(), reduction="none")
            for i, head in enumerate(self.heads)
        ]
        return torch.stack(losses).mean(0).view(truth.shape[:2]).mean(1)


def token_truth(scene: Scene) -> np.ndarray:
    """(64, 7) int64: noun, colour, part, pattern and background of every 16-pixel token, noun and colour of the nearest object."""
    out = np.empty((CELLS, CELLS, 7), dtype=np.int64)
    out[..., 0], out[..., 1], out[..., 2] = len(NOUNS), len(COLORS), len(PARTS)
    out[..., 3], out[..., 4] = PATTERNS.index(scene.pattern), list(BACKGROUNDS).index(scene.background)
    middle = (np.arange(CELLS) + 0.5) * GRID
    far = [np.hypot(middle[None] - item.center[0], middle[:, None] - item.center[1]) for item in scene.objects]
    nearest = np.argmin(far, axis=0)
    out[..., 5] = np.array([list(NOUNS).index(item.noun) for item in scene.objects])[nearest]
    out[..., 6] = np.array([list(COLORS).index(item.color) for item in scene.objects])[nearest]
    for item in scene.objects:
        x0, y0, x1, y1 = (side // GRID for side in item.box)
        for row in range(y0, y1):
            for column in range(x0, x1):
                part = PARTS.index((item.size, row - y0, column - x0))
                out[row, column, :3] = list(NOUNS).index(item.noun), list(COLORS).index(item.color), part
    return out.reshape(CELLS * CELLS, -1)


class LatentPool:
    """A growing pool of scenes with their latents, (scenes, 8, 16, 16) bfloat16; captions are drawn anew every time."""

    def __init__(self, vae: AutoencoderKL, seed: int = 0):
        self.vae, self.seed = vae.eval(), seed
        self.scenes: list[Scene] = []
        self.latents: list[torch.Tensor] = []
        self.truth: list[np.ndarray] = []

    @torch.no_grad()
    def grow(self, count: int, chunk: int = 32) -> None:
        where = self.vae.device
        for first in range(0, count, chunk):
            fresh = [self._scene(len(self.scenes) + i) for i in range(min(chunk, count - first))]
            pixels = torch.from_numpy(np.stack([np.asarray(scene.render()) for scene in fresh]))
            pixels = pixels.to(where).permute(0, 3, 1, 2).float() / 127.5 - 1
            with autocast(where):
                latents = self.vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mean
            self.scenes += fresh
            self.latents += list(latents.bfloat16().cpu())
            self.truth += [token_truth(scene) for scene in fresh]

    def fill(self, count: int, cache: Path) -> None:
        """Grows to `count` scenes; latents are read from `cache` if a run left them there, and written to it otherwise."""
        saved, weights = load_checkpoint(cache), sum(p.detach().double().sum().item() for p in self.vae.parameters())
        if (
            saved is not None
            and (saved["seed"], saved["vae"]) == (self.seed, weights)
            and len(saved["latents"]) >= count
        ):
            for index in range(count):
                scene = self._scene(index)
                self.scenes.append(scene)
                self.truth.append(token_truth(scene))
            self.latents = list(saved["latents"][:count])
            return
        for _ in tqdm(range(0, count, 192), desc="latents", mininterval=5):
            self.grow(min(192, count - len(self.scenes)))
        save_checkpoint(cache, {"seed": self.seed, "vae": weights, "latents": torch.stack(self.latents)})

    def _scene(self, index: int) -> Scene:
        rng = np.random.default_rng((self.seed, 13, index))
        return sample_scene(rng, related=rng.random() < 0.6)

    def draw(self, rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        picks = rng.integers(0, len(self.scenes), size=count)
        texts = [caption(self.scenes[i], rng) if rng.random() >= 0.1 else "" for i in picks]
        latents = torch.stack([self.latents[i] for i in picks]).float()
        return latents, torch.from_numpy(np.stack([self.truth[i] for i in picks])), texts


def schedule(step: int, done: float, warmup: int = 100, decay: float = 0.4) -> float:
    """Warm-up, constant, then linear decay to 2 % over the last `decay` of the run, `done` in 0-1: a run can be prolonged before it
    decays."""
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, max(0.02, (1 - done) / decay))


def _optimizers(model: nn.Module, encoder: nn.Module, reader: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    def matrix(name: str, weight: torch.Tensor) -> bool:
        return weight.ndim == 2 and "transformer_blocks" in name and ".norm1" not in name

    named = list(model.named_parameters())
    rest = [p for n, p in named if not matrix(n, p)]
    return [
        torch.optim.Muon([p for n, p in named if matrix(n, p)], lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": rest, "share": 1.0},
                {"params": [*reader.parameters()], "share": 1.0},
                {"params": [*encoder.parameters()], "share": 0.5},
            ],
            lr,
            betas=(0.9, 0.99),
            weight_decay=0.0,
        ),
    ]


def train(
    parts: Path,
    output: Path,
    steps: int = 10000,
    batch_size: int = 64,
    learning_rate: float = 1.5e-3,
    read_weight: float = 0.25,
    object_weight: float = 2.5,
    layout_share: float = 0.5,
    pool: int = 20000,
    grow: int = 0,
    seed: int = 0,
    device: str | None = None,
    compile: bool = False,
    save_every: int = 200,
    sample_every: int = 500,
    minutes: float = 0.0,
    start_from: str | None = None,
) -> None:
    """Trains on the VAE, tokenizer and text encoder in `parts`; checkpoints to `output/denoiser.pt`; run again to resume.

    Args:
        read_weight: weight of the reader's cross-entropy.
        object_weight: weight of tokens under an object, whose shape is what is hard; the background has weight 1.
        layout_share: share of samples whose logit-normal times have mean 2 (t around 0.9), where the layout is decided, instead of 0.2.
        pool: scenes whose latents are computed before the first step.
        grow: further scenes per 100 steps.
        sample_every: steps between sample grids; 0 for none.
        minutes: end after this long at the latest, counted from the first step of this call; the decay follows the clock.
        start_from: a saved pipeline, such as ``assets/icons-t2i``, whose transformer and text encoder a new run begins with, and whose VAE
            and tokenizer it takes where `parts` has none. A checkpoint in `output` comes first.
    """
    output.mkdir(parents=True, exist_ok=True)
    where = pick_device(device)
    torch.manual_seed(seed)
    if start_from is not None:
        for name in ("vae", "tokenizer", "text_encoder"):
            if not (parts / name).exists():
                shutil.copytree(Path(start_from) / name, parts / name)
    vae = AutoencoderKL.from_pretrained(parts / "vae").to(where, memory_format=torch.channels_last).eval()
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    encoder = CLIPTextModelWithProjection.from_pretrained(parts / "text_encoder").to(where).train()
    model, reader = build().to(where), _Reader().to(where)
    optimizers = _optimizers(model, encoder, reader, learning_rate)
    first = 0
    if (state := load_checkpoint(output / "denoiser.pt")) is not None:
        for name, module in (("model", model), ("encoder", encoder), ("reader", reader)):
            module.load_state_dict(state[name])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first = state["step"]
    elif start_from is not None:
        model.load_state_dict(SD3Transformer2DModel.from_pretrained(Path(start_from) / "transformer").state_dict())
        known = CLIPTextModelWithProjection.from_pretrained(Path(start_from) / "text_encoder")
        encoder.load_state_dict(known.state_dict())
    scenes = LatentPool(vae, seed)
    scenes.fill(pool, output / "latents.pt")

    caught: dict[str, torch.Tensor] = {}
    model.transformer_blocks[READ_AFTER].register_forward_hook(lambda module, args, out: caught.update(states=out[1]))

    def forward(noisy, embeds, pooled, times, bias):
        with _PaddingWeight(bias):
            velocity = model(noisy, embeds, pooled, times * 1000, return_dict=False)[0]
        return velocity, caught["states"]

    forward = torch.compile(forward, dynamic=False) if compile else forward
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="denoiser", mininterval=10)
    running, began = None, time.monotonic()
    for step in bar:
        done = (step + 1) / steps
        if minutes:
            done = max(done, (time.monotonic() - began) / 60 / minutes)
        rng, generator = np.random.default_rng((seed, 21, step)), torch.Generator().manual_seed(step)
        latents, truth, texts = scenes.draw(rng, batch_size)
        latents, truth = latents.to(where), truth.to(where)
        early = torch.from_numpy(rng.random(batch_size) < layout_share)
        times = torch.randn(batch_size, generator=generator) * 1.1 + torch.where(early, 2.0, 0.2)
        times = torch.sigmoid(times).to(where)
        noise = torch.randn(latents.shape, generator=generator).to(where)
        noisy = torch.lerp(latents, noise, times[:, None, None, None])
        padding = rng.choice([0, 256, int(rng.integers(1, 256))], p=[0.4, 0.4, 0.2], size=batch_size)
        bias = torch.zeros(batch_size, 1, 1, CELLS * CELLS + 33)
        bias[:, 0, 0, -1] = torch.tensor([math.log(n) if n else -1e4 for n in padding])
        with autocast(where):
            out = encoder(tokenize(tokenizer, texts).to(where), output_hidden_states=True)
            embeds = F.pad(out.hidden_states[-2].repeat(1, 1, 2), (0, 0, 0, 1))
            velocity, states = forward(noisy, embeds, out.text_embeds.repeat(1, 2), times, bias.to(where))
            flow = (velocity.float() - (noise - latents)).pow(2).mean(1)
            inside = (truth[..., 0] < len(NOUNS)).view(batch_size, 1, CELLS, CELLS).float()
            weight = 1 + (object_weight - 1) * F.interpolate(inside, scale_factor=2)[:, 0]
            flow = (flow * weight).sum() / weight.sum()
            reading = reader.loss(states, truth).mean()
        (flow + read_weight * reading).backward()
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *encoder.parameters()], 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("share", 1.0) * schedule(step, done)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = flow.item() if running is None else 0.98 * running + 0.02 * flow.item()
        if step % 10 == 0:
            bar.set_postfix(flow=f"{running:.4f}", read=f"{reading.item():.3f}")
        if (step + 1) % save_every == 0 or done >= 1:
            state = {
                "model": model.state_dict(),
                "encoder": encoder.state_dict(),
                "reader": reader.state_dict(),
                "step": step + 1,
            }
            save_checkpoint(output / "denoiser.pt", {**state, "optimizers": [o.state_dict() for o in optimizers]})
        if sample_every and ((step + 1) % sample_every == 0 or done >= 1):
            pipeline = assemble(vae, tokenizer, encoder, model)
            sample_grid(pipeline, output / f"denoiser-{step + 1:06d}.png")
            encoder.train(), model.train()
        if grow and step % 100 == 99:
            scenes.grow(grow)
        if done >= 1:
            break
    assemble(vae, tokenizer, encoder, model).save_pretrained(output / "pipeline", safe_serialization=True)


def assemble(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, encoder: CLIPTextModelWithProjection, model: SD3Transformer2DModel
):
    """The `StableDiffusion3Pipeline` of the parts; both CLIP encoders are the same weights, there is no T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=model.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def sample_grid(pipeline, path: Path, steps: int = 20, guidance_scale: float = 4.0) -> None:
    """A sheet of 24 pictures of fixed held-out prompts and seeds."""
    from torchvision.transforms.functional import to_tensor
    from torchvision.utils import save_image

    rng = np.random.default_rng((999, 0))
    prompts = [caption(sample_scene(rng, objects=1 + i % 2, related=True, distinct=True), rng) for i in range(24)]
    pipeline.set_progress_bar_config(disable=True)
    device = pipeline.transformer.device.type
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        images = pipeline(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=CANVAS,
            width=CANVAS,
            max_sequence_length=1,
            generator=[torch.Generator().manual_seed(i) for i in range(24)],
        ).images
    save_image([to_tensor(image) for image in images], path, nrow=8)
    path.with_suffix(".txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")

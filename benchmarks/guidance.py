"""The cost of perturbation guidance: with prefix reuse, without it, and in diffusers' `StableDiffusion3PAGPipeline`.

A small but deep random SD3 (24 blocks), whole pipelines on given text states, no VAE. All variants run in every round, the order
alternates, and ratios are taken within a round.

    python -m benchmarks.guidance [--layers 6 12 18 23] [--repeats 7] [--output benchmarks/results/guidance.md]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from .common import notes


DEPTH = 24


def build(pag_layer: int | None = None):
    """A pipeline around one and the same random transformer."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3PAGPipeline,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=DEPTH,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=64,
        caption_projection_dim=256,
        pooled_projection_dim=32,
        pos_embed_max_size=32,
    ).eval()
    parts = dict.fromkeys(f"{name}{number}" for name in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4)
    parts |= {"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae}
    if pag_layer is None:
        return StableDiffusion3Pipeline(**parts)
    return StableDiffusion3PAGPipeline(**parts, pag_applied_layers=[f"blocks.{pag_layer}.attn"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guidance", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 18, 23], help="first perturbed block")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/guidance.md"))
    asked = parser.parse_args()
    from attnctrl._quiet import quiet_imports

    with quiet_imports():
        import torch

        import attnctrl as ac

        plain = build()
    plain.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    call = {
        "prompt_embeds": torch.randn(1, 32, 64, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=generator),
        "num_inference_steps": asked.steps,
        "guidance_scale": 1.0,
        "output_type": "latent",
        "height": 256,
        "width": 256,
    }

    def once(pipe, **more):
        began = time.perf_counter()
        latents = pipe(**call, generator=torch.Generator().manual_seed(2), **more).images
        return time.perf_counter() - began, latents

    lines = []
    for layer in asked.layers:
        with quiet_imports():
            pag = build(layer)
        pag.set_progress_bar_config(disable=True)
        control = ac.SoftPAG(layers=[layer], region="image", scale=3.0)  # what the PAG pipeline perturbs
        kept = {"plain": [], "reuse": [], "whole": [], "pag": []}

        def controlled(reuse: bool, control=control):
            with ac.attach(plain, control, prefix_reuse=reuse):
                return once(plain)

        runs = {
            "plain": lambda: once(plain),
            "reuse": lambda: controlled(True),
            "whole": lambda: controlled(False),
            "pag": lambda pag=pag: once(pag, pag_scale=3.0),
        }
        results = {name: run()[1] for name, run in runs.items()}  # warm-up, and the check that all do the same
        if not torch.equal(results["reuse"], results["whole"]):
            raise SystemExit("prefix reuse changed the result")
        torch.testing.assert_close(results["pag"], results["whole"], atol=1e-3, rtol=1e-3)
        for turn in range(asked.repeats):
            for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
                kept[name].append(runs[name]()[0])
        extra = statistics.median((r - p) / (w - p) for r, w, p in zip(kept["reuse"], kept["whole"], kept["plain"]))
        cells = [
            statistics.median(a / p for a, p in zip(kept[name], kept["plain"])) for name in ("reuse", "whole", "pag")
        ]
        expected = (DEPTH - layer) / DEPTH
        row = [
            str(layer),
            *(f"{cell:.2f}x" for cell in cells),
            f"{extra:.3f}",
            f"{expected:.3f}",
            f"{extra - expected:+.3f}",
        ]
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    page = [
        "# The cost of perturbation guidance",
        "",
        notes(
            "benchmarks.guidance",
            model=f"random SD3, {DEPTH} blocks of 8 heads, 256 image and 32 text tokens, float32, no CFG",
            rounds=f"{asked.repeats} of {asked.steps} steps, order alternating, median of the ratios within a round",
        ),
        "",
        "Time of a whole pipeline call as a ratio to the call without guidance. Reuse and no reuse give bit-identical latents; the PAG",
        "pipeline's differ by rounding. The extra pass is what guidance adds; with reuse it should cost (D - L) / D of the whole pass.",
        "",
        "| first perturbed block L | ours, prefix reuse | ours, whole pass | PAG pipeline | extra pass, reuse / whole | (D - L) / D | difference |",
        "|---|---|---|---|---|---|---|",
        *lines,
    ]
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

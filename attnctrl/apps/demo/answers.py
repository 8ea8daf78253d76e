"""Answers of a vision-language model for the page: written token by token, with where the model looked for each word."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from threading import Event
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ...controls import VAR, Control, RecordAttention
from ...controls.spec import control_types, make_control, parse_control
from ...errors import AttnCtrlError
from ...loading import quiet_loading
from ...pipelines import GroundedVLM
from ..ask import seen
from ..batch.schema import arguments_schema, check
from .attention import SHOWN, as_text
from .forms import language_controls
from .limits import QUESTION, TOKENS, unsafe_parts
from .progress import EVERY, Stopped


SINK = (34, 211, 238)  # colour of marked sinks
RING = 9  # pixels of a mark
HALF = "\ufffd"  # what a tokenizer decodes from the first tokens of a character


@dataclass(frozen=True)
class Writing:
    """An answer that is being written."""

    title: str
    text: str
    done: int
    total: int


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Args:
        words: with the space before them; together they are `text`.
        looked: for each word, the attention to the picture while it was written, the mean over its tokens, (rows, columns); or why that is
            not known.
        sinks: in which share of the layers each image token is a sink, (rows, columns); None where no control looked for them.
        said: what the controls did.
    """

    title: str
    text: str
    words: tuple[str, ...]
    looked: tuple[Tensor, ...] | str
    sinks: Tensor | None
    said: str


def admit_question(text: str, tokens: Any) -> tuple[str, int]:
    """A question and the length of its longest answer. Raises AttnCtrlError."""
    text = (text or "").strip()
    if not text or len(text) > QUESTION:
        wrong = f"the question has {len(text)} characters" if text else "there is no question"
        raise AttnCtrlError(f"{wrong}\nHINT: What is in the picture?")
    if isinstance(tokens, bool) or not isinstance(tokens, (int, float)) or not 1 <= tokens <= TOKENS:
        raise AttnCtrlError(f"max_new_tokens={tokens!r} is not a number of tokens\nHINT: 1 to {TOKENS}")
    return text, int(tokens)


def admit_controls(items: Any, tokenizer: Any) -> list[Control]:
    """Controls of language models as the page and its clients write them: ``"PAI(alpha=0.5)"`` or ``{"control": "PAI", "alpha": 0.5}``.

    Args:
        tokenizer: given to those that read words.

    Raises:
        AttnCtrlError: no such control, an argument that is wrong, or one that names a file.
    """
    if not isinstance(items, (list, tuple)):
        raise AttnCtrlError('controls are no list\nHINT: ["PAI(alpha=0.5)"]')
    if wrong := list(unsafe_parts({"controls": list(items)})):
        raise AttnCtrlError("; ".join(wrong))
    made = [_control(item, tokenizer) for item in items]
    if unknown := [control.name for control in made if control.name not in language_controls()]:
        raise AttnCtrlError(f"{', '.join(unknown)}: not for questions\nHINT: {', '.join(language_controls())}")
    return made


def _control(item: Any, tokenizer: Any) -> Control:
    if isinstance(item, str):
        return parse_control(item)
    if not isinstance(item, Mapping) or not isinstance(item.get("control"), str):
        raise AttnCtrlError(f'control {str(item)[:60]!r} has no name\nHINT: {{"control": "PAI", "alpha": 0.5}}')
    arguments = {name: value for name, value in item.items() if name not in ("control", "tokenizer")}
    kind = control_types().get(item["control"])
    if kind is not None and any(field.name == "tokenizer" for field in fields(kind)):
        arguments["tokenizer"] = tokenizer
    elif kind is not None:
        wrong: list[str] = []
        arguments = check(arguments, arguments_schema(kind), "", wrong)
        if wrong:
            raise AttnCtrlError(f"{item['control']}: {'; '.join(wrong)}")
    return make_control(item["control"], arguments)


def write_answer(
    vlm: GroundedVLM,
    title: str,
    controls: Sequence[Control],
    image: Image.Image,
    question: str,
    tokens: int,
    stop: Event,
    tell: Callable[[Writing], None],
) -> Answer:
    """What the model says, its most likely token each time, and where it looked. Raises Stopped after `stop` was set."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]

    def write(*recorders: Control) -> list[int]:
        stream = _Stream(vlm.tokenizer, title, tokens, stop, tell)
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": tokens, "streamer": stream}
        with quiet_loading():
            vlm(
                text=[{"role": "user", "content": content}],
                controls=[*controls, *recorders],
                return_full_text=False,
                generate_kwargs=options,
            )
        return stream.ids

    if stop.is_set():
        raise Stopped
    try:
        ids, unknown = write(RecordAttention()), ""
    except AttnCtrlError as error:  # of the recorder, or the answer fails again
        ids, unknown = write(), str(error).splitlines()[0]
    session = vlm.session
    words = words_of(vlm.tokenizer, ids)
    looked = unknown or tuple(
        torch.stack([session.attention_values(token) for token in written]).mean(0).cpu() for _, written in words
    )
    watched = any(isinstance(control, VAR) and not control.neutral for control in controls)
    sinks = session.sink_values() if watched else None
    said = session.report() if controls else ""
    vlm.session = None  # its records are large
    text = "".join(word for word, _ in words)
    return Answer(title, text, tuple(word for word, _ in words), looked, sinks, said)


class _Stream(BaseStreamer):
    """What `generate` writes: tells how far it is now and then, and ends it when Stop was pressed."""

    def __init__(self, tokenizer: Any, title: str, total: int, stop: Event, tell: Callable[[Writing], None]):
        self.tokenizer, self.title, self.total, self.stop, self.tell = tokenizer, title, total, stop, tell
        self.ids: list[int] = []
        self.prompt, self.shown = True, 0.0
        tell(Writing(title, "", 0, total))

    def put(self, value: Tensor) -> None:
        if self.stop.is_set():
            raise Stopped
        if self.prompt:  # comes first, whole
            self.prompt = False
            return
        self.ids += value.flatten().tolist()
        if time.monotonic() - self.shown >= EVERY:
            self.shown = time.monotonic()
            text = self.tokenizer.decode(self.ids, skip_special_tokens=True).strip(HALF)
            self.tell(Writing(self.title, text, len(self.ids), self.total))

    def end(self) -> None:
        pass


def words_of(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """(word with the space before it, numbers of its tokens) for each word of an answer. Special tokens belong to none, and writing
    systems without spaces are cut between tokens."""
    found: list[tuple[str, list[int]]] = []
    special, before, waiting = set(tokenizer.all_special_ids), "", []
    kept: list[int] = []
    for number, token in enumerate(ids):
        if token in special:
            continue
        kept.append(token)
        waiting.append(number)
        text = tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        piece = text[len(before) :]
        if not piece or piece.endswith(HALF):
            continue
        last = found[-1][0] if found else ""
        if found and not (last.strip() and _parts(last[-1], piece[0])):
            found[-1] = last + piece, found[-1][1] + waiting
        else:
            found.append((piece, waiting))
        before, waiting = text, []
    return [(word, written) for word, written in found if word.strip()]


def _parts(last: str, first: str) -> bool:
    """Whether a word ends between two characters."""
    return last.isspace() or first.isspace() or "W" in map(unicodedata.east_asian_width, (last, first))


def shown(vlm: GroundedVLM, image: Image.Image, answers: Sequence[Answer]) -> dict[str, Any]:
    """The value of `parts.answers`."""
    small = seen(vlm.processor.image_processor, image)
    return {**picture(small), "answers": [_shown(answer) for answer in answers]}


def picture(image: Image.Image) -> dict[str, Any]:
    """The value of `parts.answers` before there is an answer."""
    small = image.copy()
    small.thumbnail((SHOWN, SHOWN))
    return {"picture": as_text(small, "WEBP"), "answers": []}


def _shown(answer: Answer) -> dict[str, Any]:
    known = not isinstance(answer.looked, str)
    words = [{"text": word} for word in answer.words]
    for word, values in zip(words, answer.looked if known else ()):
        word |= {"png": as_text(_heat(values), "PNG"), "about": f"up to {float(values.max()):.1%} at one place"}
    row = {"title": answer.title, "words": words, "said": answer.said}
    if not known:
        row["note"] = f"The attention could not be recorded: {answer.looked}"
    if answer.sinks is not None:
        marked, most = int((answer.sinks > 0).sum()), float(answer.sinks.max())
        where = f", in up to {most:.0%} of the layers" if marked else ""
        about = f"{marked} of {answer.sinks.numel()} image tokens{where}"
        row["sinks"] = {"png": as_text(_marks(answer.sinks), "PNG"), "about": about}
    return row


def _heat(values: Tensor) -> Image.Image:
    """Values (rows, columns), not negative, as a layer to lie over a darkened picture: clear, over red and yellow, to white."""
    heat = values.float() / values.max().clamp_min(torch.finfo(torch.float32).tiny)
    colour = (3 * heat[..., None] - torch.arange(3)).clamp(0, 1)
    raw = torch.cat([colour, 0.85 * heat[..., None]], -1).mul(255).round().to(torch.uint8)
    return Image.fromarray(raw.numpy())


def _marks(share: Tensor) -> Image.Image:
    """A ring on every sink (rows, columns), the clearer the more layers it is one in."""
    ring = torch.zeros(RING, RING)
    ring[1:-1, 1:-1] = 1
    ring[3:-3, 3:-3] = 0
    clear = torch.where(share > 0, share.clamp_min(0.3), 0)
    alpha = Image.fromarray(torch.kron(clear, ring).mul(255).round().to(torch.uint8).numpy())
    marks = Image.new("RGB", alpha.size, SINK)
    marks.putalpha(alpha)
    return marks

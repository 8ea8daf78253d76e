"""When and where a control acts: fractions of the steps, a sigma range, layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .errors import AttnCtrlError


@dataclass(frozen=True)
class Schedule:
    """The window of a control.

    Step i of n (counted from 0) has the fraction i/n and is inside when ``start <= i/n < stop``: with ``start=0`` the first
    step is included, with ``stop=1`` the last. ``sigma=(low, high)`` restricts the window further to noise levels in [low, high],
    as the scheduler counts them: 0-1 in flow matching, the noise's standard deviation where the picture's is 1 elsewhere.
    ``weight(fraction, sigma)`` multiplies the control's scale (guidance) or strength per step.
    """

    start: float = 0.0
    stop: float = 1.0
    sigma: tuple[float, float] | None = None
    weight: Callable[[float, float | None], float] | None = None

    def __post_init__(self) -> None:
        wrong = []
        if not (0.0 <= self.start <= 1.0 and 0.0 <= self.stop <= 1.0):
            wrong.append(f"start={self.start} and stop={self.stop} are fractions of the steps, between 0 and 1")
        elif self.start >= self.stop:
            wrong.append(f"start={self.start} is not before stop={self.stop}: the window holds no step")
        if self.sigma is not None:
            if _is_range(self.sigma):
                object.__setattr__(self, "sigma", tuple(self.sigma))
            else:
                wrong.append(f"sigma={self.sigma!r} is no range of noise levels (low, high) with 0 <= low <= high")
        if wrong:
            raise AttnCtrlError(
                "; ".join(wrong)
                + "\nHINT: start=0.0, stop=0.5 acts in the first half of the steps, sigma=(0.2, 0.8) at these noise levels"
            )

    @property
    def everywhere(self) -> bool:
        """True when the window needs no knowledge of the step."""
        return self.start == 0.0 and self.stop == 1.0 and self.sigma is None and self.weight is None

    def __str__(self) -> str:
        window = f"{self.start:g}-{self.stop:g}"
        return window if self.sigma is None else f"{window}, sigma {self.sigma[0]:g}-{self.sigma[1]:g}"

    def active(self, fraction: float | None, sigma: float | None = None) -> bool:
        """Whether a step is inside. Raises where that takes a fraction or a noise level that is not known."""
        if fraction is None and (self.start, self.stop) != (0.0, 1.0):
            raise AttnCtrlError(
                f"the window {self} needs the number of the step, which a bare denoiser does not tell\n"
                "HINT: attach to the pipeline, or call session.set_step(i, n) before each step"
            )
        # i/n computed in floating point may fall a hair short of a written fraction such as 0.3
        if fraction is not None and not self.start - 1e-6 <= fraction < self.stop - 1e-6:
            return False
        if self.sigma is None:
            return True
        if sigma is None:
            raise AttnCtrlError(
                f"the window {self} needs the noise level of the step, which neither a bare denoiser nor every scheduler tells\n"
                "HINT: attach to a pipeline whose scheduler has sigmas, or call session.set_step(i, n, sigma=…) before each step"
            )
        return self.sigma[0] <= sigma <= self.sigma[1]

    def covers(self, steps: int, sigmas: Sequence[float] | None = None) -> int:
        """How many of n steps are inside, with the noise level of each; without `sigmas` any noise level is."""
        window = self if sigmas is not None else Schedule(self.start, self.stop)
        return sum(window.active(i / steps, sigma) for i, sigma in enumerate(sigmas or [None] * steps))


def _is_range(value: object) -> bool:
    """Two numbers, 0 <= low <= high."""
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return (
        pair
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
        and 0 <= value[0] <= value[1]
    )


def parse_layers(layers: str | int | Iterable[int] | None, count: int) -> tuple[int, ...]:
    """Layer numbers of a stack of `count` layers.

    ``None`` or ``"all"``; ``"mid"`` (the middle third); a number (negative from the end) or several, ``"7,8,9"``; a range
    ``"2:6"``; ``"every:2"``. Integers match exactly: 1 is never 10.
    """
    if layers is None or layers == "all":
        return tuple(range(count))
    parts = [layers] if isinstance(layers, int) else layers.split(",") if isinstance(layers, str) else list(layers)
    found: list[int] = []
    for part in parts:
        text = str(part).strip()
        if text == "mid":
            found += range(count // 3, count - count // 3)
        elif match := re.fullmatch(r"every:(\d+)", text):
            found += range(0, count, max(1, int(match[1])))
        elif match := re.fullmatch(r"(-?\d*):(-?\d*)", text):
            found += range(count)[slice(*(int(side) if side else None for side in match.groups()))]
        elif re.fullmatch(r"-?\d+", text) and -count <= int(text) < count:
            found.append(int(text) % count)
        else:
            raise AttnCtrlError(
                f"layers={layers!r}: {text!r} matches none of the {count} layers, 0 to {count - 1}\n"
                "HINT: a number, '7,8,9', '2:6', 'every:2', 'mid' or 'all'"
            )
    if not found:
        raise AttnCtrlError(f"layers={layers!r} matches none of the {count} layers, 0 to {count - 1}")
    return tuple(sorted(set(found)))

"""When and where a control acts: fractions of the steps, a sigma range, layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .errors import AttnCtrlError


@dataclass(frozen=True)
class Schedule:
    """The window of a control.

    Step i of n (counted from 0) has the fraction i/n and is inside when ``start <= i/n < stop``: with ``start=0`` the first
    step is included, with ``stop=1`` the last. ``sigma=(low, high)`` restricts the window further to noise levels in [low, high].
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
        if self.sigma is not None and not self.sigma[0] <= self.sigma[1]:
            wrong.append(f"sigma={self.sigma} is (low, high)")
        if wrong:
            raise AttnCtrlError(
                "; ".join(wrong) + "\nHINT: Schedule(start=0.0, stop=0.5) acts in the first half of the steps"
            )

    @property
    def everywhere(self) -> bool:
        """True when the window needs no knowledge of the step."""
        return self.start == 0.0 and self.stop == 1.0 and self.sigma is None and self.weight is None

    def active(self, fraction: float | None, sigma: float | None = None) -> bool:
        if self.start == 0.0 and self.stop == 1.0 and self.sigma is None:
            return True
        if fraction is None:
            raise AttnCtrlError(
                f"the window {self.start}-{self.stop} needs the number of the step, which a bare denoiser does not tell\n"
                "HINT: attach to the pipeline, or call session.set_step(i, n) before each step"
            )
        # i/n computed in floating point may fall a hair short of a written fraction such as 0.3
        inside = self.start - 1e-6 <= fraction < self.stop - 1e-6
        if inside and self.sigma is not None and sigma is not None:
            inside = self.sigma[0] <= sigma <= self.sigma[1]
        return inside

    def covers(self, steps: int) -> int:
        """How many of n steps are inside (sigma ignored)."""
        return sum(self.start - 1e-6 <= i / steps < self.stop - 1e-6 for i in range(steps))


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

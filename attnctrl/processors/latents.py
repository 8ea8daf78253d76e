"""What a session does for controls that change the latents by gradients, before the denoiser's own pass of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..controls.base import Control, Moment
from ..controls.latent_guidance import LatentGuidance
from ..errors import AttnCtrlError
from ..guidance.latents import LatentUpdate, gradient, gradients
from .passes import Enough


if TYPE_CHECKING:
    from .session import Session


class Latents:
    """The latents of a session's pipeline, as its controls change them."""

    def __init__(self, session: Session):
        self.session = session
        self.update: LatentUpdate | None = None

    def check(self, control: Control) -> None:
        if isinstance(control, LatentGuidance) and self.session.pipeline is None:
            raise AttnCtrlError(
                f"{control.name} changes the latents of a pipeline, and a bare denoiser has none\nHINT: attach to the pipeline"
            )

    def forget(self) -> None:
        """Drops a change that the scheduler has not got."""
        if self.update is not None:
            self.update.remove()
            self.update = None

    def in_force(self, bound: dict[str, Any], moment: Moment, again: bool) -> dict[str, Any]:
        """The call with the latents that its step was given before: a step may call its denoiser `again`."""
        if self.update is None or not self.update.pending:
            return bound
        if again:
            return self._with(bound, None)
        self.forget()
        if not moment.first:
            raise AttnCtrlError(
                f"{type(self.session.pipeline).__name__} has made a step without its scheduler, and changed latents got lost"
            )
        return bound

    def guided(
        self,
        bound: dict[str, Any],
        active: tuple[Control, ...],
        mains: tuple[Control, ...],
        cond: tuple[int, ...],
        batch: int,
        moment: Moment,
    ) -> dict[str, Any]:
        """The call with latents that controls have changed. The scheduler's step of this moment gets them too."""
        due = [control for control in active if isinstance(control, LatentGuidance) and control.due(moment)]
        for number, control in enumerate(due):
            session = self.session
            session._check_cache()
            if number == 0:
                given, family = bound[session.family.image], session.family
                self.update = LatentUpdate(session.pipeline, given, len(cond), bound.get("timestep"))
            call, regions = session._with_regions(bound, mains, cond)
            rows = slice(cond[0], cond[-1] + 1)
            few, count = family.select_rows(call, rows, batch), len(cond)
            step = session._new_pass(bound, (*mains, control), tuple(range(count)), count, regions, moment)
            step.measures = True
            if not session.model.is_gradient_checkpointing:  # which a block that is left early would upset
                step.wanted = control.needed or frozenset(session._strengths[control])
            self.update.change(control.descend(self.update.latents, moment, self._measure(control, few, step)))
            bound = self._with(bound, None)
        return bound

    def _measure(self, control: LatentGuidance, call: dict[str, Any], step) -> Callable:
        session, model = self.session, self.session.model

        def measure(latents: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
            latents = latents.detach().requires_grad_()

            def run() -> None:
                step.seen.clear()
                session.calls["gradient passes"] += 1
                try:
                    session._run(self._with(call, latents), step)
                except Enough:
                    pass

            def descent() -> Tensor:
                with gradients(model), session._in_force(step):  # checkpointed blocks run again
                    return gradient(losses, latents, model)

            with gradients(model):
                losses = control.measured(run)
            return losses, descent

        return measure

    def _with(self, call: dict[str, Any], latents: Tensor | None) -> dict[str, Any]:
        name = self.session.family.image
        return {**call, name: self.update.rebuilt(call[name], latents)}

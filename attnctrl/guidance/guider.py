"""`HeadGuidance`: perturbation guidance as the `guider` of modular diffusers pipelines.

diffusers' own perturbed-attention guider knows no heads, raises on most transformers and loses its conditional branch without
classifier-free guidance; this one adds scale·(cond − perturbed) to what any other guider makes of the plain predictions.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput

from ..controls.base import Control
from ..errors import AttnCtrlError
from .delta import add_to_all, follow_change


class HeadGuidance(BaseGuidance):
    """Another guider's prediction plus scale·(cond − perturbed) of every guiding control.

    Args:
        controls: any controls. Those that guide run a perturbed pass of the conditional batch, which starts at its first perturbed
            block; the others act in the conditional pass itself.
        guider: what combines the conditional with the unconditional prediction: any of `diffusers.guiders` whose first
            prediction is the conditional one (CFG, APG, CFG-Zero*, …); None for plain classifier-free guidance at its default
            scale. With ``ClassifierFreeGuidance(guidance_scale=1.0)`` perturbation guides alone.
        combine: "separate" passes of the guiding controls, or one "joint", as in `attach`.

    The guider's own rescaling sees the plain predictions; the guidance of the controls comes on top. Guiders are not told the noise
    level of a step, so controls with a range of `sigma` raise.
    """

    config_name = "guider_config.json"
    _input_predictions = ["pred_cond", "pred_uncond"]

    def __init__(self, *controls: Control, guider: BaseGuidance | None = None, combine: str = "separate"):
        self.guider = ClassifierFreeGuidance() if guider is None else guider
        predictions = self.guider._input_predictions
        if not predictions or predictions[0] != "pred_cond":
            raise AttnCtrlError(
                f"{type(self.guider).__name__} predicts {predictions}, and HeadGuidance needs one whose first prediction is 'pred_cond'"
            )
        super().__init__(enabled=self.guider._enabled)
        names = [control.name for control in controls]
        self.register_to_config(controls=names, guider=type(self.guider).__name__, combine=combine)
        self.controls, self.combine = controls, combine
        self._session: Any = None
        self._delta: tuple[torch.Tensor, torch.Tensor] | None = None  # (denoiser's prediction, guidance term)

    def new(self, **changes) -> HeadGuidance:
        """The same controls around a copy of the inner guider with some of its settings changed."""
        return type(self)(*self.controls, guider=self.guider.new(**changes), combine=self.combine)

    def enable(self) -> None:
        super().enable()
        self.guider.enable()

    def disable(self) -> None:
        """Neither the guider nor the controls act."""
        super().disable()
        self.guider.disable()

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        self.guider.set_state(step, num_inference_steps, timestep)
        self._delta = None

    def prepare_inputs(self, data):
        return self.guider.prepare_inputs(data)

    def prepare_inputs_from_block_state(self, data, input_fields):
        return self.guider.prepare_inputs_from_block_state(data, input_fields)

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Attaches the controls for the conditional batch."""
        from ..processors.session import Session

        super().prepare_models(denoiser)
        self.guider.prepare_models(denoiser)
        if not self._enabled or not self.guider.is_conditional:
            return
        if self._session is None or self._session.model is not getattr(denoiser, "_orig_mod", denoiser):
            self._session = Session(denoiser, *self.controls, combine=self.combine, withhold=True)
        self._session.set_step(self._step, self._num_inference_steps)
        self._session.attach()

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Detaches them, and keeps the guidance term of the batch."""
        if self._session is not None and self._session.attached:
            self._delta = self._session.withheld
            self._session.detach()
        self.guider.cleanup_models(denoiser)

    def __call__(self, data: list) -> GuiderOutput:
        output = self.guider(data)
        if self._delta is not None:
            output.pred = add_to_all(output.pred, follow_change(*self._delta, data[0].noise_pred))
        return output

    @property
    def is_conditional(self) -> bool:
        return self.guider.is_conditional

    @property
    def num_conditions(self) -> int:
        return self.guider.num_conditions

    def report(self) -> str:
        """What the controls did so far (`Session.report`)."""
        if self._session is None:
            return "HeadGuidance has not guided yet"
        return self._session.report()

"""Instance attention, the part of ROICtrl (Gu et al., 2024, arXiv 2411.17949) without weights, is a setting of `RegionalPrompts`."""

import pytest
import torch

import attnctrl as ac

from ..dense import DenseAttention, plain
from ..models import TINY
from ..processors.tiny_pipelines import PIPELINES
from .test_isolation import masks_of


TEXT, LENGTHS = 5, (6, 3)
DISJOINT = [(0, 0, 0.5, 1), (0.5, 0.25, 1, 1)]
CROSSING = [(0, 0, 0.75, 1), (0.25, 0.25, 1, 0.75)]


def regions(boxes) -> list[ac.Region]:
    captions = [torch.randn(1, n, 16, generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    return [ac.Region("ab"[i], box=boxes[i], prompt_embeds=captions[i]) for i in range(2)]


def instance_attention(boxes, weight: float, base: int = TEXT, first_cond: int = 0):
    """Cross-attention of the whole picture to the prompt; inside boxes it is blended with the mean of each box's own attention,

    (1 - c) o + c mean_r scatter_r(attention(gather_r(q), k_r, v_r))    keys in the order prompt, captions
    """

    def attend(index, q, k, v):
        if k.shape[2] != base + sum(LENGTHS):
            return plain(q, k, v)
        out = plain(q, k[:, :, :base], v[:, :, :base])
        masks = masks_of(boxes, round(q.shape[2] ** 0.5))
        inside, total, start = torch.zeros_like(out), torch.zeros(q.shape[2], dtype=q.dtype), base
        for mask, length in zip(masks, LENGTHS):
            caption = slice(start, start + length)
            inside[:, :, mask] += plain(q[:, :, mask], k[:, :, caption], v[:, :, caption])
            total += mask
            start += length
        covered = torch.where(total > 0, weight, 0.0).to(q.dtype)[:, None]
        done = (1 - covered) * out + covered * inside / total.clamp(min=1)[:, None]
        return torch.cat([out[:first_cond], done[first_cond:]])

    return attend


@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("boxes", [DISJOINT, CROSSING], ids=["disjoint", "crossing"])
@pytest.mark.parametrize("family", ["unet", "pixart"])
def test_attention_couple_is_gather_attend_and_scatter(family, boxes, weight):
    build, call = TINY[family]
    inputs = call(missing=0) if family == "pixart" else call()
    model, text = build(), inputs["encoder_hidden_states"]
    control = ac.RegionalPrompts.preset("attention_couple", regions(boxes), base_weight=1 - weight)
    captions = [region.prompt_embeds.expand(len(text), -1, -1) for region in control.regions]
    longer = {**inputs, "encoder_hidden_states": torch.cat([text, *captions], 1)}
    if inputs.get("encoder_attention_mask") is not None:
        longer["encoder_attention_mask"] = torch.ones(longer["encoder_hidden_states"].shape[:2])
    with torch.no_grad():
        with DenseAttention(instance_attention(boxes, weight, text.shape[1])):
            wanted = model(**longer)[0]
        with ac.attach(model, control):
            got = model(**inputs)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert (got - model(**inputs)[0]).abs().max() > 1e-4


def test_only_conditional_rows_of_a_pipeline_have_instances():
    pipeline = PIPELINES["sd"]()
    control = ac.RegionalPrompts.preset("attention_couple", regions(DISJOINT))
    with ac.attach(pipeline.pipe, control):
        got = pipeline()
    captions = [region.prompt_embeds for region in control.regions]
    texts = {}
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        text = pipeline.inputs[name]
        texts[name] = torch.cat([text, *(caption.expand(len(text), -1, -1) for caption in captions)], 1)
    images = pipeline.images
    with DenseAttention(instance_attention(DISJOINT, 1.0, first_cond=images)):
        wanted = pipeline.where(**texts)()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)

import functools
import inspect
import json
import math

import pytest
import torch
from torch.nn import functional as F

import attnctrl as ac
from attnctrl.icons.recipes.text import build_tokenizer
from attnctrl.requests import describe, restore

from ..dense import DenseAttention, scores
from ..models import tiny_sd3
from ..processors.tiny_pipelines import PIPELINES


TEXT, WORDS = 5, (1, 2, 3, 4)
TOKENS = {"cat": (1, 3), "dog": (2,)}
NOWHERE = dict.fromkeys(TOKENS)
BOXES = {"cat": (0, 0, 0.5, 1), "dog": (0.5, 0.25, 1, 0.75)}
LOSSES = {
    "attend_and_excite": NOWHERE,
    "boxdiff": BOXES,
    "bounded": {"cat": BOXES["cat"], "dog": (0.75, 0.25, 1, 0.75)},
}


def guidance(loss="attend_and_excite", **options) -> ac.LatentGuidance:
    return ac.LatentGuidance(LOSSES[loss], TOKENS, loss, **options)


def once(loss="attend_and_excite", **options) -> ac.LatentGuidance:
    """One update a step."""
    single = {"until": 0.0, "iterations": 1} if loss == "bounded" else {"until": {}}
    return guidance(loss, **single | options)


def double(run):
    """The same pipeline in float64."""
    run.model.double()
    wide = {key: value.double() for key, value in run.inputs.items() if key.endswith("embeds")}
    return run.where(**wide)


class Spy:
    """What denoiser and scheduler get: `inputs` the arguments of every call, `samples` the latents of every step."""

    def __init__(self, run):
        self.run, self.inputs, self.samples = run, [], []

    def __enter__(self):
        scheduler, step = self.run.pipe.scheduler, self.run.pipe.scheduler.step

        @functools.wraps(step)
        def noted(*args, **kwargs):
            self.samples.append(inspect.signature(step).bind(*args, **kwargs).arguments["sample"].clone())
            return step(*args, **kwargs)

        def call(module, args, kwargs):
            if not torch.is_grad_enabled():
                self.inputs.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

        self.step = scheduler.step = noted
        self.handle = self.run.model.register_forward_pre_hook(call, with_kwargs=True)
        return self

    def __exit__(self, *exc):
        assert self.run.pipe.scheduler.step is self.step, "the scheduler has its own step again"
        del self.run.pipe.scheduler.step
        self.handle.remove()


def spied(run, *controls, **changes) -> Spy:
    with Spy(run) as spy, ac.attach(run.pipe, *controls) as spy.session:
        spy.picture = run(**changes)
    return spy


class Patterns(DenseAttention):
    """Eager attention whose patterns (B, H, n_q, n_k) are kept."""

    def __init__(self):
        super().__init__(self.attend)
        self.found = []

    def attend(self, index, q, k, v):
        self.found.append(scores(q, k).softmax(-1))
        return self.found[-1] @ v


def inside(box, side: int) -> torch.Tensor:
    mask = torch.zeros(side, side, dtype=torch.bool)
    x0, y0, x1, y1 = (round(edge * side) for edge in box)
    mask[y0:y1, x0:x1] = True
    return mask


def dense_loss(loss: str, patterns, joint: bool, text_first: bool) -> torch.Tensor:
    """The published loss of every image, from whole patterns."""
    words, among = [], []
    for p in patterns:
        n = p.shape[-1]
        if joint:
            text, image = (slice(0, TEXT), slice(TEXT, n)) if text_first else (slice(n - TEXT, n), slice(0, n - TEXT))
            for found, keys in ((words, text), (among, image)):
                part = p[:, :, image, keys]
                found.append((part / part.sum(-1, keepdim=True)).mean(1))
        else:
            (words if n == TEXT else among).append(p.mean(1))
    if loss == "bounded":
        total = 0
        for share, maps, own in (
            (1.5, words, lambda m, s, box: m[..., list(TOKENS[s])]),
            (0.5, among, lambda m, s, box: m[..., box]),
        ):
            for subject in TOKENS:
                ratios = []
                for a in maps:
                    side = math.isqrt(a.shape[1])
                    boxes = {s: inside(box, side).flatten() for s, box in LOSSES["bounded"].items()}
                    mass = own(a, subject, boxes[subject]).sum(-1)
                    f, b = mass[:, boxes[subject]].sum(1), mass[:, ~(boxes["cat"] | boxes["dog"])].sum(1)
                    ratios.append(f / (f + 2 * b))
                total = total + share * (1 - torch.stack(ratios).mean(0)) ** 2
        return total
    finest = max(a.shape[1] for a in words)
    a = torch.stack([a for a in words if a.shape[1] == finest]).mean(0)
    side = math.isqrt(finest)
    sharp = (100 * a[..., list(WORDS)]).softmax(-1)
    taps = torch.exp(-(torch.tensor([-1.0, 0, 1]).double() ** 2) / (2 * 0.5**2))
    kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
    total, worst = 0, []
    for subject, numbers in TOKENS.items():
        one = sum(sharp[..., WORDS.index(number)] for number in numbers).unflatten(1, (side, side))
        one = F.conv2d(F.pad(one[:, None], (1, 1, 1, 1), mode="reflect"), kernel)[:, 0]
        worst.append(1 - one.flatten(1).max(1).values)
        if loss == "boxdiff":
            box = inside(BOXES[subject], side)
            for part, sign in ((one[:, box], -1), (one[:, ~box], 1)):
                top = part.sort(1, descending=True).values[:, : max(1, int(part.shape[1] * 0.2))].mean(1)
                total = total + (1 + sign * top if sign < 0 else top)
            for axis in (0, 1):
                line, edge = one.amax(1 + axis), box.any(axis)
                ends = edge.nonzero().flatten().tolist()
                near = [i for i in range(side) if min(abs(i - ends[0]), abs(i - ends[-1])) <= 1]
                total = total + (line - edge.double()).abs()[:, near].mean(1)
    return total if loss == "boxdiff" else torch.stack(worst).max(0).values


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "flux, true CFG"])
def test_the_update_is_the_gradient_of_dense_attention(name, loss):
    run = double(PIPELINES[name]())
    before = spied(run)
    z = before.samples[0].clone().requires_grad_()
    call, images = dict(before.inputs[0]), run.images
    image = "sample" if name == "sd" else "hidden_states"
    factor = (call[image][-images:] / before.samples[0]).mean()
    call = {
        k: v[-images:] if torch.is_tensor(v) and v.ndim > 1 and len(v) == 2 * images else v for k, v in call.items()
    }
    if torch.is_tensor(call["timestep"]) and call["timestep"].ndim:
        call["timestep"] = call["timestep"][-images:]
    with Patterns() as dense:
        run.model(**{**call, image: z * factor})
    patterns = dense.found
    wanted = dense_loss(loss, patterns, name != "sd", name.startswith("flux"))
    (slope,) = torch.autograd.grad(wanted.sum(), z)
    control = once(loss, scale=7.0)
    got = spied(run, control)
    assert control.losses[0] == (0, pytest.approx(wanted.tolist(), rel=1e-6))
    assert slope.abs().max() > 1e-6
    torch.testing.assert_close(
        got.samples[0] - z.detach(), -7.0 * slope, rtol=1e-5, atol=1e-8 * float(slope.abs().max()) + 1e-12
    )
    assert (got.picture - before.picture).abs().max() > 1e-5


CARRIED = [
    "sd",
    "sd, DDIM",
    "sd inpaint",
    "sd ControlNet",
    "sdxl",
    "sd3",
    "sd3 inpaint",
    "sd3 ControlNet",
    "flux, true CFG",
]
CARRIED += [
    "flux Kontext",
    "flux2",
    "flux2 klein",
    "qwen",
    "cogview4",
    "pixart",
    "auraflow",
    "lumina2",
    "z-image",
    "hidream",
]


@pytest.mark.parametrize("name", CARRIED)
def test_denoiser_and_scheduler_get_the_same_latents(name):
    run = PIPELINES[name]()
    control = ac.LatentGuidance(NOWHERE, {"cat": [1], "dog": [2]}, until={}, scale=0.1, normalize=True)
    before = spied(run)
    after = spied(run, control)
    assert len(after.inputs) == len(before.inputs) and len(after.samples) == len(before.samples)
    moved = after.samples[0] - before.samples[0]
    size = moved.flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(size, torch.full_like(size, 0.1), rtol=1e-2, atol=1e-3)
    image = after.session.family.image
    calls = 2 if len(after.inputs) > len(after.samples) else 1  # of the first step
    for old, new in zip(before.inputs[:calls], after.inputs[:calls], strict=True):
        old, new = (
            torch.stack(list(x[image])) if isinstance(x[image], (list, tuple)) else x[image] for x in (old, new)
        )
        n = moved.shape[1]
        factor = (old[-run.images :, :n].flatten() / before.samples[0].flatten()).nanmedian()
        parts = len(new) // run.images
        expected = (after.samples[0] * factor).repeat(parts, *[1] * (moved.ndim - 1))
        torch.testing.assert_close(new[:, :n].reshape(expected.shape), expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(new[:, n:], old[:, n:])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_losses_go_down(name, loss):
    run = PIPELINES[name]()
    control = guidance(loss, scale=0.02, normalize=True, until=0.0, iterations=4, weight=lambda fraction, sigma: 1.0)
    spied(run, control)
    first = [values for step, values in control.losses if step == 0]
    assert len(first) == 4
    assert all(last < start for start, last in zip(first[0], first[-1], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_half_precision_goes_the_same_way(name, dtype):
    run = PIPELINES[name]()
    start = torch.randn(run.images, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    moved = []
    for kind in (torch.float32, dtype):
        run.model.to(kind)
        narrow = run.where(**{k: v.to(kind) for k, v in run.inputs.items() if k.endswith("embeds")})
        samples = [
            spied(narrow, *controls, latents=start.to(kind)).samples[0]
            for controls in ((), (once(scale=5.0, normalize=True),))
        ]
        assert samples[1].dtype == samples[0].dtype
        moved.append((samples[1].float() - samples[0].float()).flatten(1))
    assert F.cosine_similarity(*moved).min() > 0.95


@pytest.mark.parametrize("neutral", [{"scale": 0.0}, {"phrases": {}, "tokens": {}}], ids=["scale", "phrases"])
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_neutral_is_bit_identical(name, neutral):
    run = PIPELINES[name]()
    control = ac.LatentGuidance(**{"phrases": NOWHERE, "tokens": TOKENS, **neutral})
    assert torch.equal(spied(run, control).picture, run())
    assert control.losses == []


def test_windows_and_second_order_steps():
    run = PIPELINES["sd, Heun"]().where(num_inference_steps=4)
    before = spied(run)
    control = once(start=0.25, stop=0.75)
    after = spied(run, control)
    assert [step for step, _ in control.losses] == [1, 2]
    same = [torch.equal(*pair) for pair in zip(before.samples, after.samples, strict=True)]
    assert same[:2] == [True, True] and not any(same[2:])


def test_images_do_not_mix_and_each_stops_at_its_own_loss():
    run = PIPELINES["sd3"]()
    control = guidance("boxdiff", scale=0.05, normalize=True, until={0: 1.5}, iterations=3)
    together = spied(run, control).samples[0]
    for image in range(run.images):
        alone = {key: value[image : image + 1] for key, value in run.inputs.items() if torch.is_tensor(value)}
        alone["seeds"] = run.inputs["seeds"][image : image + 1]
        got = spied(run.where(**alone), control).samples[0]
        torch.testing.assert_close(got, together[image : image + 1], rtol=1e-3, atol=1e-4)

    def measure(latents):
        return latents[:, 0], lambda: torch.ones_like(latents)

    still = ac.controls.Moment(1, 4, 0.25)
    start = torch.tensor([[1.0], [2.5], [4.0]])
    flat = {"scale": 1.0, "weight": lambda fraction, sigma: 1.0, "iterations": 2}
    got = guidance("bounded", until=1.0, **flat).descend(start, still, measure)
    assert got.flatten().tolist() == [1.0, 0.5, 2.0]
    got = guidance(until={0.2: 1.0}, **flat).descend(start, still, measure)
    assert got.flatten().tolist() == [0.0, -0.5, 1.0], "and one more for all"
    got = guidance(until={0.5: 1.0}, **flat).descend(start, still, measure)
    assert got.flatten().tolist() == [0.0, 1.5, 3.0]


def test_step_sizes_are_the_published_ones():
    moments = [ac.controls.Moment(i, 50, i / 50) for i in range(50)]
    sizes = [guidance().step_size(moment) for moment in moments]
    assert sizes == pytest.approx([20 * math.sqrt(x) for x in torch.linspace(1, 0.5, 50).tolist()])
    assert [guidance().target(moment) for moment in moments if guidance().target(moment) is not None] == [
        0.95,
        0.5,
        0.2,
    ]
    sizes = [guidance("bounded").step_size(moment) for moment in moments[:15]]
    assert sizes == pytest.approx(torch.linspace(18, 5, 15).tolist())
    assert guidance("bounded").schedule.covers(50) == 15 and guidance().schedule.covers(50) == 25


def test_checkpointed_blocks_give_the_same_and_early_layers_end_early():
    run = PIPELINES["sd3"]()
    ran = []
    run.model.transformer_blocks[1].register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    wanted = spied(run, once())
    assert True in ran
    ran.clear()
    first = spied(run, once(layers=0))
    assert True not in ran and False in ran
    assert not torch.allclose(first.samples[0], wanted.samples[0])
    run.model.enable_gradient_checkpointing()
    torch.testing.assert_close(spied(run, once()).samples[0], wanted.samples[0], rtol=1e-5, atol=1e-6)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in run.model.parameters())


def test_unets_leave_out_what_lies_behind_the_maps():
    run, ran = PIPELINES["sd"](), []
    run.model.conv_out.register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    control = once("boxdiff")
    spied(run, control)
    assert control.needed and all("attn2" in path for path in control.needed)
    assert ran.count(True) == 0 and ran.count(False) == 3


def test_other_controls_act_in_the_gradient_pass_and_see_the_plain_one():
    run = PIPELINES["sd3"]()
    masks = [ac.SubjectMasks(TOKENS, stop=1.0) for _ in range(2)]
    spied(run, masks[0])
    spied(run, masks[1], once(scale=1e-30))
    assert torch.equal(masks[0].maps(), masks[1].maps())
    isolation = ac.Isolation([(0, 0, 0.5, 1), (0.5, 0, 1, 1)])
    alone, beside = once(), once()
    spied(run, alone), spied(run, beside, isolation)
    assert alone.losses[0] != beside.losses[0]
    texts = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(4))
    halves = [
        ac.Region(name, box=box, prompt_embeds=text) for (name, box), text in zip(BOXES.items(), texts, strict=True)
    ]
    for other in ("sd3", "flux, true CFG", "sd"):
        guided, regions = PIPELINES[other](), ac.RegionalPrompts(halves)
        alone, beside = once("boxdiff"), once("boxdiff")
        spied(guided, alone), spied(guided, beside, regions)
        assert alone.losses[0] != beside.losses[0]
    strong = ac.SoftPAG(heads="1.2", scale=3.0)
    got = spied(run, once(), strong)
    assert torch.equal(got.samples[0], spied(run, once()).samples[0])
    assert got.session.calls["gradient passes"] == got.session.calls["perturbed passes"] / 2 == 1


def test_leaves_no_trace():
    run = PIPELINES["sd3"]()
    latents = torch.randn(3, 4, 8, 8)
    own, before = latents.clone(), run(latents=latents)
    assert not torch.equal(spied(run, once(), latents=latents).picture, before)
    assert torch.equal(latents, own) and torch.equal(run(latents=latents), before)

    run.model.proj_out.register_forward_hook(lambda *_: 1 / 0 if not torch.is_grad_enabled() else None)
    session = ac.attach(run.pipe, once())
    with pytest.raises(ZeroDivisionError):
        run()
    assert "step" in vars(run.pipe.scheduler), "the step was interrupted with a change on its way"
    session.detach()
    assert "step" not in vars(run.pipe.scheduler)
    assert all(parameter.requires_grad for parameter in run.model.parameters())


def test_phrases_are_found_with_the_words_beside_them(tmp_path):
    tokenizer = build_tokenizer(tmp_path, captions=200)
    prompt = "a red heart left of a blue star"
    count = len(tokenizer(prompt)["input_ids"])
    control = ac.LatentGuidance.in_prompt(["red heart", "blue star"], prompt, tokenizer, (tokenizer, 20))
    assert control.phrases == {"red heart": None, "blue star": None}
    assert control.words == (*range(1, count - 1), *range(21, 19 + count))
    assert set(control.tokens["red heart"]) < set(control.words)
    bounded = ac.LatentGuidance.in_prompt({"red heart": (0, 0, 0.5, 1)}, prompt, tokenizer, loss="bounded")
    assert bounded.tokens["red heart"][-1] == count - 1


def test_survives_json():
    for control in (once("boxdiff", layers=[1], scale=3.0), guidance("bounded"), guidance(words=WORDS)):
        facts = json.loads(json.dumps(describe(control), allow_nan=False))
        back = restore(facts)
        assert describe(back) == describe(control) and back.schedule == control.schedule
        assert back.until == control.until and back.tokens == control.tokens


def test_mistakes_are_named():
    for options, message in (
        ({"loss": "box"}, "loss='box' is none of attend_and_excite, boxdiff, bounded"),
        ({"phrases": BOXES}, "'cat' has a place, and attend_and_excite knows none"),
        ({"loss": "boxdiff"}, "'dog' has no place, and boxdiff needs one"),
        ({"tokens": {"cat": [1]}}, "'dog' has no tokens"),
        ({"words": [1, 2]}, "words lack tokens of 'cat'"),
        ({"scale": -1, "iterations": 0}, "scale=-1.*iterations=0"),
    ):
        with pytest.raises(ac.AttnCtrlError, match=message):
            ac.LatentGuidance(**{"phrases": NOWHERE, "tokens": TOKENS, **options})
    with pytest.raises(ac.AttnCtrlError, match="a bare denoiser has none\nHINT: attach to the pipeline"):
        ac.attach(tiny_sd3(), guidance())
    run = PIPELINES["sd3"]()
    for control, message in (
        (ac.LatentGuidance({"cat": None}, {"cat": [9]}), "'cat' has token 9, and the text has 5 tokens\nHINT"),
        (once("boxdiff", layers=7), "0 to 2"),
        (
            ac.LatentGuidance({"a": (0, 0, 0.5, 1), "b": (0.5, 0, 1, 1)}, {"a": [1], "b": [2]}, "bounded"),
            "cover all of it",
        ),
    ):
        with pytest.raises(ac.AttnCtrlError, match=message), ac.attach(run.pipe, control):
            run()
    with ac.attach(run.pipe, guidance()), torch.inference_mode():
        with pytest.raises(ac.AttnCtrlError, match="inference_mode.*\nHINT: torch.no_grad"):
            run()
    frozen = run.model.pos_embed.register_forward_hook(lambda module, args, out: out.detach())
    with ac.attach(run.pipe, guidance()), pytest.raises(ac.AttnCtrlError, match="no gradient reaches the latents"):
        run()
    frozen.remove()
    run.pipe.scheduler.scale_model_input = lambda latents, timestep: 2 * latents
    with ac.attach(run.pipe, guidance()), pytest.raises(ac.AttnCtrlError, match="in an unknown way"):
        run()
    video = PIPELINES["ltx"]()
    with ac.attach(video.pipe, guidance()), pytest.raises(ac.AttnCtrlError, match="not videos"):
        video()

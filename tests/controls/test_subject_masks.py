import pytest
import torch

import attnctrl as ac
from attnctrl.controls.subject_masks import otsu, phrase_tokens, without_specks
from attnctrl.icons.recipes.text import build_tokenizer

from ..dense import DenseAttention, plain, scores
from ..models import flux_call, sd3_call, tiny_flux, tiny_sd3, tiny_unet, unet_call
from ..pipelines import tiny_sd3_pipeline
from ..processors.tiny_pipelines import PIPELINES


TEXT = 5
PHRASES = {"cat": [1, 3], "dog": [2]}
FAMILIES = {"sd3": (tiny_sd3, sd3_call), "flux": (tiny_flux, flux_call), "unet": (tiny_unet, unet_call)}


class Watching(DenseAttention):
    """Plain attention, and the mean over heads of its text columns for image rows: `maps` holds (B, N, TEXT) per call."""

    def __init__(self, text_first: bool = False):
        super().__init__(self.look)
        self.maps, self.text_first = [], text_first

    def look(self, index, q, k, v):
        n = k.shape[2]
        pattern = scores(q, k).softmax(-1).mean(1)
        if n == TEXT:
            self.maps.append(pattern)
        elif round(n**0.5) ** 2 != n:
            image, text = (
                (slice(TEXT, n), slice(0, TEXT)) if self.text_first else (slice(0, n - TEXT), slice(n - TEXT, n))
            )
            self.maps.append(pattern[:, image, text])
        return plain(q, k, v)


def mean_map(maps, side: int) -> torch.Tensor:
    """(B, S, side, side) of the phrases, coarse maps enlarged."""
    found = []
    for one in maps:
        mass = torch.stack([one[..., tokens].sum(-1) for tokens in PHRASES.values()], 1)
        own = round(mass.shape[-1] ** 0.5)
        found.append(torch.nn.functional.interpolate(mass.unflatten(-1, (own, own)), (side, side), mode="bilinear"))
    return torch.stack(found).mean(0).float()


@pytest.mark.parametrize("family, side", [("sd3", 4), ("flux", 4), ("unet", 8)])
def test_maps_are_the_mean_of_dense_attention_and_nothing_changes(family, side):
    build, call = FAMILIES[family]
    model, masks = build(), ac.SubjectMasks(PHRASES, stop=0.5)
    calls = [call(), call()]
    calls[1]["encoder_hidden_states"] = calls[1]["encoder_hidden_states"].roll(1, 1)
    maps = []
    with torch.no_grad():
        for inputs in calls:
            with Watching(family == "flux") as dense:
                model(**inputs)
            maps += dense.maps
        before = [model(**inputs)[0] for inputs in calls]
        with ac.attach(model, masks) as session:
            for step, inputs in enumerate([*calls, *calls]):
                session.set_step(step, 4)
                assert torch.equal(model(**inputs)[0], before[step % 2])
    torch.testing.assert_close(masks.maps(), mean_map(maps, side), rtol=1e-4, atol=1e-6)
    assert masks.masks().shape == (2, 2, side, side)


@pytest.mark.parametrize("name", ["sd3", "unet"])
def test_only_chosen_layers_are_watched(name):
    build, call = FAMILIES[name]
    model, masks = build(), ac.SubjectMasks(PHRASES, layers="1", stop=1.0)
    with torch.no_grad():
        with Watching() as dense:
            model(**call())
        with ac.attach(model, masks):
            model(**call())
    torch.testing.assert_close(masks.maps(), mean_map(dense.maps[1:2], masks.maps().shape[-1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_only_conditional_rows_of_plain_passes_count(name):
    """With guidance by a perturbed pass the maps are those without it, in the first step."""
    pipeline, found = PIPELINES[name](), []
    for controls in ((), (ac.SoftPAG(layers="1:"),)):
        masks = ac.SubjectMasks(PHRASES, stop=0.1)
        with ac.attach(pipeline.pipe, masks, *controls):
            pipeline()
        found.append(masks.maps())
    assert found[0].shape[0] == pipeline.images
    assert torch.equal(*found)
    with ac.attach(pipeline.pipe, ac.SubjectMasks(PHRASES, stop=0.1)) as session:
        pipeline.where(negative_prompt_embeds=pipeline.inputs["negative_prompt_embeds"] + 1)()
    assert torch.equal(session.controls[0].maps(), found[0])


def blobs() -> torch.Tensor:
    """Two pictures of 8 x 8 with a cat and a dog in different places."""
    maps = torch.full((2, 2, 8, 8), 0.1)
    maps[0, 0, 1:4, 1:4], maps[0, 1, 4:8, 4:8] = 0.9, 0.7
    maps[1, 0, 4:8, 0:3], maps[1, 1, 0:3, 3:8] = 0.8, 0.5
    return maps


def found_in(maps: torch.Tensor, **options) -> ac.SubjectMasks:
    """Masks that have recorded these maps (B, S, rows, columns)."""
    masks = ac.SubjectMasks(PHRASES, **options)
    masks._see("somewhere", tuple(maps.shape[-2:]), maps.flatten(2).transpose(1, 2))
    return masks


def test_masks_are_the_subjects():
    noise = 0.05 * torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    speckled = blobs() + noise
    speckled[0, 0, 7, 0] = 0.9
    speckled[0, 1, 1, 1] = 0.45  # where the cat is stronger
    masks = found_in(speckled, blur=0.0)
    assert torch.equal(masks.masks(), blobs() > 0.3)
    lone = found_in(speckled, blur=0.0, speck=0.0, exclusive=False).masks()
    assert lone[0, 0, 7, 0] and lone[0, 1, 1, 1]
    assert found_in(speckled, threshold=0.95, blur=0.0).masks().sum() < masks.masks().sum()
    smooth = found_in(blobs(), blur=1.0).masks()
    assert (smooth & (blobs() > 0.3)).sum() > 0.7 * (blobs() > 0.3).sum()
    cat, dog = masks.regions(1)
    assert (cat.prompt, dog.prompt) == ("cat", "dog")
    assert torch.equal(cat.tokens((8, 8)).view(8, 8), masks.masks()[1, 0])
    flat = found_in(torch.full((1, 2, 4, 4), 0.2))
    assert not flat.masks().any()
    with pytest.raises(ac.AttnCtrlError, match="'cat' nowhere in image 0\nHINT"):
        flat.regions()


def test_otsu_parts_two_classes():
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(60, generator=generator), torch.randn(30, generator=generator) + 5])
    cuts = x.sort().values
    between = [
        float((x > cut).float().mean() * (x <= cut).float().mean() * (x[x > cut].mean() - x[x <= cut].mean()) ** 2)
        for cut in cuts[:-1]
    ]
    best = between.index(max(between))
    assert cuts[best] < otsu(x) < cuts[best + 1] and 1 < otsu(x) < 4
    assert otsu(torch.tensor([0.0, 0, 0, 1])) == 0.5
    assert otsu(torch.full((5,), 0.3)) == pytest.approx(0.3) and otsu(torch.tensor([2.0])) == 2


def test_specks_are_parts_that_touch_over_edges():
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]).bool()
    kept = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    assert torch.equal(without_specks(mask, 0.5), kept)
    assert torch.equal(without_specks(mask, 0.25), mask)
    snake = torch.zeros(9, 9, dtype=torch.bool)
    snake[::2] = True
    snake[1::4, 8] = snake[3::4, 0] = True
    assert torch.equal(without_specks(snake, 1.0), snake)
    empty = torch.zeros(3, 3, dtype=torch.bool)
    assert torch.equal(without_specks(empty, 0.5), empty)


def test_isolation_and_sharing_use_the_masks_of_each_image():
    model, inputs = tiny_sd3(), sd3_call(batch=2)
    boxes = blobs() > 0.3

    def isolated(index, q, k, v):
        out = plain(q, k, v)
        for row in range(2):
            table = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
            cat, dog = (mask[::2, ::2] | mask[1::2, ::2] | mask[::2, 1::2] | mask[1::2, 1::2] for mask in boxes[row])
            cat, dog = cat.flatten(), dog.flatten()
            only_cat, only_dog = cat & ~dog, dog & ~cat
            table[:16, :16] = ~(only_cat[:, None] & only_dog) & ~(only_dog[:, None] & only_cat)
            out[row] = plain(q[row], k[row], v[row], table)
        return out

    with torch.no_grad():
        before = model(**inputs)[0]
        with DenseAttention(isolated):
            wanted = model(**inputs)[0]
        masks = found_in(blobs(), blur=0.0, stop=0.5)
        with ac.attach(model, ac.Isolation(masks)) as session:
            session.set_step(1, 4)
            assert torch.equal(model(**inputs)[0], before), "the masks are not known before their window ends"
            session.set_step(2, 4)
            torch.testing.assert_close(model(**inputs)[0], wanted, rtol=1e-4, atol=1e-5)
        unions = [[ac.Region("", mask=mask.float(), downsample="max") for mask in one] for one in boxes]
        with ac.attach(model, ac.SharedAttention(unions)):
            wanted = model(**inputs)[0]
        with ac.attach(model, ac.SharedAttention.consistory(masks, layers=None, dropout=0.0)) as session:
            session.set_step(2, 4)
            assert torch.equal(model(**inputs)[0], wanted)


def test_one_run_finds_masks_and_uses_them(tmp_path):
    pipe = tiny_sd3_pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red heart left of a blue star"

    def run(*controls):
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "generator": generator}
        with ac.attach(pipe, *controls) as session:
            return pipe(prompt, **options).images, session

    masks = ac.SubjectMasks.in_prompt(["red heart", "blue star"], prompt, pipe.tokenizer, stop=0.5, blur=0.0)
    before, _ = run()
    recorded, _ = run(masks)
    assert torch.equal(before, recorded)
    masks.clear()
    isolated, session = run(masks, ac.Isolation(masks))
    assert set(session.hits[session.controls[1]].values()) == {2}, "from the third of four steps on"
    again, _ = run(ac.Isolation([(region,) for region in masks.regions()], start=0.5))
    torch.testing.assert_close(isolated, again)
    assert not torch.allclose(isolated, before)


@pytest.mark.parametrize("name", ["sd3", "sd, Heun", "flux, true CFG"])
@pytest.mark.parametrize("steps", [1, 4])
def test_every_picture_begins_anew(name, steps):
    """One session makes several pictures; each has the masks that it has with controls of its own."""
    pipeline = PIPELINES[name]().where(num_inference_steps=steps)
    runs = [pipeline, pipeline.where(prompt_embeds=pipeline.inputs["prompt_embeds"].roll(1, 1)), pipeline]

    def controls():
        masks = ac.SubjectMasks(PHRASES, stop=0.5 if steps > 1 else 1.0, blur=0.0, speck=0.0, exclusive=False)
        return (masks, ac.Isolation(masks, background="isolated")) if steps > 1 else (masks,)

    alone = []
    for run in runs[:2]:
        own = controls()
        with ac.attach(run.pipe, *own):
            alone.append((run(), own[0].maps()))
    plain_pictures = [run() for run in runs[:2]]
    masks, *users = controls()
    with ac.attach(pipeline.pipe, masks, *users) as session:
        for run, (picture, maps) in zip(runs, [*alone, alone[0]]):
            assert torch.equal(run(), picture)
            assert torch.equal(masks.maps(), maps)
    assert not torch.allclose(alone[0][1], alone[1][1])
    for (picture, _), before in zip(alone, plain_pictures):
        assert torch.equal(picture, before) == (not users)
    assert len(session._plans) <= 2 * len(session.sites), "plans of earlier pictures are dropped"


def test_steps_of_a_bare_denoiser_begin_anew():
    model, masks, found = tiny_sd3(), ac.SubjectMasks(PHRASES, stop=1.0), []
    calls = [sd3_call(), sd3_call()]
    calls[1]["encoder_hidden_states"] = calls[1]["encoder_hidden_states"].roll(1, 1)
    with torch.no_grad(), ac.attach(model, masks) as session:
        for step, steps, inputs in (
            (0, 1, calls[0]),
            (0, 1, calls[1]),
            (0, 2, calls[0]),
            (1, 2, calls[1]),
            (0, 2, calls[1]),
        ):
            session.set_step(step, steps)
            model(**inputs)
            found.append(masks.maps())
    torch.testing.assert_close(found[3], (found[0] + found[1]) / 2)
    assert torch.equal(found[2], found[0]) and torch.equal(found[4], found[1])
    assert not torch.allclose(found[0], found[1])


def test_a_weak_pass_of_the_pipeline_is_not_recorded():
    pipeline, found = PIPELINES["sd3"]().where(num_inference_steps=4), []
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    for options in ({}, skipping):  # from the second step on, after what the latents of the second step come from
        masks = ac.SubjectMasks(PHRASES, stop=0.5)
        with ac.attach(pipeline.pipe, masks):
            pipeline(**options)
        found.append(masks.maps())
    assert torch.equal(*found)


def test_phrases_become_tokens(tmp_path):
    tokenizer = build_tokenizer(tmp_path, captions=200)
    prompt = "a red heart left of a blue star"
    words = tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"])
    for phrase in ("red heart", "Blue star", "left"):
        text = "".join(words[i] for i in phrase_tokens(phrase, prompt, tokenizer)).replace("</w>", "").replace("Ġ", "")
        assert text == phrase.lower().replace(" ", "")
    both = phrase_tokens("a", prompt, tokenizer)
    assert len(both) == 2, "every place, whole words only"
    shifted = ac.SubjectMasks.in_prompt(["red"], prompt, tokenizer, offset=10)
    assert shifted.phrases["red"] == tuple(10 + i for i in phrase_tokens("red", prompt, tokenizer))
    for phrase in ("green", "ear", ""):
        with pytest.raises(ac.AttnCtrlError, match=f"{phrase!r} is not in the prompt '{prompt}'\nHINT"):
            phrase_tokens(phrase, prompt, tokenizer)
    with pytest.raises(ac.AttnCtrlError, match="tokens are read\nHINT: a shorter prompt"):
        phrase_tokens("star", "a red heart and " * tokenizer.model_max_length + "a star", tokenizer)


def test_mistakes_are_named():
    with pytest.raises(
        ac.AttnCtrlError, match="(?s)'x' has no tokens.*'y' has token -1.*blur=-1.*threshold=2.*speck=3"
    ):
        ac.SubjectMasks({"x": [], "y": [-1]}, blur=-1, threshold=2, speck=3)
    with pytest.raises(ac.AttnCtrlError, match="no mapping of phrases"):
        ac.SubjectMasks(["cat"])
    with pytest.raises(ac.AttnCtrlError, match="recorded nothing yet\nHINT: attach"):
        ac.SubjectMasks(PHRASES).masks()
    with pytest.raises(ac.AttnCtrlError, match="masks are found until 0.5.*ends before\nHINT"):
        ac.Isolation(ac.SubjectMasks(PHRASES, stop=0.5), stop=0.4)
    with pytest.raises(ac.AttnCtrlError, match="one subject has no other"):
        ac.Isolation(ac.SubjectMasks({"cat": [1]}))
    model = tiny_sd3()
    with torch.no_grad(), ac.attach(model, ac.SubjectMasks({"cat": [7]}, stop=1.0)):
        with pytest.raises(ac.AttnCtrlError, match="'cat' has token 7, and the text has 5 tokens\nHINT"):
            model(**sd3_call())
    with torch.no_grad(), ac.attach(model, ac.Isolation(ac.SubjectMasks(PHRASES))) as session:
        session.set_step(2, 4)
        with pytest.raises(ac.AttnCtrlError, match="recorded nothing yet"):
            model(**sd3_call())
    with pytest.raises(ac.AttnCtrlError, match="0 to 2"):
        ac.attach(model, ac.SubjectMasks(PHRASES, layers=5))

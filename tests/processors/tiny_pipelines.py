"""Tiny diffusers pipelines with random weights, and what they are called with: `PIPELINES[name]()` is a `Run`.

Text encoders are left out, so embeddings are given. Every run makes two or more pictures of different seeds in 2-4 steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ControlNetModel, SD3Transformer2DModel

from .. import models
from ..models.common import awake, build


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def affine(uncond: torch.Tensor, cond: torch.Tensor, g: float) -> torch.Tensor:
    return uncond + g * (cond - uncond)


@dataclass(frozen=True)
class Run:
    """A pipeline, its arguments, and how it makes one prediction of the parts.

    Args:
        g: the scale of classifier-free guidance; None when there is none.
        cond_first: of the two halves of a batch.
        combine: (uncond, cond, g) -> guided prediction.
        rescale: (guided, cond) -> what the pipeline does to a guided prediction.
        last: what it does to every prediction.

    Of the tokens of a prediction, the first are the latents.
    """

    pipe: Any
    inputs: dict
    g: float | None = 3.0
    cond_first: bool = False
    combine: Callable = affine
    rescale: Callable = lambda guided, cond: guided
    last: Callable = lambda prediction: prediction

    def __call__(self, **changes):
        seeds = self.inputs["seeds"]
        torch.manual_seed(0)  # some pipelines encode pictures without a generator
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        arguments = {key: value for key, value in self.inputs.items() if key != "seeds"}
        return self.pipe(**arguments, generator=generators, output_type="latent", **changes)[0]

    def where(self, **inputs) -> Run:
        """The same with other arguments."""
        return replace(self, inputs={**self.inputs, **inputs})

    @property
    def images(self) -> int:
        return len(self.inputs["seeds"])

    @property
    def model(self) -> torch.nn.Module:
        return getattr(self.pipe, "transformer", None) or self.pipe.unet


def assemble(cls, **parts):
    """A pipeline without the parts that are not given."""
    names = inspect.signature(cls.__init__).parameters.values()
    needed = [item.name for item in names if item.default is item.empty and item.name != "self"]
    pipe = cls(**{**dict.fromkeys(needed), **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow(**options):
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def tiny_vae(channels: int = 4, cls=AutoencoderKL, **more):
    """Halves the resolution."""
    sides = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return build(
        cls,
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        **sides,
        **(more or {"shift_factor": 0.0}),
    )


def texts(prompts: int = 2, pooled: bool = False, mask: bool = False, per_prompt: int = 1, steps: int = 2) -> dict:
    """Embeddings of 5 tokens and 16 channels, and the settings of the call."""
    found = {"prompt_embeds": random(1, prompts, 5, 16), "negative_prompt_embeds": random(2, prompts, 5, 16)}
    if pooled:
        found["pooled_prompt_embeds"] = random(3, prompts, 12)
        found["negative_pooled_prompt_embeds"] = random(4, prompts, 12)
    if mask:  # the first prompt has padding, the negative ones have none
        found["prompt_attention_mask"] = torch.ones(prompts, 5, dtype=torch.int64)
        found["prompt_attention_mask"][0, 3:] = 0
        found["negative_prompt_attention_mask"] = torch.ones(prompts, 5, dtype=torch.int64)
    if per_prompt > 1:
        found["num_images_per_prompt"] = per_prompt
    return found | {"num_inference_steps": steps, "seeds": range(10, 10 + prompts * per_prompt)}


def size(height: int, width: int | None = None) -> dict:
    return {"height": height, "width": width or height}


def pictures(count: int, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(6))


def masks(count: int, side: int = 16) -> torch.Tensor:
    mask = torch.zeros(count, 1, side, side)
    mask[..., : side // 2] = 1
    return mask


# -- UNets -----------------------------------------------------------------------------------------------------------------


def stable_diffusion(scheduler="EulerDiscreteScheduler", cls="StableDiffusionPipeline", **parts):
    more = {"clip_sample": False} if scheduler == "DDIMScheduler" else {}
    return assemble(
        getattr(diffusers, cls),
        unet=models.tiny_unet(),
        scheduler=getattr(diffusers, scheduler)(steps_offset=1, **more),
        vae=tiny_vae(),
        requires_safety_checker=False,
        **parts,
    )


def sd(scheduler: str = "EulerDiscreteScheduler", per_prompt: int = 1, **options) -> Run:
    inputs = texts(per_prompt=per_prompt, steps=3) | size(16) | {"guidance_scale": 3.0}
    return Run(stable_diffusion(scheduler), {**inputs, **options})


def sd_img2img(scheduler: str = "EulerDiscreteScheduler") -> Run:
    pipe = stable_diffusion(scheduler, "StableDiffusionImg2ImgPipeline")
    return Run(pipe, texts(steps=4) | {"image": pictures(2), "strength": 0.5, "guidance_scale": 3.0})


def sd_inpaint() -> Run:
    pipe = stable_diffusion(cls="StableDiffusionInpaintPipeline")
    more = {"image": pictures(2), "mask_image": masks(2), "strength": 1.0, "guidance_scale": 3.0}
    return Run(pipe, texts() | size(16) | more)


def sd_controlnet(guess_mode: bool = False) -> Run:
    unet = models.tiny_unet()
    control = awake(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)))
    pipe = stable_diffusion(cls="StableDiffusionControlNetPipeline", controlnet=control)
    more = {"image": pictures(2), "guidance_scale": 3.0, "guess_mode": guess_mode}
    return Run(pipe, texts() | size(16) | more)


def ip_adapter_weights(unet) -> dict:
    """Of an IP-Adapter for pictures of 6 channels, as its file holds them."""
    cross = [path for path in unet.attn_processors if "attn2" in path]
    found = {}
    for index, path in enumerate(cross):
        shape = unet.get_submodule(path.removesuffix(".processor")).to_k.weight.shape
        for name in ("to_k_ip", "to_v_ip"):
            found[f"{2 * index + 1}.{name}.weight"] = 0.3 * random(20 + index, *shape)
    image = {"proj.weight": random(7, 4 * 16, 6), "proj.bias": torch.zeros(4 * 16)}
    return {"ip_adapter": found, "image_proj": image | {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}}


def sd_ip_adapter() -> Run:
    pipe = stable_diffusion()
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
    pipe.set_ip_adapter_scale(0.8)
    embeds = torch.cat([torch.zeros(1, 1, 6), random(8, 1, 1, 6)])
    inputs = texts(prompts=1, per_prompt=2) | size(16)
    return Run(pipe, inputs | {"ip_adapter_image_embeds": [embeds], "guidance_scale": 3.0})


def match_std(phi: float):
    """The standard deviation of every picture's guided prediction brought `phi` of the way to the conditional one's."""

    def rescale(guided, cond):
        axes = tuple(range(1, cond.ndim))
        ratio = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
        return phi * guided * ratio + (1 - phi) * guided

    return rescale


def sdxl(rescale: float = 0.0) -> Run:
    pipe = assemble(
        diffusers.StableDiffusionXLPipeline,
        unet=models.tiny_sdxl(),
        scheduler=diffusers.EulerDiscreteScheduler(),
        vae=tiny_vae(),
        add_watermarker=False,
    )
    inputs = texts(pooled=True) | size(16) | {"guidance_scale": 3.0, "guidance_rescale": rescale}
    return Run(pipe, inputs, rescale=match_std(rescale))


# -- transformers, one call for both halves --------------------------------------------------------------------------------


def sd3(cls: str = "StableDiffusion3Pipeline", transformer=None, **parts):
    transformer = models.tiny_sd3() if transformer is None else transformer
    vae = tiny_vae(transformer.config.in_channels)
    return assemble(getattr(diffusers, cls), transformer=transformer, scheduler=flow(), vae=vae, **parts)


def sd3_plain() -> Run:
    return Run(sd3(), texts(prompts=3, pooled=True) | size(16) | {"guidance_scale": 3.0})


def sd3_img2img() -> Run:
    more = {"image": pictures(2), "strength": 0.5, "guidance_scale": 3.0}
    return Run(sd3("StableDiffusion3Img2ImgPipeline"), texts(pooled=True, steps=4) | size(16) | more)


def sd3_inpaint() -> Run:
    config = dict(models.tiny_sd3().config) | {"in_channels": 16, "out_channels": 16}
    wide = build(SD3Transformer2DModel, **{key: value for key, value in config.items() if not key.startswith("_")})
    more = {"image": pictures(2), "mask_image": masks(2), "strength": 0.75, "guidance_scale": 3.0}
    return Run(sd3("StableDiffusion3InpaintPipeline", wide), texts(pooled=True, steps=4) | size(16) | more)


def sd3_controlnet() -> Run:
    control = build(
        diffusers.SD3ControlNetModel,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=12,
        pos_embed_max_size=12,
    )
    more = {"control_image": pictures(2), "guidance_scale": 3.0}
    return Run(sd3("StableDiffusion3ControlNetPipeline", controlnet=control), texts(pooled=True) | size(16) | more)


def pixart() -> Run:
    """The second half of the channels is a learned variance, which the pipeline drops after guidance."""
    pipe = assemble(
        diffusers.PixArtAlphaPipeline, transformer=models.tiny_pixart(), scheduler=diffusers.DDIMScheduler()
    )
    more = {"negative_prompt": None, "use_resolution_binning": False, "guidance_scale": 3.0}
    return Run(pipe, texts(mask=True) | size(64) | more, last=lambda prediction: prediction[:, :4])


def auraflow() -> Run:
    pipe = assemble(diffusers.AuraFlowPipeline, transformer=models.tiny_auraflow(), scheduler=flow())
    return Run(pipe, texts(mask=True) | size(64) | {"guidance_scale": 3.0})


def ltx(rescale: float = 0.0) -> Run:
    pipe = assemble(diffusers.LTXPipeline, transformer=models.tiny_ltx(), scheduler=flow())
    more = {"num_frames": 9, "guidance_scale": 3.0, "guidance_rescale": rescale}
    return Run(pipe, texts(mask=True) | size(96, 128) | more, rescale=match_std(rescale))


def cogvideox() -> Run:
    scheduler = diffusers.CogVideoXDDIMScheduler()
    pipe = assemble(diffusers.CogVideoXPipeline, transformer=models.tiny_cogvideox(rotary=False), scheduler=scheduler)
    return Run(pipe, texts() | size(48, 64) | {"num_frames": 5, "guidance_scale": 3.0})


def z_image(normalization: float = 0.0, truncation: float = 1.0) -> Run:
    """Lists of tensors, [cond, uncond], cond + g (cond − uncond), the sign turned at the end."""

    def shorten(guided, cond):
        if not normalization:
            return guided
        axes = tuple(range(1, cond.ndim))
        limit = cond.square().sum(axes, keepdim=True).sqrt() * normalization
        return guided * (limit / guided.square().sum(axes, keepdim=True).sqrt()).clamp(max=1)

    pipe = assemble(diffusers.ZImagePipeline, transformer=models.tiny_z_image(), scheduler=flow())
    inputs = {
        "prompt_embeds": [random(1, 40, 16), random(2, 10, 16)],
        "negative_prompt_embeds": [random(3, 7, 16), random(4, 9, 16)],
        "cfg_normalization": normalization,
        "cfg_truncation": truncation,
        "guidance_scale": 2.0,
        "num_inference_steps": 2,
        "num_images_per_prompt": 2,
        "seeds": range(4),
    }
    return Run(
        pipe,
        inputs | size(64),
        g=2.0,
        cond_first=True,
        combine=lambda uncond, cond, g: cond + g * (cond - uncond),
        rescale=shorten,
        last=lambda prediction: -prediction.squeeze(2),
    )


def hidream() -> Run:
    """The states of Llama have their rows in the second axis, and the sign is turned."""
    pipe = assemble(diffusers.HiDreamImagePipeline, transformer=models.tiny_hidream(), scheduler=flow())
    pipe.default_sample_size = 8
    inputs = texts(pooled=True) | size(64) | {"guidance_scale": 3.0}
    for prefix, seed in (("", 8), ("negative_", 9)):
        inputs[f"{prefix}prompt_embeds_t5"] = inputs.pop(f"{prefix}prompt_embeds")
        inputs[f"{prefix}prompt_embeds_llama3"] = random(seed, 3, 2, 6, 12)
    return Run(pipe, inputs, last=lambda prediction: -prediction)


def sana() -> Run:
    pipe = assemble(diffusers.SanaPipeline, transformer=models.tiny_sana(), scheduler=flow())
    more = {"negative_prompt": None, "use_resolution_binning": False, "guidance_scale": 3.0}
    return Run(pipe, texts(mask=True) | size(128) | more)


def mochi() -> Run:
    pipe = assemble(diffusers.MochiPipeline, transformer=models.tiny_mochi(), scheduler=flow(invert_sigmas=True))
    return Run(pipe, texts(mask=True) | size(48, 64) | {"num_frames": 7, "guidance_scale": 3.0})


# -- transformers, a call for each half ------------------------------------------------------------------------------------


def match_norm(guided, cond):
    """The norm of every vector along the last axis brought to the conditional one's."""
    return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def flux(cls: str = "FluxPipeline", cfg: bool = True, **more) -> Run:
    parts = {name: more.pop(name) for name in ("controlnet",) if name in more}
    pipe = assemble(
        getattr(diffusers, cls), transformer=models.tiny_flux(), scheduler=flow(), vae=tiny_vae(2), **parts
    )
    inputs = texts(pooled=True) | size(16) | more
    if cfg:
        return Run(pipe, inputs | {"true_cfg_scale": 3.0})
    return Run(pipe, {key: value for key, value in inputs.items() if not key.startswith("negative")}, g=None)


def flux_kontext() -> Run:
    """The picture's own tokens follow those of the latents, and the pipeline cuts them off what comes back."""
    more = {"image": pictures(2), "max_area": 256, "_auto_resize": False}
    return flux("FluxKontextPipeline", **more)


def flux_controlnet() -> Run:
    control = build(
        diffusers.FluxControlNetModel,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=[2, 2, 4],
    )
    return flux("FluxControlNetPipeline", controlnet=control, control_image=pictures(2))


def flux2() -> Run:
    pipe = assemble(diffusers.Flux2Pipeline, transformer=models.tiny_flux2(), scheduler=flow())
    inputs = {key: value for key, value in texts().items() if not key.startswith("negative")}
    return Run(pipe, inputs | size(64), g=None)


def flux2_klein() -> Run:
    vae = tiny_vae(2, diffusers.AutoencoderKLFlux2, patch_size=(2, 2))
    pipe = assemble(
        diffusers.Flux2KleinPipeline, transformer=models.tiny_flux2(), scheduler=flow(), vae=vae, is_distilled=False
    )
    return Run(pipe, texts() | size(16) | {"guidance_scale": 3.0})


def chroma() -> Run:
    pipe = assemble(diffusers.ChromaPipeline, transformer=models.tiny_chroma(), scheduler=flow(), vae=tiny_vae(2))
    inputs = {key: value.bool() if key.endswith("mask") else value for key, value in texts(mask=True).items()}
    return Run(pipe, inputs | size(16) | {"guidance_scale": 3.0})


def hunyuan_video() -> Run:
    """Embedded guidance and classifier-free guidance at once."""
    pipe = assemble(diffusers.HunyuanVideoPipeline, transformer=models.tiny_hunyuan_video(), scheduler=flow())
    inputs = texts(pooled=True, mask=True) | size(48, 64)
    return Run(pipe, inputs | {"num_frames": 5, "true_cfg_scale": 3.0})


def qwen_image() -> Run:
    pipe = assemble(diffusers.QwenImagePipeline, transformer=models.tiny_qwen_image(), scheduler=flow())
    inputs = texts(mask=True) | size(64) | {"true_cfg_scale": 3.0}
    inputs = {key.replace("attention_mask", "embeds_mask"): value for key, value in inputs.items()}
    return Run(pipe, inputs, rescale=match_norm)


def wan() -> Run:
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = assemble(diffusers.WanPipeline, transformer=models.tiny_wan(), scheduler=scheduler)
    return Run(pipe, texts(steps=3) | size(48, 64) | {"num_frames": 5, "guidance_scale": 3.0})


def cogview4() -> Run:
    pipe = assemble(diffusers.CogView4Pipeline, transformer=models.tiny_cogview4(), scheduler=flow())
    return Run(pipe, texts() | size(64) | {"guidance_scale": 3.0})


def lumina2(normalize: bool = True, truncation: float = 1.0) -> Run:
    pipe = assemble(diffusers.Lumina2Pipeline, transformer=models.tiny_lumina2(), scheduler=flow())
    more = {"guidance_scale": 3.0, "cfg_normalization": normalize, "cfg_trunc_ratio": truncation}
    inputs = texts(mask=True) | size(64) | more
    inputs["prompt_attention_mask"][:, 3:] = 0  # every picture starts behind its own prompt
    rescale = match_norm if normalize else lambda guided, cond: guided
    return Run(pipe, inputs, rescale=rescale, last=lambda prediction: -prediction)


def hunyuan_image(guider=None) -> Run:
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0) if guider is None else guider
    pipe = assemble(
        diffusers.HunyuanImagePipeline, transformer=models.tiny_hunyuan_image(), scheduler=flow(), guider=guider
    )
    inputs = texts(mask=True) | size(128)
    inputs = {key.replace("attention_mask", "embeds_mask"): value for key, value in inputs.items()}
    for prefix, seed in (("", 8), ("negative_", 9)):
        inputs[f"{prefix}prompt_embeds_2"] = random(seed, 2, 3, 12)
        inputs[f"{prefix}prompt_embeds_mask_2"] = torch.ones(2, 3, dtype=torch.int64)
    return Run(pipe, inputs)


PIPELINES: dict[str, Callable[[], Run]] = {
    "sd": sd,
    "sd, two images a prompt": lambda: sd(per_prompt=2),
    "sd, Heun": lambda: sd("HeunDiscreteScheduler"),
    "sd, DDIM": lambda: sd("DDIMScheduler"),
    "sd, rescale": lambda: replace(sd(guidance_rescale=0.7), rescale=match_std(0.7)),
    "sd img2img": sd_img2img,
    "sd inpaint": sd_inpaint,
    "sd ControlNet": sd_controlnet,
    "sd ControlNet, guess mode": lambda: sd_controlnet(guess_mode=True),
    "sd IP-Adapter": sd_ip_adapter,
    "sdxl": sdxl,
    "sdxl, rescale": lambda: sdxl(0.7),
    "sd3": sd3_plain,
    "sd3 img2img": sd3_img2img,
    "sd3 inpaint": sd3_inpaint,
    "sd3 ControlNet": sd3_controlnet,
    "flux": lambda: flux(cfg=False),
    "flux, true CFG": flux,
    "flux img2img": lambda: flux("FluxImg2ImgPipeline", image=pictures(2), strength=0.9, num_inference_steps=3),
    "flux ControlNet": flux_controlnet,
    "flux Kontext": flux_kontext,
    "flux2": flux2,
    "flux2 klein": flux2_klein,
    "chroma": chroma,
    "qwen": qwen_image,
    "wan": wan,
    "cogview4": cogview4,
    "pixart": pixart,
    "auraflow": auraflow,
    "ltx": ltx,
    "ltx, rescale": lambda: ltx(0.7),
    "cogvideox": cogvideox,
    "lumina2": lumina2,
    "lumina2, truncated": lambda: lumina2(normalize=False, truncation=0.5),
    "z-image": z_image,
    "z-image, normalized": lambda: z_image(normalization=0.9),
    "z-image, truncated": lambda: z_image(truncation=0.4),
    "hunyuan image": hunyuan_image,
    "hunyuan video": hunyuan_video,
    "hidream": hidream,
    "sana": sana,
    "mochi": mochi,
}

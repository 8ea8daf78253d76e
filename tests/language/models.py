"""Tiny language models of the real classes with random weights, and prompts for them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import transformers as tf

from ..models.common import awake


IMAGE, VIDEO, PAD = 120, 121, 0
TEXT = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
)
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
FINE = {**VISION, "patch_size": 4}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def llava():
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE
    )
    return tf.LlavaForConditionalGeneration(config)


def llava_onevision():
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[16, 16]],
    )
    return tf.LlavaOnevisionForConditionalGeneration(config)


def _qwen_ids():
    return dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=122, vision_end_token_id=123)


def qwen2_vl():
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=2)
    config = tf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **_qwen_ids())
    return tf.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl():
    vision = dict(
        depth=1, hidden_size=32, out_hidden_size=32, num_heads=2, intermediate_size=32, patch_size=4, window_size=16
    )
    vision.update(spatial_merge_size=2, fullatt_block_indexes=[0])
    config = tf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **_qwen_ids())
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl():
    vision = dict(
        depth=2,
        hidden_size=32,
        out_hidden_size=32,
        num_heads=2,
        intermediate_size=32,
        patch_size=4,
        spatial_merge_size=2,
    )
    vision.update(num_position_embeddings=16, deepstack_visual_indexes=[0])
    config = tf.Qwen3VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **_qwen_ids())
    return tf.Qwen3VLForConditionalGeneration(config)


def llava_next():
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[16, 16]],
    )
    return tf.LlavaNextForConditionalGeneration(config)


def llava_next_video():
    config = tf.LlavaNextVideoConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 16]],
    )
    return tf.LlavaNextVideoForConditionalGeneration(config)


def idefics3():
    config = tf.Idefics3Config(
        vision_config=dict(**FINE), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    )
    config.pad_token_id = PAD
    return tf.Idefics3ForConditionalGeneration(config)


def smolvlm():
    config = tf.SmolVLMConfig(
        vision_config=dict(**FINE), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    )
    config.pad_token_id = PAD
    return tf.SmolVLMForConditionalGeneration(config)


def internvl():
    vision = {**FINE, "image_size": [16, 16], "patch_size": [4, 4]}
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**vision), text_config=tf.Qwen2Config(**TEXT), image_token_id=IMAGE
    )
    return tf.InternVLForConditionalGeneration(config)


def gemma3():
    layers = ["sliding_attention", "full_attention"] * 2
    text = tf.Gemma3TextConfig(**TEXT, layer_types=layers, sliding_window=6, query_pre_attn_scalar=8)
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**FINE), text_config=text, mm_tokens_per_image=4, image_token_id=IMAGE
    )
    config.boi_token_index, config.eoi_token_index = 122, 123
    return tf.Gemma3ForConditionalGeneration(config)


def paligemma():
    vision = tf.SiglipVisionConfig(**VISION, projection_dim=32)
    config = tf.PaliGemmaConfig(
        vision_config=vision, text_config=tf.GemmaConfig(**TEXT), image_token_id=IMAGE, projection_dim=32
    )
    return tf.PaliGemmaForConditionalGeneration(config)


def mistral3():
    config = tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**FINE, head_dim=16),
        text_config=tf.MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    return tf.Mistral3ForConditionalGeneration(config)


def vipllava():
    config = tf.VipLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layers=[-1, -2],
    )
    return tf.VipLlavaForConditionalGeneration(config)


def pixtral():
    config = tf.LlavaConfig(
        vision_config=tf.PixtralVisionConfig(**VISION, head_dim=16),
        text_config=tf.MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return tf.LlavaForConditionalGeneration(config)


def fast_vlm():
    vision = tf.TimmWrapperConfig(architecture="test_efficientnet_ln", do_pooling=False)
    vision.hidden_size = 256
    config = tf.FastVlmConfig(
        vision_config=vision, text_config=tf.Qwen2Config(**TEXT), image_token_index=IMAGE, image_seq_length=4
    )
    return tf.FastVlmForConditionalGeneration(config)


def janus():
    vq = dict(embed_dim=8, num_embeddings=16, latent_channels=32, base_channels=32, channel_multiplier=[1, 1])
    vq.update(num_res_blocks=1, projection_dim=32, image_token_embed_dim=32)
    config = tf.JanusConfig(
        vision_config=dict(**VISION, projection_dim=32, mlp_ratio=2, num_image_tokens=4),
        text_config=tf.LlamaConfig(**TEXT),
        vq_config=vq,
        image_token_id=IMAGE,
    )
    return tf.JanusForConditionalGeneration(config)


def glm4v():
    vision = dict(depth=1, hidden_size=32, out_hidden_size=32, num_heads=2, intermediate_size=32, image_size=16)
    config = tf.Glm4vConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={**vision, "patch_size": 4},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=122,
        image_end_token_id=123,
    )
    return tf.Glm4vForConditionalGeneration(config)


def mllama():
    """Its layer 3 of 5 is cross-attention to the image."""
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=2)
    vision.update(image_size=16, patch_size=8, vision_output_dim=64, intermediate_layers_indices=[0])
    vision.update(max_num_tiles=1, supported_aspect_ratios=[[1, 1]])
    text = {**TEXT, "num_hidden_layers": 5, "cross_attention_layers": [3]}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config = tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return tf.MllamaForConditionalGeneration(config)


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT))


BUILDERS = {
    f.__name__: f
    for f in (
        *(llava, llava_next, llava_next_video, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, smolvlm, idefics3),
        *(internvl, gemma3, paligemma, mistral3, llama, vipllava, pixtral, fast_vlm, janus),
    )
}
PARTIAL = {f.__name__: f for f in (glm4v, mllama)}
"""Families that `TokenPruning` or all controls of image tokens refuse."""


def tiny(name: str, dtype: torch.dtype = torch.float64):
    """A model with the same random weights every time."""
    torch.manual_seed(0)
    return awake({**BUILDERS, **PARTIAL}[name]()).to(dtype)


@dataclass
class Prompts:
    """What a model is called with, and what the tests know about it: positions of the image tokens and of padding, (B, n) bool."""

    inputs: dict
    image: torch.Tensor = field(init=False)
    valid: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.image = self.inputs["input_ids"] == IMAGE
        self.valid = self.inputs["attention_mask"].bool()

    @property
    def length(self) -> int:
        return self.image.shape[1]


def prompts(name: str, model, rows: int = 2, pad: int = 2, images: int = 1, seed: int = 3) -> Prompts:
    """`rows` prompts of 3 + image + 4 tokens each; each row but the first is `pad` tokens shorter and padded on the left.

    Where images are written row by row, tokens that end a row and an image stand among theirs."""
    generator = torch.Generator().manual_seed(seed)
    dtype = model.dtype
    text = torch.randint(2, 100, (rows, 40), generator=generator)
    extra = {}
    side = 64 if name == "fast_vlm" else 16
    picture = torch.randn(rows * images, 3, side, side, generator=generator).to(dtype)
    patched, rowwise = name.startswith(("qwen", "glm")), name in ("mistral3", "pixtral")
    if patched:
        extra["pixel_values"] = torch.randn(rows * images * 16, 96, generator=generator).to(dtype)
        extra["image_grid_thw"] = torch.tensor([[1, 4, 4]] * (rows * images))
    elif name in ("smolvlm", "idefics3"):
        extra["pixel_values"] = picture.reshape(rows, images, 3, 16, 16)
    elif name in ("llava_next", "llava_next_video", "llava_onevision"):
        extra["pixel_values"] = picture[:, None].expand(-1, 2, -1, -1, -1).contiguous()
        extra["image_sizes"] = torch.tensor([[16, 16]] * (rows * images))
    elif name == "mllama":
        extra["pixel_values"] = picture.reshape(rows, images, 1, 3, 16, 16)
        extra["aspect_ratio_ids"] = torch.ones(rows, images, dtype=torch.int64)
        extra["aspect_ratio_mask"] = torch.ones(rows, images, 1, dtype=torch.int64)
    elif rowwise:
        extra["pixel_values"] = picture
        extra["image_sizes"] = torch.tensor([[16, 16]] * (rows * images))
    elif name != "llama":
        extra["pixel_values"] = picture
    count = {"llava_next": 10, "llava_next_video": 10, "llava_onevision": 10, "llama": 0, "mllama": 1}.get(name, 4)
    ids, mask = [], []
    for row in range(rows):
        left = pad if row else 0
        words = text[row].tolist()
        line = [PAD] * left + [1] + words[left:2]
        for i in range(images if count else 0):
            start = [122] if patched else []
            picture_of = [IMAGE, IMAGE, 124, IMAGE, IMAGE, 125] if rowwise else [IMAGE] * count
            line += start + picture_of + words[3 + i : 4 + i]
        line += words[10:14]
        ids.append(line)
        mask.append([0] * left + [1] * (len(line) - left))
    extra["input_ids"], extra["attention_mask"] = torch.tensor(ids), torch.tensor(mask)
    if patched:
        extra["mm_token_type_ids"] = (extra["input_ids"] == IMAGE).long()
    if name == "gemma3":
        extra["token_type_ids"] = (extra["input_ids"] == IMAGE).long()
    if name == "paligemma":
        extra["token_type_ids"] = torch.zeros_like(extra["input_ids"])
    return Prompts(extra)

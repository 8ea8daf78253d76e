"""Makes transformers models of pretrained parts: SmolLM2 from a GGUF file, EfficientNet-Lite0 from its checkpoint, and both joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import AttnCtrlError


if TYPE_CHECKING:
    import torch
    from transformers import FastVlmForConditionalGeneration, LlamaForCausalLM, PreTrainedTokenizerFast, ProcessorMixin


IMAGE_ID, IMAGE_TOKEN = 16, "<image>"  # a token of SmolLM2's vocabulary for notebooks, which chats do not use
IMAGE_SIDE, PATCH = 224, 32
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<image>\n' }}{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_GGUF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_language_model(file: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama model in a GGUF file, dequantised to float32, and its tokenizer with its chat template."""
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(file)
    facts = {key: reader.fields[key].contents() for key in reader.fields if not key.startswith("GGUF.")}
    heads, kv_heads = facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]
    ids = {f"{name}_token_id": facts[f"tokenizer.ggml.{key}_token_id"] for name, key in _SPECIAL.items()}
    del ids["unk_token_id"]
    config = LlamaConfig(
        vocab_size=len(facts["tokenizer.ggml.tokens"]),
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        dtype="float32",
        **ids,
    )
    state = {}
    for tensor in reader.tensors:
        block, _, kind = tensor.name.removeprefix("blk.").removesuffix(".weight").rpartition(".")
        value = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if kind in ("attn_q", "attn_k"):  # rotary pairs lie side by side in GGUF, half a head apart in transformers
            value = value.view(heads if kind == "attn_q" else kv_heads, -1, 2, value.shape[1]).transpose(1, 2)
            value = value.reshape(-1, config.hidden_size)
        name = f"layers.{block}.{_GGUF_NAMES[kind]}" if block else _GGUF_NAMES[kind]
        state[f"model.{name}.weight"] = value
    model = LlamaForCausalLM(config)
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    model.tie_weights()
    model.generation_config = GenerationConfig(**ids)
    return model.eval(), _tokenizer(facts)


def load_vision_tower(file: Path) -> dict[str, torch.Tensor]:
    """The state of timm's `tf_efficientnet_lite0` without its classifier, from the package's checkpoint, whose order is the same."""
    import timm
    import torch

    wanted = timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict()
    given = torch.load(file, map_location="cpu", weights_only=True)
    values = [value for name, value in given.items() if not name.endswith("num_batches_tracked")][:-2]
    names = [name for name in wanted if not name.endswith("num_batches_tracked")]
    if [value.shape for value in values] != [wanted[name].shape for name in names]:
        raise AttnCtrlError(
            f"the weights in {file.name} do not fit timm's tf_efficientnet_lite0\nHINT: pip install -U timm"
        )
    return wanted | dict(zip(names, values))


def build_vlm(
    language: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tower: dict[str, torch.Tensor]
) -> tuple[FastVlmForConditionalGeneration, ProcessorMixin]:
    """The parts as one model, its projector untrained, and its processor; one image is 49 tokens."""
    from transformers import (
        FastVlmConfig,
        FastVlmForConditionalGeneration,
        LlavaProcessor,
        TimmWrapperConfig,
        ViTImageProcessor,
    )

    vision = TimmWrapperConfig(architecture="tf_efficientnet_lite0", do_pooling=False)
    vision.hidden_size = 1280
    config = FastVlmConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_index=IMAGE_ID,
        image_seq_length=(IMAGE_SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = FastVlmForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.model.vision_tower.timm_model.load_state_dict(tower)
    model.tie_weights()
    model.generation_config = language.generation_config
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    pictures = ViTImageProcessor(size=side, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = LlavaProcessor(
        pictures,
        _with_image_token(tokenizer),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
    return model.eval(), processor


def add_adapter(model: FastVlmForConditionalGeneration, file: Path) -> None:
    """Sets the projector and adds the LoRA, both from a safetensors file: `projector.<name>` and, for a layer's linear map W,
    `lora.<layer>.<name>.a` (R, in) and `.b` (out, R), which make it W + b·a."""
    import torch
    from safetensors.torch import load_file

    tensors = {name: value.float() for name, value in load_file(file).items()}
    prefix = "projector."
    projector = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    model.model.multi_modal_projector.load_state_dict(projector)
    with torch.no_grad():
        for name, down in tensors.items():
            if name.startswith("lora.") and name.endswith(".a"):
                path = name.removeprefix("lora.").removesuffix(".a")
                up = tensors[f"lora.{path}.b"]
                model.model.language_model.layers.get_submodule(path).weight.add_(up @ down)


def _tokenizer(facts: dict) -> PreTrainedTokenizerFast:
    """Byte-level BPE from a GGUF's fields; "smollm" splits numbers into digits before."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise AttnCtrlError(f"the GGUF file has a tokenizer of kind {'/'.join(kind)}, not gpt2/smollm")
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    digits, byte_level = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([digits, byte_level]), decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, facts["tokenizer.ggml.token_type"]) if kind == 3]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special = {f"{name}_token": tokens[facts[f"tokenizer.ggml.{key}_token_id"]] for name, key in _SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=facts["tokenizer.chat_template"],
        model_max_length=facts["llama.context_length"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **special,
    )


def _with_image_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer with `IMAGE_TOKEN` in place of the token `IMAGE_ID`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    old = tokenizer.convert_ids_to_tokens(IMAGE_ID)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab[IMAGE_TOKEN] = vocab.pop(old)
    for token in state["added_tokens"]:
        token["content"] = IMAGE_TOKEN if token["content"] == old else token["content"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        model_max_length=tokenizer.model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        **{f"{name}_token": getattr(tokenizer, f"{name}_token") for name in _SPECIAL},
    )

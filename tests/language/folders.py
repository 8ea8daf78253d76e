"""Folders of tiny models as they are downloaded: weights, processor, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from .models import IMAGE, TEXT, tiny


TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} answer"
)
WORDS = "what is in the picture of a red car and blue sky answer".split()


def tokenizer():
    """Words of `WORDS` and w0, w1, …; <image> is the token that the tiny models take for one."""
    words = ["<pad>", "<s>", "<unk>", *WORDS]
    words += [f"w{i}" for i in range(TEXT["vocab_size"] - len(words))]
    words[IMAGE] = "<image>"
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<pad>", "<s>", "<unk>", "<image>"])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left"
    )


def save_llava(folder: Path, template: str | None = TEMPLATE) -> str:
    """A LLaVA of 4 layers whose first token (<s>) has a massive activation in dimension 7."""
    model = tiny("llava", torch.float32)
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[1, 7] = 60.0
    model.save_pretrained(folder)
    images = tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = tf.LlavaProcessor(
        images,
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    return str(folder)


def save_llama(folder: Path) -> str:
    tiny("llama", torch.float32).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)

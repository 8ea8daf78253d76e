"""What trains `builtin:smol-vlm`: questions as branches of one sequence, and the frozen model with its LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, FastVlmForConditionalGeneration

from ...assemble import IMAGE_ID, IMAGE_SIDE, PATCH
from ..questions import Question
from .common import autocast


ATTENTION = "attnctrl_explicit"
LORA = ("q_proj", "k_proj", "v_proj", "o_proj")


class Lora(nn.Module):
    """A frozen linear map plus b·a of rank R."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


def explicit_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """(B, H, N, D) -> (B, N, H, D) under an additive mask (B, 1, N, N); on a CPU the fused kernel's backward pass is slower."""
    shape, groups = query.shape, query.shape[1] // key.shape[1]
    query = (query * scaling).reshape(shape[0], key.shape[1], groups * shape[2], shape[3])
    scores = (query @ key.transpose(-1, -2)).view(shape[0], key.shape[1], groups, shape[2], -1)
    pattern = (scores + attention_mask[:, :, None]).softmax(-1).view(shape[0], key.shape[1], groups * shape[2], -1)
    return (pattern @ value).view(shape).transpose(1, 2), None


class Branches:
    """Scenes with their questions as sequences whose questions are branches after the image.

    Attributes:
        ids, positions: (B, N). mask: (B, 1, N, N), additive. targets: (B, N), the answers' next tokens, elsewhere -100.
        owner: (B, N), the number of the question in the batch.
    """

    def __init__(self, asked: Sequence[Sequence[Question]], tokenizer: Any, multiple: int = 8):
        start = (
            tokenizer("<|im_start|>user\n")["input_ids"]
            + [IMAGE_ID] * (IMAGE_SIDE // PATCH) ** 2
            + tokenizer("\n")["input_ids"]
        )
        rows = []
        self.questions = [question for questions in asked for question in questions]
        number = 0
        for questions in asked:
            ids, positions, branch = [*start], [*range(len(start))], [0] * len(start)
            targets, owner = [-100] * len(start), [-1] * len(start)
            for turn, question in enumerate(questions, 1):
                query = tokenizer(f"{question.text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
                answer = tokenizer(f"{question.answer}<|im_end|>")["input_ids"]
                ids += query + answer
                positions += range(len(start), len(start) + len(query) + len(answer))
                branch += [turn] * (len(query) + len(answer))
                targets += [-100] * (len(query) - 1) + answer + [-100]
                owner += [number] * (len(query) + len(answer))
                number += 1
            rows.append((ids, positions, branch, targets, owner))
        length = multiple * math.ceil(max(len(row[0]) for row in rows) / multiple)
        fill = (0, 0, -1, -100, -1)
        padded = [[part + [value] * (length - len(part)) for part, value in zip(row, fill)] for row in rows]
        self.ids, self.positions, branch, self.targets, self.owner = (torch.tensor(part) for part in zip(*padded))
        shared = branch[:, None, :] == 0
        seen = (shared | (branch[:, :, None] == branch[:, None, :])) & torch.ones(
            length, length, dtype=torch.bool
        ).tril()
        self.mask = torch.where(seen, 0.0, -1e4)[:, None]


class Learner(nn.Module):
    """The trained parts around the frozen model."""

    def __init__(self, model: FastVlmForConditionalGeneration, rank: int):
        super().__init__()
        AttentionInterface.register(ATTENTION, explicit_attention)
        model.requires_grad_(False)
        self.language = model.model.language_model
        self.language.config._attn_implementation = ATTENTION
        self.projector = model.model.multi_modal_projector.requires_grad_(True)
        for weight in self.language.parameters():
            weight.data = weight.data.bfloat16()
        self.lora = nn.ModuleDict()
        for index, layer in enumerate(self.language.layers):
            for name in LORA:
                self.lora[f"{index}-{name}"] = lora = Lora(getattr(layer.self_attn, name), rank).to(model.device)
                setattr(layer.self_attn, name, lora)

    def trained(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by the names of `attnctrl.assemble.add_adapter`."""
        out = {f"projector.{name}": value.detach() for name, value in self.projector.named_parameters()}
        for key, lora in self.lora.items():
            index, name = key.split("-")
            out[f"lora.{index}.self_attn.{name}.a"] = lora.a.detach()
            out[f"lora.{index}.self_attn.{name}.b"] = lora.b.detach()
        return out

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.trained().items():
                value.copy_(tensors[name])

    def forward(self, features: torch.Tensor, batch: Branches) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per answer token: its logits (T, V) float32, the token itself and the number of its question."""
        where = features.device
        with autocast(where):
            image = self.projector(features)
        ids = batch.ids.to(where)
        embeds = self.language.embed_tokens(ids)
        embeds = embeds.masked_scatter((ids == IMAGE_ID)[..., None], image.to(embeds.dtype))
        states = self.language(
            inputs_embeds=embeds,
            attention_mask=batch.mask.to(where, embeds.dtype),
            position_ids=batch.positions.to(where),
            use_cache=False,
        ).last_hidden_state
        chosen = (batch.targets >= 0).to(where)
        logits = F.linear(states[chosen], self.language.embed_tokens.weight).float()
        return logits, batch.targets.to(where)[chosen], batch.owner.to(where)[chosen]


def loss_of(logits: torch.Tensor, targets: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in which a question of n answer tokens weighs as sqrt(n) of them."""
    weight = torch.bincount(owner, minlength=int(owner.max()) + 1).float().rsqrt()[owner]
    return (F.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()

"""Recipe of the icon world's tokenizer and text encoder (`CLIPTextModelWithProjection`).

The tokenizer is a real CLIP byte-pair tokenizer whose merges are learned from captions, so every word of the grammar is one
token and any other text still encodes. The encoder is warmed up in a minute by reading captions: from the states that
`StableDiffusion3Pipeline` uses (`hidden_states[-2]` and the pooled projection) linear readers predict what the caption says
of each object, the background and the relation. The readers are thrown away; the denoiser's training then tunes the encoder.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ..world import BACKGROUNDS, COLORS, NOUNS, PATTERNS, RELATIONS, SIZES, caption, sample_scene
from .common import pick_device, warmup_cosine


LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"
EXTRA_WORDS = (
    "the in with of and at to top bottom center middle corner side two three four photo image next beside between under over "
    "near many no nothing left right bottom small big large tiny"
).split()


def build_tokenizer(output: Path, captions: int = 4000, seed: int = 0) -> CLIPTokenizer:
    """Learns the merges from captions and writes `vocab.json`, `merges.txt` and the rest to `output`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    rng = np.random.default_rng((seed, 5))
    corpus = [caption(sample_scene(rng), rng) for _ in range(captions)]
    words = [*NOUNS, *COLORS, *BACKGROUNDS, *PATTERNS, *SIZES, *EXTRA_WORDS]
    corpus += [" ".join(words)] * 50
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        min_frequency=2,
        show_progress=False,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    learner.train_from_iterator(corpus, trainer)
    model = json.loads(learner.to_str())["model"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    pieces = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for special in (START, END):
        vocab[special] = len(vocab)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=LENGTH,
    )
    tokenizer.save_pretrained(output)
    return tokenizer


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


class Readers(nn.Module):
    """Linear readers of what a caption says; only for the warm-up."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.noun = nn.Linear(width, len(NOUNS))
        self.color = nn.Linear(width, len(COLORS))
        self.order = nn.Linear(width, 4)
        self.size = nn.Linear(width, len(SIZES) + 1)
        self.relation = nn.Linear(width, len(RELATIONS) + 1)
        self.pooled_pairs = nn.Linear(width, len(NOUNS) * len(COLORS))
        self.pooled_pattern = nn.Linear(width, len(PATTERNS) + 1)
        self.pooled_background = nn.Linear(width, len(BACKGROUNDS) + 1)
        self.pooled_relation = nn.Linear(width, len(RELATIONS) + 1)
        self.end_pattern = nn.Linear(width, len(PATTERNS) + 1)
        self.end_background = nn.Linear(width, len(BACKGROUNDS) + 1)


def _index(word: str | None, table) -> int:
    """Position of the word found in a table, or its length for "not said"."""
    return list(table).index(word) if word is not None else len(table)


def _said(text: str, table) -> str | None:
    return next((word for word in table if f" {word} " in f" {text.replace(',', ' ')} "), None)


def train(
    output: Path,
    steps: int = 700,
    batch_size: int = 192,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Builds the tokenizer, warms the encoder up and saves both to `output/tokenizer` and `output/text_encoder`."""
    tokenizer = build_tokenizer(output / "tokenizer", seed=seed)
    where = pick_device(device)
    torch.manual_seed(seed)
    model, readers = build_encoder(tokenizer).to(where), Readers().to(where)
    optimizer = torch.optim.AdamW([*model.parameters(), *readers.parameters()], learning_rate, weight_decay=0.01)
    noun_ids = {tokenizer(noun, add_special_tokens=False).input_ids[0]: noun for noun in NOUNS}
    bar = tqdm(range(steps), desc="text", mininterval=5)
    for step in bar:
        rng = np.random.default_rng((seed, 77, step))
        worlds = [sample_scene(rng) for _ in range(batch_size)]
        texts = [caption(scene, rng) for scene in worlds]
        ids = tokenize(tokenizer, texts)
        rows, columns, targets = [], [], []
        pairs = torch.zeros(batch_size, len(NOUNS), len(COLORS))
        whole = []
        for row, (scene, text) in enumerate(zip(worlds, texts)):
            found = [c for c, token in enumerate(ids[row].tolist()) if token in noun_ids]
            relation = _index(next((r for r in RELATIONS if f" {r} a " in text), None), RELATIONS)
            for order, (column, item) in enumerate(zip(found, scene.objects)):
                size = _index(item.size_word, SIZES) if _said(text, SIZES) else len(SIZES)
                rows.append(row)
                columns.append(column)
                named = relation if order == 1 else len(RELATIONS)
                targets.append((_index(item.noun, NOUNS), _index(item.color, COLORS), order, size, named))
                pairs[row, _index(item.noun, NOUNS), _index(item.color, COLORS)] = 1
            whole.append(
                (_index(_said(text, PATTERNS), PATTERNS), _index(_said(text, BACKGROUNDS), BACKGROUNDS), relation)
            )
        out = model(ids.to(where), output_hidden_states=True)
        at = out.hidden_states[-2][rows, columns]
        ends = out.hidden_states[-2][torch.arange(batch_size), (ids == tokenizer.eos_token_id).int().argmax(1)]
        target, sentence = torch.tensor(targets, device=where), torch.tensor(whole, device=where)
        pooled = out.text_embeds
        token_readers = (readers.noun, readers.color, readers.order, readers.size, readers.relation)
        loss = sum(F.cross_entropy(reader(at), target[:, i]) for i, reader in enumerate(token_readers))
        loss = loss + 20 * F.binary_cross_entropy_with_logits(readers.pooled_pairs(pooled), pairs.flatten(1).to(where))
        sentence_readers = (readers.pooled_pattern, readers.pooled_background, readers.pooled_relation)
        loss = loss + sum(F.cross_entropy(reader(pooled), sentence[:, i]) for i, reader in enumerate(sentence_readers))
        loss = loss + sum(
            F.cross_entropy(r(ends), sentence[:, i])
            for i, r in enumerate((readers.end_pattern, readers.end_background))
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup_cosine(step, steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            color = (readers.color(at).argmax(1) == target[:, 1]).float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", color=f"{color:.3f}")
    model.save_pretrained(output / "text_encoder", safe_serialization=True)

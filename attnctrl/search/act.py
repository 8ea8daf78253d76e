"""Which heads `ACT` helps: each head alone, on a calibration set.

Yu et al., "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention
Calibration", 2024, arXiv 2406.15765, section on head selection.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attention.row_engine import Mask, edit_rows
from ..attention.rows import RowEdit
from ..controls.act import ACT
from ..controls.language import Prompt
from ..errors import AttnCtrlError
from ..families.language import find_language
from ..heads import HeadSet
from ..processors import transformers as interface
from ..processors.gates import Gate
from .record import Record, as_json, mark_of_weights


Answer = str | int | Sequence[int]


def calibrate_act(
    model: Any,
    examples: Iterable[tuple[Mapping[str, Any], Answer]],
    *,
    act: ACT | None = None,
    tokenizer: Any = None,
    margin: float = 0.0,
    batch_size: int = 32,
    output: str | os.PathLike | None = None,
    progress: bool = True,
) -> HeadSet:
    """Finds heads for `ACT`: those that, calibrated alone, raise the mean log-probability of the right answers by more than `margin`.

    A prompt is read once without edits; for the heads of a layer only this layer and those behind it run again, one head a row of the
    batch. In answers of several tokens each is read after the right ones before it, with the sinks of the prompt, as ACT does.

    The paper uses 900 questions of several tasks and does not say by how much a head has to help. With few examples, ask for a margin:
    among many heads some raise the mean by chance.

    Args:
        model: a transformers language model, with or without images.
        examples: (inputs, answer): what the tokenizer or processor returns for one prompt, and the right answer as token ids, or as
            text with `tokenizer`, which is encoded without special tokens.
        act: the control whose heads are sought: its threshold or alpha, beta, strength and layers, and its heads as those that are
            tried. None takes the defaults.
        batch_size: heads at a time.
        output: folder for the scores, as they come, and head_set.json. The same call goes on where it was stopped.
        progress: draw a bar.

    Returns:
        Heads by gain, the largest first, with weight 1; the gains of all that were tried are in its `provenance`.

    Raises:
        AttnCtrlError: no head helps, or the model's layers do not follow each other plainly.
    """
    act = ACT() if act is None else act
    examples = [_example(inputs, answer, tokenizer) for inputs, answer in examples]
    if not examples:
        raise AttnCtrlError(
            "calibrate_act needs examples\nHINT: [(processor(text=…, return_tensors='pt'), ' yes'), …]"
        )
    if act.neutral:
        raise AttnCtrlError(
            "calibrate_act: this ACT is neutral, so no head can help\nHINT: beta below 1, strength above 0"
        )
    trials = _Trials(model, act)
    folder = None if output is None else Path(output)
    settings = {
        "search": "ACT heads",
        "family": trials.language.family.name,
        "weights": mark_of_weights(model),
        "act": {name: getattr(act, name) for name in ("threshold", "alpha", "beta", "strength")},
        "examples": [as_json(example) for example in examples],
    }
    with closing(Record(folder, settings)) as record:
        total = len(examples) * sum(len(heads) for heads in trials.pool.values())
        with trials, tqdm(total=total, desc="ACT heads", unit="head", disable=not progress) as bar:
            for number, (inputs, answer) in enumerate(examples):
                trials.score(number, inputs, answer, batch_size, record, bar)
        scores = record.scores
    gains = {
        (site.layer, head): sum(scores[0, (site.layer, head), i] - scores[0, None, i] for i in range(len(examples)))
        / len(examples)
        for site, heads in trials.pool.items()
        for head in heads
    }
    best = sorted((head for head, gain in gains.items() if gain > margin), key=lambda head: (-gains[head], head))
    if not best:
        head = max(gains, key=gains.get)
        raise AttnCtrlError(
            f"calibrate_act: none of {len(gains)} heads raises the mean log-probability of {len(examples)} answers by more than {margin:g}; "
            f"the best, {head[0]}.{head[1]}, changes it by {gains[head]:+.3g}\nHINT: more examples, another threshold, a smaller margin"
        )
    found = HeadSet(
        tuple((layer, head, 1.0) for layer, head in best),
        family=trials.language.family.name,
        base_model=getattr(model.config, "_name_or_path", "") or None,
        objective="ACT: mean log-probability of the right answer",
        provenance={
            **{key: settings[key] for key in ("search", "weights", "act")},
            "examples": len(examples),
            "margin": margin,
            "without": sum(scores[0, None, i] for i in range(len(examples))) / len(examples),
            "gains": {f"{layer}.{head}": gain for (layer, head), gain in sorted(gains.items())},
        },
    )
    if folder is not None:
        found.save_pretrained(folder)
    return found


def _example(inputs: Mapping[str, Any], answer: Answer, tokenizer: Any) -> tuple[dict[str, Any], list[int]]:
    """Inputs as a plain mapping, and the ids of the answer."""
    if isinstance(answer, str):
        if tokenizer is None:
            raise AttnCtrlError(f"calibrate_act: the answer {answer!r} is text\nHINT: tokenizer=…, or token ids")
        answer = tokenizer.encode(answer, add_special_tokens=False)
    ids = [answer] if isinstance(answer, int) else [int(token) for token in answer]
    inputs = dict(inputs)
    if not ids or "input_ids" not in inputs or len(inputs["input_ids"]) != 1:
        raise AttnCtrlError(
            "calibrate_act: an example is one prompt of shape (1, n) and an answer of one token or more"
        )
    return inputs, ids


class _Trials:
    """Heads of one model, each calibrated alone. Use it as a context manager: inside, it holds the attention of the model.

    `pool`: the heads that are tried, by site.
    """

    def __init__(self, model: nn.Module, act: ACT):
        if model.get_output_embeddings() is None:
            raise AttnCtrlError(
                f"calibrate_act: {type(model).__name__} returns no logits\nHINT: the model with its head"
            )
        self.model, self.language = model, find_language(model)
        if not isinstance(getattr(self.language.decoder, "norm", None), nn.Module):
            raise AttnCtrlError(f"calibrate_act: {type(self.language.decoder).__name__} has no final norm")
        self.act = act.fit(self.language.facts)
        sites = {site.path: site for site in self.language.sites}
        touched = self.act.touches(self.language.sites)
        self.pool = {sites[path]: tuple(weights.nonzero().flatten().tolist()) for path, weights in touched.items()}
        ordered = sorted(self.language.sites, key=lambda site: site.layer)
        self.layers = [model.get_submodule(site.path.rpartition(".")[0]) for site in ordered]
        self.numbers = {site: number for number, site in enumerate(ordered)}
        self._now: tuple[nn.Module, tuple[int, ...], Prompt] | None = None

    def names(self) -> list[str]:
        return ["calibrate_act"]

    def __enter__(self) -> _Trials:
        self._held = [self.model.get_submodule(site.path) for site in self.pool]
        with interface.LOCK:
            if any(interface.holder(module) is not None for module in self._held):
                raise AttnCtrlError("controls are attached to this model\nHINT: detach them before calibrate_act")
            self._configs = list({id(module.config): module.config for module in self._held}.values())
            for number, config in enumerate(self._configs):
                try:
                    interface.switch_on(config)
                except BaseException:
                    for one in self._configs[:number]:
                        interface.switch_off(one)
                    raise
            interface.hold(self._held, self)
        return self

    def __exit__(self, *exc) -> None:
        with interface.LOCK:
            interface.release(self._held)
            for config in self._configs:
                interface.switch_off(config)

    @torch.no_grad()
    def score(self, number: int, inputs: dict, answer: list[int], size: int, record: Record, bar: Any) -> None:
        """Adds what a record lacks of one example: the log-probability of its answer without edits and with each head calibrated."""
        missing = {
            site: [h for h in heads if (0, (site.layer, h), number) not in record.scores]
            for site, heads in self.pool.items()
        }
        bar.update(sum(len(heads) - len(missing[site]) for site, heads in self.pool.items()))
        if (0, None, number) in record.scores and not any(missing.values()):
            return
        device = next(self.model.parameters()).device
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        prompt, inputs = _with_answer(inputs, answer)
        calls, entered, output, logits = self._read(inputs)
        at = prompt.last[0]

        def add(logits: Tensor, heads: Sequence[Any]) -> None:
            right = torch.tensor(answer, device=logits.device).expand(len(heads), -1)
            wide = logits if logits.dtype == torch.float64 else logits.float()
            found = wide.log_softmax(-1).gather(-1, right[..., None]).sum((1, 2)).tolist()
            record.add({(0, head, number): score for head, score in zip(heads, found, strict=True)}, {"passes": 1})

        if (0, None, number) not in record.scores:
            add(logits[:, at:], [None])
        for site, heads in missing.items():
            first = self.numbers[site]
            for start in range(0, len(heads), size):
                part = tuple(heads[start : start + size])
                self._now = (self.model.get_submodule(site.path), part, prompt)
                hidden = entered[first].expand(len(part), -1, -1)
                try:
                    for layer, (args, kwargs) in zip(self.layers[first:], calls[first:], strict=True):
                        hidden = _first(layer(hidden, *args, **kwargs))
                finally:
                    self._now = None
                add(self._head(hidden[:, at:], output, inputs), [(site.layer, head) for head in part])
                bar.update(len(part))

    def _read(self, inputs: dict) -> tuple[list, list[Tensor], Any, Tensor]:
        """A plain pass: how each layer was called, what entered it, what the base model returned, and the logits."""
        calls, entered, left, outputs = [], [], [], []

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])
            calls.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers]
        hooks += [layer.register_forward_hook(lambda m, args, out: left.append(_first(out))) for layer in self.layers]
        hooks.append(self.language.base.register_forward_hook(lambda m, args, out: outputs.append(out)))
        try:
            logits = self.model(**inputs, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        plain = len(entered) == len(self.layers) and all(map(torch.equal, left, entered[1:]))
        if not plain:
            raise AttnCtrlError(
                f"calibrate_act: {self.language.family.name} does more between its layers than hand hidden states on, "
                "so its last layers cannot run alone"
            )
        return calls, entered, outputs[0], logits

    def _head(self, hidden: Tensor, output: Any, inputs: dict) -> Tensor:
        """Logits (R, r, V) of hidden states (R, r, C) behind the last layer, by the model's own code."""
        replaced = type(output)(**{**output, "last_hidden_state": self.language.decoder.norm(hidden)})
        gate = Gate("", self.language.base, lambda gate, args, kwargs: replaced)
        try:
            return self.model(**inputs, use_cache=False).logits
        finally:
            gate.remove()

    def attend(self, inner: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, *args, **kwargs):
        """The model's own attention, and in the layer on trial one calibrated head a row; all rows come in alike."""
        if self._now is None or self._now[0] is not module:
            return inner(module, q, k, v, mask, *args, **kwargs)
        _, heads, prompt = self._now
        plain = inner(module, q[:1], k[:1], v[:1], mask, *args, **kwargs)[0].transpose(1, 2)
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        seen = Mask.read(mask, q.shape[2], k.shape[2], bool(causal))
        share = self.act.strength * (1 - self.act.beta)
        edit = RowEdit(self.act.calibration(prompt, share))
        named = {"scale": kwargs.get("scaling"), "softcap": kwargs.get("softcap")}
        edited = edit_rows(q[:1], k[:1], v[:1], [edit], lambda: plain, mask=seen, **named)
        out = plain.repeat(len(heads), 1, 1, 1)
        row = torch.arange(len(heads), device=out.device)
        out[row, list(heads)] = edited[0, list(heads)]
        return out.transpose(1, 2).contiguous(), None


def _with_answer(inputs: dict[str, Any], answer: list[int]) -> tuple[Prompt, dict[str, Any]]:
    """The prompt, and the inputs with all but the last token of the answer behind it; the answer's rows count for no statistic."""
    ids, more = inputs["input_ids"], len(answer) - 1
    valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    if not bool(valid[:, -1].all()):
        raise AttnCtrlError("calibrate_act: a prompt is padded on the right\nHINT: padding_side='left', or no padding")
    found = dict(inputs)
    found["input_ids"] = torch.cat([ids, ids.new_tensor([answer[:-1]])], 1)
    found["attention_mask"] = torch.cat([valid, valid.new_ones(1, more)], 1).long()
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            found[name] = torch.cat([inputs[name], inputs[name].new_zeros(1, more)], 1)
    counted = torch.cat([valid, valid.new_zeros(1, more)], 1)
    nothing = torch.zeros_like(counted)
    return Prompt(found["input_ids"], counted, nothing, nothing, length=counted.shape[1]), found


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output

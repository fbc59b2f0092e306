"""transformers' own model of the same architecture, on padded batches, as its users train it."""

from __future__ import annotations

import copy
import importlib.util
import re
import tempfile
import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pertoken.data.batch.pack import Sample
from pertoken.folders.adapters import base_folder
from pertoken.folders.open import name_in_folder, save_folder, split_as
from pertoken.hf_fallback.quiet import quiet
from pertoken.model.protocol import LanguageModel
from pertoken.prove.case import Case
from pertoken.prove.reference import reference_gradient
from pertoken.prove.report import Gradient, Result, compare
from pertoken.training.faults import plain_name

__all__ = ["transformers_padded"]

_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")


def transformers_padded(name: str, case: Case) -> Result:
    """The class is read from the folder that we save, so the names and shapes in it are proved with it."""
    if case.model.adapter is not None and importlib.util.find_spec("peft") is None:
        return Result(name, "float32", "skipped", note="needs peft; pip install 'pertoken[lora]'")
    samples = [case.chosen.samples[i] for i in range(len(case.chosen.samples))]
    reference = case.reference
    if case.aux_loss_coef:  # transformers' balance loss is another one, and left out
        reference = reference_gradient(case.model, samples, z_loss_coef=case.train.z_loss_coef)
    with tempfile.TemporaryDirectory() as folder:
        save_folder(copy.deepcopy(case.model).float(), folder, eos_token_id=None)
        model = _opened(case.model, Path(folder))
    num_tokens = float(sum(sample.loss_mask.sum(dtype="float64") for sample in samples))
    loss = 0.0
    for batch in (samples[::2], samples[1::2]):
        input_ids, labels, weights, attention_mask = _padded(batch)
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        nll = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
        loss_sum = nll @ weights.flatten()
        squares = logits.float().logsumexp(-1).square()[labels != -100] @ weights[labels != -100]
        torch.autograd.backward((loss_sum + case.train.z_loss_coef * squares) / num_tokens)
        loss += float(loss_sum.detach()) / num_tokens
    ours = {_without_peft(plain_name(name)): name for name, _ in case.model.named_parameters()}
    # transformers 4 has a mixture's experts under their names on disk
    ours = {name_in_folder(case.model, name): own for name, own in ours.items()} | ours
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    theirs = _under_our_names(dict(split_as(case.model, theirs)), kept=ours)
    gradients = {ours.get(_without_peft(name), name): gradient for name, gradient in theirs.items()}
    if case.aux_loss_coef:  # a router that sends every token to one expert has no gradient but the balance loss's
        gradients = {n: torch.zeros_like(g) for n, g in reference.gradients.items() if ".mlp.gate." in n} | gradients
    padding = 1 - sum(map(len, samples)) / sum(max(map(len, b)) * len(b) for b in (samples[::2], samples[1::2]))
    note = f"{type(model).__name__}, {padding:.0%} padding"
    return Result.judge(name, "float32", case.float32_tolerance, compare(Gradient(loss, gradients), reference), note)


def _opened(model: LanguageModel, folder: Path) -> Any:
    """What transformers, and for an adapter peft, make of the folder."""
    from transformers import AutoModelForCausalLM

    # A soft cap of attention, which version 4 of transformers leaves out where it computes by anything else.
    settings: dict[str, Any] = {"attn_implementation": "eager"} if model.setting("attn_logit_softcapping") else {}
    settings |= {"dtype": torch.float32}
    with quiet():
        if model.adapter is None:
            return AutoModelForCausalLM.from_pretrained(folder, **settings).train()
        import peft

        base = AutoModelForCausalLM.from_pretrained(base_folder(folder, model.adapter.base), **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
            return peft.PeftModel.from_pretrained(base, folder, is_trainable=True).eval()  # nothing drops out


def _without_peft(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default.weight", ".weight")


def _padded(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, labels, their weights, attention mask: [S, T] each, padded on the right; the label is -100 where nobody
    supervises."""
    width = max(map(len, samples))
    input_ids = torch.zeros(len(samples), width, dtype=torch.int64)
    labels = torch.full((len(samples), width), -100)
    weights = torch.zeros(len(samples), width)
    attention_mask = torch.zeros(len(samples), width, dtype=torch.int64)
    for row, sample in enumerate(samples):
        n = len(sample.tokens) - 1
        tokens = torch.from_numpy(sample.tokens.astype("int64"))
        input_ids[row, :n], attention_mask[row, :n] = tokens[:-1], 1
        weights[row, :n] = torch.from_numpy(sample.loss_mask.copy())
        labels[row, :n] = torch.where(weights[row, :n] != 0, tokens[1:], -100)
    return input_ids, labels, weights, attention_mask


def _under_our_names(gradients: dict[str, Tensor], *, kept: Container[str]) -> dict[str, Tensor]:
    """transformers 5 holds a layer's experts in one tensor each: [E, 2 I, D] for gate and up, [E, D, I] for down. So
    does a model in its own code, whose names are `kept`."""
    named: dict[str, Any] = {}
    for name, gradient in gradients.items():
        match = _FUSED.match(name)
        if match is None or name in kept:
            named[name] = gradient
            continue
        for expert, part in enumerate(gradient):
            parts = {"down_proj": part}
            if match[2] == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), part.chunk(2), strict=True))
            named |= {f"{match[1]}.{expert}.{key}.weight": value for key, value in parts.items()}
    return named

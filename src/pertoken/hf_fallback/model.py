"""Any causal language model: transformers' own code for a family that our decoder lacks, as a `LanguageModel`.

It pads where our decoder does not, and runs slower. Families are tried, not listed: what cannot be the objective that
the recipe describes is found by computing with the model as it is loaded, and refused.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pertoken.data.batch.pack import MicroBatch
from pertoken.errors import RecipeError
from pertoken.hf_fallback.check import check_loss
from pertoken.hf_fallback.head import base_model, linear_head, logit_map_of, smallest_vocabulary
from pertoken.hf_fallback.quiet import quiet
from pertoken.model.execution import PLAIN, Execution
from pertoken.model.lora import Adapter
from pertoken.model.operations import padding_metric
from pertoken.model.protocol import BalanceLoss, ModelFacts
from pertoken.objective.cross_entropy import linear_cross_entropy
from pertoken.objective.logit_map import LogitMap
from pertoken.objective.terms import CROSS_ENTROPY, LossOutput, Objective

__all__ = ["FallbackCache", "FallbackLM"]

_NO_LIMIT = 2**31 - 1
# Their angles change once a sequence is longer than the original limit, and then depend on the longest one beside it.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


@dataclass
class FallbackCache:
    """What `FallbackLM.decode` has seen so far."""

    input_ids: Tensor  # [T]
    past: Any = None  # transformers' cache of these tokens; stays None for a family without one

    @property
    def length(self) -> int:
        return int(self.input_ids.shape[0])


class FallbackLM(nn.Module):
    """A transformers causal language model that takes a `MicroBatch` and returns sums, as `CausalLM` does.

    Nothing drops out. A mixture of experts trains without a balance loss or not at all (`set_balance_loss`):
    transformers' is a mean over a micro-batch, padding included, so it would depend on the split. Raises ModelError for
    what `linear_head` or `check_logits` refuse, and where the loss differs from the loss of the model's own logits.
    """

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf
        self.adapter: Adapter | None = None
        linear_head(hf)
        self._balance_loss: BalanceLoss | None = None
        self._experts_as: str | None = getattr(hf.config, "_experts_implementation", None)
        if any("expert" in name for name, _ in hf.named_parameters()):
            coefficient = getattr(hf.config.get_text_config(), "router_aux_loss_coef", None)
            self._balance_loss = BalanceLoss("sequence", float(coefficient or 0.0))  # until `set_balance_loss`
        self._checkpointing = False  # as transformers' modules stand
        for module in hf.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        _thaw_padding(hf)
        self._base_model()
        check_loss(self, hf)

    @property
    def facts(self) -> ModelFacts:
        return ModelFacts(
            family=f"{self.hf.config.model_type} (transformers)",
            vocab_size=smallest_vocabulary(self.hf),
            max_position_embeddings=_longest(self.hf.config.get_text_config()),
            hidden_size=int(self.head_weight.shape[1]),
            balance_loss=self._balance_loss,
            experts_per_token=0 if self._balance_loss is None else _experts(self.hf.config)[0],
        )

    def setting(self, key: str) -> object:
        """Of the recipe's keys `model.KEY` those that mean the same in every family; all else is transformers'."""
        if key in ("num_hidden_layers", "num_attention_heads"):
            value: object = getattr(self.hf.config.get_text_config(), key, None)
            return value
        facts = self.facts
        known = {name: getattr(facts, name) for name in ("family", "vocab_size", "max_position_embeddings")}
        return {**known, "hidden_size": facts.hidden_size, "use_moe": facts.has_experts}.get(key)

    def set_balance_loss(self, balance_loss: BalanceLoss) -> None:
        """Raises RecipeError for any but "none"."""
        assert self._balance_loss is not None, "a dense model"
        if balance_loss.kind != "none":
            raise RecipeError(
                f'model.aux_loss="{balance_loss.kind}": {self.facts.family} is a mixture of experts in code whose '
                'balance loss depends on how a step is split; set model.aux_loss to "none" to train without one'
            )
        self._balance_loss = balance_loss

    @property
    def head_weight(self) -> Tensor:
        """[V, D]"""
        weight: Tensor = self.hf.get_output_embeddings().weight
        return weight

    @property
    def logit_map(self) -> LogitMap:
        """From the head's product to logits."""
        return logit_map_of(self.hf)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_active_parameters(self) -> int:
        """Those that a token meets: all, in a dense model, and as many of the experts as it chooses."""
        if self._balance_loss is None:
            return self.num_parameters
        chosen, experts = _experts(self.hf.config)
        of_experts = sum(p.numel() for name, p in self.named_parameters() if ".experts." in name)
        return self.num_parameters - of_experts * (experts - chosen) // max(experts, 1)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's blocks, for what treats them one by one: the longest list of modules there is."""
        lists = [list(module) for module in base_model(self.hf).modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len, default=[])

    @property
    def wide_modules(self) -> None:
        """Not known of a family that our decoder lacks."""
        return None

    @property
    def can_checkpoint_activations(self) -> bool:
        return bool(self.hf.supports_gradient_checkpointing)

    def _checkpoint_activations(self, on: bool) -> None:
        if on == self._checkpointing:
            return
        if not self.can_checkpoint_activations:
            raise RecipeError(
                f"train.activation_checkpointing=true: {self.facts.family} does not offer it; set it to false"
            )
        do = "enable" if on else "disable"  # transformers renames these from gradient_ to activation_
        switch = getattr(self.hf, f"activation_checkpointing_{do}", getattr(self.hf, f"gradient_checkpointing_{do}"))
        switch(*([{"use_reentrant": False}] if on else []))
        self._checkpointing = on

    def forward(
        self, micro_batch: MicroBatch, execution: Execution = PLAIN, *, objective: Objective = CROSS_ENTROPY
    ) -> LossOutput:
        """Sum of the negative log-likelihoods in nats over the supervised tokens, and their number.

        `objective` adds its terms. An empty micro-batch gives zeros, and every parameter a zero gradient. Engines are
        for our own decoder, so the blocks are transformers'; the loss is by `execution.loss_impl`.
        """
        if self._balance_loss is not None and torch.is_grad_enabled():
            self.set_balance_loss(self._balance_loss)  # which refuses to leave it out unasked
        self._checkpoint_activations(execution.activation_checkpointing)
        out = linear_cross_entropy(
            *(self.hidden_states(micro_batch), self.head_weight, micro_batch.labels, micro_batch.loss_mask),
            impl=execution.loss_impl,
            row_terms=objective.row_terms,
            logit_map=self.logit_map,
        )
        return replace(out, metrics=out.metrics | {"padding": self.padding(micro_batch)})

    def padding(self, micro_batch: MicroBatch, execution: Execution = PLAIN) -> tuple[Tensor, Tensor]:
        """`padding_metric`: what padded rows cost. What attention does beyond its projections is not known here."""
        head, embedding = self.head_weight, self.hf.get_input_embeddings().weight
        body = self.num_parameters - head.numel() - (0 if embedding is head else embedding.numel())
        lengths = micro_batch.lengths
        return padding_metric(
            useful=6.0 * body * sum(lengths),
            padding=6.0 * body * (len(lengths) * max(lengths, default=0) - sum(lengths)),
            head=head.numel(),
            loss_mask=micro_batch.loss_mask,
        )

    def hidden_states(self, micro_batch: MicroBatch) -> Tensor:
        """[N, D]. Each sample is a row of a right-padded rectangle: causality alone keeps its padding out of real
        positions, so no mask is needed, and positions count from 0 by themselves."""
        lengths = micro_batch.lengths or (1,)  # a token that nobody asks for lets an empty micro-batch run as any other
        longest = max(lengths)
        rows = torch.cat(
            [torch.arange(n) + i * longest for i, n in enumerate(micro_batch.lengths)] or [torch.arange(0)]
        )
        rows = rows.to(micro_batch.input_ids.device)
        padded = micro_batch.input_ids.new_zeros(len(lengths) * longest)
        padded[rows] = micro_batch.input_ids
        hidden: Tensor = self._base_model()(input_ids=padded.view(-1, longest), use_cache=False)[0]
        if self._balance_loss is not None and self._experts_as is None and torch.is_grad_enabled():
            # Version 4 of transformers passes over experts that no token chooses.
            hidden = _Reached.apply(hidden, *self.parameters())  # type: ignore[no-untyped-call]
        return hidden.flatten(0, 1)[rows]

    def _base_model(self) -> Any:
        """Token ids to hidden states, with experts that the weights' dtype allows."""
        if self._balance_loss is not None and self._experts_as is not None:
            wide = self.head_weight.dtype == torch.float64  # for which torch has no grouped product
            wanted = "eager" if wide else self._experts_as
            if self.hf.config._experts_implementation != wanted:
                self.hf.set_experts_implementation(wanted)
        return base_model(self.hf)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]"""
        return self.logit_map(F.linear(hidden, self.head_weight))

    def new_cache(self, max_length: int) -> FallbackCache:
        """An empty cache for `decode`, for one sequence. It grows, so `max_length` is not needed."""
        return FallbackCache(torch.empty(0, dtype=torch.int64, device=self.head_weight.device))

    def decode(self, input_ids: Tensor, cache: FallbackCache) -> Tensor:
        """Logits [V] after the last of `input_ids` [T], which continue what the cache holds and are added to it."""
        cache.input_ids = torch.cat((cache.input_ids, input_ids))
        base = self._base_model()
        if "past_key_values" in inspect.signature(base.forward).parameters:
            out = base(input_ids=input_ids[None], past_key_values=cache.past, use_cache=True)
            cache.past = out.past_key_values
        else:  # other kinds of state have other names: compute the whole sequence anew
            out = base(input_ids=cache.input_ids[None], use_cache=False)
        return self.logits(out[0][0, -1])

    def save(
        self,
        folder: Path,
        *,
        eos_token_id: int | None,
        tokenizer: Any,
        dtype: torch.dtype | None,
        weights: dict[str, Tensor] | None,
    ) -> None:
        """`save_folder` of `pertoken.folders.open`, without the tokenizer's own files."""
        from transformers import GenerationConfig

        dtype = dtype or self.head_weight.dtype
        special = {key: getattr(tokenizer, key, None) for key in ("bos_token_id", "pad_token_id")}
        self.hf.config.eos_token_id = eos_token_id
        self.hf.generation_config = GenerationConfig(eos_token_id=eos_token_id, **special)
        own = self.hf.state_dict() if weights is None else weights
        tensors = {name.removeprefix("hf."): tensor.detach().to("cpu", dtype) for name, tensor in own.items()}
        with quiet():
            self.hf.save_pretrained(folder, state_dict=tensors)
        self.hf.config.dtype = dtype  # transformers has noted the type of the parameters, not of what it was given
        self.hf.config.save_pretrained(folder)

    @torch.no_grad()
    def resize(self, vocab_size: int) -> None:
        """`resize_embeddings` of `pertoken.folders.open`."""
        old = self.facts.vocab_size
        with torch.random.fork_rng():  # transformers fills the new rows with random numbers first
            self.hf.resize_token_embeddings(vocab_size, mean_resizing=False)
        for layer in (self.hf.get_input_embeddings(), self.hf.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].mean(0)
        _thaw_padding(self.hf)


class _Reached(torch.autograd.Function):
    """The first tensor, for whose gradient each of the others gets a zero: what wraps a model waits for all of them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        asked = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return grads[0], *(p.new_zeros(()).expand_as(p) if needed else None for p, needed in asked)


def _thaw_padding(hf: Any) -> None:
    """Let the padding token learn: transformers would freeze its embedding, though it may be the end token as well."""
    for module in hf.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None


def _experts(config: Any) -> tuple[int, int]:
    """How many experts a token chooses, and of how many; 0 where the configuration has other words for it."""
    text = config.get_text_config()
    numbers = (getattr(text, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    chosen = getattr(text, "num_experts_per_tok", None)
    return (chosen if isinstance(chosen, int) else 0), next((n for n in numbers if isinstance(n, int)), 0)


def _longest(config: Any) -> int:
    """Up to how many tokens a sample's hidden states depend on the sample alone."""
    limit = int(getattr(config, "max_position_embeddings", None) or _NO_LIMIT)
    # Of version 5 of transformers, and of 4.
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type", part.get("type")) in _ROPE_BY_LENGTH:
            original = part.get("original_max_position_embeddings")
            limit = min(limit, original or getattr(config, "original_max_position_embeddings", None) or limit)
    return limit

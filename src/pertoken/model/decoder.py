"""A decoder on flat tokens, dense or with experts, with the features that its family has (`pertoken.families`).

Parameters carry Hugging Face's names, so that state dicts map one to one. Shape suffixes: N flat tokens, D hidden
size or head dimension, H query heads, K key-value heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pertoken.data.batch.pack import MicroBatch
from pertoken.model.attention import KVCache, cached_attention
from pertoken.model.blocks import Decoder, compute_dtype
from pertoken.model.execution import PLAIN, Execution
from pertoken.model.hooks import is_plain_linear
from pertoken.model.lora import Adapter
from pertoken.model.moe import Documents, MixtureOfExperts
from pertoken.model.plain import PlainPass, attend_in, run_plain
from pertoken.model.protocol import BalanceLoss, ModelFacts
from pertoken.objective.balance import balanced_lengths, with_balance_loss
from pertoken.objective.cross_entropy import cross_entropy, linear_cross_entropy
from pertoken.objective.logit_map import LogitMap
from pertoken.objective.terms import CROSS_ENTROPY, LossOutput, Objective
from pertoken.recipe.model import ResolvedModelConfig

__all__ = ["CausalLM"]


class CausalLM(nn.Module):
    """The language model, loss included, so that what wraps it (DDP, FSDP) sees the head's use as well.

    Parameters are float32 (or float64, for checks) and initialized from `seed` alone: neither the global random state
    nor the device matters. Under `torch.autocast` the linear layers and attention run in the low precision, while the
    residual stream and the statistics of the norms stay as wide as the parameters. On the meta device nothing is
    initialized.
    """

    def __init__(
        self,
        config: ResolvedModelConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        self.adapter: Adapter | None = None
        with torch.device("meta"):  # the layers' own initialization would draw from the global random state
            self.model = Decoder(config)
            self.lm_head = (
                None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            )
        self.to(dtype)
        if torch.device(device).type != "meta":
            # As `to_empty` does, which imports symbolic algebra to find out how a tensor on "meta" is laid out.
            empty = {n: torch.empty(p.shape, dtype=p.dtype, device=device) for n, p in self.named_parameters()}
            self.load_state_dict(empty, assign=True)
            self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Norms multiply by 1, biases are 0; matrices normal with standard deviation 0.02, those that write to the
        residual stream divided by sqrt(2 * layers) (GPT-2, section 2.3). The same for every device and dtype, up to
        rounding."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith(".bias") or self.config.offset_norms else 1.0)
                continue
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * self.config.num_hidden_layers) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the embedding where tied."""
        weight: Tensor = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return weight

    @property
    def logit_map(self) -> LogitMap:
        """From the head's product to logits."""
        return LogitMap(1.0 / self.config.logits_scaling, self.config.final_logit_softcapping)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_active_parameters(self) -> int:
        """Those that one token's way leads through: of a layer's experts, as many as it chooses."""
        idle = 0
        if self.config.use_moe:
            expert = 3 * self.config.hidden_size * self.config.moe_intermediate_size
            idle = (self.config.num_experts - self.config.num_experts_per_tok) * expert * self.config.num_hidden_layers
        return self.num_parameters - idle

    @property
    def facts(self) -> ModelFacts:
        c = self.config
        facts = ModelFacts(c.family, c.vocab_size, c.max_position_embeddings, c.hidden_size)
        if not c.use_moe:
            return facts
        balance_loss = BalanceLoss(c.aux_loss, c.aux_loss_coef)
        return replace(facts, balance_loss=balance_loss, experts_per_token=c.num_experts_per_tok)

    def setting(self, key: str) -> object:
        """What the configuration has for the recipe's key `model.KEY`, None if nothing."""
        return dict(self.config).get(key)

    def set_balance_loss(self, balance_loss: BalanceLoss) -> None:
        """A part of the objective, which loaded weights do not say; without experts there is none to set."""
        assert self.config.use_moe
        self.config = self.config.model_copy(
            update={"aux_loss": balance_loss.kind, "aux_loss_coef": balance_loss.coefficient}
        )

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's blocks, for what treats them one by one."""
        return list(self.model.layers)

    @property
    def can_checkpoint_activations(self) -> bool:
        return True

    @staticmethod
    def wide_modules(layer: nn.Module) -> list[nn.Module]:
        """What of a block autocast leaves as wide as its parameters: the norms and the router."""
        mixtures = [m for m in layer.modules() if isinstance(m, MixtureOfExperts)]
        norms = [m for m in layer.modules() if isinstance(m, nn.RMSNorm)]
        return norms + [router for mixture in mixtures for router in mixture.routers]

    def forward(
        self, micro_batch: MicroBatch, execution: Execution = PLAIN, *, objective: Objective = CROSS_ENTROPY
    ) -> LossOutput:
        """Sum of the negative log-likelihoods in nats over the supervised tokens, and their number.

        `objective` adds its terms, experts their balance loss. An empty micro-batch gives zeros, and every parameter a
        zero gradient. A head that is more than its weight (an adapter, say) is called instead, and its logits exist
        whole.
        """
        documents, num_tokens = None, sum(micro_batch.lengths)
        if self.config.use_moe:
            lengths = balanced_lengths(self.config, micro_batch.lengths)
            documents = Documents.of(lengths, micro_batch.input_ids.device)
        labels, loss_mask, rows = micro_batch.labels, micro_batch.loss_mask, micro_batch.supervised_rows()
        every = len(rows) == num_tokens
        # Nothing reads the other rows of a dense model's last block; the router of one with experts sees them all.
        output_rows = None if self.config.use_moe or every else rows
        this = execution.engine.begin(self, micro_batch, execution.casts)
        hidden, loads = this.run(documents, output_rows, recompute=execution.activation_checkpointing)
        if not every:
            labels, loss_mask = labels[rows], loss_mask[rows]
            hidden = hidden if output_rows is not None else hidden[rows]
        if self.lm_head is None or is_plain_linear(self.lm_head):
            impl = this.loss_impl if execution.loss_impl == "auto" else execution.loss_impl
            tied = this.tied if impl == "cpu" and self.lm_head is None else None
            out = linear_cross_entropy(
                *(hidden, self.head_weight, labels, loss_mask),
                impl=impl,
                tied=tied,
                row_terms=objective.row_terms,
                logit_map=self.logit_map,
                all_supervised=True,
            )
        else:
            logits = self.lm_head(hidden)
            out = cross_entropy(logits, labels, loss_mask, row_terms=objective.row_terms, logit_map=self.logit_map)
        out = replace(out, metrics=out.metrics | {"padding": this.padding()})
        return with_balance_loss(out, loads, self.config, num_tokens) if self.config.use_moe else out

    def padding(self, micro_batch: MicroBatch, execution: Execution = PLAIN) -> tuple[Tensor, Tensor]:
        """`padding_metric`: what padding adds to a forward and backward pass, and all operations."""
        return execution.engine.begin(self, micro_batch, None).padding()

    def hidden_states(self, micro_batch: MicroBatch) -> Tensor:
        """[N, D], after the final norm. Each sample sees itself alone."""
        return PlainPass(self, micro_batch).run(None, None, recompute=False)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]"""
        logits: Tensor = F.linear(hidden, self.head_weight) if self.lm_head is None else self.lm_head(hidden)
        return self.logit_map(logits)

    def new_cache(self, max_length: int) -> KVCache:
        """An empty cache for `decode`, for one sequence of at most `max_length` tokens."""
        weight = self.model.embed_tokens.weight
        return KVCache(
            layers=self.config.num_hidden_layers,
            kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            max_length=max_length,
            like=weight.new_empty((), dtype=compute_dtype(weight)),
        )

    def decode(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Logits [V] after the last of `input_ids` [T], which continue what the cache holds and are added to it."""
        start, end = cache.length, cache.length + input_ids.shape[0]
        position_ids = torch.arange(start, end, device=input_ids.device)
        attend = partial(cached_attention, cache=cache, **self.config.attention_settings)
        kinds = self.config.layer_kinds
        attends = [attend_in(partial(attend, layer=i), kind) for i, kind in enumerate(kinds)]
        hidden, _ = run_plain(self, input_ids, position_ids, attends)
        cache.length = end
        return self.logits(hidden[-1])

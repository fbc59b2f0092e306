"""Any causal language model: transformers' own code for a family that our decoder lacks, with the decoder's face.

It pads where our decoder does not, and runs slower. Families are tried, not listed: what cannot be the objective that
the recipe describes is found by computing with the model as it is loaded, and refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pertoken.data.batch.pack import MicroBatch
from pertoken.errors import ModelError, RecipeError
from pertoken.folders.files import check_fallback, save_tokenizer
from pertoken.folders.weights import aligned, listed
from pertoken.hf_fallback.head import check_logits, linear_head, smallest_vocabulary
from pertoken.model.operations import padding_metric
from pertoken.objective.cross_entropy import LossImpl, linear_cross_entropy
from pertoken.objective.terms import CROSS_ENTROPY, LossOutput, Objective
from pertoken.text import escaped_logs, reason

__all__ = ["FallbackCache", "FallbackConfig", "FallbackLM", "load_fallback", "quiet"]

_NO_LIMIT = 2**31 - 1
# Their angles change once a sequence is longer than the original limit, and then depend on the longest one beside it.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class FallbackConfig:
    """What the rest of pertoken asks of a model's configuration; all else is transformers' own business."""

    family: str  # transformers' model type, marked as such
    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    num_hidden_layers: int | None
    num_attention_heads: int | None
    use_moe: bool = False  # refused


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

    Nothing drops out. A mixture of experts is refused: its balance loss is a mean over a micro-batch, padding included,
    so it would depend on the split. Raises ModelError for what `linear_head`, `check_logits` or this rule refuse, and
    where the loss differs from the loss of the model's own logits.
    """

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf
        linear_head(hf)
        if any("expert" in name for name, _ in hf.named_parameters()):
            raise ModelError(
                f"model_type={hf.config.model_type!r}: a mixture of experts; pertoken trains those only that its own "
                "decoder covers, since transformers' balance loss depends on how a step is split"
            )
        self._checkpointing = False
        self.loss_impl: LossImpl = "auto"
        for module in hf.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        _thaw_padding(hf)
        _check(self)

    @property
    def config(self) -> FallbackConfig:
        config = self.hf.config.get_text_config()
        return FallbackConfig(
            family=f"{self.hf.config.model_type} (transformers)",
            vocab_size=smallest_vocabulary(self.hf),
            max_position_embeddings=_longest(config),
            hidden_size=int(self.head_weight.shape[1]),
            num_hidden_layers=getattr(config, "num_hidden_layers", None),
            num_attention_heads=getattr(config, "num_attention_heads", None),
        )

    @property
    def head_weight(self) -> Tensor:
        """[V, D]"""
        weight: Tensor = self.hf.get_output_embeddings().weight
        return weight

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_active_parameters(self) -> int:
        """Those that a token meets: all, in a dense model."""
        return self.num_parameters

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's blocks, for what treats them one by one: the longest list of modules there is."""
        lists = [list(module) for module in self.hf.base_model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len, default=[])

    @property
    def activation_checkpointing(self) -> bool:
        return self._checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        if on and not self.hf.supports_gradient_checkpointing:
            raise RecipeError(
                f"train.activation_checkpointing=true: {self.config.family} does not offer it; set it to false"
            )
        if on != self._checkpointing:  # transformers renames these from gradient_ to activation_
            do = "enable" if on else "disable"
            switch = getattr(
                self.hf, f"activation_checkpointing_{do}", getattr(self.hf, f"gradient_checkpointing_{do}")
            )
            switch(*([{"use_reentrant": False}] if on else []))
        self._checkpointing = on

    def compile_layers(self) -> None:
        """Raises RecipeError: which parts of a foreign model may be fused is not known."""
        raise RecipeError(f'train.compile="on": {self.config.family} is not pertoken\'s own decoder; set it to "off"')

    def forward(
        self, micro_batch: MicroBatch, *, impl: LossImpl | None = None, objective: Objective = CROSS_ENTROPY
    ) -> LossOutput:
        """Sum of the negative log-likelihoods in nats over the supervised tokens, and their number.

        `objective` adds its terms. An empty micro-batch gives zeros, and every parameter a zero gradient. `impl` is
        `linear_cross_entropy`'s, the model's `loss_impl` if not given.
        """
        hidden, impl = self.hidden_states(micro_batch), impl or self.loss_impl
        out = linear_cross_entropy(
            *(hidden, self.head_weight, micro_batch.labels, micro_batch.loss_mask),
            impl=impl,
            row_terms=objective.row_terms,
        )
        return replace(out, metrics=out.metrics | {"padding": self.padding(micro_batch)})

    def padding(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
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
        hidden: Tensor = self.hf.base_model(input_ids=padded.view(-1, longest), use_cache=False)[0]
        return hidden.flatten(0, 1)[rows]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]"""
        return F.linear(hidden, self.head_weight)

    def new_cache(self, max_length: int) -> FallbackCache:
        """An empty cache for `decode`, for one sequence. It grows, so `max_length` is not needed."""
        return FallbackCache(torch.empty(0, dtype=torch.int64, device=self.head_weight.device))

    def decode(self, input_ids: Tensor, cache: FallbackCache) -> Tensor:
        """Logits [V] after the last of `input_ids` [T], which continue what the cache holds and are added to it."""
        cache.input_ids = torch.cat((cache.input_ids, input_ids))
        base = self.hf.base_model
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
        """`save_folder` of `pertoken.folders.open`."""
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
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)

    @torch.no_grad()
    def resize(self, vocab_size: int) -> None:
        """`resize_embeddings` of `pertoken.folders.open`."""
        old = self.config.vocab_size
        with torch.random.fork_rng():  # transformers fills the new rows with random numbers first
            self.hf.resize_token_embeddings(vocab_size, mean_resizing=False)
        for layer in (self.hf.get_input_embeddings(), self.hf.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].mean(0)
        _thaw_padding(self.hf)


def load_fallback(folder: Path, *, dtype: torch.dtype) -> FallbackLM:
    """The model of a Hugging Face folder, in transformers' own code: no code of the folder's, and no pickle.

    Raises ModelError for a family that transformers lacks, weights that are missing or left over, and what `FallbackLM`
    refuses.
    """

    numbers = check_fallback(folder)
    try:
        with escaped_logs("transformers"):
            return _load(folder, numbers, dtype)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None


def _load(folder: Path, numbers: int, dtype: torch.dtype) -> FallbackLM:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        _switch_off_dropout(config)
        if getattr(config, "quantization_config", None):
            raise ModelError("quantization_config: pertoken trains floating-point weights; write it out dequantized")
        with torch.device("meta"):  # where a parameter takes no memory
            asked = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).num_parameters()
        if asked > 2 * numbers:  # tied ones are in the file once
            raise ModelError(f"config.json asks for {asked:,} numbers where the weights have {numbers:,}; correct it")
        with quiet():
            hf, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except ModelError:
        raise
    except Exception as error:  # transformers raises errors of any kind for a folder that is not what it says
        raise ModelError(f"transformers cannot open it ({reason(error)}); name another model") from None
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(key, ()))):
            raise ModelError(f"{key.replace('_', ' ')}: {listed(names)}; compare the weights with config.json")
    for parameter in hf.parameters():
        parameter.data = aligned(parameter.data)
    return FallbackLM(hf)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars: nothing below the console prints."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _switch_off_dropout(config: Any) -> None:
    """Set every dropout rate of a configuration, and of those within it, to zero."""
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
        elif hasattr(value, "to_dict"):
            _switch_off_dropout(value)


def _thaw_padding(hf: Any) -> None:
    """Let the padding token learn: transformers would freeze its embedding, though it may be the end token as well."""
    for module in hf.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None


def _longest(config: Any) -> int:
    """Up to how many tokens a sample's hidden states depend on the sample alone."""
    limit = int(getattr(config, "max_position_embeddings", None) or _NO_LIMIT)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in _ROPE_BY_LENGTH:
            original = part.get("original_max_position_embeddings")
            limit = min(limit, original or getattr(config, "original_max_position_embeddings", None) or limit)
    return limit


@torch.no_grad()
def _check(model: FallbackLM) -> None:
    """Raise ModelError unless the model, as it is trained, has the loss of its own logits on two unequal samples."""
    hf, name = model.hf, f"model_type={model.hf.config.model_type!r}"
    try:
        check_logits(hf)
        device = model.head_weight.device
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (10,), generator=generator).to(device)
        lengths = (4, 9)  # the first sample is how the second begins
        hf.eval()
        own = [hf(input_ids=tokens[None, :n], use_cache=False).logits[0] for n in lengths]
        micro_batch = MicroBatch(
            input_ids=torch.cat([tokens[:n] for n in lengths]),
            labels=torch.cat([tokens[1 : n + 1] for n in lengths]),
            loss_mask=torch.ones(sum(lengths), dtype=torch.bool, device=device),
            position_ids=torch.cat([torch.arange(n, device=device) for n in lengths]),
            cu_seqlens=torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device),
            lengths=lengths,
        )
        hf.train()
        with torch.random.fork_rng():
            ours, loss = model.logits(model.hidden_states(micro_batch)), model(micro_batch).loss_sum
    except ModelError:
        raise
    except Exception as error:  # foreign code, which may want more than token ids
        raise ModelError(f"{name}: cannot run on tokens alone ({reason(error)}); choose another model") from None
    if not _close(own[1][: lengths[0]], own[0]):
        raise ModelError(f"{name}: a token's logits depend on the tokens after it; choose a causal language model")
    own_loss = F.cross_entropy(torch.cat(own).double(), micro_batch.labels, reduction="sum")
    if not (_close(ours, torch.cat(own)) and _close(loss, own_loss)):
        raise ModelError(
            f"{name}: the loss in training is {float(loss):.6g} nats where the model's own logits give "
            f"{float(own_loss):.6g} (something drops out, or padding matters); choose another model"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to what float32 may lose on the way."""
    return bool((a.double() - b.double()).abs().max() <= 1e-4 * b.double().abs().max())

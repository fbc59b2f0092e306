"""Drives the real Megatron-Core on a CPU.

Megatron names the device in its code and has no option for it. Inside `on_cpu()` `torch.cuda.current_device()` and the
literal `device="cuda"` stand for the CPU; nothing of Megatron itself is replaced.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from megatron_names import cut, from_megatron, of_stage, to_megatron
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pertoken.adapters.megatron import forward_step
from pertoken.data.batch.pack import Sample, collate
from pertoken.data.batch.share import share_of_all
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig, ResolvedModelConfig
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step


@contextmanager
def _what_megatron_warns_of() -> Iterator[None]:
    """Of what it lacks here, and of what is deprecated in its own code; any other warning stays an error."""
    with warnings.catch_warnings():
        for message in (
            "Transformer Engine and Apex are not installed",
            "Apex is not installed",
            "The following imports from `dynamic_context.py` will be removed",
            "The 'megatron.core.transformer.custom_layers.transformer_engine'",
            "`torch.jit.script",
            "MLP requires ffn_hidden_size, but it was not provided",
            "Warning: tp_group is None, using default tp group",
            "When using async grad allreduce it is recommended to set the environment variable CUDA_DEVICE",
        ):
            warnings.filterwarnings("ignore", message=r"\s*" + message)
        yield


with _what_megatron_warns_of():
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

Batch = dict[str, Tensor]
VOCAB = 96


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


@contextmanager
def on_cpu() -> Iterator[None]:
    """To be entered in every test anew: pytest sets the warnings' filters afresh for each."""
    current_device = mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu"))
    with current_device, _CudaMeansCpu(), _what_megatron_warns_of():
        yield


@contextmanager
def ranks(folder: Path, rank: int = 0, world_size: int = 1) -> Iterator[None]:
    """A gloo group, with Megatron's own groups in it."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    try:
        regroup()
        yield
        torch.distributed.barrier()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def regroup(tensor: int = 1, pipeline: int = 1) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor, pipeline)
    # Nothing draws from the tracker, as there is no dropout and weights are copied in.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


# The samples of one step: of unequal lengths, with unequal shares of supervised tokens, two without any.
LENGTHS = [17, 9, 3, 12, 30, 1, 21]
SUPERVISED = [12, 1, 0, 5, 27, 0, 2]


def samples() -> list[Sample]:
    rng = np.random.default_rng(7)
    made = []
    for length, supervised in zip(LENGTHS, SUPERVISED, strict=True):
        loss_mask = np.zeros(length, bool)
        loss_mask[rng.permutation(length)[:supervised]] = True
        made.append(Sample(rng.integers(0, VOCAB, length + 1), loss_mask))
    return made


def padded(chosen: list[int], *, mask_dtype: torch.dtype = torch.bool) -> Batch:
    """Samples as rows of one length, [B, T]; labels are -100 where they are not supervised."""
    picked = [samples()[i] for i in chosen]
    longest = max(map(len, picked))

    def rows(name: str, filler: int) -> Tensor:
        cells = [np.append(getattr(s, name), [filler] * (longest - len(s))).astype(np.int64) for s in picked]
        return torch.from_numpy(np.stack(cells))

    loss_mask = rows("loss_mask", 0)
    labels = rows("labels", -100).masked_fill(loss_mask == 0, -100)
    return {"input_ids": rows("input_ids", 0), "labels": labels, "loss_mask": loss_mask.to(mask_dtype)}


def single(i: int) -> Batch:
    """One sample, [T]."""
    return {key: value[0] for key, value in padded([i]).items()}


def tiny(family: str, tied: bool, layers: int = 1) -> ResolvedModelConfig:
    return ModelConfig(
        family=family,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,  # not hidden_size / heads, so that a mix-up of the two shows
        intermediate_size=40,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
    ).resolve(VOCAB)


def our_model(config: ResolvedModelConfig) -> CausalLM:
    """As initialized, except for the norms, whose weights differ from each other."""
    model = CausalLM(config, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def megatron_model(
    ours: CausalLM, *, per_token: bool = True, tensor: int = 1, pipeline: int = 1, **more: Any
) -> GPTModel:
    """Megatron's GPTModel with our weights: this rank's part of it. `more` goes into its configuration."""
    c = ours.config
    config = TransformerConfig(
        num_layers=c.num_hidden_layers,
        hidden_size=c.hidden_size,
        num_attention_heads=c.num_attention_heads,
        num_query_groups=c.num_key_value_heads,
        kv_channels=c.head_dim,
        ffn_hidden_size=c.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=c.rms_norm_eps,
        qk_layernorm=c.family == "qwen3",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        cuda_graph_scope=[],  # its own default is deprecated
        calculate_per_token_loss=per_token,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,  # it would wait for a CUDA device
        **more,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=c.family == "qwen3")
    predict_more = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if config.mtp_num_layers else None
    model = GPTModel(
        config,
        spec,
        vocab_size=c.vocab_size,
        max_sequence_length=max(LENGTHS),
        position_embedding_type="rope",
        rotary_base=c.rope_theta,
        share_embeddings_and_output_weights=c.tie_word_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        mtp_block_spec=predict_more,
    )
    weights = to_megatron({name: p.detach() for name, p in ours.named_parameters()}, c)
    weights = of_stage(weights, parallel_state.get_pipeline_model_parallel_rank(), c.num_hidden_layers // pipeline)
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("mtp."):  # ours has no such layers
                weight = cut(name, weights[name], tensor)[rank]
                assert parameter.shape == weight.shape, name
                parameter.copy_(weight)
    return model


@dataclass(frozen=True)
class Result:
    """Of one step."""

    loss: float
    gradients: dict[str, Tensor]  # by our names, or Megatron's own
    reports: list[Tensor] = field(default_factory=list)  # of this rank's micro-batches


def our_step(model: CausalLM) -> Result:
    """Our own `train_step` over all samples, in the model's precision, with a learning rate of 0."""
    gradients: dict[str, Tensor] = {}

    def keep() -> None:
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})

    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    precision = Precision(dtype, torch.device("cpu"))
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.0), precision.new_scaler(), precision)
    metrics = train_step(
        state,
        share_of_all([collate(samples()[:4]), collate(samples()[4:])]),
        lr=0.0,
        max_norm=0.0,
        on_gradients=keep,
    )
    return Result(metrics.loss_sum / metrics.num_tokens, gradients)


def wrap(model: GPTModel | Float16Module, *, overlap: bool = False, average: bool = False) -> DistributedDataParallel:
    """Megatron's DDP; `overlap` reduces buckets during the backward pass, which needs every parameter's gradient."""
    model.config.finalize_model_grads_func = finalize_model_grads
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        bucket_size=4000 if overlap else None,
        average_in_collective=average,
    )
    ddp = DistributedDataParallel(model.config, settings, model)
    model.config.no_sync_func = ddp.no_sync
    return ddp


def in_bfloat16(model: GPTModel) -> Float16Module:
    model.config.bf16 = True
    return Float16Module(model.config, model)


def megatron_step(
    ddp: torch.nn.Module,
    config: ResolvedModelConfig | None,
    mine: Iterable[Batch],
    num_micro_batches: int,
    step: Any = forward_step,
) -> Result:
    """One step of Megatron's own schedule over this rank's micro-batches, reported as its training loop does it.

    Gradients go by our names; without `config` they are this rank's, by Megatron's names.
    """
    ddp.zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=RerunDataIterator(iter(mine)),  # as Megatron's own loaders wrap it: it has no __iter__
        model=[ddp],
        num_microbatches=num_micro_batches,
        seq_length=max(LENGTHS),
        micro_batch_size=1,
    )
    sums = [report["lm loss"] for report in reports]  # empty before the last pipeline stage
    total = torch.stack([torch.zeros(2), *sums]).sum(0)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    gradients = {name.removeprefix("module."): p.main_grad.clone() for name, p in ddp.module.named_parameters()}
    return Result(float(total[0] / total[1]), from_megatron(gradients, config) if config else gradients, sums)


def worst(result: Result, reference: Result) -> tuple[float, str]:
    """The largest error of any gradient, relative to the largest entry of that parameter's, and whose it is."""
    assert result.gradients.keys() == reference.gradients.keys()
    errors = {
        name: float((result.gradients[name] - wanted).abs().max() / wanted.abs().max())
        for name, wanted in reference.gradients.items()
    }
    name = max(errors, key=errors.__getitem__)
    return errors[name], name

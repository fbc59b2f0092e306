"""What fits into memory: known from the configuration before a model is built, or found out by what fails."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import torch

from pertoken.errors import RecipeError
from pertoken.recipe.model import ResolvedModelConfig
from pertoken.recipe.schema import Recipe
from pertoken.text import shown
from pertoken.training.optimizers import optimizer_kind
from pertoken.training.parallel import World

__all__ = ["check_parameters", "check_size", "machine_bytes", "memory_problem", "out_of_memory", "training_bytes"]

_MOST_MODULES = 50_000  # layers, times experts where there are any; the largest models known have half of that
_HEAD_ROWS = 512  # of logits at a time, at least (objective/cross_entropy.py)
_ITEM_BYTES = {"float64": 8}  # of weights and moments; with any other dtype they are float32
# What plain errors say of memory that was not given: torch's allocator on a CPU, C++ below it, CUDA's libraries.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory has ended: on a GPU, in torch on a CPU, in a mapping, in Python."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def memory_problem(*, updated: bool, world: World, token_budget: int) -> str:
    """Why a step that memory did not suffice for cannot be done again in smaller micro-batches, and what to do."""
    if updated:
        return "out of memory while the weights were updated; free memory and continue with resume=True"
    if world.size > 1:
        return (
            f"rank {world.rank} is out of memory; lower train.micro_batch_tokens (now {token_budget}) and continue "
            "with resume=True"
        )
    return (
        "out of memory with one sample in a micro-batch; lower data.max_seq_len, "
        "or set train.activation_checkpointing=true"
    )


def machine_bytes() -> int | None:
    """The memory that this process can have: the machine's, or what its container or `ulimit -v` allows. None where
    the system does not say."""
    limits = []
    try:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return None
    with suppress(OSError, ValueError):  # no cgroup, or "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    with suppress(ImportError, OSError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        limits += [] if soft == resource.RLIM_INFINITY else [soft]
    return min(limits)


def training_bytes(recipe: Recipe, config: ResolvedModelConfig) -> dict[str, int]:
    """What one process needs to train the decoder of `config`, in bytes, by arithmetic.

    Activations are what the plain modules keep of a micro-batch for its backward pass, and the head's chunk of logits;
    the CPU engine keeps less.
    """
    train = recipe.train
    wide = _ITEM_BYTES.get(train.dtype, 4)
    low = 2 if train.dtype in ("bfloat16", "float16") else wide
    weights = config.num_parameters * wide
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": weights * optimizer_kind(train.optimizer).state_numbers,
        "activations": train.micro_batch_tokens * _activations(recipe, config, wide, low)
        + _HEAD_ROWS * config.vocab_size * (wide + low),
    }


def _activations(recipe: Recipe, config: ResolvedModelConfig, wide: int, low: int) -> int:
    """Bytes of a token."""
    hidden, queries, keys = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if recipe.train.activation_checkpointing:
        return config.num_hidden_layers * wide * hidden
    feed_forward = config.num_experts_per_tok * config.moe_intermediate_size if config.use_moe else 0
    feed_forward = feed_forward or config.intermediate_size
    of_layer = hidden * 2 * wide + 5 * hidden * low  # the inputs of the norms, and of the matrices behind them
    of_layer += config.head_dim * (queries + keys) * (2 * low + (wide if config.qk_norm else 0))
    of_layer += 4 * feed_forward * low
    return config.num_hidden_layers * of_layer


def check_size(recipe: Recipe, vocab_size: int, device: torch.device | None = None) -> None:
    """Raises RecipeError where the recipe's own model cannot be trained for want of memory, without building it.

    Weights, gradients and the optimizer's state are counted, activations are not. `vocab_size` counts where the recipe
    has none. On a GPU (`device`), its memory counts too, unless FSDP shares the model among several.
    """
    config = recipe.model.resolve(vocab_size)
    modules = config.num_hidden_layers * (config.num_experts if config.use_moe else 1)
    if modules > _MOST_MODULES:
        experts = f", model.num_experts={config.num_experts}" if config.use_moe else ""
        raise RecipeError(
            f"model.num_hidden_layers={config.num_hidden_layers}{experts}: more than {_MOST_MODULES:,} "
            f"{'layers times experts' if config.use_moe else 'layers'} cannot be meant; lower it"
        )
    keys = ["hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"]
    keys += ["num_experts"] if config.use_moe else []
    sizes = ", ".join(f"{key}={shown(getattr(config, key))}" for key in keys)
    check_parameters(f"[model] {sizes}", config.num_parameters, recipe, device)


def check_parameters(what: str, num_parameters: int, recipe: Recipe, device: torch.device | None) -> None:
    """`check_size` for a model of so many parameters, which the message calls `what`; under an adapter all frozen."""
    weights = num_parameters * _ITEM_BYTES.get(recipe.train.dtype, 4)
    frozen = recipe.adapter.kind != "none"
    needed = weights if frozen else weights * (2 + optimizer_kind(recipe.train.optimizer).state_numbers)
    on_gpu = device is not None and device.type == "cuda"
    there = machine_bytes()
    if there is not None and (weights if on_gpu else needed) > there:
        raise _too_large(what, num_parameters, weights if on_gpu else needed, there, "this machine")
    if on_gpu and recipe.train.parallel != "fsdp":
        there = torch.cuda.get_device_properties(device).total_memory
        if needed > there:
            raise _too_large(what, num_parameters, needed, there, "the GPU")


def _too_large(what: str, num_parameters: int, needed: int, there: int, where: str) -> RecipeError:
    return RecipeError(
        f"{what}: {num_parameters:.3g} parameters; training them takes at least {needed / 1e9:,.3g} "
        f"GB (weights, gradients, optimizer), {where} has {there / 1e9:,.1f} GB. Make the model smaller"
    )

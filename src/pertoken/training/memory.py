"""What fits into memory: known from the configuration before a model is built, or found out by what fails."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import torch

from pertoken.errors import RecipeError
from pertoken.recipe.adapter import ALL_LINEAR
from pertoken.recipe.model import ResolvedModelConfig
from pertoken.recipe.schema import Recipe
from pertoken.recipe.train import TrainConfig
from pertoken.text import shown
from pertoken.training.methods import cheaper_methods, keys_of, with_method
from pertoken.training.optimizers import optimizer_kind
from pertoken.training.parallel import World

__all__ = [
    "adapter_numbers",
    "check_parameters",
    "check_size",
    "machine_bytes",
    "memory_problem",
    "needs_text",
    "optimizer_bytes",
    "out_of_memory",
    "size_text",
    "training_bytes",
]

_MOST_MODULES = 50_000  # layers, times experts where there are any; the largest models known have half of that
_HEAD_ROWS = 512  # of logits at a time, at least (objective/cross_entropy.py)
_ITEM_BYTES = {"float64": 8}  # of weights and moments; with any other dtype they are float32
# What plain errors say of memory that was not given: torch's allocator on a CPU, C++ below it, CUDA's libraries, and
# torch's allocator of Apple's mps.
_OUT_OF_MEMORY = (
    *("DefaultCPUAllocator", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    "MPS backend out of memory",
)


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

    "low precision" are the copies of the blocks' matrices that products are computed with; under an adapter the kernels
    have the sum W + s B A there, whatever W is kept in. Activations are what the
    plain modules keep of a micro-batch for its backward pass, and the head's chunk of logits; the CPU engine keeps
    less. Not counted: what Python and its libraries take, and the copy of weights and optimizer that a checkpoint in
    the background is written from.
    """
    train = recipe.train
    wide = _ITEM_BYTES.get(train.dtype, 4)
    low = 2 if train.dtype in ("bfloat16", "float16") else wide
    numbers, matrices = config.num_parameters, _numbers_of_blocks(config)
    frozen = recipe.adapter.kind != "none"
    trained = adapter_numbers(recipe, config) if frozen else numbers
    weights = numbers * wide + (trained * wide if frozen else 0)
    if recipe.model.frozen_dtype == "bfloat16":
        weights -= matrices * (wide - 2)
    return {
        "weights": weights,
        "gradients": trained * wide,
        "optimizer": round(trained * optimizer_bytes(train)),
        "low precision": matrices * low if low < wide else 0,
        "activations": train.micro_batch_tokens * _activations(recipe, config, wide, low)
        + _HEAD_ROWS * config.vocab_size * (wide + low),
    }


def optimizer_bytes(train: TrainConfig) -> float:
    """Of the optimizer's state for each number that is trained, at least."""
    kind, wide = optimizer_kind(train.optimizer), _ITEM_BYTES.get(train.dtype, 4)
    return kind.state_numbers * (kind.item_bytes or (2 if train.optimizer_dtype == "bfloat16" else wide))


def _linear_layers(config: ResolvedModelConfig) -> dict[str, tuple[int, int, int]]:
    """Of all blocks together: name -> (how many, in, out). A mixture's experts count as many."""
    hidden, blocks = config.hidden_size, config.num_hidden_layers
    queries, keys = config.head_dim * config.num_attention_heads, config.head_dim * config.num_key_value_heads
    width = config.moe_intermediate_size if config.use_moe else config.intermediate_size
    of_mlp = blocks * config.num_experts if config.use_moe else blocks
    return {
        "q_proj": (blocks, hidden, queries),
        "k_proj": (blocks, hidden, keys),
        "v_proj": (blocks, hidden, keys),
        "o_proj": (blocks, queries, hidden),
        "gate_proj": (of_mlp, hidden, width),
        "up_proj": (of_mlp, hidden, width),
        "down_proj": (of_mlp, width, hidden),
    }


def _numbers_of_blocks(config: ResolvedModelConfig) -> int:
    return sum(count * rows * columns for count, rows, columns in _linear_layers(config).values())


def adapter_numbers(recipe: Recipe, config: ResolvedModelConfig) -> int:
    """Of A and B of the recipe's adapter. Targets count by the last part of their names; experts are not adapted."""
    meant = {name.rpartition(".")[2] for name in recipe.adapter.targets}
    of_experts = ("gate_proj", "up_proj", "down_proj")
    return sum(
        count * recipe.adapter.r * (rows + columns)
        for name, (count, rows, columns) in _linear_layers(config).items()
        if (ALL_LINEAR in meant or name in meant) and not (config.use_moe and name in of_experts)
    )


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
    """`check_size` for a model of so many parameters, which the message calls `what`; under an adapter all frozen.

    The message names a method that would fit, where the recipe could turn to one."""
    on_gpu = device is not None and device.type == "cuda"
    there = machine_bytes()
    weights = num_parameters * _ITEM_BYTES.get(recipe.train.dtype, 4)
    if there is not None and (weights if on_gpu else _least_bytes(num_parameters, recipe)) > there:
        raise _too_large(what, num_parameters, recipe, there, "this machine")
    if on_gpu and recipe.train.parallel != "fsdp":
        there = torch.cuda.get_device_properties(device).total_memory
        if _least_bytes(num_parameters, recipe) > there:
            raise _too_large(what, num_parameters, recipe, there, "the GPU")


def _least_bytes(num_parameters: int, recipe: Recipe) -> float:
    """Of weights, gradients and optimizer; under an adapter of the frozen weights alone."""
    wide = _ITEM_BYTES.get(recipe.train.dtype, 4)
    if recipe.adapter.kind == "none":
        return num_parameters * (2 * wide + optimizer_bytes(recipe.train))
    return num_parameters * (2 if recipe.model.frozen_dtype == "bfloat16" else wide)


def _too_large(what: str, num_parameters: int, recipe: Recipe, there: int, where: str) -> RecipeError:
    needed, remedy = _least_bytes(num_parameters, recipe), "Make the model smaller"
    for method in cheaper_methods(recipe):
        less = _least_bytes(num_parameters, with_method(recipe, method))
        if less <= there:
            remedy = f"Set {keys_of(method)}, which takes at least {less / 1e9:,.3g} GB, or make the model smaller"
            break
    counted = "weights, gradients, optimizer" if recipe.adapter.kind == "none" else "weights"
    return RecipeError(
        f"{what}: {num_parameters:.3g} parameters; training them takes at least {needed / 1e9:,.3g} "
        f"GB ({counted}), {where} has {there / 1e9:,.1f} GB. {remedy}"
    )


def needs_text(parts: dict[str, int], there: int | None, where: str = "this machine") -> str:
    """What a run needs by part, in a line: about 2.5 GB of the 16.0 GB of this machine: weights 0.5 GB, and so on."""
    of = "" if there is None else f" of the {size_text(there)} of {where}"
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
    return f"about {size_text(sum(parts.values()))}{of}: {listed} (computed)"


def size_text(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"

"""What fits into how much memory: by model and method, by `training_bytes`."""

from __future__ import annotations

from typing import Any

from pertoken.recipe.model import ModelConfig, ResolvedModelConfig
from pertoken.recipe.schema import Recipe
from pertoken.training.memory import training_bytes
from pertoken.training.methods import METHODS, with_method

__all__ = ["SHAPES", "SIZES", "fitting_table", "methods_bytes", "total_bytes"]

SIZES = (8, 16, 24)  # GiB
_LIBRARIES = 10**9  # bytes that Python, PyTorch and a GPU's context take besides, about
_TOKENS = 2048  # of a micro-batch in the table


def _shape(family: str, hidden: int, layers: int, heads: str, width: int, vocabulary: int, **more: Any) -> Any:
    """`heads`: "queries/keys x head_dim"."""
    counts, _, head_dim = heads.partition("x")
    queries, _, keys = counts.partition("/")
    return ModelConfig(
        family=family,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=int(queries),
        num_key_value_heads=int(keys),
        head_dim=int(head_dim),
        intermediate_size=width,
        **more,
    ).resolve(vocabulary)


SHAPES: dict[str, ResolvedModelConfig] = {
    "135M": _shape("llama", 576, 30, "9/3x64", 1536, 49152),  # SmolLM2-135M
    "270M": _shape("gemma3", 640, 18, "4/1x256", 2048, 262144, sliding_window=512),  # Gemma 3 270M
    "0.6B": _shape("qwen3", 1024, 28, "16/8x128", 3072, 151936),  # Qwen3-0.6B
    "1.7B": _shape("qwen3", 2048, 28, "16/8x128", 6144, 151936),  # Qwen3-1.7B
    "4B": _shape("qwen3", 2560, 36, "32/8x128", 9728, 151936),  # Qwen3-4B
    "8B": _shape("qwen3", 4096, 36, "32/8x128", 12288, 151936, tie_word_embeddings=False),  # Qwen3-8B
}


def total_bytes(recipe: Recipe, config: ResolvedModelConfig) -> int:
    return sum(training_bytes(recipe, config).values())


def methods_bytes(recipe: Recipe, config: ResolvedModelConfig) -> dict[str, int]:
    """The recipe's model by each method, all else as the recipe has it."""
    return {method: total_bytes(_plain(recipe, method), config) for method in METHODS}


def _plain(recipe: Recipe, method: str) -> Recipe:
    """By the method alone: AdamW in float32, nothing frozen, unless it says otherwise."""
    sections = {
        "train": recipe.train.model_copy(update={"optimizer": "adamw", "optimizer_dtype": "float32"}),
        "adapter": recipe.adapter.model_copy(update={"kind": "none"}),
        "model": recipe.model.model_copy(update={"frozen_dtype": "float32"}),
    }
    return with_method(recipe.model_copy(update=sections), method)


def fitting_table() -> list[str]:
    """Lines of Markdown: GB of each shape by each method, and what it fits in; so too with activations recomputed."""
    lines = ["| model | method | GB | fits in | GB, activations recomputed | fits in |", "|---|---|---|---|---|---|"]
    for shape, config in SHAPES.items():
        totals = [methods_bytes(_table_recipe(recomputes), config) for recomputes in (False, True)]
        for method in METHODS:
            cells = [f"{total[method] / 1e9:.1f} | {_fits_in(total[method])}" for total in totals]
            lines.append(f"| {shape} | {method} | {' | '.join(cells)} |")
    return lines


def _fits_in(needed: int) -> str:
    size = next((size for size in SIZES if needed + _LIBRARIES <= size * 2**30), None)
    return "more" if size is None else f"{size} GB"


def _table_recipe(recomputes: bool) -> Recipe:
    train = {"micro_batch_tokens": _TOKENS, "activation_checkpointing": recomputes}
    data = {"path": "chats.jsonl"}
    return Recipe.parse({"stage": "sft", "out_dir": "run", "init_from": "model", "data": data, "train": train})

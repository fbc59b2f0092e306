"""Evaluation: one sum over every supervised token, divided once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pertoken.checkpoints.read import load_model, recipe_of, resolve_model_folder
from pertoken.data.batch.pack import collate, pack_micro_batches
from pertoken.data.files.find import find_files
from pertoken.data.files.records import Record, read_records
from pertoken.data.store.store import Store, build_store
from pertoken.data.tokens.tokenizer import open_tokenizer
from pertoken.errors import PertokenError
from pertoken.kernels.memory import forget_blocks
from pertoken.model.execution import PLAIN, Execution
from pertoken.model.protocol import LanguageModel, TorchModule
from pertoken.recipe.schema import Recipe, apply_override
from pertoken.training.memory import out_of_memory
from pertoken.training.parallel import World
from pertoken.training.precision import Precision

__all__ = ["Evaluation", "evaluate", "model_and_data"]


@dataclass(frozen=True)
class Evaluation:
    """Sums over a whole data set."""

    loss_sum: float  # nats
    num_tokens: float  # supervised tokens
    num_bytes: int  # UTF-8 bytes of the supervised text; special tokens have none

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return self.loss_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """All nats (those of special tokens too) in bits, per byte of text: comparable between tokenizers."""
        return self.loss_sum / math.log(2) / self.num_bytes if self.num_bytes else math.nan


@torch.no_grad()
def evaluate(
    model: TorchModule,
    store: Store,
    precision: Precision,
    *,
    token_budget: int,
    world: World | None = None,
    execution: Execution = PLAIN,
) -> Evaluation:
    """Token-weighted loss over every sample of `store`, shared among the ranks of `world` (alone if not given).

    The model's train/eval mode is restored. Where memory ends, micro-batches are halved, unless other ranks wait.
    Raises PertokenError where one sample is too many.
    """
    world = world or World()
    was_training = model.training
    model.eval()
    loss_sum: float | None = None
    try:
        while loss_sum is None:
            micro_batches = pack_micro_batches(
                store.lengths.tolist(), world_size=world.size, token_budget=token_budget
            )[world.rank]
            loss_sum = _loss_sum(model, store, precision, execution, micro_batches)
            if loss_sum is None and (world.size > 1 or len(micro_batches) >= len(store)):
                raise PertokenError(
                    f"evaluation: out of memory with {token_budget} tokens in a micro-batch; "
                    "lower train.micro_batch_tokens or data.max_seq_len"
                )
            token_budget = max(1, token_budget // 2)
    finally:
        model.train(was_training)
    loss_sum = float(world.sum(torch.tensor([loss_sum], dtype=torch.float64)))
    return Evaluation(loss_sum, float(store.num_tokens.sum()), int(store.num_bytes.sum()))


def _loss_sum(
    model: TorchModule,
    store: Store,
    precision: Precision,
    execution: Execution,
    micro_batches: Sequence[Sequence[int]],
) -> float | None:
    """In nats; None where memory ends."""
    loss_sum = 0.0
    try:
        with execution.keeping_casts() as this:
            for indices in micro_batches:
                with precision.autocast():
                    out = model(collate([store[i] for i in indices]).to(precision.device), this)
                loss_sum += float(out.loss_sum)
    except Exception as error:
        if not out_of_memory(error):
            raise
        forget_blocks()
        return None
    return loss_sum


def _data_recipe(folder: Path, path: str, overrides: Sequence[str], *, longest: int) -> Recipe:
    """A recipe that makes samples of the data at `path` as the model in `folder` was trained on them.

    A pertoken checkpoint brings its own settings; any other folder gets the defaults, at most 2,048 tokens a sample and
    the stage that the first row suggests. `overrides` come last. Evaluation has no split and never drops what is long.
    """
    values: dict[str, Any] = {"out_dir": "unused", "init_from": None}
    data: dict[str, Any] = {"max_seq_len": min(longest, 2048), "overlong": "truncate"}
    if saved := recipe_of(folder):
        data = {k: v for k, v in saved["data"].items() if k not in ("eval_path", "eval_fraction", "eval_split")}
    values["data"] = data | {"path": path, "tokenizer": data.get("tokenizer")}
    if folder.is_dir():  # the tokenizer as it was saved with the model, added tokens and template included
        values["data"] |= {"tokenizer": str(folder), "add_tokens": [], "chat_template": None}
    for override in overrides:
        apply_override(values, override)
    values.setdefault("stage", _stage_of(values["data"]))
    if values["stage"] == "pretrain" and values["data"].get("format", "auto") != "text":
        values["data"]["format"] = "text"
    return Recipe.parse(values)


def _stage_of(data: dict[str, Any]) -> str:
    """`pretrain` for raw text, `sft` for conversations, by the first row."""
    path, text_key = data["path"], data.get("text_key", "text")
    for file in find_files((path,)):
        for record in read_records(file):
            if isinstance(record, Record):
                text = not isinstance(record.value, dict) or isinstance(record.value.get(text_key), str)
                return "pretrain" if text else "sft"
    return "sft"


def model_and_data(
    model: str, data: str, overrides: Sequence[str], *, dtype: torch.dtype = torch.float32
) -> tuple[LanguageModel, Store, Any]:
    """The model at `model`, the samples that its own training would make of `data`, and its tokenizer.

    `overrides` are recipe keys, for what a model folder alone does not tell. Raises ModelError, DataError, RecipeError.
    """
    loaded = load_model(model, dtype=dtype)
    recipe = _data_recipe(resolve_model_folder(model), data, overrides, longest=loaded.facts.max_position_embeddings)
    settings = recipe.data
    assert settings.tokenizer is not None, "Recipe requires one"
    tokenizer = open_tokenizer(settings.tokenizer, add_tokens=settings.add_tokens, chat_template=settings.chat_template)
    store = build_store(settings.path, stage=recipe.stage, tokenizer=tokenizer, data=settings)
    store.check_vocab(loaded.facts.vocab_size)
    return loaded, store, tokenizer

"""What is no gradient: every sample exactly once an epoch, and exactly the assistant's words supervised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pertoken.data.batch.order import step_at, steps_per_epoch
from pertoken.data.batch.pack import pack_micro_batches
from pertoken.data.files.long_text import one_of
from pertoken.data.files.records import BadRow, Record
from pertoken.data.formats import to_text
from pertoken.data.store.dataset import Dataset
from pertoken.prove.expected import bos_id
from pertoken.prove.report import Result
from pertoken.prove.rows import expected_sample, records_of, tokens_problem
from pertoken.prove.samples import Chosen
from pertoken.prove.turns import supervision
from pertoken.recipe.data import DataConfig
from pertoken.recipe.schema import Recipe

__all__ = ["every_sample_once", "supervision_problem", "trained_otherwise", "who_is_supervised"]

_MOST_STEPS = 20_000  # of an epoch looked at one by one
_PLANNED_STEPS = 20
_ENOUGH_TO_SHUFFLE = 12  # of 12 samples there are 479 million orders


def every_sample_once(name: str, store: Dataset, recipe: Recipe) -> Result:
    """Each of two epochs holds every sample once, in an order of its own, and every plan hands out each sample once."""
    count, train = len(store), recipe.train
    steps = steps_per_epoch(count, train.batch_size)
    looked_at = steps if steps <= _MOST_STEPS else _MOST_STEPS
    # All steps, or the first ones and the last: the order is a bijection, so a repetition would show soon.
    numbers = [*range(1, looked_at), steps] if looked_at > 1 else [steps]
    orders = [_order(recipe, count, [epoch * steps + number for number in numbers]) for epoch in (0, 1)]
    problem = (
        _not_once(store, orders[0], whole=looked_at == steps)
        or _not_once(store, orders[1], whole=looked_at == steps)
        or _second_epoch(recipe, count, steps)
        or _not_shuffled(recipe, count, orders, numbers)
        or _not_a_partition(store, recipe, numbers[:_PLANNED_STEPS])
    )
    if problem:
        return Result(name, "", "failed", note=problem)
    what = f"{count:,} samples in {steps:,} steps" + ("" if looked_at == steps else f", {looked_at:,} looked at")
    return Result(name, "", "passed", note=f"{what}; two epochs in two orders")


def _order(recipe: Recipe, count: int, numbers: list[int], seed: int | None = None) -> np.ndarray:
    """The samples of these steps, one after another."""
    train = recipe.train
    seed = train.seed if seed is None else seed
    drawn = [step_at(n, num_samples=count, batch_size=train.batch_size, seed=seed).sample_ids for n in numbers]
    return np.concatenate(drawn)


def _not_once(store: Dataset, order: np.ndarray, *, whole: bool) -> str | None:
    seen = np.bincount(order, minlength=len(store))
    if seen.max() > 1:
        return f"sample {store.where(int(seen.argmax()))} comes {seen.max()} times"
    if whole and seen.sum() != len(store):
        return f"{int((seen == 0).sum())} of {len(store)} samples never come"
    return None


def _second_epoch(recipe: Recipe, count: int, steps: int) -> str | None:
    after = step_at(steps + 1, num_samples=count, batch_size=recipe.train.batch_size, seed=recipe.train.seed)
    if after.epoch != 2 or after.position_start != count:
        return f"the second epoch starts at position {after.position_start}"
    return None


def _not_shuffled(recipe: Recipe, count: int, orders: list[np.ndarray], numbers: list[int]) -> str | None:
    """The order is the seed's and the epoch's own. Of few samples, two orders may be the same by chance."""
    if count < _ENOUGH_TO_SHUFFLE:
        return None
    if np.array_equal(orders[0], orders[1]):
        return "the second epoch has the first one's order"
    if np.array_equal(orders[0], np.sort(orders[0])):
        return "the first epoch has the data's own order"
    if np.array_equal(orders[0], _order(recipe, count, numbers, recipe.train.seed + 1)):
        return f"train.seed={recipe.train.seed} and {recipe.train.seed + 1} give the same order"
    return None


def _not_a_partition(store: Dataset, recipe: Recipe, numbers: list[int]) -> str | None:
    for number in numbers:
        ids = _order(recipe, len(store), [number])
        for ranks in (1, 2, 3):
            cut = pack_micro_batches(
                store.lengths[ids].tolist(), world_size=ranks, token_budget=recipe.train.micro_batch_tokens
            )
            handed_out = sorted(i for rank in cut for micro_batch in rank for i in micro_batch)
            if handed_out != list(range(len(ids))) or len({len(rank) for rank in cut}) > 1:
                return f"the plan of step {number} on {ranks} ranks is not a partition"
    return None


def who_is_supervised(name: str, store: Dataset, chosen: Chosen, recipe: Recipe, tokenizer: Any) -> Result:
    """The supervised tokens of the chosen samples, read back as text, against the rows they come from."""
    records = records_of(store, chosen.ids, recipe)
    for i, source in zip(chosen.ids, chosen.sources, strict=True):
        record = records.get(i)
        if record is None:
            return Result(name, "", "failed", note=f"{source}: cannot be read again")
        problem = supervision_problem(store, i, record, recipe, tokenizer)
        if problem:
            return Result(name, "", "failed", note=f"{source}: {problem}")
    what = "the assistant's words and end of turn, nothing else" if recipe.stage == "sft" else "every token"
    return Result(name, "", "passed", note=f"{what}; {len(chosen.ids)} samples")


def supervision_problem(data: Dataset, i: int, record: Record, recipe: Recipe, tokenizer: Any) -> str | None:
    """How what is supervised of sample i differs from what is to be learned of its row."""
    check = _document if recipe.stage == "pretrain" else _conversation
    part, own = data.locate(i)
    return check(part.store, own, record, recipe.data.settings_of(part.name), tokenizer)


def trained_otherwise(data: Dataset, ids: Sequence[int], recipe: Recipe, tokenizer: Any) -> dict[int, str]:
    """Of these samples those whose tokens or whose mask are not what their rows and the template say, and how."""
    found: dict[int, str] = {}
    for i, record in records_of(data, ids, recipe).items():
        problem = tokens_problem(data, i, record, recipe, tokenizer)
        problem = problem or supervision_problem(data, i, record, recipe, tokenizer)
        if problem:
            found[i] = problem
    return found


def _document(store: Dataset, i: int, record: Record, data: DataConfig, tokenizer: Any) -> str | None:
    """All of a document's tokens count, and read back they are a piece of it."""
    sample = store[i]
    if not sample.loss_mask.all():
        return f"{int((~sample.loss_mask).sum())} tokens of a document are not supervised"
    text = to_text(record, data.format, data.key_names)
    if isinstance(text, BadRow):
        return str(text)
    tokens = sample.tokens.tolist()
    begins, ends = tokens[0] == bos_id(tokenizer), tokens[-1] == tokenizer.eos_token_id
    read_back = _decode(tokenizer, tokens[begins : len(tokens) - ends]).strip("\ufffd")
    return None if one_of(text, [read_back]) is not None else "read back, the tokens are not the document's text"


def _conversation(store: Dataset, i: int, record: Record, data: DataConfig, tokenizer: Any) -> str | None:
    """Supervised is what follows the prompt of each turn, up to its last end token, and nothing else."""
    expected = expected_sample(store, i, record, data, tokenizer)
    return expected if isinstance(expected, str) else supervision(store[i].loss_mask, expected, tokenizer)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text

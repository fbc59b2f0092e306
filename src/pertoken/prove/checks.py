"""What is no gradient: every sample exactly once an epoch, and exactly the assistant's words supervised."""

from __future__ import annotations

from typing import Any

import numpy as np

from pertoken.config import Recipe
from pertoken.data.batch import plan
from pertoken.data.formats import Conversation, to_conversation
from pertoken.data.order import step_at, steps_per_epoch
from pertoken.data.records import BadRow, Record, read_records
from pertoken.data.store import Store
from pertoken.prove.report import Result
from pertoken.prove.samples import Chosen

__all__ = ["every_sample_once", "who_is_supervised"]

_MOST_STEPS = 20_000  # of an epoch looked at one by one
_PLANNED_STEPS = 20
_LONGEST_TOKEN = 32  # characters: one that reaches over a span's start is not supervised


def every_sample_once(name: str, store: Store, recipe: Recipe) -> Result:
    """The first epoch's steps hold every sample once, and every plan of a step hands out each of its samples once."""
    count, train = len(store), recipe.train
    steps = steps_per_epoch(count, train.batch_size)
    looked_at = steps if steps <= _MOST_STEPS else _MOST_STEPS
    # All steps, or the first ones and the last: the order is a bijection, so a repetition would show soon.
    numbers = [*range(1, looked_at), steps] if looked_at > 1 else [steps]
    seen = np.zeros(count, dtype=np.int64)
    for number in numbers:
        step = step_at(number, num_samples=count, batch_size=train.batch_size, seed=train.seed)
        np.add.at(seen, step.sample_ids, 1)
    if seen.max() > 1:
        return Result(name, "", "failed", note=f"sample {store.where(int(seen.argmax()))} comes {seen.max()} times")
    expected = count if looked_at == steps else None
    if expected is not None and seen.sum() != expected:
        return Result(name, "", "failed", note=f"{int((seen == 0).sum())} of {count} samples never come")
    after = step_at(steps + 1, num_samples=count, batch_size=train.batch_size, seed=train.seed)
    if after.epoch != 2 or after.position_start != count:
        return Result(name, "", "failed", note=f"the second epoch starts at position {after.position_start}")
    for number in numbers[:_PLANNED_STEPS]:
        ids = step_at(number, num_samples=count, batch_size=train.batch_size, seed=train.seed).sample_ids
        for ranks in (1, 2, 3):
            cut = plan(store.lengths[ids].tolist(), world_size=ranks, token_budget=train.micro_batch_tokens)
            handed_out = sorted(i for rank in cut for micro_batch in rank for i in micro_batch)
            if handed_out != list(range(len(ids))) or len({len(rank) for rank in cut}) > 1:
                return Result(name, "", "failed", note=f"the plan of step {number} on {ranks} ranks is not a partition")
    what = f"{count:,} samples in {steps:,} steps" + ("" if looked_at == steps else f", {looked_at:,} looked at")
    return Result(name, "", "passed", note=what)


def who_is_supervised(name: str, store: Store, chosen: Chosen, recipe: Recipe, tokenizer: Any) -> Result:
    """The supervised tokens of the chosen samples, read back as text, against the rows they come from."""
    for i, source in zip(chosen.ids, chosen.sources, strict=True):
        record = _record(source)
        if record is None:
            return Result(name, "", "failed", note=f"{source}: cannot be read again")
        check = _document if recipe.stage == "pretrain" else _conversation
        problem = check(store, i, record, recipe, tokenizer)
        if problem:
            return Result(name, "", "failed", note=f"{source}: {problem}")
    what = "the assistant's words and end of turn, nothing else" if recipe.stage == "sft" else "every token"
    return Result(name, "", "passed", note=f"{what}; {len(chosen.ids)} samples")


def _record(source: str) -> Record | None:
    file, _, line = source.rpartition(":")
    found = next((row for row in read_records(file) if row.line == int(line)), None)
    return found if isinstance(found, Record) else None


def _document(store: Store, i: int, record: Record, recipe: Recipe, tokenizer: Any) -> str | None:
    """All of a document's tokens count, and read back they are a piece of it."""
    sample = store[i]
    if not sample.loss_mask.all():
        return f"{int((~sample.loss_mask).sum())} tokens of a document are not supervised"
    text = record.value if isinstance(record.value, str) else record.value[recipe.data.text_key]
    tokens = sample.tokens.tolist()
    ends = tokens[-1] == tokenizer.eos_token_id
    read_back = _decode(tokenizer, tokens[:-1] if ends else tokens).strip("\ufffd")
    return None if read_back in text else "read back, the tokens are not the document's text"


def _conversation(store: Store, i: int, record: Record, recipe: Recipe, tokenizer: Any) -> str | None:
    """What is supervised is what the template writes for the assistant's turns, its end of turn included."""
    data = recipe.data
    chat = to_conversation(record, data.format, prompt_key=data.prompt_key, completion_key=data.completion_key)
    if isinstance(chat, BadRow):
        return str(chat)
    sample = store[i]
    said = _said_by_template(chat, data.template_kwargs, tokenizer)
    labels = np.flatnonzero(sample.loss_mask)
    runs = np.split(labels, np.flatnonzero(np.diff(labels) > 1) + 1)
    got = [_decode(tokenizer, sample.labels[run].tolist()) for run in runs]
    truncated = len(sample) == data.max_seq_len
    if len(got) > len(said) or (len(got) < len(said) and not truncated):
        return f"{len(got)} supervised stretches, {len(said)} turns of the assistant"
    for number, (found, expected) in enumerate(zip(got, said, strict=False), start=1):
        if truncated and number == len(got):
            start = expected.find(found.rstrip("\ufffd"))
            ok = 0 <= start <= _LONGEST_TOKEN
        else:
            ok = expected.endswith(found) and len(expected) - len(found) <= _LONGEST_TOKEN
        if not ok:
            return f"turn {number} of the assistant: supervised is {_short(found)}, said is {_short(expected)}"
    return None


def _said_by_template(chat: Conversation, template_kwargs: dict[str, Any], tokenizer: Any) -> list[str]:
    """The assistant's turns as transformers renders them: by the template's own marks, else by what each turn adds."""

    def rendered(upto: int, prompt: bool) -> str:
        messages = chat.messages[:upto]
        if not messages:
            return ""
        text: str = tokenizer.apply_chat_template(
            messages, tools=chat.tools, tokenize=False, add_generation_prompt=prompt, **template_kwargs
        )
        return text

    turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and i >= chat.num_context]
    if "generation" in tokenizer.get_chat_template(tools=chat.tools).replace("add_generation_prompt", ""):
        encoded = tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, return_dict=True, return_assistant_tokens_mask=True, **template_kwargs
        )
        mask = np.array(encoded["assistant_masks"], dtype=bool)
        ids = np.array(encoded["input_ids"])
        where = np.flatnonzero(mask)
        runs = np.split(where, np.flatnonzero(np.diff(where) > 1) + 1)
        return [_decode(tokenizer, ids[run].tolist()) for run in runs][-len(turns) :]
    said = []
    for turn in turns:
        before, after = rendered(turn, True), rendered(turn + 1, False)
        start = next((i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y), len(before))
        said.append(after[start:].rstrip("\n"))
    return said


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}")

"""The store against the rows it was made of, token by token: what is cut, and where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pertoken.data.files.long_text import LongText
from pertoken.data.files.records import BadRow, Record, TextReading, read_records
from pertoken.data.formats import to_text
from pertoken.data.store.dataset import Dataset
from pertoken.prove.expected import difference, document_difference
from pertoken.prove.report import Result
from pertoken.prove.samples import Chosen
from pertoken.prove.turns import ExpectedSample, expected_samples
from pertoken.recipe.data import DataConfig
from pertoken.recipe.schema import Recipe

__all__ = ["expected_sample", "records_at", "records_of", "token_by_token", "tokens_problem"]

_LONGEST = 3  # samples that are looked at besides the chosen ones: those that a limit may have cut
_MOST_CHARACTERS = 5_000_000  # of a document that is encoded again; of a longer one only the seams are looked at


def records_at(sources: Sequence[str], reading: TextReading) -> dict[str, Record]:
    """The rows at `file:line`, each file read once; those that cannot be read again are missing."""
    found: dict[str, Record] = {}
    wanted: dict[str, set[int]] = {}
    for source in sources:
        file, _, line = source.rpartition(":")
        wanted.setdefault(file, set()).add(int(line))
    for file, lines in wanted.items():
        for row in read_records(file, reading=reading):
            if row.line in lines and isinstance(row, Record):
                found[f"{file}:{row.line}"] = row
            if row.line >= max(lines):
                break
    return found


def records_of(data: Dataset, ids: Iterable[int], recipe: Recipe) -> dict[int, Record]:
    """The row of each sample, read as its source is read; those that cannot be read again are missing."""
    of_source: dict[str, list[int]] = {}
    for i in ids:
        of_source.setdefault(data.locate(i)[0].name, []).append(i)
    found: dict[int, Record] = {}
    for name, own in of_source.items():
        rows = records_at([data.where(i) for i in own], recipe.data.settings_of(name).text_reading)
        found |= {i: rows[data.where(i)] for i in own if data.where(i) in rows}
    return found


def token_by_token(name: str, store: Dataset, chosen: Chosen, recipe: Recipe, tokenizer: Any) -> Result:
    """The chosen samples, and the longest ones, have exactly the tokens of their rows; no sample is too long.

    A document of n tokens is n - 1 pairs, whatever it is cut into: its pieces overlap by one token, the last label of
    one being the next one's first input. A conversation's sample is its first `max_seq_len` pairs.
    """
    limit, longest = recipe.data.max_seq_len, int(np.argmax(store.lengths))
    if store.lengths[longest] > limit:
        note = f"{store.where(longest)}: {store.lengths[longest]} inputs, data.max_seq_len={limit}"
        return Result(name, "", "failed", note=note)
    by_length = np.argsort(store.lengths, kind="stable")[-_LONGEST:]
    ids = list(dict.fromkeys([*chosen.ids, *(int(i) for i in by_length)]))
    records = records_of(store, ids, recipe)
    seen = 0
    for i in ids:
        source = store.where(i)
        if i not in records:
            return Result(name, "", "failed", note=f"{source}: cannot be read again")
        problem = tokens_problem(store, i, records[i], recipe, tokenizer)
        if problem:
            return Result(name, "", "failed", note=f"{source}: {problem}")
        seen += len(store[i].tokens)
    note = (
        f"{len(ids)} samples, {seen:,} tokens; the longest has {store.lengths[longest]:,} inputs of at most {limit:,}"
    )
    return Result(name, "", "passed", note=note)


def tokens_problem(data: Dataset, i: int, record: Record, recipe: Recipe, tokenizer: Any) -> str | None:
    """How the tokens of sample i differ from those of its row, or its count from its mask."""
    check = _document if recipe.stage == "pretrain" else _conversation
    part, own = data.locate(i)
    settings = recipe.data.settings_of(part.name)
    return check(part.store, own, record, settings, tokenizer) or _counts(data, i)


def _counts(store: Dataset, i: int) -> str | None:
    """The step's N is added up from what the store says."""
    supervised = math.fsum(store[i].loss_mask.tolist())
    if store.num_tokens[i] != supervised:
        return f"the store counts {store.num_tokens[i]:g} supervised tokens, the sample has {supervised:g}"
    return None


def _document(store: Dataset, i: int, record: Record, data: DataConfig, tokenizer: Any) -> str | None:
    """All pieces of the document that sample `i` is a piece of."""
    text = to_text(record, data.format, data.key_names)
    if isinstance(text, BadRow):
        return str(text)
    if data.eval_fraction and data.eval_split == "tail":
        cut = int(len(text) * (1 - data.eval_fraction))
        text = text.part(0, cut) if isinstance(text, LongText) else text[:cut]
    pieces = [store[j].tokens for j in _of_the_same_row(store, i)]
    for number, (one, following) in enumerate(pairwise(pieces), start=1):
        if one[-1] != following[0]:
            return f"piece {number + 1} starts with token {following[0]}, piece {number} ends with label {one[-1]}"
        if len(one) != data.max_seq_len + 1:
            return f"piece {number} of {len(pieces)} has {len(one) - 1} inputs, data.max_seq_len={data.max_seq_len}"
    if len(text) > _MOST_CHARACTERS:
        return None
    whole = np.concatenate([pieces[0], *(piece[1:] for piece in pieces[1:])])
    return document_difference(whole, str(text), data, tokenizer)


def _of_the_same_row(store: Dataset, i: int) -> range:
    """Samples of one row lie side by side."""
    source, first, last = store.where(i), i, i
    while first and store.where(first - 1) == source:
        first -= 1
    while last + 1 < len(store) and store.where(last + 1) == source:
        last += 1
    return range(first, last + 1)


def _conversation(store: Dataset, i: int, record: Record, data: DataConfig, tokenizer: Any) -> str | None:
    expected = expected_sample(store, i, record, data, tokenizer)
    return (
        expected if isinstance(expected, str) else difference(store[i].tokens, expected.tokens[: data.max_seq_len + 1])
    )


def expected_sample(store: Dataset, i: int, record: Record, data: DataConfig, tokenizer: Any) -> ExpectedSample | str:
    """What sample `i` of a conversation must be, or what is wrong with the samples of its row."""
    expected = expected_samples(record, data, tokenizer)
    if isinstance(expected, str):
        return expected
    of_row = _of_the_same_row(store, i)
    if len(expected) != len(of_row):
        return f"{len(of_row)} samples of the conversation, data.max_seq_len={data.max_seq_len} leaves {len(expected)}"
    return expected[i - of_row.start]

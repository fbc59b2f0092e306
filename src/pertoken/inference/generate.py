"""Text from a model: sampling, with a key-value cache, and text that can be shown as it is made.

The order of the processors is transformers': repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pertoken.data.batch.pack import MicroBatch
from pertoken.errors import RecipeError
from pertoken.model.protocol import LanguageModel
from pertoken.training.memory import out_of_memory

__all__ = ["check_sampling", "generate", "keep_top_k", "keep_top_p", "penalize_repetition", "stream_text"]


def generate(
    model: LanguageModel,
    input_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    use_cache: bool = True,
) -> Iterator[int]:
    """The tokens that follow `input_ids`, one at a time.

    Ends after `max_new_tokens`, before a token of `stop_ids`, or where prompt and answer together fill
    `max_position_embeddings`. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token. The same seed gives
    the same tokens. `use_cache=False` computes the whole sequence anew for every token, by the code that training runs.
    Raises RecipeError at once for arguments that cannot be meant.
    """
    facts = model.facts
    room = facts.max_position_embeddings - len(input_ids)
    _check("prompt", f"{len(input_ids)} tokens", len(input_ids) >= 1, "give at least one token")
    _check(
        "prompt",
        f"{len(input_ids)} tokens",
        room >= 1,
        f"max_position_embeddings={facts.max_position_embeddings} leaves no room for an answer; shorten it",
    )
    outside = next((i for i in input_ids if not 0 <= i < facts.vocab_size), None)
    _check("prompt", f"token {outside}", outside is None, f"the model's vocabulary has {facts.vocab_size} tokens")
    check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor, ids: list[int]) -> int:
        logits = penalize_repetition(logits.float().cpu(), ids, repetition_penalty)
        if temperature == 0:
            return int(logits.argmax())
        logits = (logits - logits.max()) / temperature  # the maximum first, or a small temperature overflows
        logits = keep_top_p(keep_top_k(logits, top_k), top_p)
        return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))

    def tokens() -> Iterator[int]:
        ids = list(input_ids)
        length = len(ids) + min(max_new_tokens, room)
        try:
            cache = model.new_cache(length) if use_cache else None
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise RecipeError(f"max_new_tokens={max_new_tokens}: no memory for {length:,} tokens; lower it") from None
        while len(ids) < length:
            with torch.inference_mode():
                if cache is None:
                    logits = model.logits(model.hidden_states(_one_document(ids, model.head_weight.device))[-1])
                else:
                    logits = model.decode(torch.tensor(ids[cache.length :], device=model.head_weight.device), cache)
                token = choose(logits, ids)
            if token in stop_ids:
                return
            ids.append(token)
            yield token

    return _in_eval_mode(model, tokens())


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, repetition_penalty: float, seed: int | None
) -> None:
    """Raises RecipeError for arguments of `generate` that cannot be meant."""
    _check("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "must be at least 1")
    _check("temperature", temperature, 0 <= temperature < math.inf, "must be at least 0 (0 is greedy)")
    _check("top_k", top_k, top_k >= 0, "must be at least 0 (0 keeps every token)")
    _check("top_p", top_p, 0 < top_p <= 1, "must be more than 0 and at most 1 (1 keeps every token)")
    _check(
        "repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf, "must be more than 0 (1 is none)"
    )
    _check("seed", seed, seed is None or 0 <= seed < 2**63, "must be at least 0 and have 63 bits at most")


def _check(name: str, value: object, fine: bool, remedy: str) -> None:
    if not fine:
        raise RecipeError(f"{name}={value}: {remedy}")


def _in_eval_mode(model: LanguageModel, tokens: Iterator[int]) -> Iterator[int]:
    was_training = model.training
    model.eval()
    try:
        yield from tokens
    finally:
        model.train(was_training)


def _one_document(ids: list[int], device: torch.device) -> MicroBatch:
    row = torch.tensor(ids)
    return MicroBatch(
        input_ids=row,
        labels=row,
        loss_mask=torch.zeros(len(ids), dtype=torch.bool),
        position_ids=torch.arange(len(ids)),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        lengths=(len(ids),),
    ).to(device)


def penalize_repetition(logits: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    """Logits [V] with those of the tokens in `ids` moved down: divided by `penalty` where positive, else multiplied
    (Keskar et al., "CTRL", section 4.1)."""
    if penalty == 1.0:
        return logits
    seen = torch.tensor(sorted(set(ids)), device=logits.device)
    score = logits[seen]
    return logits.index_copy(0, seen, torch.where(score > 0, score / penalty, score * penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits [V] with all below the k-th largest at -inf (ties with it stay); k = 0 keeps all."""
    if k == 0 or k >= logits.shape[0]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits [V] with all at -inf but the smallest set of most likely tokens whose probabilities sum to at least p
    (Holtzman et al., "The Curious Case of Neural Text Degeneration", section 3.1). At least one token stays."""
    if p == 1.0:
        return logits
    ascending, order = logits.sort()
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p
    drop[-1] = False
    return logits.masked_fill(torch.zeros_like(drop).index_copy_(0, order, drop), -torch.inf)


def stream_text(tokenizer: Any, ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids` without special tokens, in pieces, each as soon as it is stable.

    Joined, the pieces are `tokenizer.decode(ids, skip_special_tokens=True)`. A character of several tokens is held back
    until it is whole. Each piece is decoded together with the one before it, since a tokenizer may treat the start of a
    text differently.
    """

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    shown: list[int] = []  # the tokens of the latest piece
    held: list[int] = []  # those after it
    for token in ids:
        held.append(token)
        before, text = decode(shown), decode(shown + held)
        if len(text) > len(before) and not text.endswith("\ufffd"):
            yield text[len(before) :]
            shown, held = held, []
    if held and (rest := decode(shown + held)[len(decode(shown)) :]):
        yield rest

"""The tokenizer in a GGUF file: vocabulary, merges and the names of its parts, put together with `tokenizers`.

What a name stands for is llama.cpp's (src/llama-vocab.cpp), and where the original tokenizer has more (Qwen's NFC), the
original's. transformers has a reader too, which splits text like GPT-2's for any name that it does not know, "smollm"
among them; here such a name is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pertoken.errors import ModelError
from pertoken.gguf_file import GgufFile, read_gguf
from pertoken.text import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["gguf_tokenizer"]

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6  # `tokenizer.ggml.token_type`
_SPACE = "\u2581"  # what stands for a space in a vocabulary of SentencePiece

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Pre:
    """What `tokenizer.ggml.pre` stands for: how text is cut before merges, and what goes with it."""

    split: str | None = None  # a regular expression of the pieces; None: GPT-2's
    digits: bool = False  # each digit is a piece, before all else
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is a token is that token, whatever merges say
    bos: bool = False  # begins every text, where the file does not say


_GPT2, _DIGITS, _OF_QWEN2 = _Pre(), _Pre(digits=True), _Pre(_QWEN2, nfc=True)
_OF_LLAMA3 = _Pre(_LLAMA3, ignore_merges=True, bos=True)
_PRE = {
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "refact": _DIGITS,  # Granite
    "starcoder": _DIGITS,
    "command-r": _DIGITS,
    "qwen2": _OF_QWEN2,
    "deepseek-r1-qwen": _OF_QWEN2,
    "llama-bpe": _OF_LLAMA3,
    "llama3": _OF_LLAMA3,
    "llama-v3": _OF_LLAMA3,
    "dbrx": _Pre(_LLAMA3),  # OLMo 2
    "smaug-bpe": _Pre(_LLAMA3),
    "tekken": _Pre(_TEKKEN, ignore_merges=True, bos=True),  # Mistral Nemo
}


def gguf_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, its chat template included. Raises ModelError for one that pertoken cannot build.

    Tokens of control are special, those of the user are matched whole, and padding of the vocabulary is left out.
    """
    import transformers

    file = read_gguf(path)
    model = file.require("tokenizer.ggml.model", str)
    if model not in ("gpt2", "llama"):
        raise ModelError(
            f"{file.path}: tokenizer.ggml.model={shown(model)}: pertoken reads byte-pair encodings (gpt2, llama) from "
            "GGUF; set data.tokenizer to the model's tokenizer folder"
        )
    tokens = file.require("tokenizer.ggml.tokens", list)
    kinds = file.get("tokenizer.ggml.token_type", list, [_NORMAL] * len(tokens))
    if len(kinds) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise ModelError(f"{file.path}: tokenizer.ggml.token_type: not one for each token; convert the model again")
    named = _named(file, tokens)
    bos = model == "llama"
    if model == "llama":
        backend = _sentencepiece(file, tokens, kinds, named.get("unk_token"))
    else:
        pre = _pre(file)
        backend, bos = _byte_level(file, _used(tokens, kinds), pre), pre.bos
    _add_tokens(backend, tokens, kinds, named)
    _begin_and_end(backend, file, named, bos)
    template = file.get("tokenizer.chat_template", str)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **named,
        **({} if template is None else {"chat_template": template}),
    )


def _named(file: GgufFile, tokens: list[str]) -> dict[str, str]:
    """Tokens with a task, as transformers calls it."""
    found = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        full = f"tokenizer.ggml.{key}_token_id"
        token_id = file.get(full, int)
        if token_id is None:
            continue
        if not 0 <= token_id < len(tokens):
            raise ModelError(f"{file.path}: {full}={token_id}: there are {len(tokens)} tokens; convert the model again")
        found[f"{name}_token"] = tokens[token_id]
    return found


def _pre(file: GgufFile) -> _Pre:
    name = file.get("tokenizer.ggml.pre", str, "default")
    if name not in _PRE:
        raise ModelError(
            f"{file.path}: tokenizer.ggml.pre={shown(name)}: how text is split is not known, so it would be learned "
            "otherwise than the model knows it; set data.tokenizer to the model's tokenizer folder"
        )
    return _PRE[name]


def _used(tokens: list[str], kinds: list[int]) -> list[str]:
    """Without what fills the vocabulary up to the size of the embedding."""
    count = len(tokens)
    while count and kinds[count - 1] == _UNUSED:
        count -= 1
    return tokens[:count]


def _byte_level(file: GgufFile, tokens: list[str], pre: _Pre) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ", 1)) for merge in file.require("tokenizer.ggml.merges", list)]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = _built(file, lambda: Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges)))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(file: GgufFile, tokens: list[str], kinds: list[int], unknown: str | None) -> Any:
    """SentencePiece's byte-pair encoding: of neighbours that make a token, those of the highest score are merged first;
    what is in no token becomes tokens of bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    scores = file.require("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise ModelError(f"{file.path}: tokenizer.ggml.scores: not one for each token; convert the model again")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = list(_merges(tokens, kinds, scores, vocab))
    backend = _built(
        file,
        lambda: Tokenizer(
            models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in kinds),
        ),
    )
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
        steps.append(decoders.Strip(content=" ", left=1))
    else:
        backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(
    tokens: list[str], kinds: list[int], scores: list[float], vocab: dict[str, int]
) -> Iterator[tuple[str, str]]:
    """Best first. Tokens of the user and of control are matched whole, never merged to."""
    ordinary = (i for i, kind in enumerate(kinds) if kind == _NORMAL and len(tokens[i]) > 1)
    for i in sorted(ordinary, key=lambda i: (-scores[i], i)):
        token = tokens[i]
        pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        yield from sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))


def _built(file: GgufFile, make: Any) -> Any:
    """Raises ModelError where `tokenizers`, which names what it does not like, refuses vocabulary or merges."""
    try:
        return make()
    except Exception as error:
        raise ModelError(f"{file.path}: its tokenizer cannot be built ({shown(str(error))})") from None


def _add_tokens(backend: Any, tokens: list[str], kinds: list[int], named: dict[str, str]) -> None:
    from tokenizers import AddedToken

    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL or token in named.values()]
    whole = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole])


def _begin_and_end(backend: Any, file: GgufFile, named: dict[str, str], bos: bool) -> None:
    """What is put around every text."""
    from tokenizers import processors

    begins = file.get("tokenizer.ggml.add_bos_token", bool, bos) and "bos_token" in named
    ends = file.get("tokenizer.ggml.add_eos_token", bool, False) and "eos_token" in named
    used = [named[name] for name, is_used in (("bos_token", begins), ("eos_token", ends)) if is_used]
    if not used:
        return
    first, last = [named["bos_token"]] if begins else [], [named["eos_token"]] if ends else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *first, "$B:1", *last],
        special_tokens=[(token, backend.token_to_id(token)) for token in used],
    )

"""The tokenizers that pertoken trains, opened and saved by `tokenizers` alone.

transformers takes longer to import than a small run takes to read its data, and a folder of our own does not need it:
its tokenizer.json decides every encoding, its special tokens are known, its template is a file. Any other folder is
transformers' to open. `TrainedTokenizer` has the names that transformers has, and gives the same answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pertoken.families import FAMILIES
from pertoken.files import plain_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["CHATML", "MORE_FILES", "SPECIAL_TOKENS", "TrainedTokenizer", "bpe_backend", "char_backend"]

# Ids 0, 1, 2 of a trained tokenizer: padding and unknown, start of a turn (bos), end of a turn (eos).
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# The assistant's words and the end of its turn are marked as generated; its header and the last newline are not.
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'Tools, one JSON object a line:' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>' + (call | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Contractions, words with the sign before them, single digits, runs of other signs, newlines, spaces.
_WORDS = (
    r"(?i:'(?:s|t|re|ve|m|ll|d))|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_NAMED = {
    "bos_token": SPECIAL_TOKENS[1],
    "eos_token": SPECIAL_TOKENS[2],
    "unk_token": SPECIAL_TOKENS[0],
    "pad_token": SPECIAL_TOKENS[0],
}
_CONFIG = {
    **_NAMED,
    "backend": "tokenizers",
    "clean_up_tokenization_spaces": False,
    "model_max_length": int(1e30),  # transformers' way of saying that there is none
    "tokenizer_class": "PreTrainedTokenizerFast",  # the name that transformers 4 knows too
}
_WRITTEN_BEFORE = _CONFIG | {"tokenizer_class": "TokenizersBackend"}  # transformers 5's own name of it
_ABOUT_LOADING = ("is_local", "local_files_only")  # what transformers adds when it saves what it has loaded
# What else transformers reads from such a folder. It reads nothing more for the families that pertoken saves.
MORE_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "additional_chat_templates",
    "tokenizer.model",
)
_MOST_TOKENS = 100_000  # above, transformers looks whether the tokenizer is one of Mistral's that it mends


class TrainedTokenizer:
    """A tokenizer that `train_tokenizer` made: what pertoken asks of transformers' object, under the same names."""

    def __init__(self, backend: Tokenizer, chat_template: str | None) -> None:
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self.special_tokens_map = dict(_NAMED)
        ids = {token.content: i for i, token in self.added_tokens_decoder.items()}
        self.bos_token_id, self.eos_token_id, self.unk_token_id, self.pad_token_id = (
            ids[name] for name in _NAMED.values()
        )

    @classmethod
    def new(cls, backend: Tokenizer) -> TrainedTokenizer:
        """Around what has just been trained, with CHATML."""
        return cls(_finished(backend), CHATML)

    @classmethod
    def open(cls, folder: str | Path) -> TrainedTokenizer | None:
        """From a folder that holds nothing but what `save_pretrained` writes, and maybe a model; None for any other."""
        from tokenizers import Tokenizer

        folder = Path(folder)
        try:
            plain_files(folder)
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            if {k: v for k, v in config.items() if k not in _ABOUT_LOADING} not in (_CONFIG, _WRITTEN_BEFORE):
                return None
            if any((folder / name).exists() for name in MORE_FILES) or not _is_ours(folder / "config.json"):
                return None
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            if _frame(json.loads(text)) not in _frames():
                return None
            backend = Tokenizer.from_str(text)
            template = folder / "chat_template.jinja"
            chat_template = template.read_text(encoding="utf-8") if template.exists() else None
            last = max(backend.get_vocab().values())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of its Rust is no Exception; whatever is wrong, transformers will say so
            return None
        return cls(backend, chat_template) if last < _MOST_TOKENS else None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `AutoTokenizer` and `open` read. Raises OSError."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
        config = json.dumps(_CONFIG, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size())

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        decoder: dict[int, Any] = self.backend_tokenizer.get_added_tokens_decoder()
        return decoder

    @property
    def all_special_ids(self) -> list[int]:
        return list(dict.fromkeys((self.bos_token_id, self.eos_token_id, self.unk_token_id)))

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return str(self.backend_tokenizer.id_to_token(token_id))

    def get_chat_template(self, tools: object = None) -> str:
        if self.chat_template is None:
            raise ValueError("the tokenizer has none")
        return self.chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. There are no special tokens that an encoding adds."""
        ids: list[int] = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """The text of the tokens. Nothing is ever cleaned up, since that would change it."""
        assert not clean_up_tokenization_spaces
        return str(self.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))


def bpe_backend() -> Tokenizer:
    """Byte-level byte-pair encoding, to be trained."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def char_backend(characters: Iterable[str]) -> Tokenizer:
    """A token for each character: byte-pair encoding without a single merge leaves every character as it is."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *characters))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=SPECIAL_TOKENS[0]))
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.decoder = decoders.Fuse()
    return backend


def _finished(backend: Tokenizer) -> Tokenizer:
    """With the post-processor that transformers gives to one that has none: it adds nothing."""
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    return backend


def _is_ours(config: Path) -> bool:
    """Whether the config.json beside a tokenizer, where there is one, makes nothing else of it."""
    if not config.exists():
        return True
    values = json.loads(config.read_text(encoding="utf-8"))
    family = FAMILIES.get(values["model_type"])
    return family is not None and family.architecture is not None and "tokenizer_class" not in values


def _frame(spec: dict[str, Any]) -> dict[str, Any]:
    """All of a tokenizer.json but the vocabulary and its merges."""
    return {**spec, "model": {key: value for key, value in spec["model"].items() if key not in ("vocab", "merges")}}


@cache
def _frames() -> tuple[dict[str, Any], ...]:
    """Those of the two kinds, as this version of `tokenizers` writes them."""
    untrained = bpe_backend()
    untrained.add_special_tokens(list(SPECIAL_TOKENS))
    return tuple(_frame(json.loads(_finished(backend).to_str())) for backend in (untrained, char_backend(())))

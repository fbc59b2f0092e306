"""Opening tokenizers: any folder that `AutoTokenizer` loads, a GGUF file, one of our own without transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pertoken.data.tokens.gguf import gguf_tokenizer
from pertoken.data.tokens.older_transformers import add_special_tokens, other_class_expected, read_by_version_4
from pertoken.data.tokens.trained import CHATML, SPECIAL_TOKENS, TrainedTokenizer
from pertoken.errors import ModelError, RecipeError
from pertoken.families import FAMILIES, Family
from pertoken.files import plain_files, user_path
from pertoken.gguf_file import is_gguf
from pertoken.text import escaped_logs, reason, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a tokenizer that is what its tokenizer.json says: transformers 5 and 4.
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")

__all__ = [
    "MAX_TOKENS",
    "as_transformers",
    "bos_of",
    "forced_tokenizer",
    "load_tokenizer",
    "open_tokenizer",
    "special_ids",
]

_ORDINARY = (
    "Hello World",
    "It's 3 o'clock: does she know, or not?",
    "def f(x):\n    if x:\n\treturn  x\n",
    "今天天气很好。",
    "你好，世界！",
)
MAX_TOKENS = 1 << 24  # fifty times the largest vocabulary in use: an id beyond it would only fill the memory


def load_tokenizer(
    path: str | Path, *, add_tokens: Sequence[str] = (), chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or a GGUF file, from local files only and without running code of the folder's.

    `add_tokens` become special tokens with new ids. `chat_template` replaces the folder's: "chatml" for the one of
    trained tokenizers, the path of a .jinja file, or the Jinja text itself.
    Raises ModelError for the folder, RecipeError for the other two.
    """
    tokenizer = _load_checked(Path(path))
    if "" in add_tokens:
        raise RecipeError("data.add_tokens: an empty token; remove it")
    if add_tokens:
        add_special_tokens(tokenizer, list(dict.fromkeys(add_tokens)))
    if chat_template is not None:
        tokenizer.chat_template = _template_text(chat_template)
    if chat_template == "chatml":
        known = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        missing = [token for token in SPECIAL_TOKENS[1:] if token not in known]
        if missing:
            raise RecipeError(
                f'data.chat_template="chatml": the tokenizer lacks {missing}; add data.add_tokens={missing}'
            )
    return tokenizer


def open_tokenizer(path: str | Path, *, add_tokens: Sequence[str] = (), chat_template: str | None = None) -> Any:
    """As `load_tokenizer`, but without transformers where the folder is one of ours: what pertoken itself works with.

    The result answers what pertoken asks of a tokenizer; `as_transformers` makes of it what others may want.
    """
    tokenizer = None if add_tokens or is_gguf(Path(path)) else TrainedTokenizer.open(path)
    if tokenizer is None:
        return load_tokenizer(path, add_tokens=add_tokens, chat_template=chat_template)
    if chat_template is not None:
        tokenizer.chat_template = _template_text(chat_template)
    return tokenizer


def as_transformers(tokenizer: TrainedTokenizer | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer as transformers' own object."""
    if not isinstance(tokenizer, TrainedTokenizer):
        return tokenizer
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        **tokenizer.special_tokens_map,
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
    )


def _load_checked(path: Path) -> PreTrainedTokenizerBase:
    """Raises ModelError for a tokenizer that has too many tokens, or does not give ordinary text back."""
    path = user_path(path, "tokenizer")
    tokenizer = gguf_tokenizer(path) if is_gguf(path) else _load_folder(path)
    last = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= last < MAX_TOKENS:
        raise ModelError(f"tokenizer {path}: its last token has the id {last}; there can be {MAX_TOKENS:,} at most")
    if (changed := _changed_text(tokenizer)) is not None:
        text, read_back = changed
        raise ModelError(
            f"tokenizer {path}: {shown(text)} comes back as {shown(read_back)}, so a model could not "
            "learn to write ordinary text; choose a tokenizer that keeps letters, signs and spaces as they are"
        )
    return tokenizer


def _load_folder(path: Path) -> PreTrainedTokenizerBase:
    import transformers

    if not path.is_dir():
        raise ModelError(f"tokenizer {path}: no such folder; name one that holds a tokenizer.json")
    if not (path / "tokenizer.json").is_file():
        raise ModelError(
            f"tokenizer {path}: has no tokenizer.json, so tokens cannot be traced back to their text; save it with "
            "transformers' AutoTokenizer, which writes one"
        )
    try:
        plain_files(path)
        with escaped_logs("transformers"), other_class_expected():
            told = read_by_version_4(path)
            is_generic = told is not None or _is_generic(path)
            loader = transformers.PreTrainedTokenizerFast if is_generic else transformers.AutoTokenizer
            tokenizer = loader.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False, **(told or {})
            )
        if not tokenizer.is_fast:
            raise ModelError(f"tokenizer {path}: has no tokenizer.json, so tokens cannot be traced back to their text")
        tokenizer.get_vocab()
        special_ids(tokenizer)
    except (KeyboardInterrupt, SystemExit, ModelError):
        raise
    except BaseException as error:  # whatever a broken folder makes of the loader; a panic of its Rust is no Exception
        raise ModelError(f"tokenizer {path}: cannot be loaded ({reason(error)}); it needs a tokenizer.json") from None
    return tokenizer


def _changed_text(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """The first of some ordinary texts that encoding and decoding changes, and what becomes of it.

    A text with characters that the tokenizer knows not to know says nothing, nor does a space put before or taken from
    the beginning.
    """
    for text in _ORDINARY:
        try:
            ids = tokenizer.encode(text, add_special_tokens=False)
        except Exception:  # no tokens for it, and none for what is unknown: a row of which that is true is named
            continue
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            continue
        read_back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if read_back.removeprefix(" ") != text:
            return text, read_back
    return None


def _is_generic(path: Path) -> bool:
    """Whether the tokenizer of a folder is its tokenizer.json and no more, though AutoTokenizer would force the class
    of the model beside it upon it (`Family.forced_tokenizer`)."""
    files = (path / "config.json", path / "tokenizer_config.json")
    if not all(file.exists() for file in files):
        return False
    of_model, of_tokenizer = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    family = FAMILIES.get(of_model.get("model_type"))
    if family is None or family.forced_tokenizer is None:
        return False
    return of_tokenizer.get("tokenizer_class") in _GENERIC and "auto_map" not in of_tokenizer


def forced_tokenizer(family: Family | None, tokenizer: Any) -> str | None:
    """What a user should know of a tokenizer that is saved beside a model of `family`, None where it is nothing."""
    if family is None or family.forced_tokenizer in (None, type(tokenizer).__name__):
        return None
    return (
        f"transformers.AutoTokenizer opens every tokenizer beside a {family.model_type} model as its "
        f"{family.forced_tokenizer}, which this one is not; open it there with PreTrainedTokenizerFast.from_pretrained"
    )


def _template_text(chat_template: str) -> str:
    if chat_template == "chatml":
        return CHATML
    if "{" in chat_template:
        return chat_template
    key = f"data.chat_template={shown(chat_template)}"
    try:
        file = Path(chat_template).expanduser()
        if file.suffix == ".jinja" and file.is_file():
            return file.read_text(encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:  # not UTF-8, too long a name, no such user's home
        raise RecipeError(f"{key}: cannot be read as UTF-8 ({reason(error)})") from None
    raise RecipeError(f'{key}: neither a .jinja file nor Jinja text; give one, or "chatml"')


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts before every text that it encodes, if it does."""
    for text in ("a", "0", " ", "\u7684"):
        try:
            with_it, alone = (tokenizer.encode(text, add_special_tokens=add) for add in (True, False))
            break
        except Exception:  # no tokens for it, and none for what is unknown
            continue
    else:
        return None
    return int(with_it[0]) if len(with_it) > len(alone) and with_it[0] in special_ids(tokenizer) else None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that stand for no text."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)

"""Tokenizers: loading any folder that `AutoTokenizer` loads, and training a small one of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pertoken.data.files.find import find_files
from pertoken.data.files.long_text import LongText, blocks_of
from pertoken.data.files.records import BadRow, Problems, Record, read_records
from pertoken.data.formats import detect_format, to_conversation, to_text
from pertoken.data.tokens.trained import (
    CHATML,
    MORE_FILES,
    SPECIAL_TOKENS,
    TrainedTokenizer,
    bpe_backend,
    char_backend,
)
from pertoken.errors import DataError, ModelError, RecipeError
from pertoken.families import FAMILIES, Family
from pertoken.files import plain_files, user_path
from pertoken.text import escaped_logs, names, reason, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CHATML",
    "SPECIAL_TOKENS",
    "as_transformers",
    "end_of_turn_id",
    "forced_tokenizer",
    "load_tokenizer",
    "open_tokenizer",
    "render",
    "special_ids",
    "train_tokenizer",
]

# Of a tokenizer that is what its tokenizer.json says: transformers 5 and 4.
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")
_PIECE_CHARS = 1 << 16
_LONGEST_PIECE_CHARS = 1 << 18
_MAX_TOKENS = 1 << 24  # fifty times the largest vocabulary in use: an id beyond it would only fill the memory


def load_tokenizer(
    path: str | Path, *, add_tokens: Sequence[str] = (), chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, from local files only and without running code of the folder's.

    `add_tokens` become special tokens with new ids. `chat_template` replaces the folder's: "chatml" for the one of
    trained tokenizers, the path of a .jinja file, or the Jinja text itself.
    Raises ModelError for the folder, RecipeError for the other two.
    """
    tokenizer = _load_folder(Path(path))
    if "" in add_tokens:
        raise RecipeError("data.add_tokens: an empty token; remove it")
    if add_tokens:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": list(dict.fromkeys(add_tokens))}, replace_extra_special_tokens=False
        )
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
    tokenizer = None if add_tokens else TrainedTokenizer.open(path)
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


def _load_folder(path: Path) -> PreTrainedTokenizerBase:
    import transformers

    path = user_path(path, "tokenizer")
    if not path.is_dir():
        raise ModelError(f"tokenizer {path}: no such folder; name one that holds a tokenizer.json")
    try:
        plain_files(path)
        with escaped_logs("transformers"):
            loader = transformers.PreTrainedTokenizerFast if _is_generic(path) else transformers.AutoTokenizer
            tokenizer = loader.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ModelError(f"tokenizer {path}: has no tokenizer.json, so tokens cannot be traced back to their text")
        last = max(tokenizer.get_vocab().values(), default=-1)
        special_ids(tokenizer)
    except (KeyboardInterrupt, SystemExit, ModelError):
        raise
    except BaseException as error:  # whatever a broken folder makes of the loader; a panic of its Rust is no Exception
        raise ModelError(f"tokenizer {path}: cannot be loaded ({reason(error)}); it needs a tokenizer.json") from None
    if not 0 <= last < _MAX_TOKENS:
        raise ModelError(f"tokenizer {path}: its last token has the id {last}; there can be {_MAX_TOKENS:,} at most")
    return tokenizer


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


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any],
    add_generation_prompt: bool = False,
    mark: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, by the tokenizer's template; with `mark` also the character spans that it marks as
    generated. Raises ValueError with a one-line reason where the template cannot render it.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=mark,
            add_generation_prompt=add_generation_prompt,
            **{**tokenizer.special_tokens_map, **template_kwargs},
        )
    except Exception as error:  # a template is a program from elsewhere, and may fail in any way
        raise ValueError(
            f"the chat template cannot render it ({reason(error)}); correct it or set another data.chat_template"
        ) from None
    return texts[0], spans[0] if mark else []


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that stand for no text."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> int:
    """The special token that ends an assistant turn: the first one after its words in the template's rendering.

    A tokenizer without a template, or with one that ends turns in plain text, has its `eos_token_id` for it.
    Raises RecipeError where the template cannot render a question and its answer, the tokenizer has no tokens for
    what it renders, or neither token exists.
    """
    if isinstance(tokenizer, TrainedTokenizer) and tokenizer.chat_template == CHATML and not template_kwargs:
        return tokenizer.eos_token_id  # as below, without transformers
    if tokenizer.chat_template is not None:
        words = "An answer"
        probe = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": words}]
        try:
            text, _ = render(tokenizer, probe, template_kwargs=template_kwargs)
        except ValueError as error:
            raise RecipeError(f"data.chat_template: for a question and an answer, {error}") from None
        _, _, tail = text.rpartition(words)
        special = special_ids(tokenizer)
        try:
            ids = tokenizer.backend_tokenizer.encode(tail, add_special_tokens=False).ids
        except Exception as error:  # a tokenizer is a program from elsewhere
            raise RecipeError(f"data.tokenizer: has no tokens for what its template writes ({reason(error)})") from None
        for token in ids:
            if token in special:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            "data.tokenizer: neither an end-of-turn token in its chat template nor an eos token, so generation would "
            'never stop; set data.chat_template="chatml" and data.add_tokens=["<|im_start|>", "<|im_end|>"]'
        )
    return int(tokenizer.eos_token_id)


def train_tokenizer(
    files: Sequence[str | Path],
    *,
    vocab_size: int | None,
    out_dir: str | Path,
    kind: Literal["bpe", "char"] = "bpe",
    text_key: str = "text",
    prompt_key: str = "prompt",
    completion_key: str = "completion",
    overwrite: bool = False,
) -> TrainedTokenizer:
    """Train a tokenizer on the text and the conversations in `files`, and save it as a folder.

    "bpe": byte-level byte-pair encoding of at most `vocab_size` tokens; any text round-trips exactly.
    "char": a token per character seen or written by the template, others become <|endoftext|>; `vocab_size`, which may
    be None, is an upper bound.
    Both have SPECIAL_TOKENS as ids 0, 1, 2 and CHATML as chat template.
    `files` may be folders and globs, too. An `out_dir` with anything in it is refused unless `overwrite`, which
    replaces a tokenizer of the same files there and leaves all else.
    Raises RecipeError for a `vocab_size` that is too small and for `out_dir`, DataError for files that give no text or
    bad rows.
    """
    out_dir = _room_for_a_tokenizer(user_path(out_dir, "--out"), overwrite=overwrite)
    if vocab_size is not None and vocab_size > _MAX_TOKENS:
        raise RecipeError(f"vocab_size={vocab_size}: there can be {_MAX_TOKENS:,} tokens at most")
    texts = _texts(_training_files(files), text_key, prompt_key, completion_key)
    tokenizer = TrainedTokenizer.new(_train_bpe(texts, vocab_size) if kind == "bpe" else _train_char(texts, vocab_size))
    try:
        tokenizer.save_pretrained(out_dir)
    except OSError as error:
        raise RecipeError(f"{out_dir}: cannot be written ({error.strerror}); choose another folder") from None
    return tokenizer


def _room_for_a_tokenizer(folder: Path, *, overwrite: bool) -> Path:
    try:
        there = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return folder
    except OSError as error:
        raise RecipeError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
    if there and not overwrite:
        raise RecipeError(f"{folder}: holds {names(there)}; choose another folder, or replace them with --overwrite")
    if others := [name for name in there if name in MORE_FILES]:
        raise RecipeError(f"{folder}: holds {names(others)} of another kind of tokenizer; choose another folder")
    return folder


def _training_files(files: Sequence[str | Path]) -> list[Path]:
    try:
        return find_files([str(file) for file in files])
    except DataError as error:
        raise DataError(str(error).replace("correct data.path", "name another")) from None


def _train_bpe(texts: Iterator[str | LongText], vocab_size: int | None) -> Tokenizer:
    from tokenizers import pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size is None or vocab_size < least:
        raise RecipeError(f"vocab_size={vocab_size}: a byte-level tokenizer needs at least {least}")
    backend = bpe_backend()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return backend


def _train_char(texts: Iterator[str | LongText], vocab_size: int | None) -> Tokenizer:
    found = set("\nassistantsystemtooluser")  # what the chat template itself writes
    for text in texts:
        for block in blocks_of(text):
            found.update(block)
    characters = sorted(found)
    least = len(SPECIAL_TOKENS) + len(characters)
    if vocab_size is not None and vocab_size < least:
        raise RecipeError(
            f"vocab_size={vocab_size}: the text has {len(characters)} characters, so at least {least} are needed"
        )
    return char_backend(characters)


def _pieces(text: str | LongText) -> Iterator[str]:
    """A long text in pieces that end with a line, so that the trainer's threads share the work.

    The lines of a LongText may be longer than is held: these are cut behind a space or, where there is none, anywhere.
    """
    held = ""
    for block in blocks_of(text):
        held, start = held + block, 0
        while end := _end_of_piece(held, start, cut=isinstance(text, LongText)):
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


def _end_of_piece(text: str, start: int, *, cut: bool) -> int:
    """0 where more of the text must be seen."""
    stop = start + _LONGEST_PIECE_CHARS if cut else len(text)
    if end := text.find("\n", start + _PIECE_CHARS, stop) + 1:
        return end
    if not cut or len(text) < stop:
        return 0
    return text.rfind(" ", start + _PIECE_CHARS, stop) + 1 or stop


def _texts(
    files: Sequence[str | Path], text_key: str, prompt_key: str, completion_key: str
) -> Iterator[str | LongText]:
    problems = Problems()
    found = False
    for file in files:
        for row in read_records(file):
            texts = row if isinstance(row, BadRow) else _row_texts(row, text_key, prompt_key, completion_key)
            if isinstance(texts, BadRow):
                problems.add(texts)
                continue
            for text in texts:
                if len(text):
                    found = True
                    yield text
    problems.raise_if_any()
    if not found:
        raise DataError(f"{', '.join(map(str, files)) or 'no file'}: no text to train a tokenizer on")


def _row_texts(
    record: Record, text_key: str, prompt_key: str, completion_key: str
) -> Sequence[str | LongText] | BadRow:
    if not isinstance(record.value, dict) or text_key in record.value:
        text = to_text(record, text_key)
        return text if isinstance(text, BadRow) else [text]
    keys = {"prompt_key": prompt_key, "completion_key": completion_key}
    format = detect_format(record, **keys)
    chat = format if isinstance(format, BadRow) else to_conversation(record, format, **keys)
    if isinstance(chat, BadRow):
        return chat
    return [message.get(key, "") for message in chat.messages for key in ("reasoning_content", "content")]

"""Training a tokenizer of one's own on the texts and conversations of data files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pertoken.data.files.find import find_files
from pertoken.data.files.long_text import LongText, blocks_of
from pertoken.data.files.problems import Problems
from pertoken.data.files.records import BadRow, Record, read_records
from pertoken.data.formats import KeyNames, to_conversation, to_text
from pertoken.data.tokens.tokenizer import MAX_TOKENS
from pertoken.data.tokens.trained import MORE_FILES, SPECIAL_TOKENS, TrainedTokenizer, bpe_backend, char_backend
from pertoken.errors import DataError, RecipeError
from pertoken.files import user_path
from pertoken.text import names

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["train_tokenizer"]

_PIECE_CHARS = 1 << 16
_LONGEST_PIECE_CHARS = 1 << 18


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
    on_message: Callable[[str], None] = lambda text: None,
) -> TrainedTokenizer:
    """Train a tokenizer on the text and the conversations in `files`, and save it as a folder.

    "bpe": byte-level byte-pair encoding of at most `vocab_size` tokens; any text round-trips exactly.
    "char": a token per character seen or written by the template, others become <|endoftext|>; `vocab_size`, which may
    be None, is an upper bound.
    Both have SPECIAL_TOKENS as ids 0, 1, 2 and CHATML as chat template.
    `files` may be folders and globs, too; `on_message` is told what is passed over there.
    An `out_dir` with anything in it is refused unless `overwrite`, which replaces a tokenizer of the same files there
    and leaves all else.
    Raises RecipeError for a `vocab_size` that is too small and for `out_dir`, DataError for files that give no text or
    bad rows.
    """
    out_dir = _room_for_a_tokenizer(user_path(out_dir, "out"), overwrite=overwrite)
    if vocab_size is not None and vocab_size > MAX_TOKENS:
        raise RecipeError(f"vocab_size={vocab_size}: there can be {MAX_TOKENS:,} tokens at most")
    texts = _texts(_training_files(files, on_message), KeyNames(text_key, prompt_key, completion_key))
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
        raise RecipeError(f"{folder}: holds {names(there)}; choose another folder, or replace them with overwrite=True")
    if others := [name for name in there if name in MORE_FILES]:
        raise RecipeError(f"{folder}: holds {names(others)} of another kind of tokenizer; choose another folder")
    return folder


def _training_files(files: Sequence[str | Path], on_message: Callable[[str], None]) -> list[Path]:
    try:
        return find_files([str(file) for file in files], on_message, key="files")
    except DataError as error:
        raise DataError(str(error).replace("correct files", "name another")) from None


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


def _texts(files: Sequence[str | Path], keys: KeyNames) -> Iterator[str | LongText]:
    problems = Problems()
    found = False
    for file in files:
        for row in read_records(file):
            texts = row if isinstance(row, BadRow) else _row_texts(row, keys)
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


def _row_texts(record: Record, keys: KeyNames) -> Sequence[str | LongText] | BadRow:
    """The texts of a document, or of a conversation's messages."""
    if isinstance(record.value, str | LongText) or (isinstance(record.value, dict) and keys.text in record.value):
        text = to_text(record, keys=keys)
        return text if isinstance(text, BadRow) else [text]
    chat = to_conversation(record, keys=keys)
    if isinstance(chat, BadRow):
        return chat
    return [message.get(key, "") for message in chat.messages for key in ("reasoning_content", "content")]

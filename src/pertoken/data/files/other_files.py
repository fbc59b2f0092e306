"""Files that no rows are read from: what they are, and what can be done about it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["is_other", "next_step", "what_it_is"]

_TO_TEXT = "convert it to text first, for example with {tool}, and train on the .txt"
_BY_SUFFIX = {
    ".pdf": "a PDF; " + _TO_TEXT.format(tool="pdftotext"),
    ".docx": "a Word document; " + _TO_TEXT.format(tool="pandoc"),
    ".doc": "a Word document; " + _TO_TEXT.format(tool="LibreOffice"),
    ".odt": "an OpenDocument text; " + _TO_TEXT.format(tool="pandoc"),
    ".rtf": "a rich text document; " + _TO_TEXT.format(tool="pandoc"),
    ".epub": "an e-book; " + _TO_TEXT.format(tool="pandoc"),
    ".pptx": "a presentation; save its text as .txt first",
    ".xlsx": "a spreadsheet; save it as .csv (CSV UTF-8) first",
    ".xls": "a spreadsheet; save it as .csv (CSV UTF-8) first",
    ".ods": "a spreadsheet; save it as .csv (UTF-8) first",
}
_BY_MAGIC = {
    b"%PDF": _BY_SUFFIX[".pdf"],
    b"{\\rtf": _BY_SUFFIX[".rtf"],
    b"PK\x03\x04": "a ZIP archive; unpack it and name the files in it",
    b"7z\xbc\xaf": "a 7z archive; unpack it and name the files in it",
    b"Rar!": "a RAR archive; unpack it and name the files in it",
    b"\x04\x22\x4d\x18": "an lz4 file; decompress it first, or compress it as .gz or .zst",
    b"\xd0\xcf\x11\xe0": "an old Office document; save it as .txt or .csv first",
    b"\x89PNG": "a PNG image; there is no text in it to train on",
    b"\xff\xd8\xff": "a JPEG image; there is no text in it to train on",
    b"GIF8": "a GIF image; there is no text in it to train on",
    b"RIFF": "audio, video or an image; there is no text in it to train on",
    b"ID3": "audio; there is no text in it to train on",
    b"OggS": "audio; there is no text in it to train on",
    b"\x89HDF": "an HDF5 file; write its rows as .jsonl or .parquet first",
    b"SQLite format 3": "an SQLite database; write its rows as .jsonl or .parquet first",
    b"\x93NUMPY": "a NumPy array; write text as .txt, or rows as .jsonl",
    b"FEA1": "a Feather file of version 1; write its rows as .parquet first",
    b"ORC": "an ORC file; write its rows as .parquet first",
    b"Obj\x01": "an Avro file; write its rows as .jsonl or .parquet first",
    b"\x80\x02": "a Python pickle, which can run code when it is read; write its rows as .jsonl",
    b"\x80\x03": "a Python pickle, which can run code when it is read; write its rows as .jsonl",
    b"\x80\x04": "a Python pickle, which can run code when it is read; write its rows as .jsonl",
    b"\x80\x05": "a Python pickle, which can run code when it is read; write its rows as .jsonl",
    b"\x7fELF": "a program; there is no text in it to train on",
}
_TAR_AT, _TAR = 257, b"ustar"
_KNOWN = "give .jsonl, .json, .csv, .tsv, .parquet, .arrow or text as UTF-8"


def is_other(head: bytes, suffix: str) -> bool:
    """Whether a file that starts with `head` is known to be none, though some of these are text to look at."""
    return suffix in _BY_SUFFIX or any(head.startswith(magic) for magic in (b"%PDF", b"{\\rtf"))


def next_step(path: Path) -> str | None:
    """What can be done about a file that has text in it, but not as text."""
    step = _BY_SUFFIX.get(path.suffix.lower())
    return None if step is None else f"{path.suffix.lower()}: {step.partition('; ')[2]}"


def what_it_is(head: bytes, path: Path) -> str:
    """Of a file that starts with `head`, in words, with the next step."""
    if (known := _BY_SUFFIX.get(path.suffix.lower())) is not None:
        return known
    if head[_TAR_AT:].startswith(_TAR):
        return "a tar archive; unpack it and name the files in it"
    if (known := next((what for magic, what in _BY_MAGIC.items() if head.startswith(magic)), None)) is not None:
        return known
    if (nul := head.find(b"\0")) >= 0:
        return f"binary data (a NUL byte at offset {nul}); {_KNOWN}"
    return f"neither UTF-8 text nor anything else that can be read; {_KNOWN}"

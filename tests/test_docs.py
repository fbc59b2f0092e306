"""The examples of docs/ run as they are printed."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import pertoken

from pertoken import Recipe, train
from pertoken.data.files.records import BadRow, Record
from pertoken.data.formats import FORMATS, Conversation, formats_that_give, read_row, to_conversation
from pertoken.data.store.build import build_store
from pertoken.errors import RecipeError
from pertoken.families import FAMILIES, Family
from pertoken.folders.config import config_from_hf
from pertoken.folders.refusals import NotCovered
from pertoken.folders.weights import load_folder, save_folder
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig
from pertoken.recipe.sources import READING_KEYS, SourceConfig

pytestmark = pytest.mark.numeric

ROOT = Path(__file__).parents[1]
EXTENDING = ROOT / "docs" / "extending.md"


def section(title: str) -> str:
    text = EXTENDING.read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    return found


def run_blocks(title: str) -> dict[str, Any]:
    """What the Python blocks of a section define."""
    names: dict[str, Any] = {"__name__": "docs"}
    for block in re.findall(r"^```python$(.*?)^```$", section(title), re.M | re.S):
        exec(compile(block, str(EXTENDING), "exec"), names)
    return names


@pytest.mark.parametrize("title", ["A family", "A format", "A loss"])
def test_sections_are_short(title):
    assert 0 < len(section(title).splitlines()) < 60


def test_the_family_of_the_documentation_computes_what_transformers_does(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, MinistralConfig

    family = run_blocks("A family")["MINISTRAL"]
    assert isinstance(family, Family)
    assert family.model_type not in FAMILIES, "then the documentation needs another example"
    monkeypatch.setitem(FAMILIES, family.model_type, family)

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 61, "tie_word_embeddings": False, "max_position_embeddings": 256}
    sizes |= {"sliding_window": 7}
    types = ("full_attention", "sliding_attention")
    recipe = ModelConfig.model_validate({"family": "ministral", "layer_types": types, **sizes})
    ours = CausalLM(recipe.resolve(61), seed=1)
    save_folder(ours, tmp_path, eos_token_id=None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == "MinistralForCausalLM"
    ids = torch.arange(50) % 61
    with torch.no_grad():
        expected = theirs(input_ids=ids[None]).logits[0, -1]
        found = load_folder(tmp_path).decode(ids, ours.new_cache(50))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5

    assert config_from_hf(MinistralConfig(**sizes, layer_types=list(types)).to_dict()) == ours.config
    for values in (MinistralConfig(**sizes).to_dict(), {**sizes, "model_type": "ministral"}):  # types, said or not
        assert config_from_hf(values).layer_types == ("sliding_attention",) * 2
    assert config_from_hf(MinistralConfig(**sizes | {"sliding_window": None}).to_dict()).layer_types is None
    with pytest.raises(NotCovered, match="layer_types="):
        config_from_hf(MinistralConfig(**sizes).to_dict() | {"layer_types": ["linear_attention"] * 2})


def test_the_format_of_the_docs_is_one_file_and_one_line_of_the_dict(
    tmp_path: Path, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    headline = run_blocks("A format")["HEADLINE"]
    file = tmp_path / "a.jsonl"
    row = {"article": "2+2", "date": "Add.", "headline": "4", "id": 7}
    file.write_text("".join(json.dumps(r) + "\n" for r in (row, {"article": "Say hi.", "headline": "Hi"})))
    values = {
        "stage": "sft",
        "out_dir": str(tmp_path / "run"),
        "data": {"path": str(file), "tokenizer": "t", "store": str(tmp_path / "store"), "format": "headline"},
    }
    with pytest.raises(RecipeError, match=r"data\.format='headline': must be one of"):
        Recipe.parse(values)
    monkeypatch.setitem(FORMATS, headline.name, headline)
    data = Recipe.parse(values).data
    store = build_store(data.path, stage="sft", tokenizer=bpe_tokenizer, data=data)
    said = [bpe_tokenizer.decode(store[i].labels[store[i].loss_mask]) for i in range(len(store))]
    assert said == ["4<|im_end|>", "Hi<|im_end|>"]
    assert bpe_tokenizer.decode(store[0].tokens).startswith("<|im_start|>user\nAdd.\n\n2+2<|im_end|>")
    formats, note = store.report.notes()
    assert formats == "formats: headline (2 rows)"
    assert note.endswith(f": id (1 row, the first {file}:1)"), "what is not read is said"
    assert to_conversation(Record("a", 1, row, 0, 0)) == to_conversation(Record("a", 1, row, 0, 0), "headline")
    assert str(to_conversation(Record("a", 1, row | {"headline": ""}, 0, 0))).startswith("a:1: headline: no text, so")


def test_the_loss_of_the_docs_is_the_focal_loss():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = run_blocks("A loss")
    hidden, weight, labels, mask = (names[name] for name in ("hidden", "weight", "labels", "loss_mask"))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    nll = F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="none")[mask]
    ((1 - (-nll).exp()) ** 2 * nll / 100).sum().backward()
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert (ours.grad.double() - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # between peft and transformers
def test_the_adapter_of_the_docs_trains_exports_and_opens_in_peft(world, tmp_path, monkeypatch, peft):
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^```toml$(.*?)^```$", page, re.M | re.S)
    (python,) = re.findall(r"^```python$(.*?)^```$", page, re.M | re.S)
    commands = re.findall(r"^pertoken (.*?) *(?:#.*)?$", page, re.M)
    train(world.recipe(tmp_path / "base", train__max_steps=1))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(recipe)
    keys = [f"data.path={world.folder / 'chats.jsonl'}", f"data.eval_path={world.folder / 'held-out.jsonl'}"]
    keys += [f"data.store={tmp_path / 'store'}", f"init_from={tmp_path / 'base'}", "train.max_steps=2"]
    assert pertoken("train", "recipe.toml", *keys, "train.dtype=float32")[0] == 0
    assert len(commands) == 2
    for command in commands:
        assert pertoken(*command.split())[0] == 0
    names: dict[str, Any] = {}
    exec(compile(python, "docs/adapters.md", "exec"), names)
    merged, ids = load_folder(tmp_path / "merged"), torch.arange(9)
    with torch.no_grad():
        expected = names["model"](input_ids=ids[None]).logits[0, -1]
        assert (merged.decode(ids, merged.new_cache(9)) - expected).abs().max() < 1e-5


def examples(title: str) -> list[tuple[str, dict[str, Any], str]]:
    """(heading, row, what stands below it) of a section of docs/data.md."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (part,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", page, re.M | re.S)
    found = []
    for below in re.split(r"^### ", part, flags=re.M):
        for row, text in re.findall(r"^```json\n(.*?)\n```\n\n```text\n(.*?)\n```$", below, re.M | re.S):
            found.append((below.partition("\n")[0], json.loads(row), text))
    return found


def as_shown(chat: Conversation) -> str:
    lines = []
    for i, message in enumerate(chat.messages):
        weight = "" if message["role"] != "assistant" or chat.weight(i) == 1 else f" (weight {chat.weight(i):g})"
        more = [f" {key}={json.dumps(value)}" for key, value in message.items() if key not in ("role", "content")]
        lines.append(f"{message['role']}{weight}: {message['content']}{''.join(more)}")
    return "\n".join([*lines, *([f"tools: {json.dumps(chat.tools)}"] if chat.tools else [])])


def test_every_format_has_an_example_that_is_read_so():
    found = examples("Formats")
    assert {name for name, _, _ in found} == set(formats_that_give("conversation"))
    for name, row, text in found:
        read = read_row(Record("a", 1, row, 0, 0), "conversation")
        assert not isinstance(read, BadRow), read
        assert isinstance(read.value, Conversation)
        assert (read.format, as_shown(read.value)) == (name, text)


def test_the_commonest_mistakes_have_the_messages_of_the_page():
    found = examples("Mistakes")
    assert len(found) >= 20
    for _, row, text in found:
        assert str(read_row(Record("a", 1, row, 0, 0), "conversation")) == f"a:1: {text}"


def test_the_sources_of_the_page_are_a_recipe_and_it_names_every_key_that_they_may_have() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (part,) = re.findall(r"^## Several sources$(.*?)(?=^## )", page, re.M | re.S)
    (text,) = re.findall(r"^```toml\n(.*?)\n```$", part, re.M | re.S)
    values = tomllib.loads(text)
    values["data"]["tokenizer"] = "t"
    recipe = Recipe.parse({"stage": "sft", "out_dir": "r", **values})
    assert [(s.name, s.repeat, s.fraction) for s in recipe.data.sources] == [
        ("chats", 1, None),
        ("questions", 3, None),
        ("gsm8k", 1, 0.5),
    ]
    assert all(f"`{key}`" in part for key in (*READING_KEYS, *SourceConfig.model_fields.keys() - {"path", "name"}))


PAGES = [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_the_pages_name_exist(page):
    """`room/file.py` is below src/pertoken, `tests/...` and `benchmarks/...` below the repository, a name anywhere."""
    known = [p for top in ("src", "tests", "benchmarks", "recipes") for p in (ROOT / top).rglob("*.*")]
    names = {p.name for p in known}
    examples = {"NAME.py", "focal.py", "ministral.py", "headline.py", "test_headline.py"}
    for name in set(re.findall(r"`([\w./-]+\.(?:py|c|toml))`", page.read_text(encoding="utf-8"))):
        path = Path(name)
        if path.name in examples or path.name in (
            "recipe.toml",
            "sft.toml",
            "pyproject.toml",
            "pretrain_gpt.py",
            "train_full_sft.py",
        ):
            continue
        if len(path.parts) == 1:
            assert path.name in names, f"{page.name} names {name}"
        else:
            assert (ROOT / name).exists() or (ROOT / "src" / "pertoken" / name).exists(), f"{page.name} names {name}"

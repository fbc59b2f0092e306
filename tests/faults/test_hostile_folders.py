"""Model and tokenizer folders made to do harm: nothing in them is run, nothing outside of them is read."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import World, pertoken

from pertoken import load_model, load_tokenizer
from pertoken.data.chat.render import ChatTemplate
from pertoken.data.tokens.trained import CHATML
from pertoken.errors import ModelError, PertokenError, RecipeError
from pertoken.folders.open import save_folder
from pertoken.inference.chat import ChatSession
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig

HUGE = 10**9
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, char_folder: Path) -> dict[str, Path]:
    """A folder of the decoder's own family, and one that transformers opens; both with a tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    own, foreign = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("foreign")
    tokenizer = load_tokenizer(char_folder)
    save_folder(
        CausalLM(ModelConfig.model_validate(SIZES).resolve(len(tokenizer))), own, eos_token_id=2, tokenizer=tokenizer
    )
    gpt2 = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(gpt2).save_pretrained(foreign)
    tokenizer.save_pretrained(foreign)
    return {"own": own, "foreign": foreign}


@pytest.fixture(params=["own", "foreign"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of either, to be spoilt."""
    return Path(shutil.copytree(folders[request.param], tmp_path / "model"))


def _refused(load: Callable[[Path], Any], path: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        load(path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 700


def _config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def test_a_payload_would_run_if_it_were_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.bin", "model.pkl"])
def test_a_folder_of_pickles_is_refused_unread(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(tmp_path / "ran")}, folder / name)
    _refused(load_model, folder, "does not unpickle model folders" if "pytorch" in name else "no model.safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pth_with_code_does_not_run_it(tmp_path: Path, zipped: bool) -> None:
    weights = {"model.norm.weight": torch.ones(3), "x": Payload(tmp_path / "ran")}
    torch.save(weights, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    _refused(load_model, tmp_path / "model.pth", "not a file of tensors")
    (tmp_path / "model.pth").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    _refused(load_model, tmp_path / "model.pth", "not a file of tensors")
    assert not (tmp_path / "ran").exists()


def test_a_pth_whose_tensors_repeat_one_number_without_end_is_refused(tmp_path: Path) -> None:
    weights = {"model.embed_tokens.weight": torch.zeros(1).expand(HUGE, HUGE)}
    torch.save(weights, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").stat().st_size < 5000
    _refused(load_model, tmp_path / "model.pth", "not a state dict")


OWN_CODE = {
    "a family of its own": {"model_type": "theirs", "architectures": ["Theirs"]},
    "a class for a known family": {},
    "a class elsewhere": {"auto_map": {"AutoConfig": "someone/else--code.Theirs", "AutoModelForCausalLM": "a/b--c.D"}},
}


@pytest.mark.parametrize("case", OWN_CODE)
def test_code_in_a_folder_is_not_run(folder: Path, tmp_path: Path, case: str) -> None:
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass Theirs: pass\n"
    for name in ("code", "modeling", "tokenization", "__init__", "custom_generate"):
        (folder / f"{name}.py").write_text(code)
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "code.Theirs")
    _config(folder, **{"auto_map": classes} | OWN_CODE[case])
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values["auto_map"] = {"AutoTokenizer": ["code.Theirs", "code.Theirs"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    if case == "a family of its own":
        _refused(load_model, folder, r"auto_map, is never run")
    else:
        load_model(folder)  # as the family it says it is, by code that is known
    for load in (load_tokenizer, lambda path: ChatSession.load(str(path), "cpu")):
        with suppress(PertokenError):
            load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "{tmp}/secret.safetensors", "sub/../../secret.safetensors", "..", "", "a\0b", 3, None],
)
def test_an_index_that_points_out_of_its_folder_is_refused(folder: Path, tmp_path: Path, name: Any) -> None:
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    name = name.format(tmp=tmp_path) if isinstance(name, str) else name
    index = {"weight_map": dict.fromkeys(load_file(tmp_path / "secret.safetensors"), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}} | index))
    _refused(load_model, folder, "weight_map")


def _header(path: Path, change: Callable[[dict[str, Any]], None], length: int | None = None) -> None:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content[8 + size :])


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in header.items() if key != "__metadata__")


LIES = {
    "a longer header": (lambda header: None, 2**40),
    "no header": (lambda header: header.clear(), 0),
    "beyond the file": (lambda header: _first(header).update(data_offsets=[0, 2**50]), None),
    "backwards": (lambda header: _first(header).update(data_offsets=[64, 0]), None),
    "another shape": (lambda header: _first(header).update(shape=[HUGE, HUGE]), None),
    "overlapping": (lambda header: header.update(x=dict(_first(header))), None),
    "an unknown type": (lambda header: _first(header).update(dtype="F7"), None),
    "no numbers": (lambda header: _first(header).update(shape=["a"]), None),
}


@pytest.mark.parametrize("lie", LIES)
def test_weights_whose_header_lies_are_refused(folder: Path, lie: str) -> None:
    _header(folder / "model.safetensors", *LIES[lie])
    _refused(load_model, folder, "cannot be read")


SIZE_KEYS = "hidden_size num_hidden_layers vocab_size intermediate_size num_attention_heads num_key_value_heads"


@pytest.mark.parametrize("key", f"{SIZE_KEYS} head_dim n_embd n_layer n_inner n_head n_positions".split())
@pytest.mark.parametrize("size", [HUGE, 10**18, 10**30])
def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_asked_for(
    folder: Path, key: str, size: int
) -> None:
    _config(folder, **{key: size})
    theirs = json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    if theirs == key.startswith("n_"):
        _refused(load_model, folder, "config.json|weights|sizes")


def test_experts_without_number_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["own"], tmp_path / "model"))
    for family in ("qwen3_moe", "mixtral"):
        _config(folder, model_type=family, num_experts=HUGE, num_local_experts=HUGE)
        _refused(load_model, folder, "num_hidden_layers=1 of 1000000000 experts: the weights have")


def test_attention_from_elsewhere_and_adapters_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["foreign"], tmp_path / "model"))
    for key in ("attn_implementation", "_attn_implementation"):
        _config(folder, **{key: "someone/kernel"})
        _refused(load_model, folder, f"{key}='someone/kernel': code from elsewhere")
        _config(folder, **{key: None})
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    _refused(load_model, folder, "an adapter; merge it")


def test_names_in_a_folder_cannot_steer_the_terminal(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"{i}\x1b[2J\n" + "x" * 10_000: torch.zeros(1) for i in range(9)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _refused(load_model, folder, r"\\x1b\[2J")


STEERING = "\x1b[31mX\nanother line"
TOLD = {
    "a type": {"model_type": STEERING},
    "angles": {"model_type": "qwen2", "rope_scaling": {"rope_type": STEERING, "factor": 2.0}},
}


@pytest.mark.parametrize("case", TOLD)
def test_what_transformers_says_of_a_folder_cannot_steer_the_terminal(folders, tmp_path, case) -> None:
    """In a process of its own: pytest has its own handlers."""
    folder = Path(shutil.copytree(folders["foreign"], tmp_path / "model"))
    _config(folder, **TOLD[case])
    code = (
        "import sys, logging; from pathlib import Path; from pertoken import load_model, load_tokenizer\n"
        "from pertoken.errors import PertokenError\n"
        "for load in (load_tokenizer, load_model):\n"
        "    try: load(sys.argv[1])\n"
        "    except PertokenError as error: print(error, file=sys.stderr)\n"
        "assert not logging.getLogger('transformers').handlers[0].filters\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert b"\\x1b[31mX\\nanother line" in ended.stderr, "it is said"
    assert b"\x1b" not in ended.stdout + ended.stderr
    assert not [line for line in ended.stderr.splitlines() if line.startswith(b"another line")]


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"a":' * 100_000, "\0", "\udcff", "1" * 5000])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_file_that_is_no_json_object_is_refused(folder: Path, name: str, text: str) -> None:
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    if name.startswith("tokenizer"):
        _refused(load_tokenizer, folder, "cannot be loaded")
    else:
        if "index" in name:
            (folder / "model.safetensors").unlink()
        _refused(load_model, folder, name)


def _tokenizer(source: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(source, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("size", [2**24, 2**31, 2**32 - 1, 2**40, -1])
def test_a_tokenizer_with_absurd_ids_is_refused(char_folder: Path, tmp_path: Path, size: int) -> None:
    def change(values: dict[str, Any]) -> None:
        values["model"]["vocab"]["~"] = size

    _refused(load_tokenizer, _tokenizer(char_folder, tmp_path / "t", change), r"its last token has the id|cannot be")


def test_a_row_that_the_tokenizer_has_no_tokens_for_is_named_and_can_be_skipped(world: World, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        vocab = values["model"]["vocab"]
        values["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "<nowhere>"}
        values["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}

    tokenizer = _tokenizer(world.folder / "tokenizer", tmp_path / "tokenizer", change)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("red", "gr\u00fcn", "blue", "\u732b")))
    recipe = world.write_recipe(
        tmp_path / "run", stage="pretrain", data__path=str(rows), data__eval_path=[], data__tokenizer=str(tokenizer),
        data__store=str(tmp_path / "store"),
    )  # fmt: skip
    code, _, err = pertoken("prepare", recipe)
    assert code == 2
    assert f"{rows}:2: text: the tokenizer has no tokens for it (" in err
    assert "(lines 2 and 4)" in err
    code, out, err = pertoken("prepare", recipe, "data.on_bad_row=skip")
    assert code == 0, err
    assert "training: 2 samples" in out
    assert "2 bad rows skipped" in out


# Chat templates

REACHING = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch TRACE') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('touch TRACE').read() }}",
    "{{ namespace.__init__.__globals__['sys'] }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['os'] }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ (1).__class__.__bases__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ('{0.__class__}' | format(1)) and messages.append(1) }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/passwd' %}",
]
ENDLESS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'x' * 10**15 }}",
    "{{ 10 ** 10 ** 2 % 0 }}",
    "{% for %}",
    "{{ " + "(" * 5000 + " }}",
    "{% if x %}" * 200 + "{% endif %}" * 200,
    "{{ messages[5] | tojson }}",
]


@pytest.mark.parametrize("template", [*REACHING, *ENDLESS])
def test_a_template_that_reaches_out_or_never_ends_is_refused(char_folder: Path, tmp_path: Path, template: str) -> None:
    tokenizer = load_tokenizer(char_folder, chat_template=template.replace("TRACE", str(tmp_path / "ran")) + " ")
    with pytest.raises(RecipeError, match=r"data\.chat_template: for a question and an answer, .* cannot render it"):
        ChatTemplate(tokenizer, {}, day="2026-01-31")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("deep", "cannot render it (maximum recursion"),
        ("half", "has no tokens for it ("),
        ("over", "cannot render it (Range too big"),
        ("zero", "cannot render it ("),
    ],
)
def test_a_template_that_fails_for_one_row_names_that_row(
    world: World, tmp_path: Path, words: str, message: str
) -> None:
    branches = {
        "deep": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "half": "{{ '\\ud800' }}",
        "over": "{% for i in range(10**6) %}{% endfor %}",
        "zero": "{{ 1 // 0 }}",
    }
    template = CHATML + f"{{% if messages[0].content == '{words}' %}}{branches[words]}{{% endif %}}"
    texts = ["red", "blue", words, "green"]
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}] for text in texts]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    recipe = world.write_recipe(
        tmp_path / "run", data__path=str(rows), data__eval_path=[], data__chat_template=template,
        data__store=str(tmp_path / "store"),
    )  # fmt: skip
    code, _, err = pertoken("prepare", recipe)
    assert code == 2
    assert f"{rows}:3: conversation: the " in err
    assert message in err
    code, out, err = pertoken("prepare", recipe, "data.on_bad_row=skip")
    assert code == 0, err
    assert "training: 3 samples" in out

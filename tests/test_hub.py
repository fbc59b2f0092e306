"""Models, tokenizers and data by their names on the hub, with the real client against a small hub of the tests' own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_server import Files, Hub
from huggingface_hub import constants, file_download
from tiny import World

from pertoken import Recipe, load_model, train
from pertoken.errors import DataError, ModelError, PertokenError, RecipeError
from pertoken.hub import fetch as fetch_module
from pertoken.hub.choose import choose, separate_folders
from pertoken.hub.fetch import fetch, name_of
from pertoken.hub.names import check_hub_name, data_name, model_name
from pertoken.runs.data import prepare
from pertoken.tracking.listener import Listener

MODEL = "models/owner/tiny"
DATA = "datasets/owner/chats"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, and an empty cache."""
    with Hub().serving() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        point_at(hub.url, monkeypatch)
        yield hub


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # version 0 has taken it from there
        if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
            template = url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture(scope="session")
def model_files(world: World, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A model folder as repositories have it: with code, and with a pickle of the weights beside them."""
    out = tmp_path_factory.mktemp("hub-model")
    result = train(world.recipe(out / "run", train__max_steps=1))
    keep = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    files = {name: (result.checkpoint / name).read_bytes() for name in keep if (result.checkpoint / name).is_file()}
    files |= {f.name: f.read_bytes() for f in result.checkpoint.glob("*.jinja")}
    return files | {"modeling_tiny.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "README.md": b"#"}


@pytest.fixture
def data_files(world: World) -> Files:
    rows = (world.folder / "chats.jsonl").read_bytes().splitlines(keepends=True)
    return {"data/train.jsonl": b"".join(rows[:60]), "chats.py": b"raise SystemExit", "README.md": b"#"}


class Told(Listener):
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.progress: list[tuple[int, int]] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def downloading(self, done_bytes: int, total_bytes: int) -> None:
        self.progress.append((done_bytes, total_bytes))


def get(text: str, part: Any = "model", told: Told | None = None, **also: Any) -> Path:
    """The path that a name means."""
    told, name = told or Told(), name_of(text, part, "key")
    assert name is not None
    found = fetch(name, part, label="key", on_message=told.message, on_progress=told.downloading, **also)
    return Path(found.path)


def refused(text: str, part: Any = "model", **also: Any) -> str:
    with pytest.raises(DataError if part == "data" else ModelError) as caught:
        get(text, part, **also)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_of(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


# Names


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("owner/name", ("model", "owner/name", None, "")),
        ("owner/Name-0.6B@refs/pr/3", ("model", "owner/Name-0.6B", "refs/pr/3", "")),
        ("hf://owner/name@v1.0", ("model", "owner/name", "v1.0", "")),
        ("hf://datasets/owner/name", ("dataset", "owner/name", None, "")),
        ("hf://datasets/owner/name/", ("dataset", "owner/name", None, "")),
        ("hf://datasets/owner/name@v1/a/*.jsonl", ("dataset", "owner/name", "v1", "a/*.jsonl")),
        ("hf://datasets/owner/name@refs/convert/parquet/a", ("dataset", "owner/name", "refs/convert/parquet", "a")),
        ("hf://datasets/owner/name@a%2Fb/c", ("dataset", "owner/name", "a/b", "c")),
    ],
)
def test_a_name_of_the_hub_is_its_repository_revision_and_part(text: str, meant: tuple[str, ...]) -> None:
    name = data_name(text) if "datasets" in text else model_name(text)
    assert name is not None
    assert (name.kind, name.repo, name.revision, name.inside) == meant


@pytest.mark.parametrize("text", ["/owner/name", "./owner/name", "~/name", "name", "a/b/c", "owner/model.pth", "a/"])
def test_what_no_repository_can_be_called_is_a_path(text: str) -> None:
    assert model_name(text) is None


def test_a_path_that_exists_is_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert model_name("owner/name") is None
    assert data_name("owner/name") is None
    assert model_name("hf://owner/name") is not None


@pytest.mark.parametrize("text", ["hf://", "hf://datasets/x", "hf://spaces/a/b", "hf://a", "hf:///a/b", "hf://a/b@"])
def test_what_begins_as_a_name_of_the_hub_and_is_none_is_refused_with_the_recipe(text: str) -> None:
    with pytest.raises(ValueError, match="is no name of the hub; write hf://datasets/owner/name"):
        check_hub_name(text)
    values = {"stage": "sft", "out_dir": "x", "data": {"path": text, "tokenizer": "y"}}
    with pytest.raises(RecipeError, match=r"^data.path=.*is no name of the hub"):
        Recipe.parse(values)


def test_data_and_models_are_told_apart(hub: Hub) -> None:
    with pytest.raises(DataError, match=r"^key=hf://a/b: no name of data; write hf://datasets/owner/name"):
        name_of("hf://a/b", "data", "key")
    with pytest.raises(ModelError, match=r"^key=hf://datasets/a/b: no name of a model; write owner/name"):
        name_of("hf://datasets/a/b", "model", "key")
    with pytest.raises(DataError, match=r"^key=a/b: no such file or folder; correct it, or write hf://datasets/a/b"):
        name_of("a/b", "data", "key")


# Which files


def test_weights_are_one_file_or_shards_never_both_nor_other_kinds() -> None:
    settings, tokenizer = ["config.json", "generation_config.json"], ["tokenizer.json", "chat_template.jinja"]
    other = [
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "original/x.safetensors",
        "a.py",
    ]
    one, index = "model.safetensors", "model.safetensors.index.json"
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert choose([*settings, *tokenizer, *other, one], "model") == sorted([*settings, *tokenizer, one])
    assert choose([*settings, *other, index, *shards], "model") == sorted([*settings, index, *shards])
    assert choose([*settings, *tokenizer, *other, one], "tokenizer") == sorted([*settings, *tokenizer])


@pytest.mark.parametrize(
    ("files", "part", "said"),
    [
        (["config.json", "pytorch_model.bin"], "model", r"pickles alone \(pytorch_model.bin\), which can run code"),
        (["config.json", "adapter_config.json", "adapter_model.safetensors"], "model", "is an adapter; merge it"),
        (["config.json", "model.gguf"], "model", "has no model.safetensors; name"),
        (["model.safetensors"], "model", "has no config.json"),
        (["config.json"], "tokenizer", "has no tokenizer"),
        (["x.py", "README.md"], "data", r"no data, only code that would fetch them \(x.py\), which is neither"),
        (["README.md"], "data", r"has no data file \(.jsonl, "),
    ],
)
def test_a_repository_without_what_is_needed_says_why(files: list[str], part: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose(files, part)


def test_data_are_taken_by_their_suffix_and_narrowed_by_file_folder_or_glob() -> None:
    files = [
        "a/x.jsonl",
        "a/x.jsonl.gz",
        "a/b/y.parquet",
        "ab/z.csv",
        "t.txt.zst",
        "n.py",
        "n.pt",
        "n.pkl.gz",
        ".h/i.json",
    ]
    assert choose(files, "data") == ["a/b/y.parquet", "a/x.jsonl", "a/x.jsonl.gz", "ab/z.csv", "t.txt.zst"]
    assert choose(files, "data", "a") == ["a/b/y.parquet", "a/x.jsonl", "a/x.jsonl.gz"]
    assert choose(files, "data", "a/x.jsonl") == ["a/x.jsonl"]
    assert choose(files, "data", "a/*") == ["a/x.jsonl", "a/x.jsonl.gz"]
    assert choose(files, "data", "**/*.parquet") == ["a/b/y.parquet"]
    with pytest.raises(ValueError, match=r"^c is not there; name a file"):
        choose(files, "data", "c")
    with pytest.raises(ValueError, match=r"^n.py holds n.py, none of it data"):
        choose(files, "data", "n.py")


def test_folders_that_are_no_splits_are_several_sets() -> None:
    assert separate_folders(["main/train.jsonl", "main/test.jsonl", "socratic/train.jsonl"]) == ["main", "socratic"]
    assert separate_folders(["x/en/a.jsonl", "x/de/a.jsonl"], "x") == ["de", "en"]
    for files in (["train/a.jsonl", "test/a.jsonl"], ["data/a.jsonl", "b.jsonl"], ["a.jsonl"]):
        assert separate_folders(files) == []


# Downloads


def test_a_model_is_downloaded_once_and_said_once(hub: Hub, model_files: Files) -> None:
    commit = hub.repo(MODEL).commit(model_files)
    told = Told()
    folder = get("owner/tiny", told=told)
    assert folder.name == commit
    assert (folder / "model.safetensors").read_bytes() == model_files["model.safetensors"]
    wanted = sorted(model_files.keys() - {"modeling_tiny.py", "pytorch_model.bin", "README.md"})
    assert files_of(folder) == wanted == hub.downloads()
    total = sum(len(model_files[name]) for name in wanted)
    said = (
        f"key=owner/tiny: {len(wanted)} files, {total / 1e3:,.1f} kB, to download from the hub (commit {commit[:12]}): "
    )
    assert len(told.messages) == 1
    assert told.messages[0].startswith(said + "chat_template.jinja, config.json")
    assert told.progress[-1] == (total, total)
    assert all(done < total for done, _ in told.progress[:-1])
    load_model(folder)

    again = Told()
    assert get("owner/tiny", told=again) == folder
    assert again.messages == []
    assert again.progress == []
    assert hub.downloads() == wanted


def test_an_older_client_keeps_the_list_of_files_where_newer_ones_look_for_it(
    hub: Hub, model_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("keeps_listings", "counts_bytes"):
        monkeypatch.setattr(fetch_module, name, lambda: False)
    commit = hub.repo(MODEL).commit(model_files)
    told = Told()
    folder = get("owner/tiny", "tokenizer", told)
    sizes = [len(model_files[name]) for name in files_of(folder)]
    assert told.progress[-1] == (sum(sizes), sum(sizes))
    asked = len(hub.requests)
    assert get("owner/tiny", "tokenizer", told, commit=commit) == folder
    assert len(hub.requests) == asked, "a commit needs no hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not in the cache, of its commit" in refused("owner/tiny"), "it is known which files there are"
    if hasattr(huggingface_hub, "get_cached_repo_tree"):
        kept = huggingface_hub.get_cached_repo_tree("owner/tiny", revision=commit)
        assert {file.path: file.size for file in kept} == {name: len(text) for name, text in model_files.items()}


def test_neither_code_nor_pickles_are_ever_asked_for(hub: Hub, model_files: Files, data_files: Files) -> None:
    hub.repo(MODEL).commit(model_files)
    hub.repo(DATA).commit(data_files)
    get("owner/tiny")
    get("hf://datasets/owner/chats", "data")
    assert not [r for r in hub.requests if r.endswith((".py", ".bin", ".md"))]


def test_a_tokenizer_comes_without_weights(hub: Hub, model_files: Files) -> None:
    hub.repo(MODEL).commit(model_files)
    folder = get("owner/tiny", "tokenizer")
    assert "tokenizer.json" in files_of(folder)
    assert "model.safetensors" not in files_of(folder)


def test_pickled_weights_are_refused_before_anything_is_downloaded(hub: Hub, model_files: Files) -> None:
    hub.repo(MODEL).commit({k: v for k, v in model_files.items() if k != "model.safetensors"})
    said = refused("owner/tiny")
    assert said.startswith("key=owner/tiny: has its weights as pickles alone (pytorch_model.bin)")
    assert hub.downloads() == []


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, model_files: Files) -> None:
    repo = hub.repo(MODEL)
    first = repo.commit(model_files, ref="v1")
    newest = repo.commit(model_files | {"config.json": model_files["config.json"] + b"\n"})
    assert get("owner/tiny").name == newest
    assert get("owner/tiny@v1").name == first
    assert get(f"owner/tiny@{first}").name == first
    assert get("owner/tiny", commit=first).name == first
    said = refused("owner/tiny@v2")
    assert said == "key=owner/tiny@v2: has no revision 'v2'; name a branch, a tag or a commit of it"


def test_part_of_the_data_is_downloaded_alone(hub: Hub) -> None:
    files = {
        "main/train-0.jsonl": b"1",
        "main/test-0.jsonl": b"2",
        "other/train.jsonl": b"3",
        "a[1].jsonl": b"4",
    }
    hub.repo(DATA).commit(files)
    assert files_of(get("hf://datasets/owner/chats/main/train-0.jsonl", "data").parent) == ["train-0.jsonl"]
    assert hub.downloads() == ["main/train-0.jsonl"]
    pattern = get("hf://datasets/owner/chats/main/te*.jsonl", "data")
    assert [f.name for f in pattern.parent.glob(pattern.name)] == ["test-0.jsonl"]
    assert hub.downloads() == ["main/test-0.jsonl", "main/train-0.jsonl"]
    told = Told()
    assert files_of(get("hf://datasets/owner/chats", "data", told)) == sorted(files)
    assert told.messages[1:] == [
        "key=hf://datasets/owner/chats: all of its folders are read, main, other; to read one alone name it: "
        "hf://datasets/owner/chats/main"
    ]
    assert "data" in refused("hf://datasets/owner/chats/none", "data")


# What can go wrong


def test_a_name_that_the_hub_does_not_know(hub: Hub) -> None:
    assert refused("owner/none") == (
        "key=owner/none: no such folder here, and the hub has no such model, or shows it to some accounts alone; "
        "correct the name, or log in with `hf auth login`"
    )
    assert refused("hf://datasets/owner/none", "data").startswith(
        "key=hf://datasets/owner/none: the hub has no such set of data, or shows it to some accounts alone"
    )


def test_a_gated_repository_names_its_terms(hub: Hub, model_files: Files) -> None:
    hub.repo(MODEL).commit(model_files)
    hub.repo(MODEL).gated = True
    assert refused("owner/tiny") == (
        "key=owner/tiny: the hub gives it only to those who have accepted its terms; accept them on its page there, "
        "and log in with `hf auth login`"
    )


def test_the_login_of_the_hub_is_used(hub: Hub, model_files: Files, tmp_path: Path) -> None:
    hub.repo(MODEL).commit(model_files)
    (tmp_path / "token").write_text("hf_secret")
    get("owner/tiny")
    assert hub.tokens == {"Bearer hf_secret"}


def free_url() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def test_without_network_what_is_cached_is_used_and_the_rest_refused(
    hub: Hub, model_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.repo(MODEL).commit(model_files)
    folder = get("owner/tiny", "tokenizer")
    point_at(free_url(), monkeypatch)
    told = Told()
    assert get("owner/tiny", "tokenizer", told) == folder
    assert len(told.messages) == 1
    assert told.messages[0].startswith("key=owner/tiny: the hub does not answer (Connect")
    assert told.messages[0].endswith(f"; the commit {commit[:12]}, which is in the cache, is used")
    assert get("owner/tiny", "tokenizer", told, commit=commit) == folder
    assert len(told.messages) == 1, "a commit needs no hub"
    said = refused("owner/tiny")
    assert said.startswith("key=owner/tiny: the hub does not answer (Connect")
    assert said.endswith(f"(not in the cache, of its commit {commit[:12]}: model.safetensors)")
    said = refused("owner/other")
    assert said.startswith("key=owner/other: the hub does not answer (Connect")
    assert said.endswith("check the network and HF_ENDPOINT, or name a local copy")


def test_a_hub_that_is_down_is_one_line(hub: Hub) -> None:
    hub.broken = True
    said = refused("owner/tiny")
    assert said.startswith("key=owner/tiny: the hub answers 503 (")
    assert said.endswith("; try again later")


def test_offline_mode_asks_nobody(hub: Hub, model_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.repo(MODEL).commit(model_files)
    folder = get("owner/tiny", "tokenizer")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    told = Told()
    assert get("owner/tiny", "tokenizer", told) == folder
    assert told.messages == []
    assert refused("owner/tiny") == (
        "key=owner/tiny: HF_HUB_OFFLINE is set; unset it (not in the cache, of its commit "
        f"{commit[:12]}: model.safetensors)"
    )
    assert refused("owner/other") == (
        f"key=owner/other: not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set; unset it, or "
        "download it first"
    )
    assert hub.requests == []


def test_what_others_have_put_into_the_cache_is_used_offline_with_a_word(
    hub: Hub, model_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the list of its files that a whole download leaves there."""
    import huggingface_hub

    commit = hub.repo(MODEL).commit(model_files)
    for name in ("config.json", "tokenizer.json"):
        huggingface_hub.hf_hub_download("owner/tiny", name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = Told()
    assert files_of(get("owner/tiny", "tokenizer", told)) == ["config.json", "tokenizer.json"]
    assert told.messages == [
        f"key=owner/tiny: the hub cannot be asked which files the commit {commit[:12]} has; those in the cache are used"
    ]
    assert "has no model.safetensors" in refused("owner/tiny")


def test_a_disk_without_room_is_seen_before_the_download(
    hub: Hub, model_files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import pertoken.hub.fetch

    hub.repo(MODEL).commit(model_files)
    monkeypatch.setattr(pertoken.hub.fetch, "free_bytes", lambda folder: 2_500)
    said = refused("owner/tiny")
    assert "to download, and 2.5 kB free in " in said
    assert said.endswith("; free some, or set HF_HOME to a larger disk")
    assert str(tmp_path / "cache") in said
    assert hub.downloads() == []


# Runs


def recipe(world: World, out: Path, **changes: Any) -> Recipe:
    values = {"data__path": "hf://datasets/owner/chats", "data__tokenizer": "owner/tiny", "train__max_steps": 2}
    return world.recipe(out, data__eval_path=(), model={}, init_from="owner/tiny", **(values | changes))


def test_a_run_keeps_its_commits_and_its_resume_takes_them(
    hub: Hub, world: World, model_files: Files, data_files: Files, tmp_path: Path
) -> None:
    model, data = hub.repo(MODEL).commit(model_files), hub.repo(DATA).commit(data_files)
    result = train(recipe(world, tmp_path / "run"))
    used = {"owner/tiny": model, "hf://datasets/owner/chats": data}
    assert json.loads((result.checkpoint / "trainer_state.json").read_text())["hub"] == used
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["fields"]["hub"] for event in events if event["kind"] == "start"] == [used]
    assert 'init_from = "owner/tiny"' in (tmp_path / "run" / "recipe.toml").read_text()

    hub.repo(DATA).commit({"data/train.jsonl": data_files["data/train.jsonl"][:0]})
    hub.repo(MODEL).commit({})
    hub.requests.clear()
    further = train(recipe(world, tmp_path / "run", train__max_steps=3), resume=True)
    assert further.step == 3
    assert hub.requests == [], "what is in the cache is known by its commit"
    with pytest.raises(PertokenError, match=r"owner/tiny: has no config.json"):
        train(recipe(world, tmp_path / "new"))


def test_an_adapter_names_the_commit_of_its_base_and_finds_it_again(
    hub: Hub, world: World, model_files: Files, data_files: Files, tmp_path: Path
) -> None:
    commit = hub.repo(MODEL).commit(model_files)
    hub.repo(DATA).commit(data_files)
    lora: dict[str, Any] = {"adapter__kind": "lora", "adapter__r": 4}
    result = train(recipe(world, tmp_path / "run", **lora))
    config = json.loads((result.checkpoint / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/tiny", commit)

    hub.repo(MODEL).commit({})  # which the name means from now on
    hub.requests.clear()
    further = train(recipe(world, tmp_path / "run", train__max_steps=3, **lora), resume=True)
    assert json.loads((further.checkpoint / "adapter_config.json").read_text()) == config
    model = load_model(tmp_path / "run")
    assert model.adapter is not None
    assert model.adapter.base.revision == commit
    assert hub.requests == []


def test_data_are_prepared_without_weights(
    hub: Hub, world: World, model_files: Files, data_files: Files, tmp_path: Path
) -> None:
    hub.repo(MODEL).commit(model_files)
    hub.repo(DATA).commit(data_files)
    store, _ = prepare(recipe(world, tmp_path / "run", data__tokenizer=None))
    assert len(store) == 60
    assert "model.safetensors" not in hub.downloads()


def test_commands_take_names_of_the_hub_by_environment_alone(
    hub: Hub, world: World, model_files: Files, data_files: Files, tmp_path: Path
) -> None:
    hub.repo(MODEL).commit(model_files)
    hub.repo(DATA).commit(data_files)
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}

    def pertoken(*args: str, code: int = 0, **environment: str) -> tuple[str, str]:
        command = [sys.executable, "-m", "pertoken", *args]
        done = subprocess.run(command, env={**os.environ, **here, **environment}, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr

    data = "hf://datasets/owner/chats/data/train.jsonl"
    out, said = pertoken("eval", "owner/tiny", data, "--device", "cpu", "--json", str(tmp_path / "eval.json"))
    assert json.loads((tmp_path / "eval.json").read_text())["samples"] == 60
    assert "MODEL owner/tiny: " in said
    assert f"DATA {data}: 1 file, " in said
    assert "downloaded " in said
    assert f"{data}: 60 samples" in out
    out, said = pertoken("export", "owner/tiny", "--out", str(tmp_path / "out"), HF_HUB_OFFLINE="1")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert said == ""
    _, said = pertoken("generate", "owner/none", "--prompt", "x", code=2)
    assert said.startswith("error: MODEL owner/none: no such folder here, and the hub has no such model")
    assert said.count("\n") == 1


def test_ranks_download_once(hub: Hub, world: World, model_files: Files, data_files: Files, tmp_path: Path) -> None:
    hub.repo(MODEL).commit(model_files)
    hub.repo(DATA).commit(data_files)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe(world, tmp_path / "run").to_toml())
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "pertoken", "train", str(file)],
            env={**os.environ, **here, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    downloads = hub.downloads()
    assert len(downloads) == len(set(downloads))
    assert "model.safetensors" in downloads
    assert [r for r in hub.requests if "/tree/" in r] == sorted(
        {r for r in hub.requests if "/tree/" in r}, reverse=True
    )

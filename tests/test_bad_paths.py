"""Names that no file can have, and files that are no files: one line each, and nothing waits."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from tiny import World, pertoken

from pertoken.errors import ModelError, RecipeError
from pertoken.files import plain_file
from pertoken.recipe.schema import Recipe

LONG = "x" * 300


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("paths") / "run"
    assert pertoken("train", world.write_recipe(folder, train__max_steps=1))[0] == 0
    return folder


@pytest.fixture(autouse=True)
def _never_waits():
    """A pipe that nobody writes into would be waited for without end."""

    def late(number, frame):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(*args: object, word: str) -> None:
    code, _, err = pertoken(*args)
    assert code == 2, err
    assert word in err
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err


@pytest.mark.parametrize("key", ["out_dir", "init_from", "data.path", "data.eval_path", "data.tokenizer", "data.store"])
@pytest.mark.parametrize("name", [LONG, f"folder/{LONG}/x", "a\\u0000b"])
def test_a_name_that_no_file_can_have_is_refused_in_a_recipe(world, tmp_path, key, name):
    recipe = world.write_recipe(tmp_path / "run", train__max_steps=1)
    if "\\u" not in name:
        refused("train", recipe, f"{key}={name}", word=key)
    with pytest.raises(RecipeError, match=rf"{key}.*: (too long for a name|no file can have)"):
        world.recipe(tmp_path / "run", **{key.replace(".", "__"): name.replace("\\u0000", "\0")})


def test_a_name_that_no_file_can_have_is_refused_on_the_command_line(run, world, tmp_path):
    chats = world.folder / "chats.jsonl"
    for args in (
        ("train", LONG),
        ("prepare", LONG),
        ("eval", LONG, chats),
        ("eval", run, LONG),
        ("inspect", LONG, chats),
        ("generate", LONG, "--prompt", "x"),
        ("chat", LONG),
        ("replay", LONG, "--step", 1),
        ("export", LONG, "--out", tmp_path / "x"),
        ("export", run, "--out", tmp_path / LONG),
        ("tokenizer", "train", chats, "--kind", "char", "--out", tmp_path / LONG),
        ("tokenizer", "train", f"{LONG}.txt", "--kind", "char", "--out", tmp_path / "x"),
        ("eval", run, chats, "--json", tmp_path / LONG),
    ):
        code, _, err = pertoken(*args)
        assert code == 2, (args, err)
        assert len(err.strip().splitlines()) == 1, (args, err)
        assert len(err) < 700
    assert not (tmp_path / "x").exists()


def a_pipe_for(path: Path) -> Path:
    path.unlink()
    os.mkfifo(path)
    return path


def test_a_pipe_or_a_device_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "recipe.toml")
    for path in (tmp_path / "recipe.toml", "/dev/zero", "/dev/tty"):
        refused("train", path, word="cannot be read (")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_in_a_model_folder_is_refused(run, world, tmp_path, name):
    folder = Path(shutil.copytree(run / "checkpoints" / "step-00000001", tmp_path / "model"))
    a_pipe_for(folder / name)
    refused("generate", folder, "--prompt", "red", word=name if name != "config.json" else "config.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_pipe_in_a_folder_for_transformers_is_refused(tmp_path, name):
    from transformers import GPT2Config, GPT2LMHeadModel

    from pertoken import load_model

    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "model")
    a_pipe_for(tmp_path / "model" / name)
    with pytest.raises(ModelError):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["manifest.json", "trainer_state.json", "model.safetensors", "metrics.ledger"])
def test_a_pipe_in_a_checkpoint_makes_it_a_damaged_one(run, tmp_path, name):
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    a_pipe_for(copy / "checkpoints" / "step-00000001" / name)
    recipe = run.with_suffix(".toml")
    code, _, err = pertoken("train", recipe, f"out_dir={copy}", "--resume")
    assert code == 2
    assert "no checkpoint is valid" in err


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_a_pipe_is_no_data(world, tmp_path, suffix):
    pipe = tmp_path / f"rows{suffix}"
    os.mkfifo(pipe)
    recipe = world.write_recipe(tmp_path / "run", data__path=str(pipe), train__max_steps=1)
    refused("train", recipe, word=str(pipe))
    refused("tokenizer", "train", pipe, "--kind", "char", "--out", tmp_path / "t", word=str(pipe))


def test_a_pipe_for_metrics_is_refused(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    a_pipe_for(copy / "metrics.jsonl")
    recipe = run.with_suffix(".toml")
    refused("train", recipe, f"out_dir={copy}", "--resume", word="metrics.jsonl: not a plain file")


def test_only_regular_files_are_plain(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert plain_file(tmp_path / "link") == tmp_path / "link"
    for path in (tmp_path, tmp_path / "none", Path("/dev/null")):
        with pytest.raises(OSError, match=str(path)):
            plain_file(path)


def test_a_tilde_is_the_home_folder_in_every_path(world, tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    shutil.copytree(world.folder / "tokenizer", home / "tokenizer")
    shutil.copy(world.folder / "chats.jsonl", home / "chats.jsonl")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    recipe = world.write_recipe(
        home / "recipe", data__path="~/chats.jsonl", data__tokenizer="~/tokenizer", data__store="~/store",
        data__eval_path=["~/*.jsonl"], train__max_steps=1,
    )  # fmt: skip
    text = recipe.read_text().replace(str(home), "~")
    recipe.write_text(text)
    assert 'out_dir = "~/recipe"' in text
    assert pertoken("train", "~/recipe.toml")[0] == 0
    assert (home / "recipe" / "metrics.jsonl").exists()
    for args in (
        ("train", "~/recipe.toml", "out_dir=~/tuned", "init_from=~/recipe"),
        ("train", "~/recipe.toml", "--resume"),
        ("eval", "~/recipe", "~/chats.jsonl", "--json", "~/eval.json"),
        ("replay", "~/recipe", "--step", "1"),
        ("export", "~/recipe", "--out", "~/exported"),
        ("tokenizer", "train", "~/chats.jsonl", "--kind", "char", "--out", "~/made"),
    ):
        code, _, err = pertoken(*args)
        assert code == 0, (args, err)
    assert not list(here.iterdir())
    refused("train", "~nobody-of-this-name/recipe.toml", word="no file can have this name")


def test_a_recipe_may_begin_with_a_byte_order_mark_and_is_utf8(world, tmp_path):
    recipe = world.write_recipe(tmp_path / "run")
    text = recipe.read_text() + "# Märchen\n"
    recipe.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert Recipe.load(recipe) == world.recipe(tmp_path / "run")
    for encoding in ("utf-16", "utf-16-le", "utf-32", "latin-1"):
        recipe.write_bytes(text.encode(encoding))
        refused("train", recipe, word=str(recipe))


@pytest.mark.parametrize("format_", ["hf", "minimind"])
def test_an_export_that_cannot_be_written_is_one_line_and_leaves_nothing(run, tmp_path, format_):
    (tmp_path / "file").write_text("in the way")
    name = "x.pth" if format_ == "minimind" else "x"
    for out in (Path("/proc/x") / name, tmp_path / "file" / name):
        refused("export", run, "--out", out, "--format", format_, word=f"--out {out}: cannot be written (")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused("export", run, "--out", tmp_path / "link", word="exists already")


def test_an_export_that_fails_half_way_leaves_nothing(run, tmp_path, monkeypatch):
    from pertoken.folders import weights as hf

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "save_file", full)
    refused("export", run, "--out", tmp_path / "out", word="No space left on device")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_trained_on_known_files_and_folders_only(world, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "rows.pdf").write_text("x")
    out = ("--kind", "char", "--out", tmp_path / "t")
    refused("tokenizer", "train", tmp_path / "rows.json", *out, word="empty; remove it")
    refused("tokenizer", "train", tmp_path / "rows.pdf", *out, word="a PDF; convert it to text first")
    refused("tokenizer", "train", tmp_path / "data", *out, word="compressed or not); name another")
    refused("tokenizer", "train", tmp_path / "none.txt", *out, word="no such file or folder; name another")
    shutil.copy(world.folder / "chats.jsonl", tmp_path / "data")
    assert pertoken("tokenizer", "train", tmp_path / "data", *out)[0] == 0


def test_a_tokenizer_replaces_nothing_unless_told_to(world, tmp_path):
    chats, out = world.folder / "chats.jsonl", tmp_path / "t"
    train = ("tokenizer", "train", chats, "--kind", "char", "--out", out)
    assert pertoken(*train)[0] == 0
    (out / "tokenizer.json").write_text("mine")
    (out / "notes.txt").write_text("mine")
    refused(*train, word="or replace them with --overwrite")
    assert (out / "tokenizer.json").read_text() == "mine"
    assert pertoken(*train, "--overwrite")[0] == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "tokenizer.json").read_text() != "mine"
    (out / "added_tokens.json").write_text("{}")
    refused(*train, "--overwrite", word="added_tokens.json of another kind of tokenizer")
    (tmp_path / "file").touch()
    refused(*train[:-1], tmp_path / "file", word="cannot be written")

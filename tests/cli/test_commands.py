"""The commands, as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import World, pertoken, rows_of

from pertoken import load_model, load_tokenizer
from pertoken.inference.chat import ChatSession
from pertoken.model.decoder import CausalLM
from pertoken.recipe.starter import STARTERS

COMMANDS = "train prepare eval inspect replay generate chat export tokenizer new demo".split()


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory):
    """A model trained for a while through the command line."""
    out = tmp_path_factory.mktemp("cli") / "run"
    recipe = world.write_recipe(out, train__max_steps=60, train__learning_rate=1e-2)
    code, printed, err = pertoken("train", recipe)
    assert code == 0, err
    return out, printed


def test_help_lists_every_command():
    code, out, _ = pertoken("--help")
    assert code == 0
    for command in COMMANDS:
        assert re.search(rf"^\s+{command}\s", out, re.MULTILINE), command


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "tokenizer"])
def test_every_command_has_help(command):
    code, out, _ = pertoken(command, "--help")
    assert code == 0
    assert "Usage: pertoken" in out


@pytest.mark.parametrize("stage", STARTERS)
def test_new_prints_the_starter(stage):
    assert pertoken("new", stage) == (0, STARTERS[stage], "")


USER_ERRORS = {
    "no recipe": (["train", "nowhere.toml"], "nowhere.toml: cannot be read"),
    "no stage": (["new", "dpo"], "dpo: no such recipe; there are sft, pretrain"),
    "no model": (["eval", "nowhere", "x.jsonl"], "nowhere: not a run, not a model folder"),
    "no data": (["eval", "{run}", "nowhere.jsonl"], "nowhere.jsonl"),
    "no such row": (["inspect", "{run}", "{chats}", "--row", "999"], "row 999 made no sample"),
    "negative temperature": (["generate", "{run}", "--prompt", "a", "--temperature", "-1"], "temperature"),
    "unknown format": (["export", "{run}", "--format", "onnx", "--out", "x"], "--format onnx: must be hf or minimind"),
    "demo into a full folder": (["demo", "--out", "{world}"], "is not empty; name a new folder"),
    "tokenizer too small": (["tokenizer", "train", "{chats}", "--vocab-size", "9", "--out", "x"], "vocab_size=9"),
    "unknown option": (["train", "--no-such-option"], "No such option"),
    "eval key": (["eval", "{run}", "{chats}", "data.max_len=3"], "data.max_len: unknown key; did you mean"),
}


@pytest.mark.parametrize("name", USER_ERRORS)
def test_a_users_mistake_is_one_message_on_stderr_and_exit_2(name, run, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = USER_ERRORS[name]
    values = {"run": run[0], "chats": world.folder / "chats.jsonl", "world": world.folder}
    code, _, err = pertoken(*(a.format(**values) for a in arguments))
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_bad_rows_are_listed_with_file_and_line_and_skipping_them_is_possible(world, tmp_path):
    bad = tmp_path / "bad.jsonl"
    good = (world.folder / "chats.jsonl").read_text().splitlines()
    bad.write_text("\n".join(["{", *good[:5], '{"messages": []}', '{"messages": [{"role": "owl", "content": "hu"}]}']))
    recipe = world.write_recipe(tmp_path / "recipe", data__path=str(bad), train__max_steps=1)
    code, _, err = pertoken("train", recipe)
    assert code == 2
    for line in (1, 7, 8):
        assert f"bad.jsonl:{line}: " in err
    assert 'data.on_bad_row="skip"' in err
    assert not (tmp_path / "recipe").exists(), "nothing was trained on"
    code, out, err = pertoken("train", recipe, "data.on_bad_row=skip")
    assert code == 0, err
    listed = re.search(r"3 bad rows skipped, listed in (\S+)", out)
    assert Path(listed[1]).read_text().count("bad.jsonl:") == 3


def test_a_token_id_outside_of_the_models_vocabulary_names_file_and_line(world, tmp_path):
    recipe = world.write_recipe(tmp_path / "recipe", model__vocab_size=10)
    code, _, err = pertoken("train", recipe)
    assert code == 2
    assert re.search(r"chats\.jsonl:1: .*outside the model's vocabulary of 10", err)


def test_the_summary_says_what_is_about_to_be_trained(run, world):
    printed = run[1]
    for part in (
        "101 to train on, 12 to evaluate on",
        "1 rank x",
        "60 over 9 epochs",
        "float32 on cpu",
        " parameters",
        "expected",
        "chats.jsonl:",
        "⟧",
    ):
        assert part in printed, part
    supervised = "".join(re.findall("⟦(.*?)⟧", printed, re.DOTALL))
    assert "<|im_end|>" in supervised
    assert "user" not in supervised
    assert re.search(r"step 60 .*eval .*ppl .*bits/byte", printed)


def test_eval_gives_the_loss_the_run_ended_with(run, world, tmp_path):
    out, _ = run
    code, printed, err = pertoken("eval", out, world.folder / "held-out.jsonl", "--json", tmp_path / "e.json")
    assert code == 0, err
    last = rows_of(out)[-1]
    figures = json.loads((tmp_path / "e.json").read_text())
    assert figures["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(last["eval_bits_per_byte"], rel=1e-6)
    assert f"{figures['perplexity']:.4f}" in printed


def test_eval_of_raw_text_and_of_a_folder_without_a_recipe(run, world, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sings under the moon")
    out = tmp_path / "hf"
    assert pertoken("export", run[0], "--out", out)[0] == 0
    code, _, err = pertoken("eval", out, text, "--json", tmp_path / "e.json")
    assert code == 0, err
    figures = json.loads((tmp_path / "e.json").read_text())
    assert figures["num_tokens"] == len("the cat sings under the moon"), "all but the first character, and EOS"
    assert figures["num_bytes"] == len("the cat sings under the moon") - 1


def test_inspect_shows_each_token_with_its_label_and_loss(run, world):
    code, out, err = pertoken("inspect", run[0], world.folder / "chats.jsonl", "--row", "3")
    assert code == 0, err
    assert "chats.jsonl:3" in out
    body = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    supervised = [cells for cells in body if cells[4].strip() == "yes"]
    assert supervised[-1][2].strip() == "<|im_end|>"
    row = json.loads((world.folder / "chats.jsonl").read_text().splitlines()[2])
    answer = row["messages"][1]["content"]
    said = "".join(cells[2].strip() or " " for cells in supervised[:-1])
    assert said == answer
    mean = np.mean([float(cells[5]) for cells in supervised])
    shown = float(re.search(r"mean loss of these: ([\d.]+)", out)[1])
    assert shown == pytest.approx(mean, abs=1e-3)


def test_generate_equals_transformers_greedy_on_the_checkpoint_folder(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = next((run[0] / "checkpoints").glob("step-*60"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "red cat"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, return_tensors="pt")
    ended = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids.input_ids.shape[1] :]
    expected = tokenizer.decode(ended, skip_special_tokens=True)
    assert len(expected) > 5
    code, out, err = pertoken("generate", folder, "--prompt", prompt, "--max-new-tokens", 40)
    assert code == 0, err
    assert out.rstrip("\n") == expected.rstrip("\n")
    code, by_chat, _ = pertoken("generate", run[0], "--chat", "--prompt", "red cat", "--max-new-tokens", 40)
    assert by_chat == out


def test_generation_stops_where_the_turn_ends(run, monkeypatch):
    folder = next((run[0] / "checkpoints").glob("step-*60"))
    tokenizer = load_tokenizer(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    real = CausalLM.decode
    monkeypatch.setattr(CausalLM, "decode", lambda *a: real(*a).index_fill(0, torch.tensor(end), 1e9))
    assert pertoken("generate", folder, "--prompt", "red", "--max-new-tokens", 5) == (0, "\n", "")
    assert ChatSession.load(str(folder)).stop_ids == {end}
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_chat_remembers_the_conversation_and_ends_with_the_input(run):
    options = ("--temperature", 0, "--max-new-tokens", 8)
    code, once, err = pertoken("chat", run[0], *options, stdin="red cat\n")
    assert code == 0, err
    _, twice, _ = pertoken("chat", run[0], *options, stdin="red cat\nred cat\n/new\nred cat\n/exit\nred cat\n")
    answers = twice.splitlines()
    assert len(answers) == 3
    assert answers[0] == answers[2] == once.strip("\n")


@pytest.fixture(scope="module")
def short(world, tmp_path_factory):
    """A run whose model has a context of 60 tokens."""
    folder = tmp_path_factory.mktemp("short") / "run"
    recipe = world.write_recipe(
        folder,
        model__max_position_embeddings=60,
        data__max_seq_len=60,
        data__overlong="truncate",
        train__max_steps=1,
    )
    code, _, err = pertoken("train", recipe)
    assert code == 0, err
    return folder


def test_a_chat_longer_than_the_context_drops_the_oldest_turns_says_so_and_continues(short):
    said = "red\n" * 12 + "x" * 80 + "\nred\n"
    code, out, err = pertoken("chat", short, "--temperature", 0, "--max-new-tokens", 4, stdin=said)
    assert code == 0, err
    assert len(out.splitlines()) >= 13, "every message that fits is answered, also after one that does not"
    lines = err.strip().splitlines()
    assert any("longer than the model's context; its oldest 2 messages are dropped" in line for line in lines)
    assert sum("not answered: this message takes" in line for line in lines) == 1


def test_a_message_that_leaves_little_room_is_answered_in_what_is_left(short):
    code, out, err = pertoken("chat", short, "--temperature", 0, "--max-new-tokens", 500, stdin="x" * 22 + "\n")
    assert (code, err) == (0, "")
    assert len(out) > 2, "some tokens, whatever they are, and a newline"


def test_sampling_that_cannot_be_meant_ends_the_chat_at_once(run):
    code, _, err = pertoken("chat", run[0], "--temperature", -1, stdin="red\n")
    assert code == 2
    assert "temperature=-1" in err
    code, _, err = pertoken("generate", run[0], "--prompt", "red", "--seed", 2**70)
    assert code == 2
    assert f"seed={2**70}" in err


@pytest.mark.parametrize("stdin", [b"\xff\xfe\nred\nr\xe9d\n\0\n\x1b[2J\n", b"red\xe4\xbb", b""])
def test_bytes_of_any_kind_typed_into_a_chat_end_in_no_traceback(run, stdin):
    command = [sys.executable, "-m", "pertoken", "chat", str(run[0]), "--max-new-tokens", "2", "--temperature", "0"]
    ended = subprocess.run(command, input=stdin, capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert b"Traceback" not in ended.stderr
    assert b"\x1b" not in ended.stdout + ended.stderr
    bad = sum(not _is_utf8(line) for line in stdin.split(b"\n"))
    assert ended.stderr.count(b"not UTF-8; this line was not sent") == bad


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_export_in_half_precision_and_as_minimind_and_back(run, world, tmp_path):
    from safetensors.torch import load_file

    assert pertoken("export", run[0], "--out", tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert pertoken("export", run[0], "--out", tmp_path / "half")[0] == 2, "nothing is overwritten"
    code, out, err = pertoken("export", run[0], "--format", "minimind", "--out", tmp_path / "mini")
    assert code == 0, err
    trained, back = load_model(run[0]), load_model(out.strip())
    for name, weight in trained.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight.half().float()), name
    recipe = world.write_recipe(tmp_path / "sft", init_from=out.strip(), train__max_steps=1)
    recipe.write_text(recipe.read_text().replace("max_position_embeddings = 1024", "max_position_embeddings = 32768"))
    code, _, err = pertoken("train", recipe)
    assert code == 0, err


def test_fine_tuning_from_a_run_takes_its_model_and_tokenizer(run, world, tmp_path):
    recipe = world.write_recipe(tmp_path / "more", init_from=str(run[0]), train__max_steps=1)
    text = "\n".join(line for line in recipe.read_text().splitlines() if not line.startswith("tokenizer"))
    recipe.write_text(text)
    code, _, err = pertoken("train", recipe)
    assert code == 0, err
    assert rows_of(tmp_path / "more")[0]["loss"] < rows_of(run[0])[0]["loss"] - 0.5
    code, _, err = pertoken("train", recipe, "--overwrite", "model.hidden_size=64")
    assert code == 2
    assert "model.hidden_size=64: the model at" in err


def test_added_tokens_make_room_in_a_pretrained_model(run, world, tmp_path):
    recipe = world.write_recipe(
        tmp_path / "more", init_from=str(run[0]), train__max_steps=1, data__add_tokens=["<tool>", "</tool>"]
    )
    code, _, err = pertoken("train", recipe)
    assert code == 0, err
    before, after = load_model(run[0]), load_model(tmp_path / "more")
    assert after.config.vocab_size == before.config.vocab_size + 2
    assert len(load_tokenizer(next((tmp_path / "more" / "checkpoints").glob("step-*1")))) == after.config.vocab_size


def test_prepare_builds_once_and_opens_after(world, tmp_path):
    recipe = world.write_recipe(tmp_path / "recipe", data__store=str(tmp_path / "store"))
    code, first, err = pertoken("prepare", recipe)
    assert code == 0, err
    assert "tokenized" in first
    assert "training: 101 samples" in first
    _, second, _ = pertoken("prepare", recipe)
    assert "tokenized" not in second


def test_control_characters_in_data_do_not_reach_the_terminal(world, tmp_path):
    chats = tmp_path / "chats.jsonl"
    row = {"messages": [{"role": "user", "content": "a\x1b[31mred"}, {"role": "assistant", "content": "b\x07[bold]c"}]}
    chats.write_text(json.dumps(row) + "\n")
    assert pertoken("tokenizer", "train", chats, "--kind", "char", "--out", tmp_path / "tok")[0] == 0
    recipe = world.write_recipe(
        tmp_path / "run",
        data__path=str(chats),
        data__eval_path=[],
        data__tokenizer=str(tmp_path / "tok"),
        train__max_steps=1,
    )
    _, out, err = pertoken("train", recipe)
    assert "\x1b" not in out
    assert "\x07" not in out + err
    assert "\\x1b[31mred" in out
    assert "[bold]c" in out

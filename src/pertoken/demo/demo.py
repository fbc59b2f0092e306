"""`pertoken demo`: from real chats to a model to talk to, and the figures that show what each stage was good for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pertoken.checkpoints.read import load_model
from pertoken.console import ConsoleListener, duration
from pertoken.data.batch.order import step_at
from pertoken.data.batch.pack import collate
from pertoken.data.batch.share import share_of_all
from pertoken.data.store.build import build_store
from pertoken.data.store.dataset import Dataset
from pertoken.data.tokens.tokenizer import open_tokenizer
from pertoken.data.tokens.train import train_tokenizer
from pertoken.demo.trigram import trigram_nats
from pertoken.errors import DataError, RecipeError
from pertoken.inference.chat import ChatSession
from pertoken.model.decoder import CausalLM
from pertoken.recipe.schema import Recipe
from pertoken.runs.setup import train
from pertoken.text import plain
from pertoken.training.evaluate import Evaluation, evaluate
from pertoken.training.optimizers.adamw import build_adamw
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step

__all__ = ["run_demo"]

_HELD_OUT = 0.04  # of the conversations: in neither tokenizer, pretraining nor fine-tuning
_VOCAB_SIZE = 4096
_MODEL: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 512,
    "max_position_embeddings": 1024,
}
_RESERVE_SHARE = 0.15  # of the minutes, for all that is not training
_PRETRAIN_SHARE = 0.5  # of the time for training; fine-tuning is done twice in the rest
_PROMPTS = ("Hi! How are you today?", "What do you like to do for fun?", "Do you have any pets?")


def run_demo(console: Console, out: Path, minutes: float) -> None:
    """Make everything under `out` in about `minutes`, printing as it goes. Raises RecipeError, DataError."""
    if minutes <= 0:
        raise RecipeError(f"--minutes {minutes:g}: must be more than 0")
    if out.exists() and any(out.iterdir()):
        raise RecipeError(f"--out {out}: is not empty; name a new folder")
    clock = _Clock(60 * minutes)
    out.mkdir(parents=True, exist_ok=True)

    _heading(console, "1. Real chats, and a tokenizer made from them")
    files = _write_data(out)
    train_tokenizer([str(files.text)], vocab_size=_VOCAB_SIZE, kind="bpe", out_dir=out / "tokenizer")
    console.print(
        f"{files.train_conversations:,} conversations to learn from, {files.held_out_conversations:,} held out; "
        f"{_VOCAB_SIZE:,} tokens",
        highlight=False,
    )
    dtype = "float32" if Precision("bfloat16", torch.device("cpu")).is_emulated() else "bfloat16"
    pretrain, sft, scratch = (_recipe(out, stage, dtype) for stage in ("pretrain", "sft", "sft-from-scratch"))
    pretrain_store, sft_store = _store(pretrain), _store(sft)

    _heading(console, "2. Pretraining on their text")
    speed = _tokens_per_s(pretrain, pretrain_store, dtype)
    pretrain = _with_steps(pretrain, pretrain_store, speed * clock.left() * _PRETRAIN_SHARE)
    _train(console, out, "pretrain", pretrain)
    _heading(console, "3. Fine-tuning on the conversations: the second speaker is the assistant")
    tokens = _tokens_per_s_of(out / "pretrain") * clock.left() / 2
    sft, scratch = (_with_steps(recipe, sft_store, tokens) for recipe in (sft, scratch))
    _train(console, out, "sft", sft)
    _heading(console, "4. The same fine-tuning from random weights, to see what pretraining was good for")
    _train(console, out, "sft-from-scratch", scratch)

    _heading(console, f"5. Evaluation on the {files.held_out_conversations:,} held-out conversations")
    _evaluate(console, out, files, pretrain, sft, pretrain_store)
    _heading(console, "6. A chat")
    _chat(console, out)
    _say_what_was_made(console, out, files, clock)


class _Clock:
    """The time there is for training: what remains of the total, less a share for evaluation, chat and mishaps."""

    def __init__(self, total_s: float) -> None:
        self._start = time.perf_counter()
        self._total_s = total_s

    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def left(self) -> float:
        return max(0.1 * self._total_s, (1 - _RESERVE_SHARE) * self._total_s - self.elapsed())


def _say_what_was_made(console: Console, out: Path, files: _Files, clock: _Clock) -> None:
    console.print(f"\nMade in {duration(clock.elapsed())}:", highlight=False)
    for what, path in {
        "conversations": files.conversations,
        "tokenizer": out / "tokenizer",
        "recipes": out / "recipes",
        "the pretrained model": out / "pretrain",
        "the chat model": out / "sft",
        "figures": out / "results.json",
    }.items():
        console.print(Text(plain(f"  {what:<22}{path}")))
    console.print("\nNext, try:", highlight=False)
    for command in (
        f"pertoken chat {out / 'sft'}",
        f"pertoken inspect {out / 'sft'} {files.held_out}",
        f"pertoken train {out / 'recipes' / 'sft.toml'} out_dir={out / 'sft-2'} train.learning_rate=1e-3",
        "pertoken new sft        # a recipe for conversations of your own",
    ):
        console.print(Text(plain(f"  {command}")))


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]", highlight=False)


# --- data


@dataclass(frozen=True)
class _Files:
    text: Path  # the training conversations as plain text, one a row
    conversations: Path  # the same, as messages
    held_out_text: Path
    held_out: Path
    train_conversations: int
    held_out_conversations: int


def _chitchat() -> Path:
    found = importlib.util.find_spec("chitchat_dataset")
    if found is None or found.origin is None:
        raise DataError("the demo needs real conversations; pip install chitchat-dataset==0.9.0")
    return Path(found.origin).parent / "dataset.json"


def _conversations() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(id, messages): who speaks first is the user, the other the assistant; a turn's utterances are its lines."""
    for name, chat in json.loads(_chitchat().read_text(encoding="utf-8")).items():
        messages: list[dict[str, str]] = []
        first: str | None = None
        for turn in chat["messages"]:
            for utterance in turn:
                first = first or utterance["sender"]
                role = "user" if utterance["sender"] == first else "assistant"
                text = utterance["text"].strip()
                if not text:
                    continue
                if messages and messages[-1]["role"] == role:
                    messages[-1]["content"] += "\n" + text
                else:
                    messages.append({"role": role, "content": text})
        if any(m["role"] == "assistant" for m in messages):
            yield name, messages


def _write_data(out: Path) -> _Files:
    folder = out / "data"
    folder.mkdir()
    rows: dict[bool, list[list[dict[str, str]]]] = {False: [], True: []}
    for name, messages in _conversations():
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        rows[int.from_bytes(digest, "big") < _HELD_OUT * 2**64].append(messages)

    def write(name: str, held_out: bool, row: Callable[[list[dict[str, str]]], dict[str, Any]]) -> Path:
        path = folder / name
        path.write_text(
            "".join(json.dumps(row(m), ensure_ascii=False) + "\n" for m in rows[held_out]), encoding="utf-8"
        )
        return path

    def as_text(messages: list[dict[str, str]]) -> dict[str, Any]:
        return {"text": "\n".join(m["content"] for m in messages)}

    def as_messages(messages: list[dict[str, str]]) -> dict[str, Any]:
        return {"messages": messages}

    return _Files(
        text=write("text.jsonl", False, as_text),
        conversations=write("conversations.jsonl", False, as_messages),
        held_out_text=write("held-out-text.jsonl", True, as_text),
        held_out=write("held-out.jsonl", True, as_messages),
        train_conversations=len(rows[False]),
        held_out_conversations=len(rows[True]),
    )


# --- training


def _recipe(out: Path, name: str, dtype: str) -> Recipe:
    sft = name.startswith("sft")
    values: dict[str, Any] = {
        "stage": "sft" if sft else "pretrain",
        "out_dir": str(out / name),
        "data": {
            "path": str(out / "data" / ("conversations.jsonl" if sft else "text.jsonl")),
            "tokenizer": str(out / "tokenizer"),
            "max_seq_len": 512 if sft else 256,
            "overlong": "truncate",
            "store": str(out / "store"),
        },
        "train": {
            "batch_size": 4 if sft else 8,
            "learning_rate": 2e-3 if sft else 6e-3,
            "warmup_steps": 20,
            "weight_decay": 0.1,
            "dtype": dtype,
            "device": "cpu",
        },
        "log": {"log_interval": 100},
    }
    if name == "sft":
        values["init_from"] = str(out / "pretrain")
    else:
        values["model"] = _MODEL
    return Recipe.parse(values)


def _with_steps(recipe: Recipe, store: Dataset, tokens: float) -> Recipe:
    """As many steps as `tokens` allow, at least enough to warm up."""
    tokens_per_step = float(store.lengths.mean()) * recipe.train.batch_size
    steps = max(recipe.train.warmup_steps + 10, int(tokens / tokens_per_step))
    values = recipe.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    values["train"]["max_steps"] = steps
    return Recipe.parse(values)


def _train(console: Console, out: Path, name: str, recipe: Recipe) -> None:
    path = out / "recipes" / f"{name}.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(recipe.to_toml(), encoding="utf-8")
    listener = ConsoleListener(console, log_interval=recipe.log.log_interval)
    try:
        train(recipe, listener=listener)
    finally:
        listener.close()


def _store(recipe: Recipe) -> Dataset:
    assert recipe.data.tokenizer is not None
    tokenizer = open_tokenizer(recipe.data.tokenizer)
    return build_store(recipe.data.path, stage=recipe.stage, tokenizer=tokenizer, data=recipe.data)


def _tokens_per_s(recipe: Recipe, store: Dataset, dtype: str) -> float:
    """Measured on this machine with the model to be trained, so that `--minutes` means the same everywhere."""
    model = CausalLM(recipe.model.resolve(_VOCAB_SIZE))
    precision = Precision(dtype, torch.device("cpu"))
    optimizer = build_adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
    state = TrainState(model, optimizer, precision.new_scaler(), precision)
    ids = step_at(1, num_samples=len(store), batch_size=recipe.train.batch_size, seed=0).sample_ids
    share = share_of_all([collate([store[int(i)] for i in ids])])
    times = []
    for _ in range(7):
        start = time.perf_counter()
        train_step(state, share, lr=1e-3, max_norm=1.0)
        times.append(time.perf_counter() - start)
    return float(store.lengths[ids].sum()) / statistics.median(times[2:])  # the first ones warm up


def _tokens_per_s_of(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float(sum(row["tokens"] for row in rows) / sum(row["step_s"] for row in rows))


# --- evaluation


def _evaluate(
    console: Console, out: Path, files: _Files, pretrain: Recipe, sft: Recipe, pretrain_store: Dataset
) -> None:
    """The figures, printed and written to results.json."""
    precision = Precision("float32", torch.device("cpu"))

    def held_out(recipe: Recipe, path: Path) -> Dataset:
        data = recipe.data.model_copy(update={"path": (str(path),)})
        return _store(recipe.model_copy(update={"data": data}))

    text, chats = held_out(pretrain, files.held_out_text), held_out(sft, files.held_out)

    def run(name: str, store: Dataset) -> Evaluation:
        return evaluate(load_model(out / name), store, precision, token_budget=8192)

    nats = {k: trigram_nats(pretrain_store, text, _VOCAB_SIZE, k) for k in (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)}
    add = min(nats, key=nats.__getitem__)  # the best on the held-out text itself: in the trigram's favoor
    trigram = Evaluation(nats[add], float(text.num_tokens.sum()), int(text.num_bytes.sum()))
    rows = {
        f"add-{add:g} trigram, text": trigram,
        "pretrained, text": run("pretrain", text),
        "fine-tuned from scratch, answers": run("sft-from-scratch", chats),
        "fine-tuned after pretraining, answers": run("sft", chats),
    }
    table = Table("held-out", "nats/token", "perplexity", "bits/byte")
    for name, result in rows.items():
        table.add_row(name, f"{result.loss:.3f}", f"{result.perplexity:.1f}", f"{result.bits_per_byte:.3f}")
    console.print(table)
    figures = {
        name: {"loss": r.loss, "perplexity": r.perplexity, "bits_per_byte": r.bits_per_byte} for name, r in rows.items()
    }
    (out / "results.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _chat(console: Console, out: Path) -> None:
    talker = ChatSession.load(str(out / "sft"), "cpu")
    messages: list[dict[str, Any]] = []
    for seed, prompt in enumerate(_PROMPTS):
        messages.append({"role": "user", "content": prompt})
        pieces = talker.reply(
            talker.encode_chat(messages), max_new_tokens=60, temperature=0.8, top_k=0, top_p=0.9, seed=seed
        )
        answer = "".join(pieces)
        messages.append({"role": "assistant", "content": answer})
        console.print(Text(f"  you>   {prompt}"))
        console.print(Text(plain(f"  model> {answer}")))

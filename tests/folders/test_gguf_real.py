"""SmolLM2-135M and Gemma 3 270M from GGUF: the same models as transformers' own reading of the same files."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import rows_of

from pertoken import Recipe, load_model, load_tokenizer, train
from pertoken.data.batch.order import step_at
from pertoken.demo.demo import _conversations
from pertoken.folders.gguf import count_gguf, load_gguf
from pertoken.inference.generate import generate
from pertoken.runs.data import prepare

pytestmark = pytest.mark.slow

GEMMA_TURNS = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{{ message['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "It's 3 o'clock: does she know, or not?",
    "def f(x):\n    if x:\n\treturn  x\n\n\n# 12345, 3.14",
    "今天天气很好。你好，世界！",
    "Ein Märchen für Kinder: naïve café, 👩‍🚀 🙂",
    "<b>bold</b> and\t\ttabs",
]


@dataclass(frozen=True)
class Real:
    path: Path
    model: Any  # transformers'
    tokenizer: Any  # transformers'
    chat_template: str | None  # where the file has none


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(request: pytest.FixtureRequest) -> Real:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("gguf", reason="needs the optional package gguf")
    path = request.getfixturevalue(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the GGUF reader's own
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # Which transformers takes for padding and would not train, though a chat ends its turns with it.
    model.get_input_embeddings().padding_idx = None
    return Real(path, model, tokenizer, None if request.param == "smollm2" else GEMMA_TURNS)


def chats(count: int) -> list[list[dict[str, str]]]:
    """Real ones, of few turns."""
    pytest.importorskip("chitchat_dataset", reason="needs the package chitchat-dataset")
    return [messages[:4] for _, messages in _conversations() if len(messages) >= 4][:count]


def test_the_tokenizer_encodes_as_transformers_does_from_the_same_file(real):
    ours, theirs = load_tokenizer(real.path, chat_template=real.chat_template), real.tokenizer
    template = real.chat_template or theirs.chat_template
    assert ours.chat_template == template
    texts = [*TEXTS, *(message["content"] for chat in chats(50) for message in chat)]
    texts += [ours.apply_chat_template(chat, tokenize=False) for chat in chats(50)]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_digits_of_smollm_are_pieces_of_their_own_as_its_training_had_it(smollm2):
    """Here transformers reads another tokenizer from the file: it takes "smollm" for GPT-2's pieces."""
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.tokenize("12 and  345") == ["1", "2", "Ġand", "ĠĠ", "3", "4", "5"]


def test_weights_are_bit_for_bit_those_of_transformers(real):
    model, theirs = load_gguf(real.path), real.model.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, theirs[name]), name
    assert count_gguf(real.path) == model.num_parameters


def test_logits_and_64_greedy_tokens_are_those_of_transformers(real):
    model, tokenizer = load_gguf(real.path), load_tokenizer(real.path, chat_template=real.chat_template)
    chat = [{"role": "user", "content": "Why is the sky blue? Answer in a few sentences."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    for ids in (prompt, *map(tokenizer.encode, TEXTS)):
        ids = torch.tensor(ids)
        with torch.no_grad():
            theirs = real.model(ids[None]).logits[0, -1]
            ours = model.decode(ids, model.new_cache(len(ids)))
        assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5
    for ids in (prompt, tokenizer.encode("The quick brown fox")):
        theirs = real.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64, min_new_tokens=64)
        ours = list(generate(model, ids, max_new_tokens=64))
        assert ours == theirs[0, len(ids) :].tolist()


def test_three_steps_are_those_of_a_plain_loop_over_transformers(real, tmp_path):
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats(12)))
    recipe = Recipe.parse(
        {
            "stage": "sft",
            "out_dir": str(tmp_path / "run"),
            "init_from": str(real.path),
            "data": {"path": str(data), "max_seq_len": 512, "chat_template": real.chat_template},
            "train": {
                "batch_size": 4,
                "max_steps": 3,
                "micro_batch_tokens": 256,
                "learning_rate": 1e-5,
                "weight_decay": 0.1,
                "schedule": "constant",
                "warmup_steps": 0,
                "dtype": "float32",
                "device": "cpu",
            },
            "checkpoint": {"save_optimizer": False},
        }
    )
    train(recipe)
    ours = rows_of(tmp_path / "run")
    store, _ = prepare(recipe)
    model, start = real.model, {name: weight.clone() for name, weight in real.model.state_dict().items()}
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95))
    for row in ours:
        ids = step_at(row["step"], num_samples=len(store), batch_size=4, seed=42).sample_ids
        samples = [store[int(i)] for i in ids]
        num_tokens, total = sum(int(sample.loss_mask.sum()) for sample in samples), 0.0
        for sample in samples:
            tokens, mask = torch.from_numpy(sample.tokens.astype(np.int64)), torch.tensor(sample.loss_mask)
            logits = model(input_ids=tokens[None, :-1]).logits[0]
            loss = F.cross_entropy(logits[mask], tokens[1:][mask], reduction="sum") / num_tokens
            loss.backward()
            total += loss.item()
        # torch's own norm adds float32 squares up in float32 on a CPU: 4e-5 off at 135M numbers
        norm = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad.mul_(min(1.0, 1.0 / (norm.item() + 1e-6)))
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(total, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    trained, theirs = load_model(folder).state_dict(), model.state_dict()
    moved = max(float((theirs[name] - start[name]).abs().max()) for name in trained)
    assert moved > 2e-5
    # AdamW's first steps have the size of the rate whatever the gradient's is, also where that is all rounding.
    apart = torch.cat([(trained[name] - theirs[name]).abs().flatten() for name in trained])
    assert float(apart.double().mean()) < 1e-3 * moved
    model.load_state_dict(start)
    _opens_in_transformers(folder, real)


def _opens_in_transformers(folder: Path, real: Real) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(hf_model) is type(real.model)
    for text in TEXTS:
        ids = torch.tensor(tokenizer.encode(text))
        assert ids.tolist() == real.tokenizer.encode(text)
        with torch.no_grad():
            theirs = hf_model(ids[None]).logits[0, -1]
            assert (ours.decode(ids, ours.new_cache(len(ids))) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


PEAK = """
import sys
from pathlib import Path
from pertoken.folders.gguf import load_gguf

def peak_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

import gguf, torch.nn
before = peak_kib()
model = load_gguf(sys.argv[1])
print((peak_kib() - before) * 1024 / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_loading_holds_little_more_than_the_model(gemma3):
    found = subprocess.run([sys.executable, "-c", PEAK, gemma3], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 1.15

"""What a command imports: seconds each, and the first thing that a user waits for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pertoken import Recipe
from pertoken.recipe.homes import OPTIMIZERS

# What none of this needs. Those of the second line come with torch's compiler, pandas with two calls of pyarrow.
HEAVY = "transformers huggingface_hub accelerate datasets pandas jinja2 "
HEAVY += "torch._dynamo torch._inductor sympy torch.distributed.fsdp torch.distributed.tensor"


def heavy_after(*arguments: object, also: str = "") -> str:
    """Which of the heavy modules a command has imported when it is done."""
    code = "import sys\nfrom pertoken.cli.commands import main\n"
    code += f"sys.argv = {['pertoken', *map(str, arguments)]!r}\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
    code += f"print([m for m in {HEAVY + ' ' + also!r}.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_tokenizer_is_trained_by_tokenizers_alone(text_file: Path, tmp_path: Path) -> None:
    also = "torch numpy pyarrow"
    command = ("tokenizer", "train", text_file, "--kind", "char", "--out", tmp_path / "t")
    assert heavy_after(*command, also=also) == "[]"


# bitsandbytes imports what it likes.
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adamw8bit"])
def test_a_whole_run_and_its_resume_import_nothing_heavy(
    optimizer: str, text_file: Path, char_folder: Path, tmp_path: Path
) -> None:
    recipe = Recipe.parse(
        {
            "stage": "pretrain",
            "out_dir": str(tmp_path / "run"),
            "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
            "data": {
                "path": str(text_file),
                "tokenizer": str(char_folder),
                "max_seq_len": 16,
                "eval_fraction": 0.2,
                "eval_split": "tail",
                "store": str(tmp_path / "store"),
            },
            "train": {"batch_size": 2, "max_steps": 2, "device": "cpu", "optimizer": optimizer},
        }
    )
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml())
    assert heavy_after("train", file) == "[]"
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    assert heavy_after("train", file, "--resume", "train.max_steps=3") == "[]"


@pytest.mark.parametrize("arguments", [("--help",), ("new", "sft"), ("new", "nonsense")])
def test_a_command_that_ends_at_once_has_said_all_and_gives_its_code(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    with (tmp_path / "out").open(
        "w"
    ) as out:  # not a terminal, so that Python keeps what is printed until it is flushed
        done = subprocess.run([sys.executable, "-m", "pertoken", *arguments], stdout=out, stderr=subprocess.PIPE)
    said = (tmp_path / "out").read_text()
    assert done.returncode == (2 if "nonsense" in arguments else 0)
    assert bool(said) != ("nonsense" in arguments)
    assert done.stderr.decode().startswith("error: nonsense") == ("nonsense" in arguments)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
def test_output_that_cannot_be_written_is_not_success() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "pertoken", "new", "sft"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode != 0

"""A model is loaded without being in memory twice: pages of the process's own, beyond what imports took."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pertoken.folders.adapters import adapt, save_adapter
from pertoken.folders.weights import save_folder
from pertoken.model.decoder import CausalLM
from pertoken.model.lora import Base
from pertoken.recipe.adapter import AdapterConfig
from pertoken.recipe.model import ModelConfig

MOST = 1.15  # of the model's own size, in the dtype it is loaded in

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc/self/status")

# A small model of the same kind is loaded first, so that whatever is imported and made ready once is not counted.
MEASURED = """
import re, sys, threading, time
from pathlib import Path
import torch
from pertoken.checkpoints.read import load_model
from pertoken.folders.files import check_fallback
from pertoken.hf_fallback.load import load_fallback

def own_bytes():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def load(folder):
    if sys.argv[1] == "fallback":
        return load_fallback(folder, num_weights=check_fallback(folder), dtype=torch.float32)
    return load_model(folder, blocks_dtype=torch.bfloat16 if sys.argv[1] == "frozen" else None)

def watch():
    while not done:
        seen.append(own_bytes())
        time.sleep(0.0003)

torch.set_num_threads(1)
load(Path(sys.argv[2]))
start, seen, done = own_bytes(), [], False
thread = threading.Thread(target=watch)
thread.start()
model = load(Path(sys.argv[3]))
seen.append(own_bytes())
done = True
thread.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(size, max(seen) - start, *sorted({str(p.dtype) for p in model.parameters()}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small and large models, by their size: as a float32 checkpoint, as a bfloat16 export, and an adapter for it."""
    made = {}
    sizes = {"small": {"hidden_size": 16, "vocab_size": 64}, "large": {"hidden_size": 512, "vocab_size": 8000}}
    for name, size in sizes.items():
        folder = tmp_path_factory.mktemp(name)
        config = ModelConfig.model_validate(
            {"family": "llama", "num_hidden_layers": 6, "num_attention_heads": 4, **size}
        )
        model = CausalLM(config.resolve(0), seed=0)
        save_folder(model, folder / "float32", eos_token_id=2)
        save_folder(model, folder / "bfloat16", eos_token_id=2, dtype=torch.bfloat16)
        adapt(model, AdapterConfig(kind="lora"), Base(str(folder / "bfloat16")), seed=0)
        save_adapter(model, folder / "adapter", eos_token_id=2)
        made[name] = folder
    return made


def measured(how, kind, folders):
    """(the model's bytes, the most that loading took, dtypes)"""
    arguments = [how, folders["small"] / kind, folders["large"] / kind]
    ended = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True)
    size, peak, *dtypes = ended.stdout.split()
    return int(size), int(peak), dtypes


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "adapter"])
@pytest.mark.parametrize("how", ["own", "fallback"])
def test_loading_takes_little_more_than_the_model(folders, how, kind):
    if (how, kind) == ("fallback", "adapter"):
        pytest.skip("transformers' own model is opened here without an adapter")
    size, peak, dtypes = measured(how, kind, folders)
    assert size > 70e6
    assert dtypes == ["torch.float32"]
    assert peak <= MOST * size


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "adapter"])
def test_what_stays_frozen_in_bfloat16_is_never_there_in_float32(folders, kind):
    size, peak, dtypes = measured("frozen", kind, folders)
    assert dtypes == ["torch.bfloat16", "torch.float32"]
    assert size < 70e6
    assert peak <= MOST * size

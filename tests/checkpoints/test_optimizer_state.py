"""An optimizer's state on disk is read back by its own optimizer alone, whatever shapes it has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pertoken.checkpoints.read import OPTIMIZER, Checkpoint, load_optimizer
from pertoken.checkpoints.saver import save_checkpoint
from pertoken.checkpoints.state import TrainerState
from pertoken.errors import CheckpointError
from pertoken.model.decoder import CausalLM
from pertoken.recipe.homes import OPTIMIZERS
from pertoken.recipe.model import ModelConfig
from pertoken.recipe.train import TrainConfig
from pertoken.training.optimizers import Optimizer, build_optimizer
from pertoken.training.schedule import set_lr

CONFIG = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24).resolve(11)


def made(name: str) -> tuple[CausalLM, Optimizer]:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = CausalLM(CONFIG, seed=1, dtype=torch.float32)
    return model, build_optimizer(model, TrainConfig(optimizer=name, learning_rate=1e-2, dtype="float32"))


def step(model: CausalLM, optimizer: Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    set_lr(optimizer, 0.01)
    optimizer.step()


def saved(folder: Path, model: CausalLM, optimizer: Optimizer) -> Checkpoint:
    state = TrainerState(step=2, recipe={}, data={}, scaler={}, micro_batch_tokens=0)
    return Checkpoint(
        save_checkpoint(folder, model=model, tokenizer=None, eos_token_id=0, optimizer=optimizer, state=state)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_after_a_checkpoint_is_bitwise_the_step_without_one(tmp_path: Path, name: str) -> None:
    model, optimizer = made(name)
    step(model, optimizer, 1)
    step(model, optimizer, 2)
    again, its_optimizer = made(name)
    again.load_state_dict(model.state_dict())
    load_optimizer(saved(tmp_path, model, optimizer), again, its_optimizer)
    step(model, optimizer, 3)
    step(again, its_optimizer, 3)
    for (key, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), key
        for what, value in optimizer.state[a].items():
            assert torch.equal(value, its_optimizer.state[b][what]), (key, what)
            assert value.dtype == its_optimizer.state[b][what].dtype


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    model, optimizer = made("adamw")
    step(model, optimizer, 1)
    checkpoint = saved(tmp_path, model, optimizer)
    with pytest.raises(CheckpointError, match=r"_proj\.weight has exp_avg, .*; the checkpoint belongs to another opt"):
        load_optimizer(checkpoint, *made("muon"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_of_another_shape_is_refused(tmp_path: Path, name: str) -> None:
    model, optimizer = made(name)
    step(model, optimizer, 1)
    checkpoint = saved(tmp_path, model, optimizer)
    path = checkpoint.folder / OPTIMIZER
    tensors = load_file(path)
    key = next(key for key in tensors if key.startswith("model.layers.0.mlp.up_proj.weight/") and tensors[key].ndim)
    save_file(tensors | {key: tensors[key].mT.contiguous()}, path)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight/\w+ has shape .*; the checkpoint belongs to another m"):
        load_optimizer(checkpoint, *made(name))

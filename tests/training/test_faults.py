"""Where a fault shows first, and what becomes of a gradient norm that is an outlier."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import World, pertoken, rows_of, untimed
from torch import nn

from pertoken import load_model, train
from pertoken.data.batch.pack import collate
from pertoken.data.batch.sample import Sample
from pertoken.errors import NonFiniteError, RecipeError
from pertoken.hf_fallback.model import FallbackLM
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig
from pertoken.runs import loop, spikes
from pertoken.runs.replay import replay
from pertoken.runs.spikes import Spikes, SpikeStep
from pertoken.tracking.listener import Listener
from pertoken.training.faults import first_non_finite, is_finite, nearest_bad_gradient
from pertoken.training.parallel import World as Ranks
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState

pytestmark = pytest.mark.numeric

SAMPLES = [
    Sample(np.array([3, 1, 4, 1, 5, 9, 2]), np.ones(6, dtype=np.bool_)),
    Sample(np.array([6, 5, 3]), np.array([False, True])),
]


def model_of(kind: str) -> nn.Module:
    if kind == "fallback":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        return FallbackLM(GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=32)))
    config = ModelConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, use_moe=kind == "experts")
    return CausalLM(config.resolve(16), seed=1)


def spoil_output(model: nn.Module, name: str, value: float) -> None:
    """One number of what a module gives, with finite parameters."""

    def spoil(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out.view(-1)[0] = value
        return out

    model.get_submodule(name).register_forward_hook(spoil)


def spoil_parameter(model: nn.Module, name: str, value: float) -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value


LAYER = "model.layers.1"
PLANTED = {
    "an output": ("plain", spoil_output, f"{LAYER}.mlp.down_proj", f"the output of {LAYER}.mlp.down_proj"),
    "a norm's output": ("plain", spoil_output, f"{LAYER}.input_layernorm", f"the output of {LAYER}.input_layernorm"),
    "an attention's": ("plain", spoil_output, f"{LAYER}.self_attn", f"the output of {LAYER}.self_attn"),
    "of the last norm": ("plain", spoil_output, "model.norm", "the output of model.norm"),
    "an expert's": (
        "experts",
        spoil_output,
        f"{LAYER}.mlp.experts.2.gate_proj",
        f"the output of {LAYER}.mlp.experts.2.gate_proj",
    ),
    "a router": (
        "experts",
        spoil_parameter,
        f"{LAYER}.mlp.gate.weight",
        f"the output of {LAYER}.mlp.gate, whose parameter {LAYER}.mlp.gate.weight is not finite already",
    ),
    "a matrix": (
        "plain",
        spoil_parameter,
        f"{LAYER}.self_attn.v_proj.weight",
        f"the output of {LAYER}.self_attn.v_proj, whose parameter {LAYER}.self_attn.v_proj.weight "
        "is not finite already",
    ),
    "the head, tied": (
        "plain",
        spoil_parameter,
        "model.embed_tokens.weight",
        "the parameter model.embed_tokens.weight, which is not finite already",
    ),
    "transformers' modules": (
        "fallback",
        spoil_parameter,
        "hf.transformer.h.1.mlp.c_fc.weight",
        "the output of transformer.h.1.mlp.c_fc, whose parameter transformer.h.1.mlp.c_fc.weight is not finite already",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize(("dtype", "value"), [("float32", math.nan), ("bfloat16", math.inf), ("float16", -math.inf)])
def test_the_first_module_that_is_not_finite_is_named(name, dtype, value):
    kind, plant, where, said = PLANTED[name]
    model = model_of(kind)
    plant(model, where, value)
    assert first_non_finite(model, collate(SAMPLES), Precision(dtype, torch.device("cpu"))) == said


def test_what_overflows_between_modules_is_named_by_the_module_that_computes_it():
    """A gate and a projection of which each is within float16, and their product is not."""
    model = model_of("plain")
    with torch.no_grad():
        for projection in ("gate", "up"):
            model.get_parameter(f"{LAYER}.mlp.{projection}_proj.weight").mul_(2e4)
    precision = Precision("float16", torch.device("cpu"))
    found = first_non_finite(model, collate(SAMPLES), precision)
    assert found == f"what {LAYER}.mlp computes before {LAYER}.mlp.down_proj"
    assert first_non_finite(model, collate(SAMPLES), Precision("float32", torch.device("cpu"))) is None


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_found_and_cleared():
    model, precision = model_of("plain"), Precision("float32", torch.device("cpu"))

    def run_backward(out: Any) -> None:
        out.objective({"supervised": 1.0, "inputs": 1.0}).backward()
        taken.append(nearest_bad_gradient(model))

    taken: list[str | None] = []
    assert is_finite(model, collate(SAMPLES), precision, gradient_of=run_backward)
    spoil_gradient(model, f"{LAYER}.mlp.up_proj")
    assert is_finite(model, collate(SAMPLES), precision)
    assert not is_finite(model, collate(SAMPLES), precision, gradient_of=run_backward)
    assert taken == [None, f"{LAYER}.mlp.up_proj.weight"]
    assert all(p.grad is None for p in model.parameters())


def spoil_gradient(model: nn.Module, name: str) -> None:
    """What flows back into a module's output is infinite from there on."""

    def spoil(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        if out.requires_grad:
            out = out.clone()
            out.register_hook(lambda grad: grad + math.inf)
        return out

    model.get_submodule(name).register_forward_hook(spoil)


def built_with(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Every model that a run builds goes through `change`."""
    from pertoken.runs import assemble, setup

    real = setup.build_model

    def build(*args: Any) -> Any:
        model = real(*args)
        change(model)
        return model

    for module in (setup, assemble):  # a run, and a replay of it
        monkeypatch.setattr(module, "build_model", build)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_whose_gradient_is_not_finite_names_sample_and_parameter_and_replays(world, tmp_path, monkeypatch, dtype):
    """Of one sample alone: that with the letter that no other has."""
    lines = (world.folder / "chats.jsonl").read_text().splitlines(keepends=True)
    lines[29] = lines[29].replace('"content": "', '"content": "\u00df ', 1)
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(lines))

    def spoil(model: CausalLM) -> None:
        unknown = 0
        up = model.model.layers[0].mlp.up_proj

        def look(module: nn.Module, args: Any) -> None:
            nonlocal unknown
            unknown = int((args[0] == tokenizer.unk_token_id).sum())

        def back(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
            if unknown and out.requires_grad:
                out = out.clone()
                out.register_hook(lambda grad: grad * math.nan)
            return out

        model.model.embed_tokens.register_forward_pre_hook(look)
        up.register_forward_hook(back)

    from pertoken.data.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(world.folder / "tokenizer")
    built_with(monkeypatch, spoil)
    monkeypatch.setattr(
        Precision, "new_scaler", lambda self: torch.amp.GradScaler("cpu", init_scale=0.5, enabled=dtype == "float16")
    )
    run = tmp_path / "run"
    recipe = world.recipe(
        run,
        data__path=str(chats),
        data__eval_path=[],
        train__dtype=dtype,
        train__engine="plain",
        train__max_steps=7,
        train__micro_batch_tokens=600,
        model__num_hidden_layers=1,
    )
    with pytest.raises(NonFiniteError) as caught:
        train(recipe)
    step = len(rows_of(run)) + 1
    assert str(caught.value).splitlines() == [
        f"step {step}: the gradient norm is nan; the weights were not touched and step {step - 1} is saved",
        "first: the gradient of model.layers.0.mlp.up_proj.weight; the forward pass is finite",
        f"non-finite by itself: {chats}:30",
        f"look closer with: replay({str(run)!r}, step={step})",
    ]
    again = replay(run, step)
    assert again.problem == "the gradient norm is nan"
    assert f"{chats}:30" in [sample.where for sample in again.samples]


# Spikes.


def test_a_spike_is_a_norm_above_the_factor_times_the_median_of_the_last_hundred():
    norms = Spikes("warn", 10.0)
    for i in range(19):
        norms.remember(1.0 + i % 3)  # the median is 2
    assert norms.ratio(1e9) is None, "too few are known"
    norms.remember(2.0)
    for norm, ratio in ((20.0, None), (20.1, 20.1 / 2), (math.inf, None), (math.nan, None)):
        assert norms.ratio(norm) == ratio, norm
    norms.remember(math.inf)
    assert len(norms.norms) == 20
    for _ in range(60):  # a level that has changed for good
        norms.remember(100.0)
    assert norms.ratio(100.0) is None
    for _ in range(100):
        norms.remember(0.0)
    assert len(norms.norms) == 100
    assert norms.ratio(1.0) is None, "a median of 0 says nothing"
    assert Spikes("stop", 0.0, [1.0] * 50).ratio(1e9) is None, "0 turns it off"


def test_what_a_spike_does_is_the_recipes_choice():
    for mode, skipped in (("warn", False), ("skip", True)):
        assert Spikes(mode, 10.0, [1.0] * 50).skips(11.0, Ranks()) is skipped
        assert not Spikes(mode, 10.0, [1.0] * 50).skips(9.0, Ranks())
    with pytest.raises(SpikeStep, match="the gradient norm 11 is 11 times 1, the median of the last 50 steps"):
        Spikes("stop", 10.0, [1.0] * 50).skips(11.0, Ranks())


@pytest.mark.parametrize("factor", [0.5, 1.0, -1.0])
def test_a_factor_that_would_make_every_other_step_a_spike_is_refused(world, tmp_path, factor):
    with pytest.raises(RecipeError, match=r"train\.spike_factor"):
        world.recipe(tmp_path, train__spike_factor=factor)
    assert world.recipe(tmp_path, train__spike_factor=0.0).train.spike_factor == 0


class Told(Listener):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


SPIKE = 9  # the step whose gradient is a hundred times the usual


@pytest.fixture
def _a_spike(monkeypatch):
    """In step 9 of every run; and three norms are enough to call a fourth a spike."""
    samples_of, backward, step = loop.samples_of, TrainState.backward, 0

    def noted(run: Any, number: int) -> Any:
        nonlocal step
        step = number
        return samples_of(run, number)

    monkeypatch.setattr(loop, "samples_of", noted)
    monkeypatch.setattr(
        TrainState, "backward", lambda self, objective: backward(self, objective * (100 if step == SPIKE else 1))
    )
    monkeypatch.setattr(spikes, "_ENOUGH", 3)


def spiking(world: World, out: Path, mode: str, **changes: Any) -> Any:
    settings = {"train__max_steps": 11, "train__on_spike": mode, "train__spike_factor": 5.0}
    small = {"data__eval_path": [], "model__num_hidden_layers": 1, "checkpoint__keep_last": 99}
    return world.recipe(out, **(settings | small | changes))


def weights_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(load_model(run / "checkpoints" / f"step-{step:08d}").state_dict())


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("_a_spike")
@pytest.mark.parametrize(("mode", "dtype"), [("warn", "float32"), ("skip", "float32"), ("skip", "float16")])
def test_a_spike_is_told_and_its_update_left_out_if_asked(world, tmp_path, monkeypatch, mode, dtype):
    def scaler(self: Precision) -> torch.amp.GradScaler:  # a hundred times the usual must not overflow float16
        return torch.amp.GradScaler(self.device.type, init_scale=2.0**6, enabled=self.dtype == "float16")

    monkeypatch.setattr(Precision, "new_scaler", scaler)
    told, run = Told(), tmp_path / "run"
    recipe = spiking(world, run, mode, train__dtype=dtype, checkpoint__save_interval=1)
    train(recipe, listener=told)
    rows = rows_of(run)
    (row,) = (row for row in rows if "spike" in row)
    assert row["step"] == SPIKE
    assert row["spike"] > 5
    assert row.get("skipped", False) is (mode == "skip")
    unchanged = same_weights(weights_at(run, SPIKE - 1), weights_at(run, SPIKE))
    assert unchanged is (mode == "skip")
    (message,) = (text for text in told.messages if "median" in text)
    assert message.startswith(f"step {SPIKE}: the gradient norm ")
    done = {"warn": 'updated all the same (train.on_spike="warn")', "skip": 'update skipped (train.on_spike="skip")'}
    for part in (done[mode], "chats.jsonl:", " and 11 more", f"replay({str(run)!r}, step={SPIKE})"):
        assert part in message
    states = [
        json.loads((run / "checkpoints" / f"step-{step:08d}" / "trainer_state.json").read_text())
        for step in (SPIKE - 1, SPIKE)
    ]
    assert states[1]["grad_norms"] == [*states[0]["grad_norms"], row["grad_norm"]]
    if dtype == "float16":  # a finite gradient is a good sign for the scale, updated by or not
        before, after = (state["scaler"] for state in states)
        assert after["scale"] == before["scale"]
        assert after["_growth_tracker"] == before["_growth_tracker"] + 1


@pytest.mark.usefixtures("_a_spike")
def test_stop_leaves_the_step_before_and_ends_with_3_and_the_run_can_go_on(world, tmp_path):
    run = tmp_path / "run"
    recipe = tmp_path / "stop.toml"
    recipe.write_text(spiking(world, run, "stop").to_toml())
    code, _, err = pertoken("train", recipe)
    assert code == 3
    assert f"error: step {SPIKE}: the gradient norm " in err
    assert f'train.on_spike="stop": the weights were not touched and step {SPIKE - 1} is saved' in err
    assert "its samples: " in err
    assert f"pertoken replay {run} --step {SPIKE}" in err
    assert len(rows_of(run)) == SPIKE - 1
    assert pertoken("train", recipe, "--resume")[0] == 3, "the same step again"
    code, _, err = pertoken("train", recipe, "--resume", "train.on_spike=skip")
    assert code == 0, err
    assert rows_of(run)[SPIKE - 1]["skipped"]
    whole = tmp_path / "whole"
    train(spiking(world, whole, "skip"))
    assert untimed(rows_of(run)) == untimed(rows_of(whole))
    assert same_weights(weights_at(run, 11), weights_at(whole, 11))


@pytest.mark.usefixtures("_a_spike")
def test_the_window_of_norms_survives_a_resume_just_before_the_spike(world, tmp_path):
    """Without it, the norm of step 9 would have nothing to be compared with."""
    part, whole = tmp_path / "part", tmp_path / "whole"
    train(spiking(world, whole, "skip"))
    train(spiking(world, part, "skip", checkpoint__save_interval=SPIKE - 1))
    for folder in sorted((part / "checkpoints").glob("step-*"))[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (part / "checkpoints" / "best").unlink(missing_ok=True)
    train(spiking(world, part, "skip", checkpoint__save_interval=SPIKE - 1), resume=True)
    assert untimed(rows_of(part)) == untimed(rows_of(whole))
    assert same_weights(weights_at(part, 11), weights_at(whole, 11))


RANKS = """
import json
import math
import sys
from pathlib import Path
import torch
import pertoken.runs.loop as loop
from pertoken import Recipe, train
from pertoken.errors import PertokenError
from pertoken.runs import spikes
from pertoken.runs import setup as building
from pertoken.training.parallel import end_process, join_world

what = None
spikes._ENOUGH = 3
real = building.build_model
def build(*args):
    model = real(*args)
    def back(module, args, out):
        if what == "gradient" and out.requires_grad and steps[0] == 5:
            out = out.clone()
            out.register_hook(lambda grad: grad * math.nan)
        if what == "output" and steps[0] == 5:
            out = out * math.nan
        return out
    model.model.layers[0].mlp.up_proj.register_forward_hook(back)
    return model
building.build_model = build
steps = [0]
step_of = loop.samples_of
def samples_of(run, step):
    steps[0] = step
    return step_of(run, step)
loop.samples_of = samples_of
ratio = spikes.Spikes.ratio
def seen_by_rank_zero_alone(self, norm):
    return 7.0 if what in ("skip", "stop") and world.is_main and steps[0] == 5 else None
spikes.Spikes.ratio = seen_by_rank_zero_alone
with join_world("cpu") as world:
    said = {}
    for path in sys.argv[1:]:
        what = Path(path).stem
        try:
            train(Recipe.load(path))
            said[what] = "done"
        except PertokenError as error:
            said[what] = f"{type(error).__name__} {error.exit_code}: {error}"
    everyone = world.gather(said)
    assert everyone[0] == everyone[1], everyone
    if world.is_main:
        print(json.dumps(said))
end_process(0)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


RANK_CASES = {"gradient": "fsdp", "output": "ddp", "stop": "ddp", "skip": "fsdp"}


@pytest.fixture(scope="module")
def of_two_ranks(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder of runs, each with a fault in step 5 of 6, and how each ended on both ranks alike."""
    folder = tmp_path_factory.mktemp("two-ranks")
    for what, how in RANK_CASES.items():
        mode = what if what in ("stop", "skip") else "warn"
        changes = {"train__parallel": how, "train__engine": "plain", "train__max_steps": 6}
        (folder / f"{what}.toml").write_text(spiking(world, folder / what, mode, **changes).to_toml())
    script = folder / "two.py"
    script.write_text(RANKS)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, *(folder / f"{what}.toml" for what in RANK_CASES)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=200) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], printed
    return folder, json.loads(printed[0][0])


@pytest.mark.parametrize("what", RANK_CASES)
def test_two_ranks_give_up_or_skip_together_with_one_report(of_two_ranks, what):
    folder, ends = of_two_ranks
    run, said = folder / what, ends[what]
    if what == "skip":
        assert said == "done"
        assert [row.get("skipped", False) for row in rows_of(run)] == [False] * 4 + [True, False]
        return
    assert len(rows_of(run)) == 4
    assert (run / "checkpoints" / "step-00000004").is_dir()
    if what == "stop":
        assert said.startswith("SpikeError 3: step 5: the gradient norm ")
    elif what == "gradient":
        assert said.startswith("NonFiniteError 3: step 5: the gradient norm is nan")
        assert "first: the gradient of model.layers.0.mlp.up_proj.weight; the forward pass is finite" in said
    else:
        assert said.startswith("NonFiniteError 3: step 5: the loss is nan")
        assert "first: the output of model.layers.0.mlp.up_proj" in said

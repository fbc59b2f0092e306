"""One, two and three processes, DDP and FSDP2: the same run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import World, rows_of, untimed

from pertoken import Recipe, load_model, train
from pertoken.checkpoints.read import whole_optimizer_tensors

pytestmark = pytest.mark.numeric

JOBS = Path(__file__).parents[1] / "rank_jobs.py"
STEPS, STOP_AT = 30, 17
HOW = ("ddp", "fsdp")
WAYS = {
    "ddp": {"train__parallel": "ddp"},
    "fsdp": {"train__parallel": "fsdp"},
    "ddp-muon": {"train__parallel": "ddp", "train__optimizer": "muon", "train__muon_learning_rate": 4e-3},
    "fsdp-muon": {"train__parallel": "fsdp", "train__optimizer": "muon", "train__muon_learning_rate": 4e-3},
}
RESUMED = ("ddp", "fsdp", "fsdp-muon")  # under DDP, Muon's state is kept as on one rank
ONE_LEFT = {"train__batch_size": 50, "train__max_steps": 6}  # 101 samples: the last step of an epoch has one


EXPERTS = {"model__use_moe": True, "model__aux_loss_coef": 0.1, "train__max_steps": 14}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def torchrun(ranks: int, *command: object) -> list[str]:
    place = ["--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *place, *map(str, command)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run_ranks(ranks: int, *command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(torchrun(ranks, *command), capture_output=True, text=True, env=environment(), timeout=300)


def recipe_of(world: World, out: Path, **changes: Any) -> Recipe:
    """30 steps of 8 of 101 samples (so epochs end with 5), in micro-batches of at most 600 tokens."""
    settings: dict[str, Any] = {"max_steps": STEPS, "batch_size": 8, "micro_batch_tokens": 600, "schedule": "constant"}
    return world.recipe(out, **({f"train__{key}": value for key, value in settings.items()} | changes))


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run on one rank and, for each way and number of ranks, the run, its first part alone, and the
    first part's resumption."""
    folder = tmp_path_factory.mktemp("ranks")
    for way in ("ddp", "ddp-muon"):
        train(recipe_of(world, alone(folder, way), **WAYS[way]))
    train(recipe_of(world, folder / "alone-idle", **ONE_LEFT))
    train(recipe_of(world, folder / "experts", **EXPERTS))
    for ranks in (2, 3):
        jobs = []
        for way, changes in WAYS.items():
            jobs.append((recipe_of(world, folder / f"{way}{ranks}", **changes), False))
        for way in RESUMED:
            part = folder / f"{way}{ranks}-part"
            jobs.append((recipe_of(world, part, **WAYS[way], train__max_steps=STOP_AT), False))
        for how in HOW:
            name = f"{how}{ranks}"
            jobs.append((recipe_of(world, folder / f"{name}-idle", train__parallel=how, **ONE_LEFT), False))
        jobs.append((recipe_of(world, folder / f"experts{ranks}", **EXPERTS), False))
        run_jobs(ranks, folder, jobs)
    return folder


def alone(runs: Path, way: str) -> Path:
    """The run on one rank with the same optimizer."""
    return runs / ("alone-muon" if way.endswith("muon") else "alone")


def run_jobs(ranks: int, folder: Path, jobs: list[tuple[Recipe, bool]]) -> None:
    listed = [{"recipe": tomllib.loads(r.to_toml()), "resume": resume} for r, resume in jobs]
    (folder / "jobs.json").write_text(json.dumps(listed))
    done = run_ranks(ranks, JOBS, folder)
    assert done.returncode == 0, done.stderr[-3000:]


def same_curve(a: Path, b: Path, tolerance: float = 1e-5) -> None:
    rows_a, rows_b = rows_of(a), rows_of(b)
    assert [r["step"] for r in rows_a] == [r["step"] for r in rows_b] == list(range(1, STEPS + 1))
    for x, y in zip(rows_a, rows_b, strict=True):
        for key in ("loss", "grad_norm", "eval_loss"):
            assert (key in x) == (key in y) or key == "eval_loss"
            if key in x and key in y:
                assert y[key] == pytest.approx(x[key], rel=tolerance), (x["step"], key)
        for key in ("num_tokens", "samples", "tokens", "positions", "epoch", "lr"):
            assert x[key] == y[key], (x["step"], key)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_and_norms_are_those_of_one_rank(runs, way, ranks):
    same_curve(alone(runs, way), runs / f"{way}{ranks}")
    rows = rows_of(alone(runs, way))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5  # it learns, so a wrong update would show


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_sample_is_seen_exactly_once_an_epoch_over_all_ranks(runs, world, how, ranks):
    seen = [read_lists(runs / f"{how}{ranks}-seen-{rank}.jsonl") for rank in range(ranks)]
    alone = rows_of(runs / "alone")
    steps = [sorted(i for rank in seen for i in rank[step]) for step in range(STEPS)]
    assert [len(ids) for ids in steps] == [row["samples"] for row in alone]
    for first, last in ((0, 13), (13, 26)):  # two epochs of 12 steps of 8 and one of 5
        assert sorted(i for ids in steps[first:last] for i in ids) == list(range(101))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_without_a_sample_takes_part(runs, how, ranks):
    name = f"{how}{ranks}-idle"
    seen = [read_lists(runs / f"{name}-seen-{rank}.jsonl") for rank in range(ranks)]
    assert sum(not rank[2] for rank in seen) == sum(not rank[5] for rank in seen) == ranks - 1
    for x, y in zip(rows_of(runs / "alone-idle"), rows_of(runs / name), strict=True):
        assert x["samples"] == (1 if x["step"] % 3 == 0 else 50)
        assert (y["loss"], y["grad_norm"]) == pytest.approx((x["loss"], x["grad_norm"]), rel=1e-5), x["step"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_mixtures_balance_and_load_are_sums_over_ranks(runs, ranks):
    for x, y in zip(rows_of(runs / "experts"), rows_of(runs / f"experts{ranks}"), strict=True):
        for key in ("loss", "grad_norm", "aux_loss", "max_expert_share"):
            assert y[key] == pytest.approx(x[key], rel=1e-5), (x["step"], key)
        assert y["expert_load"] == pytest.approx(x["expert_load"], abs=2e-5)


def read_lists(path: Path) -> list[list[int]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_samples_of_a_step_do_not_depend_on_ranks(runs):
    def of(name: str, ranks: int) -> list[list[int]]:
        seen = [read_lists(runs / f"{name}-seen-{rank}.jsonl") for rank in range(ranks)]
        return [sorted(i for rank in seen for i in rank[step]) for step in range(STEPS)]

    assert of("ddp2", 2) == of("ddp3", 3) == of("fsdp2", 2) == of("fsdp3", 3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_checkpoint_is_whole_and_opens_anywhere(runs, way, ranks):
    folder = runs / f"{way}{ranks}" / "checkpoints" / f"step-{STEPS:08d}"
    weights, expected = load_model(folder).state_dict(), load_model(alone(runs, way)).state_dict()
    for name, tensor in expected.items():
        assert (weights[name] - tensor).abs().max() < 1e-4, name
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == sum(t.numel() for t in expected.values())
    parts = sorted(p.name for p in folder.glob("optimizer*"))
    assert len(parts) == (1 if way.startswith("ddp") else ranks + 1), parts


@pytest.mark.parametrize("way", RESUMED)
def test_a_resume_on_as_many_ranks_is_bitwise(runs, world, tmp_path, way):
    shutil.copytree(runs / f"{way}3-part", tmp_path / "run")
    run_jobs(3, tmp_path, [(recipe_of(world, tmp_path / "run", **WAYS[way]), True)])
    whole = runs / f"{way}3"
    assert state_of(tmp_path / "run") == state_of(whole)
    kept = [{k: v for k, v in r.items() if not k.startswith("eval")} for r in untimed(rows_of(tmp_path / "run"))]
    assert kept == [{k: v for k, v in r.items() if not k.startswith("eval")} for r in untimed(rows_of(whole))]


def state_of(run: Path) -> dict[str, str]:
    files = sorted((run / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("way", RESUMED)
def test_a_run_saved_on_two_ranks_goes_on_on_one_and_on_three(runs, world, tmp_path, way):
    for name in ("one", "three"):
        shutil.copytree(runs / f"{way}2-part", tmp_path / name, symlinks=True)
    train(recipe_of(world, tmp_path / "one", **WAYS[way]), resume=True)
    run_jobs(3, tmp_path, [(recipe_of(world, tmp_path / "three", **WAYS[way]), True)])
    same_curve(alone(runs, way), tmp_path / "one")
    same_curve(alone(runs, way), tmp_path / "three")
    last = f"checkpoints/step-{STEPS:08d}"
    if way.startswith("ddp"):
        moments = load_file(tmp_path / "three" / last / "optimizer.safetensors")
        for name, tensor in load_file(tmp_path / "one" / last / "optimizer.safetensors").items():
            assert (moments[name] - tensor).abs().max() <= 1e-5, name


def test_an_error_on_one_rank_ends_all_with_its_message_once(world, tmp_path):
    path = world.write_recipe(tmp_path / "run")
    for change, message in (
        ("train.lerning_rate=1", "error: train.lerning_rate: unknown key; did you mean train.learning_rate?"),
        ("data.path=/nowhere.jsonl", "error: /nowhere.jsonl: no such file or folder; correct data.path"),
    ):
        done = run_ranks(2, "-m", "pertoken", "train", path, change)
        assert done.returncode == 1  # torchrun's own
        assert done.stderr.count(message) == 1, done.stderr
        assert "exitcode: 2" in done.stderr.replace(" ", "").replace("exitcode:", "exitcode: ")
    assert not (tmp_path / "run").exists()


def test_an_error_that_only_one_rank_meets_is_the_one_shown(world, tmp_path):
    """A machine of a cluster whose disk cannot be read, say."""
    script = tmp_path / "one_bad_rank.py"
    script.write_text(
        "import os, sys\n"
        "import pertoken.runs.computation as computation\n"
        "from pertoken.cli.commands import main\n"
        "from pertoken.errors import DataError\n"
        "share_of = computation.share_of\n"
        "def bad(*args, **kwargs):\n"
        "    if os.environ['RANK'] == '1': raise DataError('store: cannot be read (Input/output error)')\n"
        "    return share_of(*args, **kwargs)\n"
        "computation.share_of = bad\n"
        "main()\n"
    )
    done = run_ranks(3, script, "train", world.write_recipe(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stderr.count("error: store: cannot be read (Input/output error)") == 1
    workers = done.stderr.split("torch/distributed/elastic")[0]
    assert "Traceback" not in workers, done.stderr


def test_only_rank_zero_prints(world, tmp_path):
    path = world.write_recipe(tmp_path / "run", train__max_steps=3, log__log_interval=1)
    done = run_ranks(2, "-m", "pertoken", "train", path)
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(f"step {step} ") for step in (1, 2, 3)] == [1, 1, 1], done.stdout
    assert done.stdout.count("done: ") == 1
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["start", "best", "saved", "end"], "rank 0 alone keeps them"


def test_a_signal_stops_all_ranks_after_the_same_step_and_saves(world, tmp_path):
    path = world.write_recipe(tmp_path / "run", train__max_steps=100_000, log__log_interval=1)
    process = subprocess.Popen(
        torchrun(2, "-m", "pertoken", "train", path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    wait_for_rows(tmp_path / "run" / "metrics.jsonl", 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    rows = rows_of(tmp_path / "run")
    assert err.count(f"stopped by SIGTERM after step {rows[-1]['step']}, saved") == 1, err
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved[-1].name == f"step-{rows[-1]['step']:08d}"


def wait_for_rows(path: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.1)


OVERFLOW = """
import sys
import torch
import torch.distributed as dist
from pertoken.recipe.model import ModelConfig
from pertoken.data.batch.pack import MicroBatch, collate
from pertoken.data.batch.share import Share
from pertoken.model.decoder import CausalLM
from pertoken.training.optimizers.adamw import build_adamw
from pertoken.training.parallel import end_process, join_world, parallelize, whole
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step

with join_world("cpu") as world:
    config = ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).resolve(64)
    model = CausalLM(config)
    precision = Precision("float16", torch.device("cpu"))
    wrapped = parallelize(model, sys.argv[1], world, device=precision.device, layers=model.layers)
    state = TrainState(wrapped, build_adamw(model, weight_decay=0.1, betas=(0.9, 0.95)), precision.new_scaler(),
                       precision, world)
    unscale = state.scaler.unscale_
    def overflow(optimizer):
        if world.rank == 1:  # in this rank's part of the gradient alone
            gradient = model.model.layers[0].mlp.up_proj.weight.grad
            getattr(gradient, "_local_tensor", gradient)[0, 0] = float("inf")
        unscale(optimizer)
    ids = torch.arange(9) + world.rank
    batch = MicroBatch(ids[:-1], ids[1:], torch.ones(8, dtype=torch.bool), torch.arange(8),
                       torch.tensor([0, 8], dtype=torch.int32), (8,))
    share = Share((batch,), (), {"supervised": 16.0, "inputs": 16.0})
    seen = []
    for step in range(3):
        state.scaler.unscale_ = overflow if step == 1 and sys.argv[1] == "fsdp" else unscale
        metrics = train_step(state, share, lr=1e-3, max_norm=1.0)
        total = float(sum(whole(p.detach()).double().sum() for p in model.parameters()))
        seen.append((metrics.skipped, state.scaler.get_scale(), total))
    everyone = world.gather(seen)
    assert everyone[0] == everyone[1], everyone
    skipped, scales, totals = zip(*everyone[0])
    if sys.argv[1] == "fsdp":
        assert skipped == (False, True, False), skipped
        assert scales == (65536.0, 32768.0, 32768.0), scales
        assert totals[1] == totals[0] != totals[2], totals
end_process(0)
"""


@pytest.mark.parametrize("how", HOW)
def test_an_overflow_in_one_ranks_shard_halves_the_scale_on_all(tmp_path, how):
    (tmp_path / "overflow.py").write_text(OVERFLOW)
    done = run_ranks(2, tmp_path / "overflow.py", how)
    assert done.returncode == 0, done.stderr


GATHERED = """
import sys
import numpy as np
import torch
from pertoken.recipe.model import ModelConfig
from pertoken.data.batch.pack import Sample, collate
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import Execution
from pertoken.training.parallel import end_process, join_world, parallelize, synchronized, whole

experts = {"use_moe": True, "num_experts_per_tok": 2} if sys.argv[1] == "experts" else {}
LOW = getattr(torch, sys.argv[2])
config = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **experts).resolve(64)
with join_world("cpu") as world:
    found, seen = [], []
    for low in (None, LOW):
        model = CausalLM(config, seed=1)
        wrapped = parallelize(model, "fsdp", world, device=torch.device("cpu"), layers=model.layers, low=low,
                              wide=model.wide_modules)
        layer = model.layers[0]  # looked at while it runs; before and after, what it has is its shards
        layer.mlp.register_forward_pre_hook(
            lambda *_, m=layer: seen.append({n: p.dtype for n, p in m.named_parameters()}))
        rng = np.random.default_rng(world.rank)
        for i in range(3):  # one of them empty on each rank
            lengths = [9, 5, 3] if i != world.rank else []
            batch = collate([Sample(rng.integers(0, 64, n + 1), rng.random(n) < 0.6) for n in lengths])
            with synchronized(wrapped, now=i == 2):
                with torch.autocast("cpu", LOW):
                    out = wrapped(batch, Execution(activation_checkpointing=sys.argv[3] == "again"))
                out.objective({"supervised": 10.0, "inputs": 30.0}).backward()
        found.append({n: whole(p.grad).clone() for n, p in model.named_parameters()})
    assert set(seen[0].values()) == {torch.float32}
    dtypes = seen[-1]
    for name, dtype in dtypes.items():
        full = "norm" in name or name.endswith("mlp.gate.weight")
        assert dtype == (torch.float32 if full else LOW), (name, dtype)
    for name, wide in found[0].items():
        assert found[1][name].dtype == torch.float32, name
        error = float((found[1][name] - wide).norm() / wide.norm().clamp(min=1e-30))
        assert error <= 4e-7, (name, error)
end_process(0)
"""


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("kind", "dtype", "blocks"),
    [("dense", "bfloat16", "once"), ("dense", "float16", "again"), ("experts", "bfloat16", "again")],
)
def test_fsdp_that_gathers_in_low_precision_has_the_gradients_of_autocast(tmp_path, ranks, kind, dtype, blocks):
    """A float32 rounding apart: bfloat16 sums of gradients would differ by 1e-3."""
    (tmp_path / "gathered.py").write_text(GATHERED)
    done = run_ranks(ranks, tmp_path / "gathered.py", kind, dtype, blocks)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ten_runs_end_without_an_abort(world, runs, tmp_path, how, ranks):
    for i in range(10):
        path = tmp_path / f"run{i}.toml"
        path.write_text(recipe_of(world, tmp_path / f"run{i}", train__parallel=how).to_toml())
        done = run_ranks(ranks, "-m", "pertoken", "train", path)
        assert done.returncode == 0, (i, done.stderr)
        same_curve(runs / "alone", tmp_path / f"run{i}")


def test_an_adapter_on_two_ranks_is_the_one_of_one_rank(world, tmp_path):
    train(recipe_of(world, tmp_path / "base", train__max_steps=12))
    lora = {"model": {}, "init_from": str(tmp_path / "base"), "adapter__kind": "lora", "train__learning_rate": 1e-2}
    lora |= {"train__max_steps": 6, "adapter__r": 4}
    train(recipe_of(world, tmp_path / "alone", **lora))
    jobs = [recipe_of(world, tmp_path / how, **lora, train__parallel=how) for how in HOW]
    jobs.append(recipe_of(world, tmp_path / "part", **lora | {"train__max_steps": 3}, train__parallel="fsdp"))
    run_jobs(2, tmp_path, [(recipe, False) for recipe in jobs])
    run_jobs(2, tmp_path, [(recipe_of(world, tmp_path / "part", **lora, train__parallel="fsdp"), True)])
    expected = load_model(tmp_path / "alone").state_dict()
    for name in (*HOW, "part"):
        for ours, theirs in zip(rows_of(tmp_path / "alone"), rows_of(tmp_path / name), strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5), name
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4), name
        found = load_model(tmp_path / name).state_dict()
        assert all(torch.allclose(found[key], expected[key], atol=1e-4) for key in expected)
        newest = tmp_path / name / "checkpoints" / "step-00000006"
        state = {key for file in newest.glob("optimizer*.safetensors") for key in load_file(file)}
        assert state
        assert all(".lora_" in key for key in state)


def test_moments_in_bfloat16_are_rounded_alike_on_any_number_of_ranks(world, tmp_path):
    """Gradients differ in their last bits, so a few roundings do; with other draws half would."""
    low = {"train__optimizer_dtype": "bfloat16", "train__max_steps": 4}
    train(recipe_of(world, tmp_path / "alone", **low))
    run_jobs(2, tmp_path, [(recipe_of(world, tmp_path / how, **low, train__parallel=how), False) for how in HOW])
    newest = Path("checkpoints") / "step-00000004"
    expected = load_file(tmp_path / "alone" / newest / "optimizer.safetensors")
    for how in HOW:
        found = whole_optimizer_tensors(tmp_path / how / newest)
        assert found.keys() == expected.keys()
        moments = [name for name in expected if not name.endswith("/step")]
        assert all(found[name].dtype == torch.bfloat16 for name in moments)
        same = sum(int((found[name] == expected[name]).sum()) for name in moments)
        assert same > 0.99 * sum(expected[name].numel() for name in moments), how

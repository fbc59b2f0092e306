"""Apple's mps: when it is taken, and that no float64 is asked of a device without it. Computed on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import World, rows_of
from torch.utils._python_dispatch import TorchDispatchMode

from pertoken import train
from pertoken.errors import RecipeError
from pertoken.model import operations
from pertoken.objective import cross_entropy, wide
from pertoken.runs import computation
from pertoken.training import gradient_stats, norms, step
from pertoken.training.optimizers import muon
from pertoken.training.precision import Precision, resolve_device

MPS = torch.device("mps")


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    return lambda there: monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)


def test_mps_is_taken_where_pytorch_has_it_and_never_unasked(available: Callable[[bool], None]) -> None:
    available(True)
    assert resolve_device("mps") == MPS
    assert resolve_device("auto").type != "mps"
    available(False)
    with pytest.raises(RecipeError, match=r'^train.device="mps": PyTorch has no such device here; use "auto" or "cpu"'):
        resolve_device("mps")


def test_mps_is_for_one_process(available: Callable[[bool], None]) -> None:
    available(True)
    with pytest.raises(RecipeError, match=r'^train.device="mps": is for one process'):
        resolve_device("mps", 1)
    with pytest.raises(RecipeError, match=r'^train.device="mps:1": PyTorch has no such device'):
        resolve_device("mps:1")


def test_float64_is_refused_there_with_the_recipe(world: World, tmp_path: Any) -> None:
    with pytest.raises(RecipeError, match=r'train.dtype="float64": train.device="mps" has no float64; set train.dtype'):
        world.recipe(tmp_path / "run", train__device="mps", train__dtype="float64")
    with pytest.raises(RecipeError, match=r'^dtype="float64": mps has none'):
        Precision("float64", MPS)
    assert world.recipe(tmp_path / "run", train__device="mps", train__dtype="float32").train.device == "mps"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_mixed_precision_there_is_that_of_the_recipe(dtype: str) -> None:
    precision = Precision(dtype, MPS)
    assert precision.low_dtype == (None if dtype == "float32" else getattr(torch, dtype))
    assert not precision.is_emulated()
    assert precision.new_scaler().is_enabled() == (dtype == "float16")


class NoFloat64(TorchDispatchMode):
    """The CPU as a device without float64: nothing becomes float64 but by what brings it to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.on_host = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_wide = isinstance(out, torch.Tensor) and out.dtype == torch.float64
        narrow = [x for x in tensors if x.dtype != torch.float64]
        assert not (is_wide and narrow and not self.on_host), f"{func} makes float64 of {narrow[0].dtype}"
        return out

    def allowed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def on_host(*args: Any) -> Any:
            self.on_host += 1
            try:
                return function(*args)
            finally:
                self.on_host -= 1

        return on_host


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> NoFloat64:
    """What may bring numbers to the host in float64 is allowed to."""
    mode = NoFloat64()
    for module in (cross_entropy, operations, step, gradient_stats, norms, muon):
        for name in ("in_float64", "_add", "sum_of_squares", "matrix_norms"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, mode.allowed(getattr(module, name)))
    return mode


def test_sums_go_to_the_host_of_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wide.device_of_sums(MPS) == torch.device("cpu")
    for name in ("cpu", "cuda:3"):
        assert wide.device_of_sums(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__dtype": "bfloat16", "train__z_loss_coef": 1e-3},
        {"train__dtype": "float32", "train__optimizer": "muon"},
        {"train__dtype": "float16"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_step_makes_no_float64_on_a_device_without_it(
    world: World,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    without_float64: NoFloat64,
    changes: dict[str, Any],
) -> None:
    monkeypatch.setattr(cross_entropy, "_kernels", lambda *_, **__: None)
    # PyTorch's own takes float32 for it on mps.
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", without_float64.allowed(torch.amp.GradScaler.unscale_))
    recipe = world.recipe(
        tmp_path / "run",
        train__max_steps=2,
        train__engine="plain",
        train__device="cpu",
        log__grad_stats=True,
        **changes,
    )
    original = step.train_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        with without_float64:
            return original(*args, **kwargs)

    monkeypatch.setattr(computation, "train_step", watched)
    train(recipe)
    assert len(rows_of(tmp_path / "run")) == 2

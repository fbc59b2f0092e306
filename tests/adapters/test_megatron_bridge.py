"""`loss_func` against the loss of megatron-bridge 0.3.1, bit for bit.

The package as a whole needs a GPU's libraries; its file of losses needs only megatron-core and is loaded by path.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron_cpu import on_cpu

from pertoken.adapters.megatron import loss_func

pytestmark = pytest.mark.slow  # an optional package: `make test-slow` installs it


@pytest.fixture(scope="module")
def losses() -> ModuleType:
    try:
        package = distribution("megatron-bridge")
    except PackageNotFoundError:
        pytest.skip("megatron-bridge is not installed (pip install --no-deps megatron-bridge==0.3.1)")
    path = package.locate_file("megatron/bridge/training/losses.py")
    spec = importlib.util.spec_from_file_location("megatron_bridge_losses", str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.detach().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 129), (4, 4099)])
def test_loss_count_report_and_gradient_are_bitwise_equal(losses, shape, share, dtype):
    generator = torch.Generator().manual_seed(1)
    loss_mask = (torch.rand(shape, generator=generator) < share).float()
    nll = torch.rand(shape, generator=generator) * 12
    ours, theirs = nll.to(dtype).requires_grad_(), nll.to(dtype).requires_grad_()
    with on_cpu():
        wanted = losses.masked_next_token_loss(loss_mask, theirs, check_for_nan_in_loss=False)
    got = loss_func(loss_mask, ours)
    for one, other in ((got[0], wanted[0]), (got[1], wanted[1]), (got[2]["lm loss"], wanted[2]["lm loss"])):
        assert bits(one) == bits(other)
    got[0].backward()
    wanted[0].backward()
    assert bits(ours.grad) == bits(theirs.grad)

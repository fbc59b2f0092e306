"""What `loss_func` returns, and what `forward_step` passes on and refuses. The engine itself: test_megatron.py."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pertoken.adapters.megatron import forward_step, loss_func, require_per_token_loss
from pertoken.errors import DataError, RecipeError

pytestmark = pytest.mark.numeric

# The contract of loss_func


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 129)])
def test_loss_func_returns_sum_count_and_report(dtype, mask_dtype, shape):
    generator = torch.Generator().manual_seed(0)
    nll = torch.rand(shape, generator=generator).to(dtype).requires_grad_()
    counted = torch.rand(shape, generator=generator) < 0.5
    loss_sum, num_tokens, report = loss_func(counted.to(mask_dtype), nll)
    wide = torch.promote_types(dtype, torch.float32)
    assert (loss_sum.dtype, loss_sum.shape) == (wide, ())
    assert torch.allclose(loss_sum, nll.to(wide)[counted].sum())
    assert (num_tokens.dtype, num_tokens.shape, int(num_tokens)) == (torch.int32, (), int(counted.sum()))
    assert list(report) == ["lm loss"]
    assert torch.equal(report["lm loss"], torch.stack([loss_sum.detach(), num_tokens.to(wide)]))
    loss_sum.backward()
    assert torch.equal(nll.grad, counted.to(dtype))


def test_the_report_shares_no_memory_with_the_loss_and_the_count():
    """Without the flag Megatron divides the loss in place, after the report was made."""
    loss_sum, num_tokens, report = loss_func(torch.ones(4, dtype=torch.bool), torch.full((4,), 2.0, requires_grad=True))
    assert not report["lm loss"].requires_grad
    with torch.no_grad():
        loss_sum /= 8
        num_tokens += 5
    assert report["lm loss"].tolist() == [8.0, 4.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_a_false_mask_covers_has_no_part_in_the_loss(bad):
    nll = torch.tensor([1.0, bad, 2.0], requires_grad=True)
    loss_sum, num_tokens, _ = loss_func(torch.tensor([1.0, 0.0, 1.0]), nll)
    loss_sum.backward()
    assert (float(loss_sum.detach()), int(num_tokens), nll.grad.tolist()) == (3.0, 2, [1.0, 0.0, 1.0])


@pytest.mark.parametrize("weight", [0.5, 2.0, -1.0, float("nan")])
def test_a_mask_of_other_than_zeros_and_ones_is_refused(weight):
    mask = torch.tensor([[1.0, weight, 0.0]])
    message = rf"^loss_mask={weight:g}: Megatron divides by an integer count"
    with pytest.raises(DataError, match=message):
        loss_func(mask, torch.ones(1, 3))
    batch = {"input_ids": torch.ones(1, 3).long(), "labels": torch.ones(1, 3).long(), "loss_mask": mask}
    with pytest.raises(DataError, match=message):
        forward_step(iter([batch]), Recorder())


def test_a_mask_that_was_not_cut_as_the_batch_was_is_refused():
    with pytest.raises(DataError, match=r"loss_mask=\[2, 8\]: the model returned losses \[2, 4\]"):
        loss_func(torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 4))


# The contract of forward_step, with a model that keeps what it was given


class Recorder(nn.Module):
    """Stands for a GPTModel of 10 tokens; on the meta device, so that whatever is not moved there shows."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(calculate_per_token_loss=True, **config)
        self.vocab_size = 10
        self.weight = nn.Parameter(torch.ones((), device="meta"))
        self.given: dict[str, Any] = {}

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, *, labels: Tensor, **more: Any
    ) -> Tensor:
        self.given = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            **more,
        }
        return self.weight * torch.zeros(input_ids.shape, device="meta")


class OnCPU(Recorder):
    """The same on the CPU, where values can be read."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        super().forward(*args, **kwargs)
        return self.weight * torch.zeros(self.given["input_ids"].shape)


def rows(**changes: Any) -> dict[str, Any]:
    batch = {
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]),
        "labels": torch.tensor([[2, 3, -100], [5, -100, -100]]),
        "loss_mask": torch.tensor([[True, True, False], [True, False, False]]),
    }
    return {key: value for key, value in {**batch, **changes}.items() if value is not None}


def test_a_label_of_minus_100_never_reaches_the_model():
    model = OnCPU()
    forward_step(iter([rows()]), model)
    assert model.given["labels"].tolist() == [[2, 3, 0], [5, 0, 0]]


def test_a_single_row_becomes_a_batch_of_one():
    model = OnCPU()
    output, loss = forward_step(iter([{key: value[0] for key, value in rows().items()}]), model)
    assert model.given["input_ids"].tolist() == [[1, 2, 3]]
    assert model.given["position_ids"].tolist() == [[0, 1, 2]]
    assert int(loss(output)[1]) == 2


@pytest.mark.parametrize("position_ids", [torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7], [5, 6, 7]])])
def test_positions_are_passed_on(position_ids):
    model = OnCPU()
    forward_step(iter([rows(position_ids=position_ids)]), model)
    assert model.given["position_ids"].tolist() == [[5, 6, 7], [5, 6, 7]]


def test_everything_moves_to_the_model_s_device():
    model = Recorder()
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    forward_step(iter([rows(attention_mask=mask)]), model)
    assert {value.device.type for value in model.given.values()} == {"meta"}


def test_the_loss_mask_goes_into_the_model_only_where_it_has_losses_of_its_own():
    plain, mtp = OnCPU(mtp_num_layers=None), OnCPU(mtp_num_layers=1)
    for model in (plain, mtp):
        forward_step(iter([rows()]), model)
    assert "loss_mask" not in plain.given
    assert torch.equal(mtp.given["loss_mask"], rows()["loss_mask"])


BROKEN = [
    (
        rows(labels=torch.tensor([[2, -100, 3], [5, 1, 1]])),
        r"^labels\[0, 1\]=-100 under a true loss_mask: .*or mask it$",
    ),
    (
        rows(labels=torch.tensor([[2, 10, 3], [5, 1, 1]])),
        r"^labels\[0, 1\]=10 under a true loss_mask: .*vocabulary of 10",
    ),
    (rows(input_ids=torch.tensor([[1, 2, 3], [4, 10, 0]])), r"^input_ids\[1, 1\]=10: .*vocabulary of 10"),
    (rows(input_ids=torch.tensor([[1, 2, 3], [4, -1, 0]])), r"^input_ids\[1, 1\]=-1: "),
    (rows(input_ids=torch.ones(2, 3)), r"^input_ids=torch.float32: token ids must be integers"),
    (rows(labels=torch.ones(2, 3)), r"^labels=torch.float32: token ids must be integers"),
    (rows(labels=None), r"^labels: is not a tensor of the batch, which has input_ids, loss_mask"),
    (rows(loss_mask=[[1, 1, 0]]), r"^loss_mask: is not a tensor"),
    (
        rows(loss_mask=torch.ones(2, 2).bool()),
        r"^input_ids \[2, 3\], labels \[2, 3\], loss_mask \[2, 2\]: must have one",
    ),
    ({key: value[None] for key, value in rows().items()}, r"must have one shape, \[B, T\] or \[T\]"),
    (rows(position_ids=torch.arange(4)), r"^position_ids=\[4\]: must be \[T\] or \[B, T\]"),
    (rows(attention_mask=torch.ones(2, 3).long()), r"^attention_mask=\[2, 3\] torch.int64: must be Megatron's"),
    (rows(cu_seqlens=torch.tensor([0, 2, 3])), r"^cu_seqlens: packed rows are not supported"),
    ((1, 2), r"^data_iterator: yields tuple; a batch is a dict of tensors"),
]


@pytest.mark.parametrize(("batch", "message"), BROKEN)
def test_a_batch_that_breaks_the_contract_says_how(batch, message):
    with pytest.raises(DataError, match=message):
        forward_step(iter([batch]), OnCPU())


def test_a_rank_without_an_iterator_is_told_so():
    with pytest.raises(DataError, match=r"^data_iterator=None: .*is_distributed = True"):
        forward_step(None, OnCPU())


def test_what_parallelism_asks_of_the_batch():
    with pytest.raises(DataError, match=r"^position_ids: are missing"):
        forward_step(iter([rows()]), OnCPU(context_parallel_size=2))
    with pytest.raises(DataError, match=r"^data_iterator: has nothing left, but pipeline stages"):
        forward_step(iter([]), OnCPU(pipeline_model_parallel_size=2, variable_seq_lengths=False))
    model = OnCPU(pipeline_model_parallel_size=2, variable_seq_lengths=True, tensor_model_parallel_size=4)
    forward_step(iter([]), model)
    assert model.given["input_ids"].shape == (1, 8)


@pytest.mark.parametrize("config", [None, SimpleNamespace(), SimpleNamespace(calculate_per_token_loss=None)])
def test_a_configuration_without_the_flag_is_refused(config):
    with pytest.raises(RecipeError, match=r"^calculate_per_token_loss=None: "):
        require_per_token_loss(config)
    model = OnCPU()
    model.config = config
    with pytest.raises(RecipeError, match=r"^calculate_per_token_loss=None: "):
        forward_step(iter([rows()]), model)


class Wrapper(nn.Module):
    """Has no configuration of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(*args, **kwargs)


def test_configuration_and_vocabulary_are_found_inside_of_wrappers():
    model = OnCPU()
    wrapped = Wrapper(Wrapper(model))
    forward_step(iter([rows()]), wrapped)
    with pytest.raises(DataError, match=r"vocabulary of 10"):
        forward_step(iter([rows(input_ids=torch.full((2, 3), 10))]), wrapped)
    model.config.calculate_per_token_loss = False
    with pytest.raises(RecipeError, match=r"^calculate_per_token_loss=False: "):
        forward_step(iter([rows()]), wrapped)


def test_the_adapter_needs_no_megatron():
    """With the package out of reach both functions still work."""
    code = """
import sys
sys.modules["megatron"] = None
from types import SimpleNamespace
import torch
from pertoken.adapters.megatron import forward_step
model = torch.nn.Linear(1, 1)
model.config = SimpleNamespace(calculate_per_token_loss=True)
model.forward = lambda ids, positions, mask, labels: model.weight.new_ones(ids.shape)
batch = {name: torch.ones(3, dtype=torch.int64) for name in ("input_ids", "labels", "loss_mask")}
output, loss = forward_step(iter([batch]), model)
print([float(x) for x in loss(output)[:2]])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[3.0, 3.0]"

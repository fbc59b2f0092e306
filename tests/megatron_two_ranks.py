"""What runs on each of two ranks for tests/adapters/test_megatron.py. One spawn serves all cases."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron_cpu import (
    LENGTHS,
    Batch,
    megatron_model,
    megatron_step,
    on_cpu,
    our_model,
    padded,
    ranks,
    regroup,
    single,
    tiny,
    wrap,
)

from pertoken.adapters import megatron as adapter
from pertoken.errors import PertokenError

MODELS = {"qwen3": ("qwen3", False), "llama": ("llama", True)}  # family, tied


def splits() -> dict[str, tuple[list[Batch], list[Batch], int, bool]]:
    """Name -> batches of rank 0, of rank 1, micro-batches per rank, whether reduction overlaps the backward pass."""
    return {
        "unequal counts": ([padded([0, 1]), single(2)], [padded([3, 4]), padded([5, 6])], 2, False),
        "one rank has no supervised token": ([padded([0, 1, 3]), padded([4, 6])], [padded([2]), single(5)], 2, False),
        "iterators end early": ([padded([0, 1, 2, 3]), padded([4, 6])], [single(5)], 3, False),
        "one rank has no data": ([padded([0, 1, 2, 3]), padded([4, 5, 6])], [], 2, False),
        "one rank has no data, reduction overlaps": ([padded([0, 1, 2, 3]), padded([4, 5, 6])], [], 2, True),
    }


def unchecked() -> Any:
    """`forward_step` without its two checks."""
    return mock.patch.multiple(adapter, require_per_token_loss=lambda _: None, _require_sums_over_ranks=lambda _: None)


def _refusal(ddp: torch.nn.Module, config: Any, mine: list[Batch]) -> str:
    try:
        megatron_step(ddp, config, mine, 2)
    except PertokenError as error:
        return str(error)
    return ""


def work(rank: int, folder: Path) -> None:
    """Writes folder/rank-R.pt: {case: Result as a dict, or the message of a refusal}."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    results: dict[str, Any] = {}
    with ranks(folder, rank, 2), on_cpu():
        _data_parallel(rank, results)
        whole = padded(list(range(len(LENGTHS))))
        rows = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(len(LENGTHS))]
        regroup(tensor=2)
        ours = our_model(tiny("llama", True))
        ddp = wrap(megatron_model(ours, tensor=2))
        results["tensor parallel"] = asdict(megatron_step(ddp, None, rows, len(rows) + 1))  # one more than there are
        regroup(pipeline=2)
        ours = our_model(tiny("qwen3", False, layers=2))
        ddp = wrap(megatron_model(ours, pipeline=2))
        results["pipeline parallel"] = asdict(megatron_step(ddp, None, rows, len(rows)))
    torch.save(results, folder / f"rank-{rank}.pt")


def _data_parallel(rank: int, results: dict[str, Any]) -> None:
    for name, (family, tied) in MODELS.items():
        ours = our_model(tiny(family, tied))
        for split, (first, second, num_micro_batches, overlap) in splits().items():
            ddp = wrap(megatron_model(ours), overlap=overlap)
            mine = second if rank else first
            results[f"{name}: {split}"] = asdict(megatron_step(ddp, ours.config, mine, num_micro_batches))
    mine = splits()["unequal counts"][rank]
    ddp = wrap(megatron_model(ours, per_token=False))
    results["default: message"] = _refusal(ddp, ours.config, mine)
    with unchecked():
        results["default: unchecked"] = asdict(megatron_step(ddp, ours.config, mine, 2))
    ddp.module.config.calculate_per_token_loss = True
    results["late: message"] = _refusal(ddp, ours.config, mine)
    with unchecked():
        results["late: unchecked"] = asdict(megatron_step(ddp, ours.config, mine, 2))

"""The ways in which one process may compute a step, each compared with the reference gradient."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pertoken.checkpoints.read import Checkpoint, load_model, load_optimizer
from pertoken.checkpoints.saver import save_checkpoint
from pertoken.checkpoints.state import TrainerState
from pertoken.data.batch.order import step_at, steps_per_epoch
from pertoken.data.batch.pack import collate
from pertoken.data.batch.share import Share, share_of
from pertoken.engines.cpu.engine import CpuEngine
from pertoken.engines.torch_compile import CompileEngine, has_compiler, not_compiled
from pertoken.errors import CompilerError
from pertoken.model.execution import PLAIN, Execution
from pertoken.model.protocol import LanguageModel
from pertoken.objective.terms import CROSS_ENTROPY
from pertoken.prove.case import EXACT, FLOAT32, FLOAT64, Case, balance_loss_of, gradient_of_step, set_balance_loss
from pertoken.prove.report import Gradient, Result, compare
from pertoken.prove.samples import Chosen
from pertoken.training.optimizers import build_optimizer
from pertoken.training.step import TrainState, train_step

__all__ = ["CLASSES", "split_of_balance"]


def _exact(name: str, case: Case, share: Share, note: str = "", execution: Execution = PLAIN) -> Result:
    got = gradient_of_step(case.model, share, precision=FLOAT64, objective=case.objective, execution=execution)
    count = len(share.micro_batches)
    note = note or (f"{count} micro-batches" if count > 1 else "all samples in one")
    return Result.judge(name, "float64", EXACT, compare(got, case.reference), note)


def one_by_one(name: str, case: Case) -> Result:
    return _exact(name, case, case.share(token_budget=1))


def all_at_once(name: str, case: Case) -> Result:
    return _exact(name, case, case.share(token_budget=case.num_inputs))


def shuffled(name: str, case: Case) -> Result:
    """Other neighbors in every micro-batch, in an order that `pack_micro_batches` would not choose."""
    order = np.random.default_rng(0).permutation(case.all_ids)
    parts = np.array_split(order, 2)
    samples = case.chosen.samples
    share = case.split()
    micro_batches = tuple(collate([samples[int(i)] for i in part]) for part in parts)
    return _exact(name, case, Share(micro_batches, tuple(parts), share.denominators))


def accumulation(name: str, case: Case) -> Result:
    return _exact(name, case, case.split())


def reference_loss(name: str, case: Case) -> Result:
    """The head's plain code, logits and all, in place of the fused one that the other classes use."""
    return _exact(name, case, case.split(), "plain logits", Execution(loss_impl="reference"))


def activation_checkpointing(name: str, case: Case) -> Result:
    return _exact(name, case, case.split(), "each block computed twice", Execution(activation_checkpointing=True))


def short_last_step(name: str, case: Case) -> Result:
    """An epoch of the chosen samples whose last step has fewer than the others."""
    count = len(case.chosen.samples) - 1
    batch_size = next((b for b in range(2, count) if count % b), 0)
    if not batch_size:
        return Result(name, "float64", "skipped", note=f"{count} samples have no shorter last step")
    steps = steps_per_epoch(count, batch_size)
    drawn = [
        step_at(s, num_samples=count, batch_size=batch_size, seed=case.train.seed).sample_ids
        for s in range(1, steps + 1)
    ]
    left = sorted(set(range(count)) - {int(i) for ids in drawn[:-1] for i in ids})
    reference = case.plain_gradient([case.chosen.samples[i] for i in left])
    share = case.share(token_budget=case.num_inputs, ids=drawn[-1])
    got = gradient_of_step(case.model, share, precision=FLOAT64, objective=case.objective)
    note = f"{len(drawn[-1])} of {batch_size} samples"
    return Result.judge(name, "float64", EXACT, compare(got, reference), note)


def _in_float32(name: str, case: Case, model: LanguageModel, note: str, execution: Execution = PLAIN) -> Result:
    share = case.split()
    got = gradient_of_step(model, share, precision=FLOAT32, objective=case.objective, execution=execution)
    return Result.judge(name, "float32", case.float32_tolerance, compare(got, case.reference), note)


def float32(name: str, case: Case) -> Result:
    return _in_float32(
        name, case, copy.deepcopy(case.model).float(), f"{len(case.split().micro_batches)} micro-batches"
    )


def compiled(name: str, case: Case) -> Result:
    if not has_compiler():
        return Result(name, "float32", "skipped", note="no C++ compiler on this machine")
    model = copy.deepcopy(case.model).float()
    why = not_compiled(model)
    if why is not None:
        return Result(name, "float32", "skipped", note=why)
    return _in_float32(name, case, model, "layers fused by torch.compile", Execution(CompileEngine()))


def kernels(name: str, case: Case) -> Result:
    """After a step under other weights, so that what is kept of weights within a step does not outlive it."""
    model = copy.deepcopy(case.model).float()
    try:
        engine = CpuEngine(torch.float32)
    except CompilerError as error:
        return Result(name, "float32", "skipped", note=str(error))
    why = engine.supports(model)
    if why is not None:
        return Result(name, "float32", "skipped", note=why)
    true = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    execution = Execution(engine)
    gradient_of_step(model, case.split(), precision=FLOAT32, objective=case.objective, execution=execution)
    model.load_state_dict(true)
    return _in_float32(name, case, model, "compiled for this processor", Execution(engine))


def resume(name: str, case: Case) -> Result:
    """Two steps, a checkpoint in mid-epoch, a third step; against the third step of what was read back."""
    count, batch_size = len(case.chosen.samples) - 1, 1
    model = copy.deepcopy(case.model).float()
    precision = FLOAT32

    def step(number: int, model: LanguageModel, optimizer: torch.optim.Optimizer) -> Gradient:
        ids = step_at(number, num_samples=count, batch_size=batch_size, seed=case.train.seed).sample_ids
        share = case.share(token_budget=case.num_inputs, ids=ids)
        kept: dict[str, torch.Tensor] = {}
        metrics = train_step(
            TrainState(model, optimizer, precision.new_scaler(), precision, objective=case.objective),
            share,
            lr=1e-3,
            max_norm=1.0,
            on_gradients=lambda: kept.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            ),
        )
        return Gradient(metrics.loss_sum / metrics.num_tokens, kept)

    optimizer = build_optimizer(model, case.train)
    step(1, model, optimizer)
    step(2, model, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        saved = save_checkpoint(
            Path(folder),
            model=model,
            tokenizer=case.tokenizer,
            eos_token_id=0,
            optimizer=optimizer,
            state=TrainerState(step=2, recipe={}, data={}, scaler={}, micro_batch_tokens=0),
        )
        again = load_model(saved)
        set_balance_loss(again, balance_loss_of(model))
        its_optimizer = build_optimizer(again, case.train)
        checkpoint = Checkpoint(saved)
        load_optimizer(checkpoint, again, its_optimizer)
        expected = step(3, model, optimizer)
        got = step(checkpoint.step + 1, again, its_optimizer)
    found = compare(got, expected)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    result = Result.judge(name, "float32", 0.0, found, "bitwise, weights after the step too")
    return result if same else Result(name, "float32", "failed", note="the weights after the step differ")


def split_of_balance(name: str, model: LanguageModel, chosen: Chosen) -> Result:
    """How far two splits of the step are apart where the balance loss is a micro-batch's; no failure, it says so."""
    ids, samples = np.arange(len(chosen.samples)), chosen.samples
    found = []
    for token_budget in (int(samples.lengths.sum()), 1):
        share = share_of(samples, ids, token_budget=token_budget)
        found.append(gradient_of_step(model, share, precision=FLOAT64, objective=CROSS_ENTROPY))
    result = Result.judge(name, "float64", EXACT, compare(found[1], found[0]), "one micro-batch against many")
    return dataclasses.replace(result, verdict="differs") if result.verdict == "failed" else result


CLASSES: dict[str, Callable[[str, Case], Result]] = {
    "one sample per micro-batch": one_by_one,
    "one micro-batch": all_at_once,
    "shuffled": shuffled,
    "accumulation": accumulation,
    "reference loss": reference_loss,
    "activation checkpointing": activation_checkpointing,
    "short last step": short_last_step,
    "float32": float32,
    "kernels": kernels,
    "compiled": compiled,
    "resume in mid-epoch": resume,
}

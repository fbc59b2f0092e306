"""Code that the chosen samples are too few or too short for: the head's several chunks, attention's several blocks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pertoken.data.batch.share import share_of
from pertoken.engines.cpu.engine import CpuEngine
from pertoken.engines.cpu.supported import unsupported
from pertoken.errors import CompilerError
from pertoken.kernels.ops import Kernels
from pertoken.model.execution import Execution
from pertoken.objective.cross_entropy import LossImpl, linear_cross_entropy
from pertoken.prove.case import EXACT, FLOAT32, FLOAT32_FACTOR, FLOAT64, Case, gradient_of_step
from pertoken.prove.report import Gradient, Result, compare, largest_error
from pertoken.prove.samples import LONG, InMemory

__all__ = ["PATH_CLASSES"]

_CHUNKS = 2.3  # the last one shorter than the others
_LOGITS_OF_A_CHUNK = 2**23  # at least 512 rows; tests/prove hold both against loss.py
_ROWS_OF_A_CHUNK = 512
_COLUMNS = 64  # of the hidden states: how many there are changes no path, and costs
_PLAIN_LOGITS = 2**24  # at a time


def head_in_chunks(name: str, case: Case) -> Result:
    """Several chunks of logits of the model's own head, against the plain formula."""
    hidden, weight, labels, mask = _head_inputs(case)
    expected = _plain_head(hidden, weight, labels, mask, case)
    found = compare(_head(hidden, weight, labels, mask, "chunked", case), expected)
    return Result.judge(name, "float64", EXACT, found, _about(labels, weight))


def head_by_kernels(name: str, case: Case) -> Result:
    try:
        Kernels(torch.float32)
    except CompilerError as error:
        return Result(name, "float32", "skipped", note=str(error))
    hidden, weight, labels, mask = _head_inputs(case)
    expected = _plain_head(hidden, weight, labels, mask, case)
    hidden, weight = hidden.float(), weight.float()
    tolerance = FLOAT32_FACTOR * largest_error(_plain_head(hidden, weight, labels, mask, case), expected)
    found = compare(_head(hidden, weight, labels, mask, "cpu", case), expected)
    return Result.judge(name, "float32", tolerance, found, _about(labels, weight))


def _about(labels: Tensor, weight: Tensor) -> str:
    return f"{len(labels):,} rows, {len(weight):,} tokens in the vocabulary"


def _head_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states drawn at random, the head's first columns, labels, and a mask.

    Every other label is the chosen samples', over and over; the rest come from all of the vocabulary.
    """
    weight = case.model.head_weight.detach()[:, :_COLUMNS].double().contiguous()
    supervised = math.ceil(_CHUNKS * max(_ROWS_OF_A_CHUNK, _LOGITS_OF_A_CHUNK / len(weight)))
    rows = supervised + supervised // 10
    samples = [case.chosen.samples[i] for i in range(len(case.chosen.samples))]
    of_samples = np.resize(np.concatenate([sample.tokens[1:] for sample in samples]).astype(np.int64), rows)
    labels = torch.from_numpy(of_samples)
    mask = torch.ones(rows, dtype=torch.bool)
    mask[::11] = False
    generator = torch.Generator().manual_seed(case.train.seed)
    hidden = torch.randn(rows, weight.shape[1], generator=generator, dtype=torch.float32).double()
    labels[1::2] = torch.randint(len(weight), (rows // 2,), generator=generator)
    return hidden, weight, labels, mask


def _head(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, impl: LossImpl, case: Case) -> Gradient:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    terms, logit_map = case.objective.row_terms, case.model.logit_map
    out = linear_cross_entropy(hidden, weight, labels, mask, impl=impl, row_terms=terms, logit_map=logit_map)
    num_tokens = float(mask.sum())
    torch.autograd.backward(out.objective({"supervised": num_tokens}))
    assert hidden.grad is not None
    assert weight.grad is not None
    return Gradient(float(out.loss_sum.detach()) / num_tokens, {"hidden states": hidden.grad, "head": weight.grad})


def _plain_head(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, case: Case) -> Gradient:
    """softmax - one hot, plus 2 log Z * softmax of the z-loss, times the slope of the logits' scale and cap, times what
    the logits are made of.

    Some rows at a time.
    """
    z_loss_coef, scale, cap = case.train.z_loss_coef, case.model.logit_map.scale, case.model.logit_map.cap
    d_hidden, d_weight, loss_sum = torch.zeros_like(hidden), torch.zeros_like(weight), 0.0
    supervised = mask.nonzero().squeeze(1)
    for rows in torch.split(supervised, max(1, _PLAIN_LOGITS // len(weight))):
        logits = hidden[rows] @ weight.T * scale
        capped = None if cap is None else torch.tanh(logits / cap)
        if cap is not None and capped is not None:
            logits = cap * capped
        log_z = logits.logsumexp(1, keepdim=True)
        log_p = torch.log_softmax(logits, 1)
        at = torch.arange(len(rows))
        loss_sum -= float(log_p[at, labels[rows]].double().sum())
        d_logits = log_p.exp_()
        if z_loss_coef:
            d_logits *= 1 + 2 * z_loss_coef * log_z
        d_logits[at, labels[rows]] -= 1
        d_logits *= scale if capped is None else scale * (1 - capped**2)
        d_hidden[rows] = d_logits @ weight / len(supervised)
        d_weight += d_logits.T @ hidden[rows] / len(supervised)
    return Gradient(loss_sum / len(supervised), {"hidden states": d_hidden, "head": d_weight})


def long_documents(name: str, case: Case) -> Result:
    """A document of several blocks of queries beside a short one.

    By the kernels in float32. A mixture in float64 by the plain modules: among so many tokens there is one whose
    experts are so close to a tie that float32 decides it otherwise.
    """
    if case.long is None:
        return Result(name, "", "skipped", note=f"no sample has more than {LONG} inputs")
    short = case.chosen.samples[0]
    samples = InMemory([case.long, short])
    reference = case.plain_gradient([case.long, short])
    share = share_of(samples, np.arange(2), token_budget=int(samples.lengths.sum()))
    note = f"{len(case.long)} inputs, {int((case.long.loss_mask != 0).sum())} of them supervised"
    model = copy.deepcopy(case.model).float()
    if case.model.facts.has_experts or unsupported(model) is not None:
        found = compare(gradient_of_step(case.model, share, precision=FLOAT64, objective=case.objective), reference)
        return Result.judge(name, "float64", EXACT, found, note)
    plain = case.plain_gradient([case.long, short], model=model)
    tolerance = FLOAT32_FACTOR * largest_error(plain, reference)
    try:
        engine = CpuEngine(torch.float32)
    except CompilerError as error:
        return Result(name, "float32", "skipped", note=str(error))
    execution = Execution(engine)
    got = gradient_of_step(model, share, precision=FLOAT32, objective=case.objective, execution=execution)
    return Result.judge(name, "float32", tolerance, compare(got, reference), note)


PATH_CLASSES: dict[str, Callable[[str, Case], Result]] = {
    "head in chunks": head_in_chunks,
    "head in chunks, kernels": head_by_kernels,
    "long documents": long_documents,
}

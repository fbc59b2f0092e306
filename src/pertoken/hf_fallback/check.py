"""What a family of transformers' does beyond our objective is found by computing with the model as it is loaded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pertoken.data.batch.pack import MicroBatch
from pertoken.errors import ModelError
from pertoken.hf_fallback.head import check_logits
from pertoken.model.protocol import LanguageModel
from pertoken.text import reason

__all__ = ["check_loss"]


@torch.no_grad()
def check_loss(model: LanguageModel, hf: Any) -> None:
    """Raise ModelError unless `model`, around transformers' `hf` and as it is trained, has the loss of its own logits.

    Tried on two samples of unequal length."""
    name = f"model_type={hf.config.model_type!r}"
    try:
        check_logits(hf)
        device = model.head_weight.device
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.facts.vocab_size, (10,), generator=generator).to(device)
        lengths = (4, 9)  # the first sample is how the second begins
        hf.eval()
        own = [hf(input_ids=tokens[None, :n], use_cache=False).logits[0] for n in lengths]
        micro_batch = MicroBatch(
            input_ids=torch.cat([tokens[:n] for n in lengths]),
            labels=torch.cat([tokens[1 : n + 1] for n in lengths]),
            loss_mask=torch.ones(sum(lengths), dtype=torch.bool, device=device),
            position_ids=torch.cat([torch.arange(n, device=device) for n in lengths]),
            cu_seqlens=torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device),
            lengths=lengths,
        )
        hf.train()
        with torch.random.fork_rng():
            ours, loss = model.logits(model.hidden_states(micro_batch)), model(micro_batch).loss_sum
    except ModelError:
        raise
    except Exception as error:  # foreign code, which may want more than token ids
        raise ModelError(f"{name}: cannot run on tokens alone ({reason(error)}); choose another model") from None
    if not _close(own[1][: lengths[0]], own[0]):
        raise ModelError(f"{name}: a token's logits depend on the tokens after it; choose a causal language model")
    own_loss = F.cross_entropy(torch.cat(own).double(), micro_batch.labels, reduction="sum")
    if not (_close(ours, torch.cat(own)) and _close(loss, own_loss)):
        raise ModelError(
            f"{name}: the loss in training is {float(loss):.6g} nats where the model's own logits give "
            f"{float(own_loss):.6g} (something drops out, or padding matters); choose another model"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to what float32 may lose on the way."""
    return bool((a.double() - b.double()).abs().max() <= 1e-4 * b.double().abs().max())

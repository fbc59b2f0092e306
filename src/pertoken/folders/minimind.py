"""MiniMind's `.pth` files in and out."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from pertoken.errors import ModelError
from pertoken.families import FAMILIES
from pertoken.files import plain_file
from pertoken.folders.weights import build_model
from pertoken.model.decoder import CausalLM
from pertoken.model.protocol import LanguageModel
from pertoken.recipe.model import ModelConfig, ResolvedModelConfig
from pertoken.text import listed

__all__ = ["load_minimind", "save_minimind"]

_MINIMIND = FAMILIES["minimind"]
# A .pth carries no configuration; MiniMind builds it with these.
_MINIMIND_ROPE_THETA, _MINIMIND_RMS_NORM_EPS = _MINIMIND.defaults["rope_theta"], _MINIMIND.defaults["rms_norm_eps"]


def load_minimind(path: str | Path, *, dtype: torch.dtype = torch.float32) -> CausalLM:
    """The model of a MiniMind `.pth` (with q/k-norm), its architecture read off the tensors' names and shapes.

    How many experts a token chooses cannot be read off them, so of a mixture it is MiniMind's default, one. The head is
    tied unless `lm_head.weight` differs from the embedding. Raises ModelError for any other file.
    """
    path = Path(path)
    try:
        tensors = torch.load(plain_file(path), map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); name a MiniMind .pth file") from None
    except Exception:  # foreign bytes lead the unpickler to errors of any kind
        raise ModelError(f"{path}: not a file of tensors; name a MiniMind .pth file (out/*.pth)") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and _whole(t) for name, t in tensors.items()):
        raise ModelError(f"{path}: not a state dict; name the weights (out/*.pth), not a resume file")
    try:
        config = _minimind_config(tensors, path)
    except (ValueError, IndexError, ZeroDivisionError):  # pydantic's error is a ValueError
        raise ModelError(f"{path}: shapes that no MiniMind model has; name a MiniMind .pth file (out/*.pth)") from None
    return build_model(config, tensors, dtype, path)


def _whole(tensor: object) -> bool:
    """Whether it is a plain tensor whose numbers are all in the file: a view may repeat one of them a billionfold."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _minimind_config(tensors: dict[str, Tensor], path: Path) -> ResolvedModelConfig:
    first = "model.layers.0."
    router = tensors.get(f"{first}mlp.gate.weight")
    names = [f"{first}self_attn.{x}.weight" for x in ("q_norm", "q_proj", "k_proj")]
    names += [f"{first}mlp.{'' if router is None else 'experts.0.'}gate_proj.weight", "model.embed_tokens.weight"]
    if missing := [name for name in names if name not in tensors]:
        raise ModelError(
            f"{path}: {listed(missing)}: missing; name a MiniMind file with q/k-norm (minimind-3 or later)"
        )
    q_norm, q_proj, k_proj, gate_proj, embedding = (tensors[name] for name in names)
    head_dim = q_norm.shape[0]
    head = tensors.get("lm_head.weight", embedding)
    layers = {int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    experts = None if router is None else router.shape[0]
    return ModelConfig(
        family=_MINIMIND.recipe_name,
        hidden_size=embedding.shape[1],
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=q_proj.shape[0] // head_dim,
        num_key_value_heads=k_proj.shape[0] // head_dim,
        head_dim=head_dim,
        intermediate_size=gate_proj.shape[0],
        rope_theta=_MINIMIND_ROPE_THETA,
        rms_norm_eps=_MINIMIND_RMS_NORM_EPS,
        tie_word_embeddings=torch.equal(head, embedding),
        use_moe=experts is not None,
        num_experts=experts,
    ).resolve(embedding.shape[0])


def save_minimind(model: LanguageModel, path: str | Path, *, dtype: torch.dtype = torch.float16) -> None:
    """A `.pth` that MiniMind loads (`strict=True` too), in float16 as MiniMind saves it unless `dtype` says otherwise.

    The file carries no configuration, so a model that MiniMind would compute differently is refused (ModelError).
    """
    if not isinstance(model, CausalLM):
        raise ModelError(f"model.family={model.facts.family!r}: MiniMind has q/k-norm; export as hf")
    config = model.config
    kinds = ("qk_norm", "qk_norm_of_all_heads", "qkv_bias", "norms", "offset_norms", "activation", "scaled_embedding")
    if config.rope_scaling is not None or any(getattr(config, k) != getattr(_MINIMIND, k) for k in kinds):
        raise ModelError(
            f"model.family={config.family!r}: MiniMind has q/k-norm head by head, no bias, plain rotary embeddings, "
            "and norms before attention and feed-forward alone; export as hf"
        )
    if (config.rope_theta, config.rms_norm_eps) != (_MINIMIND_ROPE_THETA, _MINIMIND_RMS_NORM_EPS):
        raise ModelError(
            f"model.rope_theta={config.rope_theta}, model.rms_norm_eps={config.rms_norm_eps}: a .pth has neither and "
            f"MiniMind assumes {_MINIMIND_ROPE_THETA} and {_MINIMIND_RMS_NORM_EPS}; export as hf"
        )
    if config.use_moe and (config.num_experts_per_tok, config.norm_topk_prob) != (1, True):
        raise ModelError(
            f"model.num_experts_per_tok={config.num_experts_per_tok}, model.norm_topk_prob={config.norm_topk_prob}: a "
            ".pth has neither and MiniMind assumes 1 and True; export as hf"
        )
    tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    torch.save(tensors, path)

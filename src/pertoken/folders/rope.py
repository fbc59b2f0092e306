"""Rotary embeddings in a `config.json`, in the fields of transformers 4 and 5."""

from __future__ import annotations

from typing import Any

from pertoken.families import Family
from pertoken.folders.refusals import refuse
from pertoken.recipe.model import ResolvedModelConfig
from pertoken.recipe.rope import ROPE_SCALINGS

__all__ = ["FULL", "SLIDING", "local_base_from_hf", "partial_from_hf", "refuse_rope", "rope_from_hf", "rope_to_hf"]

FULL, SLIDING = "full_attention", "sliding_attention"
# In the dict of rotary parameters beside those of a scaling.
_OF_EVERY_ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rope_from_hf(values: dict[str, Any], family: Family) -> tuple[Any, dict[str, Any] | None]:
    """(`rope_theta`, the keys of `RopeScaling` or None) of layers that see everything; `refuse_rope` comes before."""
    rope = _rope(values, family)
    kind, scaling = _rope_type(rope), None
    if kind != "default":
        required, optional = ROPE_SCALINGS[kind]
        scaling = {"rope_type": kind} | {key: rope.get(key) for key in (*required, *optional)}
    return rope.get("rope_theta", values["rope_theta"]), scaling


def local_base_from_hf(values: dict[str, Any], family: Family) -> Any:
    """`rope_theta` of layers with a window, of a type whose rotary parameters go by type of layer; None: its own."""
    local = (values.get("rope_parameters") or {}).get(SLIDING) or {}
    if family.rope_local_base_freq is not None:
        return local.get("rope_theta", values.get("rope_local_base_freq"))
    return local.get("rope_theta", values["rope_theta"])


def partial_from_hf(values: dict[str, Any], family: Family) -> Any:
    """Of a type that may have it, what part of each head is turned."""
    return _rope(values, family).get("partial_rotary_factor", values.get("partial_rotary_factor"))


def rope_to_hf(config: ResolvedModelConfig, family: Family) -> dict[str, Any]:
    """What transformers 5 writes, and what 4 reads. 5 prefers the second, with the base of `rope_theta`."""
    scaling = None if config.rope_scaling is None else config.rope_scaling.model_dump(exclude_none=True)
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    if family.by_layer_type:
        rope = {FULL: rope, SLIDING: {"rope_theta": config.rope_local_base_freq, "rope_type": "default"}}
    found: dict[str, Any] = {"rope_parameters": rope, "rope_scaling": scaling}
    if family.partial_rotary:
        rope["partial_rotary_factor"] = found["partial_rotary_factor"] = config.partial_rotary_factor
    return found


def refuse_rope(values: dict[str, Any], family: Family) -> None:
    """Raise NotCovered for rotary embeddings that the decoder lacks."""
    if family.by_layer_type and FULL not in values.get("rope_parameters", {FULL: {}}):
        refuse(values, "rope_parameters", "pertoken reads them by type of layer; write them so")
    for key in ("rope_parameters", "rope_scaling"):
        _refuse_scaling(values, key, family)
    if family.by_layer_type:
        _refuse_by_layer_type(values, family)
    if _rope_type(_rope(values, family)) != "default" and "original_max_position_embeddings" in values:
        refuse(
            values, "original_max_position_embeddings", "pertoken reads it among the rotary parameters; move it there"
        )
    if values.get("partial_rotary_factor", 1) != 1 and not family.partial_rotary:
        refuse(values, "partial_rotary_factor", "pertoken rotates whole heads; choose a model that does")


def _refuse_by_layer_type(values: dict[str, Any], family: Family) -> None:
    local = values.get("rope_parameters", {}).get(SLIDING)
    if local is not None and not _is_plain(local):
        refuse(values, "rope_parameters", f"pertoken has plain angles in layers of {SLIDING}; write them so")
    scaling = values.get("rope_scaling", {})
    if FULL in scaling or SLIDING in scaling or (scaling and "rope_type" not in scaling):
        # transformers 5 would take `type` alone for no scaling, 4 for one
        refuse(values, "rope_scaling", f"pertoken reads that of {FULL} here, with its rope_type; write it so")
    if family.rope_local_base_freq is None:
        # Where the second is not given, transformers 4 takes `rope_theta`, and 5 the type's own base.
        bases = {_rope(values, family).get("rope_theta", values["rope_theta"]), local_base_from_hf(values, family)}
        bases |= set() if local is not None and "rope_theta" in local else {family.defaults["rope_theta"]}
        if len(bases) > 1:
            key = "rope_parameters" if "rope_parameters" in values else "rope_theta"
            refuse(values, key, "pertoken has one rotary base for all layers, written for both types of layer")


def _refuse_scaling(values: dict[str, Any], key: str, family: Family) -> None:
    rope = _of_full_attention(values.get(key, {}), family)
    kind = _rope_type(rope)
    if kind not in family.rope_types:
        has = ", ".join(family.rope_types)
        refuse(values, key, f"pertoken has rope_type {has} for model_type {family.model_type}; choose one of them")
    partial = rope.get("partial_rotary_factor", 1) != 1 and not family.partial_rotary
    if partial or any(isinstance(v, dict) for v in rope.values()):
        refuse(values, key, "pertoken has one kind of rotary embeddings over whole heads; choose a model with it")
    if kind == "default":
        return
    required, optional = ROPE_SCALINGS[kind]
    # of parameters by type of layer transformers reads `truncate` where there is none
    optional = tuple(name for name in optional if name != "truncate" or not family.by_layer_type)
    if any(rope.get(name) is None for name in required) or rope.keys() - {*required, *optional, *_OF_EVERY_ROPE}:
        and_ = f" (and {', '.join(optional)})" if optional else ""
        has = f"{', '.join(required)}{and_}"
        refuse(values, key, f"a {kind} scaling has {has}, and nothing else; choose a model with these")


def _is_plain(rope: Any) -> bool:
    if not isinstance(rope, dict) or rope.keys() - set(_OF_EVERY_ROPE):
        return False
    return bool(_rope_type(rope) == "default" and rope.get("partial_rotary_factor", 1) == 1)


def _rope(values: dict[str, Any], family: Family) -> dict[str, Any]:
    """The rotary parameters that transformers takes where a file has those of version 4 and of version 5."""
    scaling, parameters = values.get("rope_scaling") or {}, values.get("rope_parameters") or {}
    if family.by_layer_type:
        return _of_full_attention(parameters, family) | scaling
    return scaling or parameters


def _of_full_attention(rope: dict[str, Any], family: Family) -> dict[str, Any]:
    """Of rotary parameters for each type of layer, those of the one type that there is."""
    one = rope.get(FULL, rope) if family.by_layer_type else rope
    return one if isinstance(one, dict) else rope


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))

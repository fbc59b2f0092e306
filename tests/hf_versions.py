"""Rotary parameters as the installed transformers takes them, and what its version 4 lacks."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

VERSION_5 = hasattr(transformers.PretrainedConfig, "standardize_rope_params")
only_5 = pytest.mark.skipif(not VERSION_5, reason="about transformers 5's own behaviour")


def rope_keys(rope: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a configuration with `rope_parameters=rope`, by type of layer or not."""
    if VERSION_5:
        return {"rope_parameters": rope}
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    keys: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] == "longrope":
        keys["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    if rope["rope_type"] != "default":
        keys["rope_scaling"] = {"rope_type": rope["rope_type"], **scaling}
    return keys if local is None else keys | {"rope_local_base_freq": local["rope_theta"]}


def with_rope(keys: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration in whose words the installed version has them."""
    other = {key: value for key, value in keys.items() if key != "rope_parameters"}
    return other | rope_keys(keys["rope_parameters"]) if "rope_parameters" in keys else keys


def rope_of(config: Any) -> dict[str, Any]:
    """A configuration's rotary parameters, of layers that see everything, in the words of version 5."""
    if VERSION_5:
        rope: dict[str, Any] = config.rope_parameters
        return rope.get("full_attention", rope)
    return {"rope_theta": config.rope_theta} | (config.rope_scaling or {"rope_type": "default"})

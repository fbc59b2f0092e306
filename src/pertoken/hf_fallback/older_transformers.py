"""What version 5 of transformers writes into a config.json and version 4 would pass over: rotary parameters.

Without a word from either, version 4 would compute the angles of other parameters.
"""

from __future__ import annotations

from typing import Any

from pertoken.errors import ModelError

__all__ = ["put_rotary_parameters"]


def put_rotary_parameters(config: Any) -> None:
    """Where this is version 4, give `config` in its fields what a file of version 5 says of rotary embeddings.

    Raises ModelError where version 4 has no fields for it: parameters by type of layer.
    """
    from transformers import PretrainedConfig

    if hasattr(PretrainedConfig, "standardize_rope_params"):  # version 5, which reads the fields of both
        return
    for part in (config, config.get_text_config()):
        rope = getattr(part, "rope_parameters", None)
        # With both, the older fields count, as in version 5.
        if not isinstance(rope, dict) or isinstance(getattr(part, "rope_scaling", None), dict):
            continue
        if any(isinstance(value, dict) for value in rope.values()):
            raise ModelError(
                "rope_parameters: by type of layer, which transformers 4 does not read; install transformers>=5"
            )
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rope:
                setattr(part, key, rope[key])
        if rope.get("rope_type") == "longrope" and "original_max_position_embeddings" in rope:
            part.original_max_position_embeddings = rope["original_max_position_embeddings"]
        if rope.get("rope_type", "default") != "default":
            part.rope_scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}

"""A config.json of transformers 5 means the same under version 4, or is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from hf_versions import VERSION_5

from pertoken.errors import ModelError
from pertoken.hf_fallback.older_transformers import put_rotary_parameters

LINEAR = {"rope_type": "linear", "factor": 2.0}


def config(**values: Any) -> Any:
    made = SimpleNamespace(**{"rope_theta": 1e4, "rope_scaling": None} | values)
    made.get_text_config = lambda: made
    return made


@pytest.fixture
def version_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "PretrainedConfig", object)


@pytest.mark.usefixtures("version_4")
def test_rotary_parameters_of_version_5_reach_the_fields_of_version_4() -> None:
    plain = config(rope_parameters={"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5})
    put_rotary_parameters(plain)
    assert (plain.rope_theta, plain.rope_scaling, plain.partial_rotary_factor) == (7.0, None, 0.5)
    scaled = config(rope_parameters={"rope_theta": 7.0, **LINEAR})
    put_rotary_parameters(scaled)
    assert (scaled.rope_theta, scaled.rope_scaling) == (7.0, LINEAR)
    longer = config(rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 64})
    put_rotary_parameters(longer)
    assert longer.original_max_position_embeddings == 64


@pytest.mark.usefixtures("version_4")
def test_the_older_fields_count_where_both_are_there() -> None:
    both = config(rope_scaling=LINEAR, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    put_rotary_parameters(both)
    assert (both.rope_theta, both.rope_scaling) == (1e4, LINEAR)


@pytest.mark.usefixtures("version_4")
def test_parameters_by_type_of_layer_are_refused() -> None:
    with pytest.raises(ModelError, match=r"by type of layer.*install transformers>=5"):
        put_rotary_parameters(config(rope_parameters={"full_attention": LINEAR, "sliding_attention": LINEAR}))


@pytest.mark.skipif(not VERSION_5, reason="about transformers 5's own behaviour")
def test_version_5_is_left_alone() -> None:
    its = config(rope_parameters={"rope_theta": 7.0, **LINEAR})
    put_rotary_parameters(its)
    assert (its.rope_theta, its.rope_scaling) == (1e4, None)

"""What goes around a library for a fast start is listed, and what is listed is there."""

from __future__ import annotations

import importlib
from functools import reduce
from pathlib import Path

import pytest

import pertoken
from pertoken.fast_start import FAST_STARTS, FastStart

SOURCE = Path(pertoken.__file__).parent
UNDOCUMENTED = ("torch.optim.adamw", "chat_template_utils", "multiprocessing.connection", "buffers()")


@pytest.mark.parametrize("listed", FAST_STARTS, ids=lambda listed: listed.place)
def test_each_place_is_there(listed: FastStart) -> None:
    module, _, name = listed.place.partition(":")
    assert reduce(getattr, name.split("."), importlib.import_module(module)) is not None
    assert listed.saves_s > 0


def test_each_undocumented_interface_is_listed() -> None:
    listed = {one.place.partition(":")[0] for one in FAST_STARTS}
    for path in SOURCE.rglob("*.py"):
        module = ".".join(("pertoken", *path.relative_to(SOURCE).with_suffix("").parts))
        found = [word for word in UNDOCUMENTED if word in path.read_text()]
        assert not found or module in {*listed, "pertoken.fast_start"}, (module, found)

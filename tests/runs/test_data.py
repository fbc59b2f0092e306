"""Ranks wait for their data as long as it takes, and none reads what another rank of its machine has read."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pertoken import Recipe

RANKS = """
import json, os, sys, time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
import pertoken.data.store.build
import pertoken.training.parallel
from pertoken import Recipe
from pertoken.errors import PertokenError
from pertoken.runs import data as run_data
from pertoken.tracking.listener import Listener

pertoken.training.parallel._PATIENCE = timedelta(seconds=2)
recipe, machines = Recipe.load(Path(sys.argv[1])), json.loads(sys.argv[2])
delay_s, others, out = float(sys.argv[3]), sys.argv[4], Path(sys.argv[5])
told, scans = [], []
scan, build_store = pertoken.data.store.build.scan, run_data.build_store

class Told(Listener):
    def message(self, text):
        told.append(text)

def counted(files):
    scans.append(len(files))
    return scan(files)

def slow(*args, **kwargs):
    time.sleep(delay_s)
    return build_store(*args, **kwargs)

pertoken.data.store.build.scan, run_data.build_store = counted, slow
with pertoken.training.parallel.join_world("cpu") as world:
    machine = machines[world.rank]
    os.environ["XDG_CACHE_HOME"] = f"{os.environ['XDG_CACHE_HOME']}-{machine}"
    if machine and others:
        data = recipe.data.model_copy(update={"path": (others,)})
        recipe = recipe.model_copy(update={"data": data})
    world = replace(world, local_rank=machines[: world.rank].count(machine))
    try:
        data, error = run_data.load_data(recipe, Told() if world.is_main else Listener(), world), None
        samples = [data.train[i].tokens.tolist() for i in range(len(data.train))]
        found = [data.train.fingerprint, data.train.files[0], samples]
    except PertokenError as problem:
        found, error = None, str(problem)
    (out / str(world.rank)).write_text(json.dumps([found, error, scans, told]))
    world.patient().barrier()
    pertoken.training.parallel.end_process(0)
"""


WAITING = "data.store is not shared: 1 of the other machines make one of their own"


def _load(tmp_path: Path, recipe: Path, machines: list[int], delay_s: float = 0.0, others: str = "") -> list[Any]:
    """[samples, error, scans, messages] of each rank. Rank i is on machine `machines[i]`, with its own cache."""
    (tmp_path / "ranks.py").write_text(RANKS)
    for left in tmp_path.glob("[0-9]"):
        left.unlink()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={len(machines)}",
        f"--master-port={port}",
    ]
    arguments = ["ranks.py", recipe, json.dumps(machines), delay_s, others, tmp_path]
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((tmp_path / str(rank)).read_text()) for rank in range(len(machines))]


@pytest.fixture
def recipe(tmp_path: Path, bpe_folder: Path) -> Path:
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"text": f"The quick brown fox {i}"}) + "\n" for i in range(9)))
    values: dict[str, Any] = {
        "stage": "pretrain",
        "out_dir": str(tmp_path / "run"),
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "data": {"path": str(data), "tokenizer": str(bpe_folder)},
    }
    file = tmp_path / "recipe.toml"
    file.write_text(Recipe.parse(values).to_toml())
    return file


def test_ranks_outwait_a_preparation_longer_than_the_groups_limit_and_read_nothing(
    tmp_path: Path, recipe: Path
) -> None:
    """Rank 0 takes 6 seconds, and a collective call of the run's own group would wait for two."""
    first, *others = _load(tmp_path, recipe, [0, 0, 0], delay_s=6.0)
    assert first[0] is not None
    assert [scans for _, _, scans, _ in (first, *others)] == [[1], [], []]
    assert [found for found, *_ in others] == [first[0]] * 2


def test_each_machine_without_the_store_builds_it_once(tmp_path: Path, recipe: Path) -> None:
    ranks = _load(tmp_path, recipe, [0, 1, 1, 0], delay_s=2.5)
    assert [scans for _, _, scans, _ in ranks] == [[1], [1], [], []]
    assert [found for found, *_ in ranks] == [ranks[0][0]] * 4
    assert ranks[0][3] == [WAITING]
    again = _load(tmp_path, recipe, [0, 1, 1, 0])
    assert again[0][3] == []
    assert [found for found, *_ in again] == [ranks[0][0]] * 4


def test_a_damaged_store_of_another_machine_is_made_again(tmp_path: Path, recipe: Path) -> None:
    ranks = _load(tmp_path, recipe, [0, 1, 1])
    (samples,) = (tmp_path / "cache-1").rglob("samples.arrow")
    raw = bytearray(samples.read_bytes())
    at = raw.index(np.array(ranks[0][0][2][0], np.int32).tobytes())
    raw[at] ^= 1  # another token
    samples.write_bytes(raw)
    again = _load(tmp_path, recipe, [0, 1, 1])
    assert [found for found, *_ in again] == [ranks[0][0]] * 3
    assert again[0][3] == [WAITING]


def test_other_data_on_another_machine_is_an_error_on_every_rank(tmp_path: Path, recipe: Path) -> None:
    other = tmp_path / "b.jsonl"
    other.write_text('{"text": "something else"}\n')
    ranks = _load(tmp_path, recipe, [0, 1], others=str(other))
    message = "data.path: rank 1 finds other data or another tokenizer there than rank 0"
    assert [error for _, error, *_ in ranks] == [message] * 2

"""Many processes that train one model: torchrun's world, DDP and FSDP2, sums over ranks.

    torchrun --nproc-per-node 4 -m pertoken train recipe.toml

Gradients and weights travel over NCCL on CUDA and gloo on CPUs; the few numbers that ranks tell each other besides
(sums of metrics, a request to stop) are host values and always go over gloo.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pertoken.errors import PertokenError
from pertoken.model.protocol import TorchModule
from pertoken.objective.terms import LossOutput, Term

__all__ = [
    "World",
    "end_process",
    "first_number",
    "first_to_fail",
    "join_world",
    "leave",
    "local",
    "parallelize",
    "shard_like",
    "synchronized",
    "whole",
]

T = TypeVar("T")
_PATIENCE = timedelta(hours=2)  # rank 0 may write a checkpoint while the others wait
_NO_LIMIT = timedelta(days=3650)


@dataclass(frozen=True)
class World:
    """The processes that train together, as one of them sees it. Alone by default, and then nothing is sent."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine
    group: dist.ProcessGroup | None = None  # of all, unless a smaller one is meant

    @property
    def is_main(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element by element over ranks: [K] on the host, the same bits on every rank."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in the order of ranks, on every rank. Small things only: they are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.all_reduce(torch.zeros(1), group=self.group)  # on the host, whatever the backend of `dist.barrier`

    def patient(self) -> World:
        """The same ranks, waiting for each other without a limit: one of them may prepare data for a day.

        Every rank must ask. A rank that dies is still noticed, by its closed connection.
        """
        if self.size == 1:
            return self
        ranks = dist.get_process_group_ranks(self.group or dist.group.WORLD)
        # Never destroyed by itself: a rank that is done first would close its connections while others still wait.
        group = dist.new_group(ranks, timeout=_NO_LIMIT, backend="gloo", use_local_synchronization=True)
        return replace(self, group=group)

    def on_main(self, work: Callable[[], T]) -> T:
        """Rank 0's `work()`, sent to every rank; where it raises a PertokenError, every rank does."""
        return self.gather(self.on_main_alone(work))[0]  # type: ignore[return-value]

    def on_main_alone(self, work: Callable[[], T]) -> T | None:
        """Rank 0's `work()`, and None elsewhere; where it raises a PertokenError, every rank does."""
        return self.together(lambda: work() if self.is_main else None)

    def together(self, work: Callable[[], T]) -> T:
        """Each rank's own `work()`; where it raises a PertokenError on one rank, every rank raises that one."""
        value: T | None = None
        problem: PertokenError | None = None
        try:
            value = work()
        except PertokenError as error:
            problem = error
        for of_a_rank in self.gather(problem):
            if of_a_rank is not None:
                raise of_a_rank
        return value  # type: ignore[return-value]


@contextmanager
def join_world(device_name: str) -> Iterator[World]:
    """The world that torchrun's variables describe, left again at the end; alone without them.

    `device_name` is the recipe's: where it means CUDA, this process gets the device of its local rank. A process group
    that exists already is used, and left alone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if size == 1:
        yield World()
        return
    mine = not dist.is_initialized()
    if mine:
        cuda = device_name != "cpu" and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    world = World(dist.get_rank(), dist.get_world_size(), local_rank)
    yield world
    if mine:  # not after an error: a rank that fails must not wait for the others
        leave(world)


def leave(world: World) -> None:
    """Destroy the process group, once every rank is done with it.

    Without the barrier, ranks that leave while others are still in a last collective abort them (seen with FSDP2 on
    three gloo ranks).
    """
    world.barrier()
    dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End this rank, with what it has said flushed and nothing else done.

    Of about fifty worlds of three gloo ranks, four had one interpreter that aborted on its way out, after all was done
    and the process group destroyed ("terminate called without an active exception", no Python frame); torchrun then
    calls the run failed.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None where it was closed from the start
            with suppress(OSError, ValueError):  # nothing that is lost there changes the exit code
                stream.flush()
    os._exit(code)


def first_to_fail() -> bool:
    """Whether no other rank has failed before this one, which then is the one to say why.

    When a rank fails, others fail in its wake: with the same error where all saw the same bad recipe, or with a broken
    connection. True outside of torchrun, and where its store cannot be asked.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    host, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "0"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
        return bool(store.add(f"pertoken/failed/{attempt}", 1) == 1)
    except (RuntimeError, ValueError):
        return True


def parallelize(
    model: TorchModule,
    how: Literal["ddp", "fsdp"],
    world: World,
    *,
    device: torch.device,
    layers: list[nn.Module],
    low: torch.dtype | None = None,
    wide: Callable[[nn.Module], list[nn.Module]] | None = None,
) -> TorchModule:
    """What to call in `model`'s place: DDP around it, or the model itself with its parameters sharded by FSDP2.

    `layers` are sharded one by one, so that only one of them is whole at a time. Alone, `model` as it is.

    With `low`, what autocast would turn a layer's matrices into, FSDP2 gathers them in it: half the bytes, and the same
    numbers. `wide(layer)` are the modules that read their parameters in full; gradients are added up and sent in
    float32 all the same.
    """
    if world.size == 1:
        return model
    if how == "ddp":
        ids = [device] if device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        # What older versions of PyTorch call `broadcast_buffers`, and newer ones warn of under that name.
        known = inspect.signature(ddp.__init__).parameters
        buffers: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
        }
        return ddp(model, device_ids=ids, process_group=world.group, gradient_as_bucket_view=True, **buffers)
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _show_fsdp_what_is_in_a_loss_output()
    group = world.group or dist.group.WORLD
    assert group is not None
    mesh = DeviceMesh.from_group(group, device.type)
    policy = MixedPrecisionPolicy()
    if low is not None and wide is not None:
        policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
    for layer in layers:
        if low is not None and wide is not None:
            fully_shard(wide(layer), mesh=mesh)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    assert isinstance(model, nn.Module)
    fully_shard(model, mesh=mesh)
    return model


def _show_fsdp_what_is_in_a_loss_output() -> None:
    """FSDP2 hooks its backward pass onto the tensors it finds in a module's output."""
    from torch.utils import _pytree

    for kind in (LossOutput, Term):
        if kind not in _pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(kind)


@contextmanager
def synchronized(model: TorchModule, now: bool) -> Iterator[None]:
    """Forward and backward inside; gradients are averaged over ranks at its end if `now`, and only added up if not."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not now:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2's; its import costs half a second
        model.set_requires_gradient_sync(now)
    yield


def whole(tensor: Tensor) -> Tensor:
    """`tensor` itself, or all of a sharded one (every rank must ask)."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def local(tensor: Tensor) -> Tensor:
    """`tensor` itself, or of a sharded one the part on this rank, which shares its memory."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def first_number(tensor: Tensor) -> int:
    """Where in the whole of a tensor that is sharded by rows this rank's part begins, in numbers; else 0."""
    if not hasattr(tensor, "full_tensor"):
        return 0
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    rows_of_a_rank = -(-tensor.shape[0] // mesh.size())  # as torch.chunk has them
    rows = min(tensor.shape[0], mesh.get_local_rank() * rows_of_a_rank)
    return rows * (tensor.numel() // max(1, tensor.shape[0]))


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor`, the same on every rank, on the parameter's device, and as it is sharded if it is."""
    tensor = tensor.to(parameter.device)
    if not hasattr(parameter, "full_tensor") or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)

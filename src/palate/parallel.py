"""The world a run lives in: how many processes, which one this is, and how their numbers become one.

This is the only file that may speak of `torch.distributed`. A world of one is the same object as any other: callers
deal work out, add, gather and ask `is_main`, and no other file asks how many processes there are.

Every rank holds the *whole* batch; only forward passes, answers and gradients are divided. So statistics of a batch
(whitening, a KL controller's mean, KTO's KL term) are the same code, and the same numbers, for any number of processes.

Strategies: `replicate` keeps whole models on each rank and adds gradients once per step; `zero2` shards gradients and
optimiser state of what trains, `zero3` also the weights, both by FSDP2 (`fully_shard`), optionally kept in CPU memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from palate import ranks
from palate.settings import PalateError

T = TypeVar("T")
Summed = TypeVar("Summed", float, Tensor, dict[str, float])
Strategy = Literal["replicate", "zero2", "zero3"]

_BUCKET = 1 << 25
"""Bytes of gradient that are added over ranks in one message."""
_CONNECTION = ("connection", "gloo", "nccl", "broken pipe", "socket", "timed out", "recvvector")


@dataclass(frozen=True)
class World:
    """The processes of one run. Rank 0 is the one that writes files and speaks to the user."""

    rank: int = 0
    size: int = 1
    strategy: Strategy = "replicate"
    offload: bool = False
    store: Any = None
    """Where ranks leave a word for each other; none in a world of one."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    @property
    def can_retry(self) -> bool:
        """Whether a rank may stop in the middle of a pass and begin again: not where passes exchange weights."""
        return self.size == 1 or self.strategy == "replicate"

    @cached_property
    def _mesh(self) -> DeviceMesh:
        return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (self.size,))

    def sum(self, value: Summed) -> Summed:
        """`value` added over all ranks, the same on each: a number, a tensor of any shape, or numbers by name."""
        if self.size == 1:
            return value
        if isinstance(value, Tensor):
            total = value.clone()
            dist.all_reduce(total)
            return total
        numbers = cast("dict[str, float]", value if isinstance(value, dict) else {"": value})
        added = torch.tensor(list(numbers.values()), dtype=torch.float64)
        dist.all_reduce(added)
        named = dict(zip(numbers, added.tolist(), strict=True))
        return cast(Any, named if isinstance(value, dict) else named[""])

    def sum_means(self, means: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """The mean over all ranks of each name from every rank's (sum, count); names without a count are left out."""
        totals = self.sum({name: total for name, (total, _) in means.items()})
        counts = self.sum({name: count for name, (_, count) in means.items()})
        return {name: totals[name] / count for name, count in counts.items() if count}

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on at least one rank; all ranks hear the same."""
        return self.sum(float(flag)) > 0

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; its PalateError is raised on every rank."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except PalateError as fault:
                box[1] = fault
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    @contextmanager
    def together(self, kind: type[PalateError]) -> Generator[None]:
        """A fault of this kind on one rank is raised on every rank, at the end of the block."""
        mine: PalateError | None = None
        try:
            yield
        except kind as fault:
            mine = fault
        if self.any(mine is not None):
            raise mine or kind("another rank met numbers that are not finite.")

    def barrier(self) -> None:
        """Return once every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def rows_each(self, rows: int, most: int) -> int:
        """Rows of one part when `rows` are dealt to all ranks in parts of at most `most`."""
        return max(1, min(most, -(-rows // self.size)))

    def deal(self, parts: Sequence[T]) -> list[tuple[T, bool]]:
        """This rank's parts, and whether each counts.

        Every rank gets equally many, because sharded models pass messages in each forward pass: a rank that has run
        out goes through the first part again, for nothing.
        """
        turns = -(-len(parts) // self.size)
        places = [turn * self.size + self.rank for turn in range(turns)]
        return [(parts[i], True) if i < len(parts) else (parts[0], False) for i in places]

    def gather(self, mine: Sequence[T]) -> list[T]:
        """Every rank's values on every rank, one of each rank in turn: the order in which parts are dealt."""
        if self.size == 1:
            return list(mine)
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, list(mine))
        longest = max(len(found) for found in every)
        return [found[turn] for turn in range(longest) for found in every if turn < len(found)]

    def gather_rows(self, mine: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """All rows, on every rank, from every rank's tensors of dealt parts; `sizes` are the rows of each part.

        Each rank puts its rows into zeros and all are added: x + 0 is x, nan included.
        """
        if self.size == 1:
            return torch.cat(list(mine))
        parts = list(mine[0].new_zeros((sum(sizes), *mine[0].shape[1:])).split(list(sizes)))
        for turn, found in enumerate(mine):
            place = turn * self.size + self.rank
            if place < len(parts):  # beyond it lies the part that was gone through for nothing
                parts[place] = found
        return self.sum(torch.cat(parts))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add the gradients of whole parameters over ranks, in place; those of sharded ones were added on the way."""
        if self.size == 1:
            return
        whole_ones = [p for p in parameters if not isinstance(p, DTensor)]
        reached = self.sum(torch.tensor([float(p.grad is not None) for p in whole_ones]))
        for parameter, ranks_with in zip(whole_ones, reached.tolist(), strict=True):
            if parameter.grad is None and ranks_with:  # no part of this rank reached it, but another's did
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in whole_ones if p.grad is not None]):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def norm(self, parameters: Sequence[nn.Parameter]) -> float:
        """The global norm of the gradient, each number of it counted once."""
        mine = {True: list[Tensor](), False: list[Tensor]()}
        for parameter in parameters:
            if parameter.grad is not None:
                mine[isinstance(parameter, DTensor)].append(_of_rows(local(parameter.grad)))
        return (self.sum(_square(mine[True])) + _square(mine[False])) ** 0.5

    def shard(self, root: nn.Module, blocks: Callable[[], Iterable[nn.Module]], trains: bool) -> None:
        """Spread the weights of a module over the ranks, as the strategy says; blocks are gathered one at a time.

        What is frozen is sharded by `zero3` alone: `zero2` spreads what only training needs.
        """
        if self.size == 1 or self.strategy == "replicate" or (self.strategy == "zero2" and not trains):
            return
        how: dict[str, Any] = {"mesh": self._mesh, "reshard_after_forward": self.strategy == "zero3"}
        if self.offload:
            how["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        for module in (*blocks(), root):
            sharded: Any = fully_shard(module, **how)
            sharded.set_gradient_divide_factor(1.0)  # gradients are added: the step has already divided, once
            sharded.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def at_hand(self, *roots: nn.Module) -> Generator[None]:
        """Whole weights on every rank while they are read freely: ranks may make different numbers of passes."""
        every = [m for root in roots for m in root.modules() if isinstance(m, FSDPModule)]
        inside = list(dict.fromkeys(every))  # in the same order on every rank
        for module in inside:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in inside:
                module.reshard()
                module.set_reshard_after_forward(self.strategy == "zero3", recurse=False)

    def claims(self) -> bool:
        """Whether this rank is the first to tell how the run ended; the others end without a word."""
        if self.store is None:
            return True
        try:
            return int(self.store.add("palate/told", 1)) == 1
        except (RuntimeError, OSError):  # rank 0 kept the store and is gone
            return self.is_main

    def lost(self, fault: BaseException) -> bool:
        """Whether an exception says that another rank is gone."""
        text = str(fault).lower()
        return self.size > 1 and any(word in text for word in _CONNECTION)


@contextmanager
def joined(strategy: Strategy = "replicate", offload: bool = False) -> Generator[World]:
    """The world this process was started in, by torchrun or alone; left again at the end."""
    if ranks.size() == 1:
        yield World(strategy=strategy, offload=offload)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank())
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise PalateError(f"WORLD_SIZE is {ranks.size()} but {name} is not set. Start the run with torchrun.")
    store, rank, size = next(iter(rendezvous("env://")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore("palate", store), rank=rank, world_size=size)
    try:
        yield World(rank, size, strategy, offload, store)
    finally:
        dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies on this rank, sharing its memory; a whole tensor as it is."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank (each must ask); a whole tensor as it is."""
    return cast(DTensor, tensor.detach()).full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_like(parameter: Tensor, part: Tensor) -> Tensor:
    """All of something that is sharded as `parameter` is, from this rank's part of it."""
    if not isinstance(parameter, DTensor) or part.dim() != parameter.dim():
        return part
    spread = DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
    return spread.full_tensor()


def part_like(parameter: Tensor, full: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut as `parameter` is."""
    if not isinstance(parameter, DTensor) or full.dim() != parameter.dim():
        return full
    near = full.to(parameter.device_mesh.device_type)
    spread = distribute_tensor(near, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return spread.to_local()


def _of_rows(x: Tensor) -> Tensor:
    """The norm of each row, in the format of `x`; that of a vector, which may be long, in float64."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64 if x.dim() < 2 else None).flatten()


def _square(norms: Sequence[Tensor]) -> float:
    """The sum of squares, in float64."""
    if not norms:
        return 0.0
    return float(torch.cat([norm_R.to(norms[0].device) for norm_R in norms]).double().square().sum())


def _buckets(gradients: Sequence[Tensor]) -> Generator[list[Tensor]]:
    """Gradients of one number format and device, in messages of a reasonable size."""
    kinds: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    for alike in kinds.values():
        bucket: list[Tensor] = []
        held = 0
        for gradient in alike:
            if bucket and held + gradient.nbytes > _BUCKET:
                yield bucket
                bucket, held = [], 0
            bucket.append(gradient)
            held += gradient.nbytes
        yield bucket

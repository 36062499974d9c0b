"""Work in one process, or shared by several with torch.distributed.

`torchrun --nproc-per-node 2 -m kvtool train-seq2seq ...` starts the processes and gives each its
rank. In training they share the rows of each batch, in verify-cache the weights of a model. Only
the leader, rank 0, evaluates, writes and prints.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kvtool import ending
from kvtool.config import process_rank
from kvtool.errors import CheckFailed, KvtoolError, first_line

GIVE_BACK = 0.1  # seconds

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The part of every batch that belongs to one rank."""

    rank: int = 0
    world_size: int = 1

    def rows(self, n: int) -> slice:
        """The rows of this share in a batch of `n` rows; all shares together cover the batch."""
        return slice(self.rank * n // self.world_size, (self.rank + 1) * n // self.world_size)


WHOLE = Share()


@dataclass(frozen=True)
class Team:
    """The processes that work together; with one process every method is trivial."""

    share: Share = WHOLE

    @property
    def leads(self) -> bool:
        """Whether this process is rank 0, which evaluates, writes files and prints for all."""
        return self.share.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is only one process."""
        return self.share.world_size == 1

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose backward pass averages the gradients over all ranks."""
        return module if self.alone else nn.parallel.DistributedDataParallel(module)

    def gather(self, *values: float) -> list[tuple[float, ...]]:
        """The values of every process, in the order of ranks; all processes must call it."""
        if self.alone:
            return [values]
        mine = torch.tensor(values, dtype=torch.float64, device=_device())
        rows = [torch.empty_like(mine) for _ in range(self.share.world_size)]
        dist.all_gather(rows, mine)
        return [tuple(row.tolist()) for row in rows]

    def lead(self, work: Callable[[], T]) -> T:
        """Run `work` in the leader, and return its result in every process.

        All processes must call it. Raises the KvtoolError of the leader in every process.
        """
        if self.alone:
            return work()
        outcome: list[object] = [None]
        if self.leads:
            try:
                outcome = [work()]
            except KvtoolError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], KvtoolError):
            raise outcome[0]
        return cast(T, outcome[0])

    def each(self, work: Callable[[], T]) -> T:
        """Run `work`, in which nobody waits for another, and return its result.

        All processes must call it. What is raised in one of them is raised in every one, so that
        the leader can tell it, and nobody waits for a process that has ended.
        """
        if self.alone:
            return work()
        found: T | None = None
        failed: tuple[bool, str, str] | None = None
        try:
            found = work()
        except KvtoolError as error:
            failed = (isinstance(error, CheckFailed), error.message, error.hint)
        except Exception as error:
            who = f"process {self.share.rank} of {self.share.world_size}"
            failed = (False, f"{who}: {type(error).__name__}: {first_line(error)}", "")
        every: list[tuple[bool, str, str] | None] = [None] * self.share.world_size
        dist.all_gather_object(every, failed)
        for each in every:
            if each is not None:
                is_answer, message, hint = each
                raise (CheckFailed if is_answer else KvtoolError)(message, hint)
        return cast(T, found)

    def same(self, numbers: Tensor) -> Tensor:
        """The leader's numbers, in every process: what is decided by them is decided alike, and
        all take the same steps. All processes must call it."""
        if self.alone:
            return numbers
        found = numbers.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(found, src=0)
        return found


ALONE = Team()


@contextmanager
def joined(device: torch.device) -> Iterator[Team]:
    """The team of processes that torchrun started, inside a `with` block.

    It uses NCCL on GPUs, and gloo otherwise.
    """
    share = Share(*process_rank())
    if share.world_size == 1:
        yield ALONE
        return
    with ending.signals_at_default():  # who waits for the others is not in Python to obey
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Team(share)
    finally:
        # It waits for threads of gloo's without letting them at Python, which they need to give
        # back the last tensors: so they are given time to before.
        time.sleep(GIVE_BACK)
        dist.destroy_process_group()


def device_of_rank(device: torch.device) -> torch.device:
    """The GPU of this process, where torchrun started it; else the device."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def _device() -> torch.device:
    """The device that the backend needs its tensors on."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

"""Training in one process, or data-parallel in several with torch.distributed.

`torchrun --nproc-per-node 2 -m kvtool train-seq2seq ...` starts the processes and gives each its
rank. They share the rows of each batch. Only the leader, rank 0, evaluates, writes and prints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from kvtool import ending
from kvtool.config import process_rank
from kvtool.errors import KvtoolError

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
    """The processes that train together; with one process every method is trivial."""

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


def _device() -> torch.device:
    """The device that the backend needs its tensors on."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

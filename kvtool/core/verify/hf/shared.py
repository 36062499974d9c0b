"""A model of transformers whose weights are shared by processes that torchrun started.

transformers' own plan (`tp_plan="auto"`) says which process holds what of a weight, and where they
wait for each other. So all processes have to take the same steps: what is decided by logits is
decided by the leader's, and what is decided by time or by memory by the leader.

Each process builds the model without weights, has transformers spread it, and takes its part of
each weight from the folder's file, which is mapped: no process ever holds the whole.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.core.checkpoint.checkpoint import WithoutWeights
from kvtool.core.training.team import ALONE, Team
from kvtool.core.verify.hf.library import in_one_line, quiet_transformers
from kvtool.core.verify.hf.subject import HubDecoder, TransformersSubject, built_in_float64, tables
from kvtool.core.verify.target.adapter import State
from kvtool.core.verify.widened import Room, copy_crowds, twin
from kvtool.errors import UsageError

WORD = "torchrun"  # what messages name


@dataclass
class SharedDecoder(HubDecoder):
    """A model that the processes of a team share; `whole` is the folder's, on the CPU."""

    team: Team = ALONE
    whole: Any = field(default=None, repr=False)

    def full(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.team.same(super().full(ids, padding))

    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        logits, state = super().step(ids, state)
        return self.team.same(logits), state

    def to(self, dtype: torch.dtype) -> SharedDecoder:
        found = copy.copy(self)
        found.module = in_float64(self.module, self.whole, self.team)
        return found


class SharedSubject(TransformersSubject):
    """A shared model with one kind of transformers' caches."""

    def __init__(self, module: Any, kind: str, whole: Any, team: Team) -> None:
        self.team, self.whole = team, whole
        super().__init__(module, kind)

    def made(self, decoder: HubDecoder) -> HubDecoder:
        return SharedDecoder(**vars(decoder), team=self.team, whole=self.whole)

    def seconds(self) -> float:
        mine = torch.tensor(time.thread_time(), dtype=torch.float64, device=self.device)
        return float(self.team.same(mine))

    def moved(self, by: float, seed: int = 0, tables: bool = False) -> TransformersSubject:
        raise NotImplementedError("its weights are shared by processes")


def parts_on(device: torch.device, team: Team) -> int:
    """Of how many parts of a model one stands on a device: the CPU has all of them."""
    return 1 if device.type == "cpu" else team.share.world_size


def shared_out(whole: Any, device: torch.device, dtype: torch.dtype, team: Team) -> Any:
    """A folder's model in `dtype`, of which each process holds its part on its device.

    All processes must call it. Raises UsageError for a model without a plan, and FileError for one
    that cannot be spread over so many processes.
    """
    with WithoutWeights(), quiet_transformers():
        other = type(whole)(copy.deepcopy(whole.config))
    mesh = _spread(other, whole, device, team)
    return _filled(other, whole, lambda weight, held: _part(weight, held, mesh, device).to(dtype))


def in_float64(shared: Any, whole: Any, team: Team) -> Any:
    """A shared model with each part in float64, and its tables computed so; where copies crowd
    memory the parts stay as they are, and are widened as they are read.

    All processes must call it.
    """
    device = shared.device
    widens = team.lead(lambda: copy_crowds(whole, device, parts_on(device, team)))
    with WithoutWeights():
        other = built_in_float64(whole)
    _spread(other, whole, device, team)
    found = _filled(
        other, shared, lambda part, _: part.detach() if widens else part.detach().to(torch.float64)
    )
    return twin(found, Room(), found) if widens else found


def _filled(other: Any, given: Any, part_of: Callable[[Any, Any], Tensor]) -> Any:
    """`other`, with what `part_of` makes of each weight that is given, and of what is there."""
    owners, parts = dict(other.named_modules()), dict[int, nn.Parameter]()
    for name, weight in given.named_parameters(remove_duplicate=False):
        where, _, leaf = name.rpartition(".")
        held = owners[where]._parameters
        if id(weight) not in parts:  # tied weights are one
            parts[id(weight)] = nn.Parameter(part_of(weight, held[leaf]), requires_grad=False)
        held[leaf] = parts[id(weight)]
    return other.eval()


def _spread(model: Any, whole: Any, device: torch.device, team: Team) -> Any:
    """Have transformers plan who holds what of a model without weights, with the tables of `whole`
    -> the mesh of the processes."""
    kind = type(model)
    _require_whole_heads(model.config, team)
    _untie(model)
    tables(model, whole, model.dtype)
    for module in model.modules():
        for name, table in module._buffers.items():
            module._buffers[name] = None if table is None else table.to(device)
    try:
        from transformers.distributed import DistributedConfig

        plan = DistributedConfig(tp_plan="auto", tp_size=team.share.world_size)
        spread = kind.maybe_distribute_model
    except (ImportError, TypeError, AttributeError) as error:
        text = f"{WORD}: this release of transformers spreads no model that is built"
        raise UsageError(text, "Install transformers 5.23.") from error
    if not model.supports_tp_plan:
        raise UsageError(
            f"{WORD}: {kind.__name__} has no tp_plan in transformers (its weights stay together)",
            f"Leave {WORD} out.",
        )
    with quiet_transformers(), in_one_line(WORD):
        plan, _, manager = kind.prepare_distribute_model(plan)
        spread(model, plan, manager)
    return manager.get_mesh("tp")


def _require_whole_heads(config: Any, team: Team) -> None:
    """Raise UsageError for more processes than share heads evenly."""
    text, n = config.get_text_config(decoder=True), team.share.world_size
    for name in ("num_key_value_heads", "num_attention_heads"):
        heads = getattr(text, name, None)
        if isinstance(heads, int) and heads % n:
            raise UsageError(
                f"{WORD}: {n} processes cannot share {heads} {name} (expected a divisor)",
                "Start another number of them: --nproc-per-node.",
            )


def _untie(model: nn.Module) -> None:
    """Let each place have a weight of its own, as it is while transformers loads a model."""
    seen: set[int] = set()
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) in seen:
                module._parameters[name] = nn.Parameter(weight.detach().clone(), False)
            seen.add(id(module._parameters[name]))


def _part(weight: Tensor, held: Any, mesh: Any, device: torch.device) -> Tensor:
    """What this process holds of a weight, as the place where it is put says."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(held, DTensor):
        return weight.detach().to(device)
    # Nothing is sent: each process has the file.
    return distribute_tensor(weight.detach().to(device), mesh, held.placements, src_data_rank=None)

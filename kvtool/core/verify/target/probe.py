"""One replay of a scenario with a moved token: where it is moved, and where its effect is seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.attributes import running_modules
from kvtool.core.verify.target.session import TargetSession
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.core.verify.target.trace import Site, parameter_names


class Token(NamedTuple):
    """One fed token: its number in the run, and its row."""

    number: int
    row: int


class Spot(NamedTuple):
    """Where tokens are moved and where the effect is read. None: at the ids, and at the logits."""

    site: Site | None = None
    axis: int = 1  # of the tokens, in the site's value
    moved: tuple[str, ...] = ()  # modules whose outputs are moved


@dataclass
class FedStep:
    """A step as it ran: its tokens, the tokens before it, and the value at the spot."""

    past: int
    origin: Tensor  # (B,T,2) the number and the row of each token of the history
    value: Tensor | None = None  # (B,n,...)


@dataclass
class Probe:
    """One replay: the moved tokens, and the steps."""

    spot: Spot
    move: Token | None = None
    n_fed: int = 0
    steps: list[FedStep] = field(default_factory=list)
    fates: dict[int, str] = field(default_factory=dict)  # of tokens that were given up

    def value(self, seen: list[Tensor], logits: Tensor) -> Tensor:
        """The tokens' values at the spot, (B,n,...)."""
        if self.spot.site is None:
            return logits
        return seen[0].movedim(self.spot.axis, 1) if self.spot.axis else seen[0][None]

    @contextmanager
    def watch(
        self, modules: dict[str, nn.Module], cells: list[tuple[int, int]], n: int
    ) -> Iterator[list[Tensor]]:
        """Within, the spot's values are kept, and the outputs at `cells` (row, column) moved."""
        seen: list[Tensor] = []
        site, handles = self.spot.site, []
        if site is not None:
            handles.append(_keep(modules[site.module], site, seen))
        for name in self.spot.moved if cells else ():
            handles.append(modules[name].register_forward_hook(_moving(cells, n)))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def _keep(module: nn.Module, site: Site, seen: list[Tensor]) -> Any:
    """A hook that keeps what a site has in its module's `site.call`th call."""
    calls: list[None] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(parameter_names(module, len(args)), args, strict=False)), **kwargs}
        if len(calls) == site.call:
            seen.append(given[site.name].clone())
        calls.append(None)

    def leave(module: nn.Module, args: Any, answer: Any) -> None:
        values = answer if isinstance(answer, (tuple, list)) else [answer]
        if len(calls) == site.call:
            seen.append(values[int(site.name)].clone())
        calls.append(None)

    if site.side == "in":
        return module.register_forward_pre_hook(enter, with_kwargs=True)
    return module.register_forward_hook(leave)


def _moving(cells: list[tuple[int, int]], n: int) -> Any:
    """A hook that moves a module's output (B,n,...) at some cells."""

    def hook(module: nn.Module, args: Any, answer: Any) -> Any:
        if not isinstance(answer, Tensor) or not answer.is_floating_point() or answer.dim() < 3:
            return None
        if answer.shape[1] != n or answer.shape[0] <= max(row for row, _ in cells):
            return None
        generator = torch.Generator().manual_seed(n + len(cells))
        moved = answer.clone()
        for row, column in cells:
            noise = torch.randn(answer.shape[2:], generator=generator, dtype=torch.float64)
            moved[row, column] += noise.to(answer) * (1 + moved[row, column].abs())
        return moved

    return hook


class ProbedSession:
    """The user's session, with the origin of each token."""

    def __init__(self, subject: TargetSubject, start: Start, probe: Probe) -> None:
        self.inner, self.probe, self.subject = TargetSession(subject, start), probe, subject
        self._begin(start)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _begin(self, start: Start) -> None:
        size = (start.batch, 0, 2)
        self.origin = torch.empty(size, dtype=torch.long, device=self.subject.device)

    def feed(self, ids: Tensor) -> Tensor:
        probe, (batch, n), past = self.probe, ids.shape, self.origin.shape[1]
        numbers = torch.arange(probe.n_fed, probe.n_fed + n, device=ids.device).expand(batch, n)
        rows = torch.arange(batch, device=ids.device)[:, None].expand(batch, n)
        self.origin = torch.cat([self.origin, torch.stack([numbers, rows], dim=2)], dim=1)
        probe.n_fed += n
        cells = cells_of(self.origin[:, past:], probe.move)
        step = FedStep(past, self.origin)
        fed = ids if probe.spot.moved else with_others(ids, cells, self.subject.vocab_size)
        modules = running_modules(self.subject.decoder, self.inner.state)
        with probe.watch(modules, cells, n) as seen:
            logits = self.inner.feed(fed)
        step.value = probe.value(seen, logits)
        probe.steps.append(step)
        return logits

    def crop(self, length: int) -> None:
        self.inner.crop(length)
        self._give_up(self.origin[:, length:], "taken back")
        self.origin = self.origin[:, :length]

    def select(self, rows: Tensor) -> None:
        self.inner.select(rows)
        self.origin = self.origin[rows]

    def reset(self, start: Start) -> None:
        self.inner.reset(start)
        self._give_up(self.origin, "of the sequence before the reset")
        self._begin(start)

    def fork(self) -> ProbedSession:
        other = ProbedSession.__new__(ProbedSession)
        other.inner, other.probe, other.subject = self.inner.fork(), self.probe, self.subject
        other.origin = self.origin
        return other

    def _give_up(self, origin: Tensor, fate: str) -> None:
        self.probe.fates.update(dict.fromkeys(origin[..., 0].flatten().tolist(), fate))


def cells_of(origin: Tensor, token: Token | None) -> list[tuple[int, int]]:
    """Where in (B,T,2) a token stands: rows and columns."""
    if token is None:
        return []
    there = (origin == torch.tensor(token, device=origin.device)).all(-1)
    return [(int(row), int(column)) for row, column in there.nonzero().tolist()]


def with_others(ids: Tensor, cells: list[tuple[int, int]], vocab_size: int) -> Tensor:
    """The ids, replaced at the cells."""
    moved = ids.clone()
    for row, column in cells:
        moved[row, column] = (moved[row, column] + 1 + vocab_size // 3) % vocab_size
    return moved

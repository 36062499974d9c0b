"""Checks of a target that would prove nothing are not called right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kvtool
from decoder_shapes import (
    Core,
    Stepper,
    joined,
    judged,
)
from kvtool.core.verify.judge import ROUNDING, VACUOUS


class IdsAsCache(Core):
    def forward(self, ids: Tensor, cache: Tensor | None = None) -> Any:
        ids = ids if cache is None else torch.cat([cache, ids], dim=1)
        return self.run(ids, torch.arange(ids.shape[1]), lambda layer, k, v: (k, v)), ids


class IdsInside(Core):
    """Gives a cache, ignores it, and keeps the ids itself."""

    ids = torch.empty(1, 0, dtype=torch.long)

    def forward(self, ids: Tensor, cache: Any = None, use_cache: bool = False) -> Any:
        if not use_cache:
            return self.run(ids, torch.arange(ids.shape[1]), lambda layer, k, v: (k, v))
        n = ids.shape[1]
        self.ids = ids if cache is None else torch.cat([self.ids, ids], dim=1)
        new: list[Any] = []
        places = torch.arange(self.ids.shape[1])
        return self.run(self.ids, places, joined(None, new))[:, -n:], new


class StepsOnly(Stepper):
    """Its uncached pass is made of cached steps."""

    def full(self, ids: Tensor) -> Tensor:
        state, found = self.start(*ids.shape), []
        for i in range(ids.shape[1]):
            logits, state = self.step(ids[:, i : i + 1], state)
            found.append(logits)
        return torch.cat(found, dim=1)


def test_ids_as_a_cache_are_vacuous_although_all_logits_are_returned() -> None:
    class Cut(IdsAsCache):
        def forward(self, ids: Tensor, cache: Tensor | None = None) -> Any:
            logits, seen = super().forward(ids, cache)
            return logits[:, -ids.shape[1] :], seen

    finding = judged(Cut())
    assert finding.verdict == VACUOUS
    assert finding.evidence.endswith("the cache is not used")


def test_a_module_that_keeps_the_ids_itself_is_vacuous() -> None:
    assert judged(IdsInside()).verdict == VACUOUS


def test_an_uncached_pass_made_of_steps_is_vacuous() -> None:
    finding = judged(StepsOnly())
    assert finding.verdict == VACUOUS
    assert "full is made of steps" in finding.evidence


def test_one_step_from_an_empty_state_is_an_uncached_pass() -> None:
    class AtOnce(Stepper):
        def full(self, ids: Tensor) -> Tensor:
            return self.step(ids, self.start(*ids.shape))[0]

    assert judged(AtOnce()).verdict == ROUNDING


def test_a_vacuous_check_is_not_ok() -> None:
    report = kvtool.verify(StepsOnly(), scenarios=["decode"], tokens=4)
    assert (report.ok, report.exit_code) == (False, 1)

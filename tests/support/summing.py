"""The cheapest decoder with a past, and what the check says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.core.verify.arms import Case
from kvtool.core.verify.finding import Finding
from kvtool.core.verify.judge import BUG, Judge
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.core.verify.target.check import check_target, decode_case
from kvtool.core.verify.target.subject import TargetSubject

When = Callable[[int, int], bool]  # tokens of a step, and held before it


class Sums(nn.Module):
    """Sums what it has read: the cheapest decoder with a past. `when` plants a bug: the step does
    not see its past."""

    def __init__(self, when: When = lambda n, past: False, context: int = 1200, n_ids: int = 31):
        super().__init__()
        torch.manual_seed(0)
        self.when, self.context, self.vocab_size = when, context, n_ids
        self.table, self.head = nn.Embedding(n_ids, 8), nn.Linear(8, n_ids)

    def full(self, ids: Tensor) -> Tensor:
        return self.answer(self.table(ids).cumsum(1), torch.arange(1, ids.shape[1] + 1))

    def answer(self, sums: Tensor, places: Tensor) -> Tensor:
        return self.head(torch.tanh(sums / places[:, None].to(sums.dtype).sqrt()))

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        total, past = (torch.zeros(()), 0) if state is None else state
        n = ids.shape[1]
        x = self.table(ids).cumsum(1)
        seen = x if past and self.when(n, past) else x + total
        places = torch.arange(past + 1, past + n + 1)
        return self.answer(seen, places), (x[:, -1:] + total, past + n)


def judged(decoder: Any, scenario: str) -> Finding:
    subject = TargetSubject(decoder, "it")
    subject.find_reach()
    return Judge(subject).judge(Case(SCENARIOS[scenario]))


def wrong_in(decoder: Any) -> set[str]:
    """The scenarios that call a decoder wrong."""
    subject = TargetSubject(decoder, "it")
    main = decode_case(subject.vocab_size, subject.context, tokens=32)
    found = check_target(subject, list(SCENARIOS), main)
    return {c.finding.scenario for c in found if c.finding.verdict == BUG}

"""The largest step that a decoder takes, found with growing steps until it refuses.

A limit is a refusal (see `refusals`) of every size above it. A crash of larger sizes, or a refusal
of some between others that are taken, is no limit: a scenario that feeds such a step reports an
error. A decoder that raises at every step but those of one token, in whatever way, takes one token
a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.refusals import in_words, is_refusal
from kvtool.errors import pass_on_shortage

REACH = 160  # tokens of the largest step that is tried
PAST = 4  # tokens before a step


class Asked(Protocol):
    """The calls that are tried: see `TargetSubject`."""

    context: int
    vocab_size: int
    device: torch.device

    def call_full(self, ids: Tensor) -> Tensor:
        """One call of full."""

    def initial_state(self, start: Start) -> Any:
        """The state before the first token."""

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next tokens."""


class Limits(NamedTuple):
    """The limits of a decoder, 0 for none, and its message for more."""

    largest_step: int = 0  # tokens of a step, of a prompt too
    largest_prompt: int = 0  # tokens of the first step
    single_steps_only: bool = False  # behind the first step
    largest_pass: int = 0  # tokens of an uncached pass
    capacity: int = 0  # tokens in all steps together
    said: str = ""

    @property
    def words(self) -> str:
        """The limit of a step, for a report; "" if there is none."""
        if self.single_steps_only and self.largest_step != 1:
            return "one token a step after a prompt"
        if self.largest_step:
            return f"{self.largest_step} token{'s' * (self.largest_step > 1)} a step at most"
        return ""

    def refuses(self, n: int, past: int) -> bool:
        """Whether a step of n tokens behind `past` exceeds the limits."""
        if past and self.single_steps_only and n > 1:
            return True
        most = self.largest_step if past else self.largest_prompt
        return bool(most) and n > most


@torch.inference_mode()
def find_limits(subject: Asked) -> Limits:
    """The limits of a decoder."""
    reach = min(subject.context, REACH)
    largest_pass, _ = _most(lambda n: _passes(subject, n), reach, refusals=False)
    reach = largest_pass or reach
    first, said = _most(lambda n: _steps(subject, n), reach)
    if first and _steps(subject, first, 1) is not None:  # not a step is too long, but all together
        return Limits(largest_pass=largest_pass, capacity=first, said=said)
    past = min(PAST, first or PAST)
    room = min(first or reach, reach - past)
    several = [_steps(subject, past, n) for n in (2, 3, 8) if n <= room]
    # Decoders written for single tokens alone crash at others (DeepSeek-V3's): nothing is hidden.
    if several and None not in several and _steps(subject, past, 1) is None:
        said = in_words(several[0]) if several[0] is not None else ""
        return Limits(1 if first == 1 else 0, first, True, largest_pass, said=said)
    later, why = _most(lambda n: _steps(subject, past, n), room)
    step = later or first
    return Limits(step, first, step == 1, largest_pass, said=why or said)


def is_limit(subject: Asked, past: int, n: int) -> bool:
    """Whether steps of n tokens or more behind `past` are refused, and shorter ones are not."""
    if n < 2 or not all(_refused(subject, past, m) for m in (n, n + 1)):
        return False
    return _steps(subject, past, n // 2) is None if past else _steps(subject, n // 2) is None


def _most(
    raised: Callable[[int], BaseException | None], reach: int, refusals: bool = True
) -> tuple[int, str]:
    """The largest number below `reach` that is taken, and the message for the next one; 0 if all
    are.

    refusals: whether other errors are no limit.
    """
    error = raised(reach)
    if error is None or (refusals and not is_refusal(error)):
        return 0, ""
    low, high = 0, reach
    while high - low > 1:
        middle = (low + high) // 2
        found = raised(middle)
        if found is None:
            low = middle
        elif refusals and not is_refusal(found):
            return 0, ""
        else:
            high, error = middle, found
    return low, in_words(error)


def _passes(subject: Asked, n: int) -> BaseException | None:
    ids = torch.arange(n, device=subject.device)[None] % subject.vocab_size
    try:
        subject.call_full(ids)
    except (Exception, SystemExit) as error:  # whatever it raises: it cannot take that many
        pass_on_shortage(error)
        return error
    return None


def _steps(subject: Asked, *sizes: int) -> BaseException | None:
    """The error of steps of these sizes, the first from the state None."""
    total = sum(sizes)
    ids = torch.arange(total, device=subject.device)[None] % subject.vocab_size
    try:
        state, end = subject.initial_state(Start(1, min(subject.context, 2 * total + PAST))), 0
        for n in sizes:
            _, state = subject.step(ids[:, end : end + n], state)
            end += n
    except (Exception, SystemExit) as error:
        pass_on_shortage(error)
        return error
    return None


def _refused(subject: Asked, past: int, n: int) -> str:
    """The message with which a step is refused; "" if it is taken, or crashes."""
    error = _steps(subject, past, n) if past else _steps(subject, n)
    return in_words(error) if error is not None and is_refusal(error) else ""

"""The operations that a decoder's own lines of code ask torch for, in a step and in a pass.

Most of what a decoder does is in no module of its own: positions, masks, products with the cache.
What a line computed in a step stands beside what the same line computed in the pass; and a pass
can be given what the line computed in the steps: if that gives the wrong logits, it is the bug.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MAX_NUMBERS = 2**22  # numbers in an answer that is kept
OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[3]))


class Line(NamedTuple):
    """A line of the user's code, and the operation that it calls."""

    file: str
    number: int
    asked: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.number}"


class Done(NamedTuple):
    """One operation: its line, the count of the line's calls so far, its tensors and its result."""

    line: Line
    time: int
    given: tuple[Tensor, ...]
    answer: Tensor


class Operations(TorchFunctionMode):
    """Within, what the decoder's lines compute is kept, and some of it replaced.

    keep_given: whether operands are kept too. instead: what to answer for a line, of its `time`th
    answer; None leaves it.
    """

    def __init__(
        self,
        instead: Callable[[Line, int, Tensor], Tensor | None] | None = None,
        keep_given: bool = False,
    ) -> None:
        super().__init__()
        self.done: list[Done] = []
        self.times: dict[Line, int] = {}
        self.instead, self.keep_given = instead, keep_given

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if not isinstance(answer, Tensor) or answer.numel() > MAX_NUMBERS:
            return answer
        line = calling_line(getattr(func, "__name__", str(func)))
        if line is None:
            return answer
        time = self.times[line] = self.times.get(line, -1) + 1
        given = tuple(a.clone() for a in args if isinstance(a, Tensor)) if self.keep_given else ()
        self.done.append(Done(line, time, given, answer.clone()))
        other = None if self.instead is None else self.instead(line, time, answer)
        return answer if other is None else other


def calling_line(asked: str) -> Line | None:
    """The line of the user's code that is being run; None within torch's own, or ours."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(OURS[0]):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or frame.f_code.co_filename.startswith(OURS[1]):
        return None
    return Line(frame.f_code.co_filename, frame.f_lineno, asked)


def by_place(done: list[Done]) -> dict[tuple[Line, int], Done]:
    """The operations by line and count."""
    return {(d.line, d.time): d for d in done}


def token_axis(step: torch.Size, whole: torch.Size, n: int, total: int) -> int | None:
    """The one axis in which a step's answer has its n tokens and the pass's `total`; else None."""
    if len(step) != len(whole):
        return None
    other = [i for i, (a, b) in enumerate(zip(step, whole, strict=True)) if a != b]
    if len(other) != 1 or (step[other[0]], whole[other[0]]) != (n, total):
        return None
    return other[0]

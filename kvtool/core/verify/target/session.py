"""One run of a user's decoder and its state."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.limits import is_limit
from kvtool.core.verify.target.refusals import in_words, is_refusal
from kvtool.errors import CacheOpUnsupported, first_line, pass_on_shortage


class TargetSession:
    """The user's decoder and its state; `subject` is a TargetSubject."""

    def __init__(self, subject: Any, start: Start) -> None:
        self.subject = subject
        self._begin(start)
        self.state = subject.initial_state(start)

    def _begin(self, start: Start) -> None:
        self.start = start
        self.ids = torch.empty(start.batch, 0, dtype=torch.long, device=self.subject.device)

    def feed(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        found, self.state = self._step(ids)
        self.ids = torch.cat([self.ids, ids], dim=1)
        if found.shape[1] == n:
            return found
        # Only the last token was answered: the others, of which nothing is known, count as right.
        logits = self.subject.last_of(self.ids[:, :-1], self.start, n - 1)
        return torch.cat([logits, found], dim=1)

    def _step(self, ids: Tensor) -> tuple[Tensor, Any]:
        """A step. Raises CacheOpUnsupported for one that the decoder refuses."""
        subject, past, n = self.subject, self.ids.shape[1], ids.shape[1]
        what = f"take {n} token{'s' * (n > 1)} in a step"
        if subject.limits.refuses(n, past):
            raise CacheOpUnsupported(subject.name, what, subject.limits.words)
        try:
            return subject.step(ids, self.state)
        except Exception as error:
            refused = is_refusal(error)
            meant = refused and isinstance(error, NotImplementedError)
            if meant or (refused and is_limit(subject, past, n)):
                raise CacheOpUnsupported(subject.name, what, in_words(error)) from error
            raise

    def crop(self, length: int) -> None:
        self._change("crop", length)
        self.ids = self.ids[:, :length]

    def select(self, rows: Tensor) -> None:
        self._change("select", rows)
        self.ids = self.ids[rows]

    def reset(self, start: Start) -> None:
        self._change("reset", *self.subject.reset_arguments(start))
        self._begin(start)

    def _change(self, op: str, *args: Any) -> None:
        try:
            changed = getattr(self.subject.decoder, op)(self.state, *args)
        except NotImplementedError as error:
            raise CacheOpUnsupported(self.subject.name, op, first_line(error)) from error
        self.state = self.state if changed is None else changed

    def reload(self) -> None:
        """Save the cache, and go on with a new one that is loaded from it."""
        try:
            self.state = self.subject.reloaded(self.state, self.start)
        except (Exception, SystemExit) as error:  # found by their names: they promised nothing
            pass_on_shortage(error)
            name, what = self.subject.name, f"{type(error).__name__}: {first_line(error)}"
            raise CacheOpUnsupported(name, "be saved and loaded", what) from error

    def fork(self) -> TargetSession:
        other = copy.copy(self)
        other.state = copy.deepcopy(self.state)
        return other

    def vacuous(self) -> str | None:
        return self.subject.vacuous()

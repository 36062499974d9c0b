"""Uncached passes that several runs ask for: each is computed once, as far as there is room.

Kinds of caches are compared with one and the same pass, and a second look asks again for what the
first one saw. A pass is shared bit for bit, so that no figure depends on whether it was.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from kvtool.core.verify.precision import Promote
from kvtool.core.verify.subject import SharedPasses, Start, Subject

KEPT = 2**28  # bytes of logits that are kept at most


class Passes:
    """The uncached passes of subjects that may share them; what does not fit `most` bytes is
    computed again, and nothing is ever let go to make room.

    Code that nobody here wrote may answer otherwise each time. So a pass of a subject that is not
    `pure` is computed again where it is longer than those that were; if one differs, none is shared
    from then on.
    """

    def __init__(self, most: int = KEPT) -> None:
        self.most = most
        self.shares = True
        self.n_computed = self.n_shared = 0  # passes
        self.nbytes = 0  # of what is kept
        self._kept: dict[Hashable, Tensor] = {}
        self._checked: dict[Hashable, int] = {}  # tokens of the longest pass that came out again

    def full(self, subject: Subject, ids: Tensor, start: Start) -> Tensor:
        """The subject's `full`: (B,T) -> (B,T,V), which the caller leaves as it is."""
        if not self.shares:
            return subject.full(ids, start)
        format_ = (subject.pass_key, Promote.active > 0, subject.dtype)
        key = (format_, *(_bits(tensor) for tensor in _arguments(ids, start)))
        kept, n = self._kept.get(key), ids.shape[1]
        if kept is not None and (subject.pure or n <= self._checked.get(format_, 0)):
            self.n_shared += 1
            return kept
        logits = subject.full(ids, start)
        self.n_computed += 1
        if kept is None:
            self._keep(key, logits, subject.pure)
        elif torch.equal(kept, logits):
            self._checked[format_] = n
        else:
            self.shares = False
            self.clear()
        return logits

    def clear(self) -> None:
        """Forget all passes, and the subjects that answered them."""
        self._kept.clear()
        self._checked.clear()
        self.nbytes = 0

    def _keep(self, key: Hashable, logits: Tensor, pure: bool) -> None:
        nbytes = logits.numel() * logits.itemsize
        if self.nbytes + nbytes <= self.most:
            self.nbytes += nbytes
            self._kept[key] = logits if pure else logits.clone()  # it may be a buffer of theirs


def uncached(subject: Subject, ids: Tensor, start: Start) -> Tensor:
    """Whole sequences (B,T) in one pass -> (B,T,V), which the caller leaves as it is; shared, if
    the subject shares its passes."""
    passes: SharedPasses | None = getattr(subject, "passes", None)
    return subject.full(ids, start) if passes is None else passes.full(subject, ids, start)


def _arguments(ids: Tensor, start: Start) -> tuple[Tensor | None, ...]:
    """All that a pass depends on; how much room a session would have is not among it."""
    return (ids, start.padding, *(start.source or (None, None)))


def _bits(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.shape, tensor.cpu().numpy().tobytes())

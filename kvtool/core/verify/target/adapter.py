"""An nn.Module as a decoder of the target protocol, called as its plan says."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.core.verify.copies import converted
from kvtool.core.verify.subject import Start
from kvtool.core.verify.target import arguments, factories
from kvtool.core.verify.target.answers import is_empty, logits_and_cache
from kvtool.core.verify.target.changes import Change, apply
from kvtool.core.verify.target.eager import eager
from kvtool.core.verify.target.module_copies import session_copy, shared
from kvtool.core.verify.target.plans import Plan, signature
from kvtool.core.verify.target.refusals import OneAtATime

OPS = ("crop", "select", "reset")


@dataclass
class State:
    """The module's cache, and the facts that its caller has to track."""

    cache: Any
    past: int  # tokens that it holds
    batch: int
    room: int  # tokens
    padding: Tensor | None = None
    module: nn.Module | None = None  # the copy that this session runs on, if it has its own
    ids: Tensor | None = None  # (B,T) all ids so far, for a module that takes all of them

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        if self.module is not None:
            memo.update(shared(self.module))
        return type(self)(
            **{f.name: copy.deepcopy(getattr(self, f.name), memo) for f in fields(self)}
        )


@dataclass
class ModuleDecoder:
    """An nn.Module as a decoder of the target protocol, called by its plan."""

    module: nn.Module
    plan: Plan
    changes: dict[str, Change] = field(default_factory=dict)
    takes_padding: bool = False
    recomputes: bool = False  # it recomputed the logits of all ids so far
    notes: tuple[str, ...] = ()
    breaks_down: bool = False  # in every step behind a prompt
    answered: bool = False  # the module has answered a step, in whatever form

    @property
    def unable(self) -> tuple[str, ...]:
        """The operations that it cannot do although they have a method here."""
        return tuple(op for op in OPS if op not in self.changes)

    @property
    def guess(self) -> str:
        """How the module is called, in words."""
        return "; ".join([f"called as {self.plan}", *self.notes])

    def running(self, state: State) -> nn.Module:
        """The module that a session runs: its own copy, or the module itself."""
        return self.module if state.module is None else state.module

    def full(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """Whole sequences (B,T) in one uncached pass -> the module's logits, mostly (B,T,V)."""
        plan, (batch, n) = self.plan, ids.shape
        if plan.needs_cache:
            return self.step(ids, self.start(batch, n, padding))[0]
        names = signature(self.module, plan)
        given: dict[str, Any] = dict.fromkeys(plan.filler) | dict.fromkeys(plan.flags, False)
        if plan.cache and names.required(plan.cache):
            given[plan.cache] = None
        # A module that keeps its caches takes positions to mean that they are to be used.
        asked = plan.position and names.required(plan.position)
        if padding is not None or not plan.in_module or asked:
            given.update(self._position_arguments(ids, 0, padding))
        if plan.mask_form and (not plan.in_module or names.required(plan.mask)):
            given[plan.mask] = self._mask(batch, 0, n, n, padding)
        module = session_copy(self.module) if plan.own_module else self.module
        return logits_and_cache(self._call(module, ids, given), plan.cache)[0]

    def start(self, batch: int, capacity: int, padding: Tensor | None = None) -> State:
        """The state before the first token."""
        plan = self.plan
        module = session_copy(self.module) if plan.own_module else None
        if plan.in_module and plan.initial:
            factories.call(getattr(module, plan.initial), self.module, batch, capacity)
        cache = None if plan.in_module else self._initial_cache(batch, capacity)
        return State(cache, 0, batch, capacity, padding, module)

    def _initial_cache(self, batch: int, capacity: int) -> Any:
        return factories.build(self.plan.initial, self.module, batch, capacity)

    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """The next tokens (B,n) -> their logits, and the next state.

        Raises TypeError if the module answers without a cache, and what the module raises.
        """
        plan, n = self.plan, ids.shape[1]
        if plan.whole:
            ids = ids if state.ids is None else torch.cat([state.ids, ids], dim=1)
            state = replace(state, ids=ids, past=0)
        given: dict[str, Any] = dict.fromkeys(plan.filler) | dict.fromkeys(plan.flags, True)
        if plan.cache:
            given[plan.cache] = state.cache
        given.update(self._position_arguments(ids, state.past, state.padding))
        if plan.mask_form:
            past, width = state.past, ids.shape[1]
            given[plan.mask] = self._mask(ids.shape[0], past, width, state.room, state.padding)
        answer = self._call(self.running(state), ids, given)
        self.answered = True
        logits, cache, how = logits_and_cache(answer, plan.cache, plan.part)
        if plan.in_module:
            cache, how = None, "logits, the cache changed in place"
        elif cache is None and state.cache is not None:
            cache, how = state.cache, "logits, the cache changed in place"
        if not plan.in_module and is_empty(cache):
            raise TypeError("it answered without a cache")
        if not plan.read:
            self.plan = replace(plan, read=how)
        if plan.whole and logits.dim() == 3:
            self.recomputes |= n < logits.shape[1] == ids.shape[1]
            logits = logits[:, -n:]
            if logits.shape[1] < n < ids.shape[1]:
                raise OneAtATime("it computes the last token alone")
        return logits, replace(state, cache=cache, past=state.past + ids.shape[1])

    def _call(self, module: nn.Module, ids: Tensor, given: dict[str, Any]) -> Any:
        plan = self.plan
        called = module if plan.method == "forward" else getattr(module, plan.method)
        with eager():
            return called(**{plan.ids: ids}, **given) if plan.ids else called(ids, **given)

    def _position_arguments(self, ids: Tensor, past: int, padding: Tensor | None) -> dict[str, Any]:
        """Positions, and where there is padding a mask."""
        plan, (batch, n) = self.plan, ids.shape
        found: dict[str, Any] = {}
        line = torch.arange(past, past + n, device=ids.device)
        rows = line.repeat(batch, 1)
        if padding is not None:
            real = Start(batch, 0, padding).real(0, past + n)
            found["attention_mask"] = real.long()
            rows = (real.cumsum(1) - 1).clamp(min=0)[:, past:]
        if plan.position:
            starts = rows[:, 0]
            forms = {"rows": rows, "line": line, "int": past, "starts": starts}
            found[plan.position] = forms[plan.form]
        return found

    def _mask(self, batch: int, past: int, n: int, room: int, padding: Tensor | None) -> Any:
        weight = next(self.module.parameters())
        found = arguments.mask(self.plan.mask_form, batch, past, n, room, weight, padding)
        wrapper = signature(self.module, self.plan).wrapper(self.plan.mask)
        return wrapper(found) if wrapper else found

    def crop(self, state: State, length: int) -> State:
        """Forget all but the first `length` tokens."""
        ids = None if state.ids is None else state.ids[:, :length]
        return replace(self._changed("crop", state, length), past=length, ids=ids)

    def select(self, state: State, rows: Tensor) -> State:
        """Go on from the histories of `rows` (n,), in that order."""
        padding = None if state.padding is None else state.padding[rows]
        ids = None if state.ids is None else state.ids[rows]
        found = self._changed("select", state, rows)
        return replace(found, batch=len(rows), padding=padding, ids=ids)

    def reset(self, state: State) -> State:
        """Forget everything and begin again on the same cache."""
        found = replace(self._changed("reset", state), past=0, ids=None)
        if not self.plan.copies:
            return found
        # What the module itself keeps, a position, is not in the cache that was reset.
        return replace(found, module=session_copy(self.module))

    def _changed(self, op: str, state: State, argument: Any = None) -> State:
        cache = apply(self.changes[op], self.running(state), state.cache, state.past, argument)
        again = op == "reset" and self.changes[op].again
        if again:
            setup = getattr(state.module, self.plan.initial)
            factories.call(setup, self.module, state.batch, state.room)
        return replace(state, cache=cache)

    def to(self, dtype: torch.dtype) -> ModuleDecoder:
        """The same decoder with a copy of the module in another format."""
        return replace(self, module=converted(self.module, dtype))

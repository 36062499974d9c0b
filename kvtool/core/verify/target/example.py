"""The error for a module that cannot be called: what its signature needs, and an adapter of a few
lines."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from kvtool.core.verify.target.factories import setups
from kvtool.core.verify.target.refusals import is_refusal
from kvtool.core.verify.target.signature import CACHES, FLAGS, POSITIONS, Signature
from kvtool.errors import UsageError, first_line

HINT = "Give it full(ids) and step(ids, state): see docs/own_decoder.md."


class CannotCall(UsageError):
    """No way of calling a module runs; `example` has lines of code that would help."""

    def __init__(self, message: str, hint: str, example: str) -> None:
        super().__init__(message, hint)
        self.example = example


def cannot_call(module: nn.Module, name: str, errors: Mapping[str, BaseException]) -> CannotCall:
    """The error of a module that no plan fits; errors: of each plan."""
    names = Signature(module.forward)
    text = f"{name}: forward({names})"
    example = adapter_code(module, names)
    if unknown := names.unknown:
        needed = " and ".join(unknown)
        text += f" needs {needed}, of which nothing is known ({unknown[0]}=None was tried"
    elif not names.of((*CACHES, *FLAGS, *POSITIONS)) and not setups(module):
        return CannotCall(f"{text} has no parameter that could be a cache", HINT, example)
    else:
        text += " cannot be called with a cache (the likeliest way"
    plan, error = _telling(errors)
    raised = f"{type(error).__name__}: {first_line(error)}".rstrip(": ")
    return CannotCall(f"{text}, {plan}: {raised})", HINT, example)


def _telling(errors: Mapping[str, BaseException]) -> tuple[str, BaseException]:
    """The first plan whose error comes from the module's own code, else the first plan."""
    meant = [(plan, error) for plan, error in errors.items() if is_refusal(error)]
    own = [pair for pair in meant if "without a cache" not in str(pair[1])]
    return (own or list(errors.items()))[0]


def adapter_code(module: nn.Module, names: Signature) -> str:
    """A class with full and step around a module with this signature."""
    ids = "ids" if names.positional else f"{names.ids}=ids"
    needed = "".join(f", {name}=..." for name in names.unknown)
    cache = next(iter(names.of(CACHES)), "")
    flags = "".join(f", {flag}=True" for flag in names.of(FLAGS))
    position = next(iter(names.of(POSITIONS)), "")
    given = f", {position}=past" if position else ""
    state = f", {cache}=cache" if cache else ""
    call = f"self.model({ids}{needed}{flags}{given}{state})"
    return "\n".join(
        [
            "class Decoder:  # for --target FILE.py:Decoder",
            f"    def __init__(self): self.model = {type(module).__name__}(...)",
            f"    def full(self, ids): return self.model({ids}{needed})  # logits (B,T,V)",
            "    def step(self, ids, state):  # at first of state None",
            "        cache, past = state or (None, 0)",
            f"        logits, cache = {call}",
            "        return logits, (cache, past + ids.shape[1])",
        ]
    )

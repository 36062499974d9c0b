"""Plans: the ways in which an nn.Module may take and return a cache, by its signature."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from kvtool.core.verify.target.arguments import MASK_FORMS, POSITION_FORMS
from kvtool.core.verify.target.factories import factories, setups
from kvtool.core.verify.target.signature import CACHES, FLAGS, MASKS, POSITIONS, Signature

# Of an answer, where the first behind the logits is no cache: attentions, a loss; or none of
# them is, and what was given changed in place.
IN_PLACE = -1
PARTS = (1, 2, IN_PLACE)
# Methods that are called in place of `forward` where that takes no cache.
METHODS = ("forward", "call_with_cache", "forward_with_cache", "forward_cached", "decode")


@dataclass(frozen=True)
class Plan:
    """One way to call a module."""

    method: str = "forward"
    ids: str = ""  # the name that they are given by; none: they are the first argument
    cache: str = ""  # the parameter; none: they are in the module
    initial: str = "None"  # what the first step is given, or what builds it; of caches in the
    # module the method that sets them up, or none
    flags: tuple[str, ...] = ()
    position: str = ""
    form: str = ""
    mask: str = ""
    mask_form: str = ""
    filler: tuple[str, ...] = ()  # required parameters that are given None
    needs_cache: bool = False  # the uncached pass is one step on a new cache
    part: int = 0  # the number of the cache among the possible parts of an answer; IN_PLACE: none
    whole: bool = False  # each step is given all ids so far, and computes the new ones
    copies: bool = False  # each session runs on a copy of the module, which keeps something
    read: str = ""  # how the answer is read

    @property
    def in_module(self) -> bool:
        """Whether the module keeps its caches itself."""
        return not self.cache

    @property
    def own_module(self) -> bool:
        """Whether each session runs on a copy of the module."""
        return self.in_module or self.copies

    def __str__(self) -> str:
        parts = [f"{self.ids}=ids" if self.ids else "ids"]
        if self.cache:
            parts.append(f"{self.cache}={self.initial} at first")
        parts.extend(f"{flag}=True" for flag in self.flags)
        if self.position:
            parts.append(f"{self.position}={POSITION_FORMS[self.form]}")
        if self.mask_form:
            parts.append(f"{self.mask}={MASK_FORMS[self.mask_form]}")
        parts.extend(f"{name}=None" for name in self.filler)
        setup = f"{self.initial}, then " if self.in_module and self.initial else ""
        before = f"{setup or 'a copy for each session, '}" if self.in_module else ""
        after = f" -> {self.read}" if self.read else ""
        after += "; ids are all so far" * self.whole
        if self.needs_cache:
            after += "; it cannot go without a cache: the uncached pass is one step on a new one"
        return f"{before}{self.method}({', '.join(parts)}){after}"


def signature(module: nn.Module, plan: Plan) -> Signature:
    """The signature of the method that a plan calls."""
    return Signature(getattr(module, plan.method))


def plans(module: nn.Module, masked: bool = False) -> Iterator[Plan]:
    """Every way to call a module, the likeliest first; at the end those that need a cache, and
    those that are given all ids again.

    masked: with real masks, where it takes any.
    """
    for method in METHODS:
        if callable(getattr(module, method, None)):
            suggested = list(_suggested(module, method, masked))
            yield from (plan for plan in suggested if not plan.needs_cache)
            yield from (replace(plan, needs_cache=True) for plan in suggested)
            outside = [plan for plan in suggested if plan.cache]
            yield from (replace(plan, whole=True) for plan in outside)
            for plan in outside:
                parts = PARTS if plan.initial != "None" else PARTS[:-1]
                yield from (replace(plan, part=part) for part in parts)


def _suggested(module: nn.Module, method: str, masked: bool) -> Iterator[Plan]:
    names = Signature(getattr(module, method))
    mask = next(iter(names.of(MASKS)), "")
    if masked and not mask:
        return
    filler = [*names.unknown, *(n for n in names.of(MASKS) if names.required(n))]
    plan = Plan(method, "" if names.positional else names.ids, flags=tuple(names.of(FLAGS)))
    for form in MASK_FORMS if masked else ("",):
        left = tuple(n for n in filler if not (form and n == mask))
        for cache, initial, needs_cache in _caches(module, names):
            for position, position_form in _positions(names, cache):
                yield replace(
                    plan, cache=cache, initial=initial, position=position, form=position_form,
                    mask=mask, mask_form=form, filler=left, needs_cache=needs_cache,
                )  # fmt: skip


def _caches(module: nn.Module, names: Signature) -> Iterator[tuple[str, str, bool]]:
    """The parameters that may take a cache, each with what it may be given at first; then, without
    a parameter, the methods that may set up caches in the module, or none of them. Whether the
    uncached pass is a step, too, for want of another."""
    for cache in names.of(CACHES):
        for initial in factories(module):
            yield cache, initial, False
    for setup in setups(module):
        yield "", setup, False
    yield "", "", not names.of(FLAGS)


def _positions(names: Signature, cache: str) -> list[tuple[str, str]]:
    """The parameters that may take positions, each with a form of them; ("", "") for none of them,
    if the module can be called so."""
    found = [(n, form) for n in names.of(POSITIONS) for form in _forms(names, n)]
    if any(names.required(n) for n, _ in found):
        return found
    return [*found, ("", "")]


def _forms(names: Signature, name: str) -> tuple[str, ...]:
    """What a parameter for positions may be, the likeliest first."""
    parameter = names.parameters[name]
    hint = str(parameter.annotation)
    number = isinstance(parameter.default, int) and not isinstance(parameter.default, bool)
    if number or hint == "int" or parameter.annotation is int:
        return ("int",)
    tensor = ("line",) if name in ("input_pos", "cache_position") else ("rows", "line")
    if "Tensor" in hint:
        return (*tensor, "rows") if tensor == ("line",) else (*tensor, "starts")
    return (*tensor, "int", "starts")

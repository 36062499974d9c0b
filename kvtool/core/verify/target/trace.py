"""Where two passes of a user's decoder first differ.

Nothing is known of such a decoder but the modules in it: hooks keep what each is given and answers,
cached and uncached, in float64. The first difference in the order of execution is where a bug is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvtool.core.verify.diagnosis.locate import TOLERANCE, differs, ranges, scale
from kvtool.core.verify.target.attributes import owned_modules

HIDDEN = -1e4  # what is added to the scores of keys that are not seen is below
HEADS = ("n_heads", "num_heads", "n_head", "num_attention_heads", "heads", "nhead")


class Site(NamedTuple):
    """The place of a value: an input or output of one call of a module."""

    module: str
    call: int  # of the module, counted from 0
    side: str  # "in" or "out"
    name: str  # of the parameter; of an answer its number

    @property
    def layer(self) -> int | None:
        """The first number in the module's dotted name."""
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.module)
        return int(number[1]) if number else None


Trace = dict[Site, Tensor]  # in the order of execution
Lookup = tuple[str, str]  # a module and its parameter that is given whole numbers


class Tracer:
    """Hooks on every module of a decoder. `trace` is what they saw since it was last cleared;
    `instead` are whole numbers (B,T) to give to parameters that look something up."""

    def __init__(self, instead: dict[Lookup, Tensor] | None = None) -> None:
        self.trace: Trace = {}
        self.instead = instead or {}
        self.calls: dict[str, int] = {}

    def clear(self) -> None:
        """Forget what was seen."""
        self.trace, self.calls = {}, {}

    def given(self, lookup: Lookup) -> Tensor:
        """The inputs of a module's first call. Raises KeyError if it was not called."""
        module, name = lookup
        return self.trace[Site(module, 0, "in", name)]

    @contextmanager
    def on(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """A context in which these modules are traced: `owned_modules` of a pass, `running` ones of
        a step."""
        handles = []
        for name, module in modules.items():
            enter, leave = self._enter(name), self._leave(name)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module_name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self.calls[module_name] = self.calls.get(module_name, -1) + 1
            names = parameter_names(module, len(args))
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            for name, value in given.items():
                self._keep(Site(module_name, call, "in", name), value)
                if (module_name, name) in self.instead and isinstance(value, Tensor):
                    given[name] = shaped_like(value, self.instead[module_name, name])
            return tuple(given[n] for n in names[: len(args)]), {n: given[n] for n in kwargs}

        return hook

    def _leave(self, module_name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, answer: Any) -> None:
            values = answer if isinstance(answer, (tuple, list)) else [answer]
            for i, value in enumerate(values):
                self._keep(Site(module_name, self.calls[module_name], "out", str(i)), value)

        return hook

    def _keep(self, site: Site, value: Any) -> None:
        if isinstance(value, Tensor):
            self.trace[site] = value.clone()


def parameter_names(module: nn.Module, n_args: int) -> list[str]:
    """The names of a module's positional arguments, or numbers if they have none."""
    code = module.forward.__func__.__code__ if hasattr(module.forward, "__func__") else None
    names = [] if code is None else list(code.co_varnames[1 : code.co_argcount])
    return names[:n_args] + [str(i) for i in range(len(names), n_args)]


def shaped_like(given: Tensor, numbers: Tensor) -> Tensor:
    """Whole numbers (B,T) in the shape that a module was given, (T,) where all rows are equal."""
    if given.dim() == 1 and bool((numbers == numbers[:1]).all()):
        return numbers[0]
    return numbers[: given.shape[0]] if given.dim() == 2 and given.shape[0] == 1 else numbers


# Where


@dataclass(frozen=True)
class Difference:
    """The first difference: a value that is wrong, the value before it, and details."""

    site: Site
    before: Site | None
    found: Tensor
    expected: Tensor
    heads: tuple[int, ...] = ()
    axis: int = 1  # of the tokens, in the value
    moved: tuple[str, ...] = ()  # right modules of the same layer that it was computed from

    @property
    def part(self) -> str:
        """The module's own name, and which side of it is wrong."""
        name = self.site.module.rpartition(".")[2] or "decoder"
        return f"{name} {'input' if self.site.side == 'in' else 'output'}"

    def __str__(self) -> str:
        layer = "" if self.site.layer is None else f"layer {self.site.layer}, "
        heads = ""
        if self.heads:
            heads = f", head{'s' if len(self.heads) > 1 else ''} {ranges(self.heads)}"
        return f"{layer}{self._what()}{heads}"

    def _what(self) -> str:
        module, name = self.site.module or "the decoder", self.site.name
        named = name if not name.isdigit() and name not in ("input", "x") else "input"
        if self.site.side == "out":
            return f"{module}: its output is wrong, and its input is right"
        if self.found.dtype in (torch.int64, torch.int32):
            wrong = self.found != self.expected
            asked, right = (sorted(set(t[wrong].tolist())) for t in (self.found, self.expected))
            return f"{module} was asked for {ranges(asked)}, not {ranges(right)}"
        if self.before is None or self.before.side == "in":
            return f"{module}: its {named} is wrong"
        before = self.before.module or "the input"
        return f"{module}: its {named} is wrong, and the output of {before} before it is right"


def first_difference(
    cached: Trace, full: Trace, first: int, n: int, decoder: Any
) -> Difference | None:
    """The first value of the cached run that differs from that of the same tokens, uncached."""
    before, right = None, list[Site]()
    for site, found in cached.items():
        expected = None if site not in full else aligned(full[site], found.shape, first, n)
        if expected is None or found.numel() == 0:
            continue
        wrong = is_wrong(found, expected)
        if wrong and not _without_effect(site, cached, full, first, n):
            heads = _heads(site, found, expected, decoder)
            axis = token_axis(found.shape, full[site].shape, n, first + n)
            return Difference(
                site, before, found, expected, heads, axis, _nearest(right, site.layer)
            )
        before = site
        if site.side == "out" and found.is_floating_point():
            right.append(site)
    return None


def token_axis(found: torch.Size, whole: torch.Size, n: int, total: int) -> int:
    """Which axis of a value counts tokens: n in a step, `total` in the pass."""
    sizes = enumerate(zip(found, whole, strict=True))
    return next((i for i, pair in sizes if pair == (n, total) and i < 3), 1)


def _nearest(right: list[Site], layer: int | None) -> tuple[str, ...]:
    """The modules that answered rightly last: those of a layer; without one the last alone."""
    of_layer = [site.module for site in right if site.layer == layer]
    return tuple(dict.fromkeys(of_layer or [site.module for site in right[-1:]]))


def is_wrong(found: Tensor, expected: Tensor) -> bool:
    """Whether values differ by more than rounding. Masks that are added differ where another key
    is hidden, by whatever large negative number."""
    if not found.is_floating_point():
        return not torch.equal(found, expected)
    if _is_mask(found) and _is_mask(expected):
        return not torch.equal(found < HIDDEN, expected < HIDDEN)
    return differs(found, expected)


def _is_mask(values: Tensor) -> bool:
    """Whether values are 0 or too low for a softmax to read."""
    return bool(((values == 0) | (values < HIDDEN)).all())


def _without_effect(site: Site, cached: Trace, full: Trace, first: int, n: int) -> bool:
    """Whether a module that was given something else answers the same: masks and lengths may be
    counted in another way."""
    answers = [s for s in cached if s[:2] == site[:2] and s.side == "out"]
    if site.side == "out" or not answers:
        return False
    for answer in answers:
        found, whole = cached[answer], full.get(answer)
        expected = None if whole is None else aligned(whole, found.shape, first, n)
        if expected is None or found.numel() == 0 or is_wrong(found, expected):
            return False
    return True


def aligned(value: Tensor, shape: torch.Size, first: int, n: int) -> Tensor | None:
    """A value of the whole pass, narrowed to the n tokens from `first` on; None if it is no match.

    Where the sizes differ, the step's is n and the pass's is a number of tokens.
    """
    if value.dim() != len(shape):
        return None
    for dim, (size, wanted) in enumerate(zip(value.shape, shape, strict=True)):
        if size == wanted:
            continue
        if wanted != n or size < first + n:
            return None
        value = value.narrow(dim, first, n)
    return value


def _heads(site: Site, found: Tensor, expected: Tensor, decoder: Any) -> tuple[int, ...]:
    """The heads whose channels are wrong, if some are right: for inputs of an output projection."""
    modules = owned_modules(decoder)
    parts = site.module.split(".")
    owners = [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]
    counts = (getattr(modules.get(o), name, None) for o in owners for name in HEADS)
    count = next((c for c in counts if isinstance(c, int)), 0)
    if site.side == "out" or not count or not found.is_floating_point() or found.shape[-1] % count:
        return ()
    gap = (found - expected).abs().unflatten(-1, (count, -1)).amax(-1).flatten(0, -2).amax(0)
    wrong = (~(gap <= TOLERANCE * scale(expected))).nonzero()[:, 0].tolist()
    return () if len(wrong) == count else tuple(wrong)

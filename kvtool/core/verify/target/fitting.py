"""Finds the way to call an nn.Module: its signature suggests plans, and each is tried.

Each possibility decodes a few ids; of those that run, the one that agrees best with the uncached
pass is taken: a wrong call would look like a bug. All of it happens on copies of the module.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.core.verify.target.abilities import changes_of
from kvtool.core.verify.target.adapter import ModuleDecoder
from kvtool.core.verify.target.answers import AGREES, last_gap
from kvtool.core.verify.target.attributes import unwrapped, whole_number
from kvtool.core.verify.target.example import cannot_call
from kvtool.core.verify.target.module_copies import left_over, same, session_copy
from kvtool.core.verify.target.plans import Plan, plans, signature
from kvtool.core.verify.target.refusals import is_refusal
from kvtool.core.verify.target.signature import CACHES
from kvtool.errors import UsageError, pass_on_shortage

PROBE = 9  # ids that are tried
# Steps that are tried: any size; one token behind a prompt; no prompt; never one token alone.
SINGLY = (4, 1, 1, 1, 1)
SIZES = ((4, 3, 1, 1), SINGLY, (1, 1, 1, 1), (4, 3, 2))
PROMPT_ONLY = len(SIZES)
# A module that may be given a position for each token has to count them itself if it is not. Where
# a step starts, its caller alone may know.
COUNTED, RAISES = ("rows", "line"), "it raises"
NAMED = 3  # attributes that a note names


@dataclass
class Fit:
    """A way of calling that runs: how many of SIZES, and the gap from the uncached pass."""

    decoder: ModuleDecoder
    level: int
    gap: float
    held: int = 0  # tokens before the first that is not the pass's

    @property
    def agrees(self) -> bool:
        """Whether no other way needs to be tried."""
        return self.level < PROMPT_ONLY and self.gap <= AGREES


@dataclass
class Tries:
    """The plans that were tried, and their results."""

    fits: list[Fit] = field(default_factory=list)
    errors: dict[str, BaseException] = field(default_factory=dict)

    @property
    def runs(self) -> list[Fit]:
        """The ways that go on behind the prompt."""
        return [fit for fit in self.fits if fit.level < PROMPT_ONLY]

    @property
    def agree(self) -> bool:
        """Whether one of the ways agrees with the uncached pass."""
        return any(fit.agrees for fit in self.fits)

    def best(self) -> Fit | None:
        """The first of the closest ways, among those that agree for the most tokens. If the cache
        is wrong, no way agrees fully."""
        of = self.runs or self.fits
        longest = max((fit.held for fit in of), default=0)
        of = [fit for fit in of if fit.held == longest]
        least = min((fit.gap for fit in of), default=math.inf)
        return next((fit for fit in of if fit.gap <= 10 * least), None)


def adapt(module: Any, name: str, device: torch.device) -> ModuleDecoder:
    """The way to call a module that agrees best with its uncached pass.

    Raises UsageError if none runs; it says what the signature needs.
    """
    module, wrapper = unwrapped(module)
    if not isinstance(module, nn.Module):
        kind = type(module).__name__
        kind = f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
        called = "Call it, and give what it returns." if callable(module) else ""
        raise UsageError(
            f"{name}: {kind} is no decoder (expected an nn.Module, or an object with full(ids) and "
            "step(ids, state))",
            called,
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise UsageError(
            f"{name}: TorchScript does not tell how its forward is called",
            "Give the module that it was made of, or an object with full and step.",
        )
    n_ids = min(whole_number(module, ("vocab_size",)) or 4, 4)
    ids = torch.arange(PROBE, device=device)[None] % n_ids
    tries = Tries()
    _try(module, ids, tries, masked=False)
    best = tries.best()
    if not tries.runs or (best is not None and _looks_ahead(best.decoder, ids)):
        masked = Tries()
        _try(module, ids, masked, masked=True)
        if masked.agree or not tries.fits:
            best = masked.best()
        tries.errors.update(masked.errors)
    if best is None:
        raise cannot_call(module, name, tries.errors)
    decoder = _with_abilities(best, ids)
    if wrapper:
        decoder.notes = (f"taken out of {wrapper}", *decoder.notes)
    return decoder


class _Trials:
    """What plans for one module have in common: a copy to try them on, and calls that it refuses.

    A wrong cache agrees with no plan, so that hundreds are tried.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._copy: nn.Module | None = None
        self._refused: set[Plan] = set()

    def copy(self) -> nn.Module:
        """A copy that nothing has changed, or the module itself if it cannot be copied."""
        if self._copy is None:
            self._copy = _copy(self.module)
        return self._copy

    def changed(self) -> list[str]:
        """The attributes that running has changed in the copy; then the next one is new."""
        if self._copy is None or self._copy is self.module:
            return []
        found = left_over(self.module, self._copy)
        if found:
            self._copy = None
        return found

    def refuse(self, decoder: ModuleDecoder) -> None:
        """Remember the plan of a decoder that raised, if not even its first step was answered."""
        if not decoder.answered:
            self._refused.add(_first_step(decoder.plan))

    def refuses(self, plan: Plan) -> bool:
        """Whether a plan begins with a step that was refused: only later steps, or how answers are
        read, are others."""
        return _first_step(plan) in self._refused


def _first_step(plan: Plan) -> Plan:
    """The plan without what decides nothing of its first step's call."""
    return replace(plan, needs_cache=False, part=0, whole=False, copies=False)


def _try(module: nn.Module, ids: Tensor, tries: Tries, masked: bool) -> None:
    """Try plans until one agrees."""
    trials = _Trials(module)
    for plan in plans(module, masked):
        if tries.agree:
            return
        if tries.runs and (plan.needs_cache or plan.method != "forward"):
            continue
        if trials.refuses(plan):
            continue
        try:
            fit = _fit(trials, plan, ids)
            longest = max((other.held for other in tries.fits), default=0)
            tells = fit.agrees or fit.held > longest
            if not plan.whole or (tells and _computes_the_new(fit, ids)):
                tries.fits.append(fit)
        except (Exception, SystemExit) as error:  # it may raise anything if called wrongly
            tries.errors.setdefault(str(plan), error)


def _fit(trials: _Trials, plan: Plan, ids: Tensor) -> Fit:
    """How a plan fits, on a copy of the module for each session if the module keeps something.

    Raises what the module raises.
    """
    module = trials.module
    if plan.own_module:
        inside, error = _tried(decoder := ModuleDecoder(module, plan), ids)
        if inside is None:
            assert error is not None
            trials.refuse(decoder)
            raise error
        if not plan.initial and not inside.agrees and signature(module, plan).of(CACHES):
            raise TypeError("without a cache from outside its logits are others")
        return inside
    used = trials.copy()
    fit, error = _tried(decoder := ModuleDecoder(used, plan), ids)
    kept = trials.changed()
    again = None if fit is None or not kept else _tried(ModuleDecoder(used, plan), ids)[0]
    if kept and not (fit and fit.agrees and again and again.agrees):
        own, _ = _tried(ModuleDecoder(module, replace(plan, copies=True)), ids)
        if own is not None and (fit is None or own.gap <= AGREES):
            names = ", ".join(kept[:NAMED])
            own.decoder.notes = (
                f"{names} of the module would change what the next session answers: "
                "each runs on a copy",
            )
            return own
    if fit is None:
        assert error is not None
        trials.refuse(decoder)
        raise error
    fit.decoder.module = module
    return fit


def _computes_the_new(fit: Fit, ids: Tensor) -> bool:
    """Whether a module that takes all ids so far answers for the new ones alone, and without a
    cache for all. One that recomputes everything would hide bugs of its steps."""
    whole = fit.decoder.full(ids)
    return not fit.decoder.recomputes and whole.dim() == 3 and whole.shape[1] == ids.shape[1]


def _copy(module: nn.Module) -> nn.Module:
    try:
        return session_copy(module)
    except Exception as error:  # what cannot be copied is used as it is
        pass_on_shortage(error)
        return module


def _tried(decoder: ModuleDecoder, ids: Tensor) -> tuple[Fit | None, BaseException | None]:
    try:
        return _measured(decoder, ids), None
    except (Exception, SystemExit) as error:
        return None, error


def _stores(decoder: ModuleDecoder, ids: Tensor) -> bool:
    """Whether a step changes the cache that it is given, or the module that keeps it."""
    state = decoder.start(1, 4 * PROBE)
    before = copy.deepcopy(state)
    try:
        _, after = decoder.step(ids, state)
    except Exception as error:
        if not is_refusal(error) or ids.shape[1] == 1:
            raise
        return _stores(decoder, ids[:, :1])
    if decoder.plan.in_module:
        return bool(left_over(before.module or decoder.module, decoder.running(after)))
    return after.cache is not state.cache or not same(before.cache, after.cache)


def _measured(decoder: ModuleDecoder, ids: Tensor) -> Fit:
    """The gap of a module from its uncached pass, in the first of SIZES that it takes.

    A module that takes a prompt rightly and fails afterwards counts too: the check reports that.
    Raises what the module raised at the first of them.
    """
    if not _stores(decoder, ids[:, :4]):
        raise TypeError("it answered without a cache")
    whole = decoder.full(ids)
    if whole.dim() < 2 or whole.shape[0] != 1:
        raise ValueError(f"it answered ids (1, {PROBE}) with {tuple(whole.shape)}")
    first: BaseException | None = None
    for level, sizes in enumerate(SIZES):
        try:
            gaps = _gaps(decoder, ids, sizes)
            right = list(takewhile(lambda gap: gap <= AGREES, gaps))
            return Fit(decoder, level, max(gaps), sum(sizes[: len(right)]))
        except (Exception, SystemExit) as error:
            first = first or error
            if isinstance(error, TypeError) and "without a cache" in str(error):
                break
    assert first is not None
    if isinstance(first, (RuntimeError, IndexError)) and not is_refusal(first):
        gap = cached_gap(decoder, ids, SIZES[0][:1])
        if gap <= AGREES:
            return Fit(decoder, PROMPT_ONLY, gap)
    raise first


def cached_gap(decoder: ModuleDecoder, ids: Tensor, sizes: Sequence[int]) -> float:
    """The gap of cached logits from uncached ones, over max |uncached|."""
    return max(_gaps(decoder, ids, sizes))


def _gaps(decoder: ModuleDecoder, ids: Tensor, sizes: Sequence[int]) -> list[float]:
    state, gaps, end = decoder.start(1, 4 * PROBE), [], 0
    for n in sizes:
        logits, state = decoder.step(ids[:, end : end + n], state)
        end += n
        at_once = decoder.full(ids[:, :end])
        if logits.shape[-1] != at_once.shape[-1]:
            raise ValueError(f"it answered a step with {tuple(logits.shape)}")
        gaps.append(last_gap(logits, at_once))
    return gaps


def _looks_ahead(decoder: ModuleDecoder, ids: Tensor) -> bool:
    """Whether a module that could be given a mask sees later tokens without one."""
    if not decoder.plan.mask or decoder.plan.mask_form:
        return False
    other = ids.clone()
    other[:, -1] = 5 % int(ids.max() + 3)
    one, two = decoder.full(ids), decoder.full(other)
    if one.dim() != 3 or one.shape[1] != ids.shape[1]:
        return False
    return last_gap(one[:, :-1], two[:, :-1]) > AGREES


def _with_abilities(fit: Fit, ids: Tensor) -> ModuleDecoder:
    """The decoder with its other abilities; notes whether it needs positions."""
    decoder, plan = fit.decoder, fit.decoder.plan
    names = signature(decoder.module, plan)
    decoder.breaks_down = fit.level == PROMPT_ONLY
    if not decoder.breaks_down:
        decoder.changes = changes_of(decoder, ids, SIZES[fit.level])
        readings = [change for change in decoder.changes.values() if change.noted]
        decoder.notes = (*decoder.notes, *map(str, readings))
    decoder.takes_padding = _takes_padding(decoder, ids.device)
    optional = plan.position and not names.required(plan.position)
    if optional and not plan.in_module and names.parameters[plan.position].default is None:
        note = _without_positions(decoder, ids, SIZES[min(fit.level, PROMPT_ONLY - 1)])
        if note and plan.form in COUNTED and RAISES not in note:
            decoder.plan = replace(plan, position="")
            note = f"{plan.position} is left out, as its default allows; given, logits are right"
        decoder.notes = (*decoder.notes, note) if note else decoder.notes
    return decoder


def _takes_padding(decoder: ModuleDecoder, device: torch.device) -> bool:
    """Whether a mask of the whole history runs, with positions for each row or without any, and
    hides padding from an uncached pass."""
    plan = decoder.plan
    plain = plan.mask == "attention_mask" and plan.mask_form in ("", "ones", "trues")
    if not plain or plan.form not in ("", "rows"):
        return False
    ids = torch.arange(2 * PROBE, device=device).reshape(2, PROBE) % 4
    padding = torch.tensor([0, 3], device=device)
    other = ids.clone()
    other[1, :3] = (ids[1, :3] + 1) % 4
    try:
        state = decoder.start(2, 2 * PROBE, padding)
        _, state = decoder.step(ids[:, :-2], state)
        found, _ = decoder.step(ids[:, -2:], state)
        whole, changed = (decoder.full(line, padding)[:, -2:] for line in (ids, other))
    except (Exception, SystemExit) as error:  # whatever it raises: it takes no such mask
        pass_on_shortage(error)
        return False
    finite = bool(found[:, -1].isfinite().all() and whole.isfinite().all())
    scale = float(whole.abs().max()) or 1.0
    return finite and float((changed - whole).abs().max()) <= AGREES * scale


def _without_positions(decoder: ModuleDecoder, ids: Tensor, sizes: Sequence[int]) -> str:
    """The error of the module without optional positions, in words; else ""."""
    name = decoder.plan.position
    bare = ModuleDecoder(_copy(decoder.module), replace(decoder.plan, position=""))
    try:
        gap = cached_gap(bare, ids, sizes)
    except (Exception, SystemExit) as error:
        pass_on_shortage(error)
        return f"without {name} {RAISES} {type(error).__name__}"
    if gap <= AGREES or cached_gap(decoder, ids, sizes) > AGREES:
        return ""
    return f"without {name} its cached logits are others ({gap:.0e})"

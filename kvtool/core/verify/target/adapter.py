"""An nn.Module as a decoder: how its forward takes and gives a cache is guessed, and tried out.

The names in its signature say what is possible. Each possibility decodes a few ids; of those that
run, the one that agrees best with the uncached pass is taken: a wrong call would look like a bug.
"""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.core.verify.copies import converted
from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.plans import CACHES, FACTORIES, Plan, parameters, plans, required
from kvtool.errors import UsageError, first_line, pass_on_shortage

SIZES = {  # what a factory's parameters may be called
    "batch": ("batch", "batch_size", "max_batch_size", "bsz", "b", "n_rows"),
    "room": (
        "capacity", "max_len", "max_length", "max_seq_len", "max_seq_length", "max_tokens",
        "length", "seq_len", "context", "max_context", "size", "decoder_max_seq_len", "n_tokens",
    ),
}  # fmt: skip
AGREES = 1e-3  # the gap in float32 or float64 below which no other way of calling is tried
SHOWN = 4  # failed ways of calling that an error names
PROBE = 9  # ids that are tried: a step of 4, of 3, and of one twice


@dataclass
class State:
    """The module's cache, and what its caller has to keep in mind."""

    cache: Any
    past: int  # tokens that it holds
    batch: int
    room: int  # tokens
    padding: Tensor | None = None


@dataclass
class ModuleDecoder:
    """An nn.Module, called as planned: a decoder of the protocol of a target."""

    module: nn.Module
    plan: Plan
    unable: tuple[str, ...] = ("crop", "select", "reset")
    takes_padding: bool = False
    note: str = ""

    @property
    def guess(self) -> str:
        """How the module is called, in words."""
        return f"called as {self.plan}" + (f"; {self.note}" if self.note else "")

    def full(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """Whole sequences (B,T) -> what the module answers, mostly (B,T,V); no cache takes part."""
        plan = self.plan
        if plan.needs_cache:
            return self.step(ids, self.start(ids.shape[0], ids.shape[1], padding))[0]
        given: dict[str, Any] = dict.fromkeys(plan.filler)
        if plan.flag:
            given[plan.flag] = False
        if plan.cache and required(self.module, plan.cache):
            given[plan.cache] = None
        # A module that keeps its caches takes positions to mean that they are to be used.
        if (
            padding is not None
            or not plan.in_module
            or (plan.position and required(self.module, plan.position))
        ):
            given.update(self._position_arguments(ids, 0, padding))
        return logits_and_cache(self.module(ids, **given), plan.cache)[0]

    def start(self, batch: int, capacity: int, padding: Tensor | None = None) -> State:
        """The state before the first token."""
        return State(self._initial_cache(batch, capacity), 0, batch, capacity, padding)

    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """The next tokens (B,n) -> their logits, and the next state.

        Raises TypeError if the module answers without a cache, and what the module raises.
        """
        plan = self.plan
        given: dict[str, Any] = dict.fromkeys(plan.filler)
        if plan.flag:
            given[plan.flag] = True
        if plan.cache:
            given[plan.cache] = state.cache
        given.update(self._position_arguments(ids, state.past, state.padding))
        module = state.cache if plan.in_module else self.module
        logits, cache, how = logits_and_cache(module(ids, **given), plan.cache)
        if plan.in_module or (cache is None and state.cache is not None):
            cache, how = state.cache, "logits, the cache changed in place"
        if _is_empty(cache):
            raise TypeError("it answered without a cache")
        if not plan.read:
            self.plan = replace(plan, read=how)
        return logits, replace(state, cache=cache, past=state.past + ids.shape[1])

    def _position_arguments(self, ids: Tensor, past: int, padding: Tensor | None) -> dict[str, Any]:
        """Positions, and where there is padding a mask."""
        plan, (batch, n) = self.plan, ids.shape
        found: dict[str, Any] = {}
        line = torch.arange(past, past + n, device=ids.device)
        rows = line.expand(batch, n)
        if padding is not None:
            real = Start(batch, 0, padding).real(0, past + n)
            found["attention_mask"] = real.long()
            rows = (real.cumsum(1) - 1).clamp(min=0)[:, past:]
        if plan.position:
            found[plan.position] = {"rows": rows, "line": line, "int": past}[plan.form]
        return found

    def _initial_cache(self, batch: int, capacity: int) -> Any:
        plan = self.plan
        if plan.in_module:
            module = copy.deepcopy(self.module)
            _call_factory(getattr(module, plan.initial), batch, capacity, self.module)
            return module
        if plan.initial in FACTORIES:
            return _call_factory(getattr(self.module, plan.initial), batch, capacity, self.module)
        return {"None": None, "[]": [], "{}": {}}.get(plan.initial, [None] * plan.n_layers)

    def crop(self, state: State, length: int) -> State:
        """Forget all but the first `length` tokens."""
        # Since transformers 5 its caches take how many tokens to remove, as a negative number.
        of_transformers = type(state.cache).__module__.startswith("transformers.")
        to = length - state.past if of_transformers else length
        return replace(state, cache=self._change("crop", state.cache, to), past=length)

    def select(self, state: State, rows: Tensor) -> State:
        """Go on from the histories of `rows` (n,), in that order."""
        padding = None if state.padding is None else state.padding[rows]
        cache = self._change("select", state.cache, rows)
        return replace(state, cache=cache, batch=len(rows), padding=padding)

    def reset(self, state: State) -> State:
        """Forget everything and begin again on the same cache."""
        return replace(state, cache=self._change("reset", state.cache), past=0)

    def _change(self, op: str, cache: Any, *args: Any) -> Any:
        method = change_method(self.module, cache, op)
        assert method is not None  # else it is among `unable`
        try:
            changed = method(*args) if method.__self__ is cache else method(cache, *args)
        except (Exception, SystemExit) as error:  # found by its name: it promised nothing
            raise NotImplementedError(f"{type(error).__name__}: {first_line(error)}") from error
        return cache if changed is None else changed

    def to(self, dtype: torch.dtype) -> ModuleDecoder:
        """The same decoder with a copy of the module in another format."""
        return replace(self, module=converted(self.module, dtype))


CHANGE_METHODS = {
    "crop": ("crop", "truncate", "rewind"),
    "select": ("select", "batch_select_indices", "reorder", "reorder_cache", "_reorder_cache"),
    "reset": ("reset", "reset_caches", "clear"),
}


def change_method(module: nn.Module, cache: Any, op: str) -> Any:
    """The method of a cache, or of the module that is given it, that crops, selects or resets."""
    for holder, n_args in ((cache, 0), (module, 1)):
        if isinstance(holder, (list, dict, tuple, Tensor)):
            continue
        for name in CHANGE_METHODS[op]:
            method = getattr(holder, name, None)
            n = n_args + (op != "reset")
            if inspect.ismethod(method) and _takes(method, n):
                return method
    return None


def adapt(module: Any, name: str, device: torch.device) -> ModuleDecoder:
    """The way to call a module that agrees best with its uncached pass.

    Raises UsageError, with all that was tried, if none runs.
    """
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"{name}: a {type(module).__name__} is no decoder (expected an nn.Module, or an object "
            "with full(ids) and step(ids, state))"
        )
    ids = torch.arange(PROBE, device=device)[None] % 4
    tried: dict[str, str] = {}
    runs: list[tuple[float, ModuleDecoder]] = []
    for plan in plans(module):
        if plan.needs_cache and runs:
            break
        decoder = ModuleDecoder(module, plan)
        try:
            gap = _cached_gap(decoder, ids)
        except (Exception, SystemExit) as error:  # it may raise anything if called wrongly
            tried.setdefault(str(plan), f"{type(error).__name__}: {first_line(error)}")
            continue
        runs.append((gap, decoder))
        if gap <= AGREES:
            break
    if not runs:
        raise _nothing_fits(module, name, tried)
    best = min(gap for gap, _ in runs)
    decoder = next(d for gap, d in runs if gap <= 10 * best)
    return _with_abilities(decoder, ids)


def logits_and_cache(answer: Any, cache: str) -> tuple[Tensor, Any, str]:
    """The logits and the cache of a module's answer, and how they were found.

    Raises TypeError if there are no logits in it.
    """
    if isinstance(answer, Tensor):
        return answer, None, "logits"
    named = dict(answer) if isinstance(answer, dict) else getattr(answer, "__dict__", {})
    if isinstance(named.get("logits"), Tensor):
        for name in (cache, *CACHES):
            if named.get(name) is not None:
                return named["logits"], named[name], f"output.logits, output.{name}"
        return named["logits"], None, "output.logits"
    if isinstance(answer, (tuple, list)) and answer and isinstance(answer[0], Tensor):
        rest = [value for value in answer[1:] if value is not None]
        how = "(logits, cache)" if len(answer) == 2 else "(logits, ..., cache)"
        return answer[0], rest[0] if rest else None, how
    raise TypeError(f"it answered with a {type(answer).__name__} in which there are no logits")


def _cached_gap(decoder: ModuleDecoder, ids: Tensor) -> float:
    """How far cached logits are from the uncached ones, over max |uncached|."""
    whole = decoder.full(ids)
    if whole.dim() < 2 or whole.shape[0] != 1:
        raise ValueError(f"it answered ids (1, {PROBE}) with {tuple(whole.shape)}")
    state, gaps, end = decoder.start(1, 4 * PROBE), [], 0
    for n in (4, 3, 1, 1):
        logits, state = decoder.step(ids[:, end : end + n], state)
        end += n
        at_once = decoder.full(ids[:, :end])
        if logits.shape[-1] != whole.shape[-1]:
            raise ValueError(f"it answered a step with {tuple(logits.shape)}")
        width = whole.shape[-1]
        found, expected = logits.flatten()[-width:], at_once.flatten()[-width:]
        gaps.append(float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0))
    return max(math.inf if math.isnan(g) else g for g in gaps)


def _with_abilities(decoder: ModuleDecoder, ids: Tensor) -> ModuleDecoder:
    """With what else it can do, and whether it needs the positions that it is given."""
    module, plan = decoder.module, decoder.plan
    state = decoder.start(1, PROBE)
    _, state = decoder.step(ids[:, :4], state)
    able = [op for op in CHANGE_METHODS if change_method(module, state.cache, op)]
    decoder.unable = tuple(op for op in CHANGE_METHODS if op not in able)
    names = parameters(module)
    decoder.takes_padding = _takes_padding(decoder, ids.device)
    if plan.position and not plan.in_module and names[plan.position].default is None:
        decoder.note = _without_positions(decoder, ids)
    return decoder


def _takes_padding(decoder: ModuleDecoder, device: torch.device) -> bool:
    """Whether a mask of the whole history runs, with positions for each row or without any, and
    hides padding from an uncached pass."""
    names = parameters(decoder.module)
    if "attention_mask" not in names or decoder.plan.form not in ("", "rows"):
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


def _without_positions(decoder: ModuleDecoder, ids: Tensor) -> str:
    """How wrong the module is where its caller leaves out positions, although it may; else ""."""
    name = decoder.plan.position
    bare = ModuleDecoder(decoder.module, replace(decoder.plan, position=""))
    try:
        gap = _cached_gap(bare, ids)
    except (Exception, SystemExit) as error:
        pass_on_shortage(error)
        return f"without {name} it raises {type(error).__name__}"
    if gap <= AGREES or _cached_gap(decoder, ids) > AGREES:
        return ""
    return f"without {name} its cached logits are others ({gap:.0e})"


def _nothing_fits(module: nn.Module, name: str, tried: dict[str, str]) -> UsageError:
    signature = f"forward({', '.join(parameters(module))})"
    hint = "Give it full(ids) and step(ids, state): see kvtool.core.verify.target."
    if not tried:
        return UsageError(f"{name}: {signature} has no parameter that could be a cache", hint)
    words = [f"{plan}: {why}" for plan, why in tried.items()]
    more = f"; and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    text = f"{name}: no way to call {signature} with a cache runs. Tried "
    return UsageError(f"{text}{'; '.join(words[:SHOWN])}{more}", hint)


def _is_empty(cache: Any) -> bool:
    """Whether a cache is None, or a container that holds nothing else."""
    if isinstance(cache, list):
        return all(part is None for part in cache)
    return cache is None or cache == {}


def _takes(method: Any, n: int) -> bool:
    """Whether a method can be called with n positional arguments."""
    try:
        inspect.signature(method).bind(*[None] * n)
    except TypeError:
        return False
    return True


def _call_factory(factory: Any, batch: int, capacity: int, module: nn.Module) -> Any:
    """Call a factory with what the names of its parameters ask for."""
    weight = next(module.parameters())
    known = {"dtype": weight.dtype, "device": weight.device}
    known |= dict.fromkeys(SIZES["batch"], batch) | dict.fromkeys(SIZES["room"], capacity)
    names = inspect.signature(factory).parameters
    return factory(**{name: known[name] for name in names if name in known})

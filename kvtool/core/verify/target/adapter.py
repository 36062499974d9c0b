"""An nn.Module as a decoder: how its forward takes and gives a cache is guessed, and tried out.

The names in its signature say what is possible. Each possibility decodes a few ids; of those that
run, the one that agrees best with the uncached pass is taken: a wrong call would look like a bug.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.errors import UsageError, first_line, pass_on_shortage

CACHES = (
    "past_key_values", "kv_cache", "kv_caches", "cache", "caches", "past_kv", "past_kvs", "past",
    "layer_past", "past_key_value", "cache_params", "state", "states", "mems", "hidden",
)  # fmt: skip
FLAGS = ("use_cache", "return_cache", "use_kv_cache", "return_kv", "return_state")
POSITIONS = (
    "position_ids", "positions", "input_pos", "cache_position", "start_pos", "pos", "position",
    "offset", "pos_offset", "past_length", "past_len", "cur_pos",
)  # fmt: skip
FORMS = {
    "rows": "arange(past, past + n) for each row",
    "line": "arange(past, past + n)",
    "int": "past",
}
FACTORIES = (
    "make_cache", "new_cache", "init_cache", "create_cache", "empty_cache", "make_kv_cache",
    "init_kv_cache", "new_kv_cache", "allocate_cache", "init_state", "initial_state", "new_state",
)  # fmt: skip
SETUPS = ("setup_caches", "set_kv_cache", "setup_cache", "setup_kv_cache")  # caches in the module
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


@dataclass(frozen=True)
class Plan:
    """One way to call a module's forward."""

    cache: str = ""  # the parameter; none: the module keeps its caches itself
    initial: str = "None"  # what the first step is given: None, [], {}, [None] * n, or a method
    n_layers: int = 0  # of [None] * n
    flag: str = ""
    position: str = ""
    form: str = ""
    filler: tuple[str, ...] = ()  # required parameters that are given None
    fresh: bool = False  # it cannot go without a cache: the uncached pass is one step on a new one
    read: str = ""  # how the answer is read

    @property
    def own(self) -> bool:
        return not self.cache

    def __str__(self) -> str:
        parts = ["ids"]
        if self.cache:
            parts.append(f"{self.cache}={self.initial} at first")
        if self.flag:
            parts.append(f"{self.flag}=True")
        if self.position:
            parts.append(f"{self.position}={FORMS[self.form]}")
        parts.extend(f"{name}=None" for name in self.filler)
        before = f"{self.initial}, then " if self.own else ""
        after = f" -> {self.read}" if self.read else ""
        if self.fresh:
            after += "; it cannot go without a cache: the uncached pass is one step on a new one"
        return f"{before}forward({', '.join(parts)}){after}"


@dataclass
class State:
    """The module's cache, and what its caller has to keep in mind."""

    cache: Any
    past: int
    batch: int
    room: int
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
        return f"called as {self.plan}" + (f"; {self.note}" if self.note else "")

    def full(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        plan = self.plan
        if plan.fresh:
            return self.step(ids, self.start(ids.shape[0], ids.shape[1], padding))[0]
        given: dict[str, Any] = dict.fromkeys(plan.filler)
        if plan.flag:
            given[plan.flag] = False
        if plan.cache and _required(self.module, plan.cache):
            given[plan.cache] = None
        # A module that keeps its caches takes positions to mean that they are to be used.
        if not plan.own or (plan.position and _required(self.module, plan.position)):
            given.update(self._places(ids, 0, padding))
        return read(self.module(ids, **given), plan.cache)[0]

    def start(self, batch: int, capacity: int, padding: Tensor | None = None) -> State:
        return State(self._initial(batch, capacity), 0, batch, capacity, padding)

    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        plan = self.plan
        given: dict[str, Any] = dict.fromkeys(plan.filler)
        if plan.flag:
            given[plan.flag] = True
        if plan.cache:
            given[plan.cache] = state.cache
        given.update(self._places(ids, state.past, state.padding))
        module = state.cache if plan.own else self.module
        logits, cache, how = read(module(ids, **given), plan.cache)
        if plan.own or (cache is None and state.cache is not None):
            cache, how = state.cache, "logits, the cache changed in place"
        if cache is None or cache == {} or (isinstance(cache, list) and _all_none(cache)):
            raise TypeError("it answered without a cache")
        if not plan.read:
            self.plan = replace(plan, read=how)
        return logits, replace(state, cache=cache, past=state.past + ids.shape[1])

    def _places(self, ids: Tensor, past: int, padding: Tensor | None) -> dict[str, Any]:
        """Positions, and where there is padding a mask."""
        plan, (batch, n) = self.plan, ids.shape
        found: dict[str, Any] = {}
        line = torch.arange(past, past + n, device=ids.device)
        rows = line.expand(batch, n)
        if padding is not None:
            columns = torch.arange(past + n, device=ids.device)
            found["attention_mask"] = (columns >= padding[:, None]).long()
            rows = (rows - padding[:, None]).clamp(min=0)
        if plan.position:
            found[plan.position] = {"rows": rows, "line": line, "int": past}[plan.form]
        return found

    def _initial(self, batch: int, capacity: int) -> Any:
        plan = self.plan
        if plan.own:
            module = copy.deepcopy(self.module)
            _make(getattr(module, plan.initial), batch, capacity, self.module)
            return module
        if plan.initial in FACTORIES:
            return _make(getattr(self.module, plan.initial), batch, capacity, self.module)
        return {"None": None, "[]": [], "{}": {}}.get(plan.initial, [None] * plan.n_layers)

    def crop(self, state: State, length: int) -> State:
        # Since transformers 5 its caches take how many tokens to remove, as a negative number.
        of_transformers = type(state.cache).__module__.startswith("transformers.")
        to = length - state.past if of_transformers else length
        return replace(state, cache=self._change("crop", state.cache, to), past=length)

    def select(self, state: State, rows: Tensor) -> State:
        padding = None if state.padding is None else state.padding[rows]
        cache = self._change("select", state.cache, rows)
        return replace(state, cache=cache, batch=len(rows), padding=padding)

    def reset(self, state: State) -> State:
        return replace(state, cache=self._change("reset", state.cache), past=0)

    def _change(self, op: str, cache: Any, *args: Any) -> Any:
        method = changer(self.module, cache, op)
        assert method is not None  # else it is among `unable`
        try:
            changed = method(*args) if method.__self__ is cache else method(cache, *args)
        except (
            Exception,
            SystemExit,
        ) as error:  # found by its name: that it refuses breaks no promise
            raise NotImplementedError(f"{type(error).__name__}: {first_line(error)}") from error
        return cache if changed is None else changed

    def to(self, dtype: torch.dtype) -> ModuleDecoder:
        return replace(self, module=copy.deepcopy(self.module).to(dtype))


CHANGERS = {
    "crop": ("crop", "truncate", "rewind"),
    "select": ("select", "batch_select_indices", "reorder", "reorder_cache", "_reorder_cache"),
    "reset": ("reset", "reset_caches", "clear"),
}


def changer(module: nn.Module, cache: Any, op: str) -> Any:
    """The method of a cache, or of the module that is given it, that crops, selects or resets."""
    for holder, n_args in ((cache, 0), (module, 1)):
        if isinstance(holder, (list, dict, tuple, Tensor)):
            continue
        for name in CHANGERS[op]:
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
    for plan in all_plans(module):
        if plan.fresh and runs:
            break
        decoder = ModuleDecoder(module, plan)
        try:
            gap = _gap(decoder, ids)
        except (
            Exception,
            SystemExit,
        ) as error:  # a module may raise anything: then it is not called like that
            tried.setdefault(str(plan), f"{type(error).__name__}: {first_line(error)}")
            continue
        runs.append((gap, decoder))
        if gap <= AGREES:
            break
    if not runs:
        raise _nothing_fits(module, name, tried)
    best = min(gap for gap, _ in runs)
    decoder = next(d for gap, d in runs if gap <= 10 * best)
    return _completed(decoder, ids)


def all_plans(module: nn.Module) -> Iterator[Plan]:
    """Every way to call a module; last those that cannot go without a cache."""
    yield from plans(module)
    yield from (replace(plan, fresh=True) for plan in plans(module))


def plans(module: nn.Module) -> Iterator[Plan]:
    """Every way that the signature suggests, the likeliest first."""
    names = _parameters(module)
    flag = next((n for n in FLAGS if n in names), "")
    places: list[tuple[str, str]] = [
        (n, form) for n in POSITIONS if n in names for form in _forms(names[n])
    ]
    if not any(_required(module, n) for n, _ in places):
        places.append(("", ""))
    known = {*FLAGS, *CACHES, *POSITIONS}
    required = tuple(n for n in list(names)[1:] if n not in known and _required(module, n))
    layers = _layers(module)
    for cache in (n for n in CACHES if n in names):
        made = [n for n in FACTORIES if callable(getattr(module, n, None))]
        for initial in (*made, "None", "[]", "{}", *([f"[None] * {layers}"] if layers else [])):
            for place, form in places:
                yield Plan(cache, initial, layers, flag, place, form, required)
    for setup in (n for n in SETUPS if callable(getattr(module, n, None))):
        for place, form in places:
            yield Plan("", setup, 0, flag, place, form, required)


def read(answer: Any, cache: str) -> tuple[Tensor, Any, str]:
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


def _gap(decoder: ModuleDecoder, ids: Tensor) -> float:
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


def _completed(decoder: ModuleDecoder, ids: Tensor) -> ModuleDecoder:
    """With what else it can do, and whether it needs the positions that it is given."""
    module, plan = decoder.module, decoder.plan
    state = decoder.start(1, PROBE)
    _, state = decoder.step(ids[:, :4], state)
    able = [op for op in CHANGERS if changer(module, state.cache, op)]
    decoder.unable = tuple(op for op in CHANGERS if op not in able)
    names = _parameters(module)
    decoder.takes_padding = "attention_mask" in names and plan.form == "rows"
    if plan.position and not plan.own and names[plan.position].default is None:
        bare = ModuleDecoder(module, replace(plan, position=""))
        try:
            gap = _gap(bare, ids)
        except (Exception, SystemExit) as error:
            pass_on_shortage(error)
            decoder.note = f"without {plan.position} it raises {type(error).__name__}"
        else:
            if not gap <= AGREES < math.inf and _gap(decoder, ids) <= AGREES:
                decoder.note = f"without {plan.position} its cached logits are others ({gap:.0e})"
    return decoder


def _nothing_fits(module: nn.Module, name: str, tried: dict[str, str]) -> UsageError:
    signature = f"forward({', '.join(_parameters(module))})"
    hint = "Give it full(ids) and step(ids, state): see kvtool.core.verify.target.subject."
    if not tried:
        return UsageError(f"{name}: {signature} has no parameter that could be a cache", hint)
    words = [f"{plan}: {why}" for plan, why in tried.items()]
    more = f"; and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    text = f"{name}: no way to call {signature} with a cache runs. Tried "
    return UsageError(f"{text}{'; '.join(words[:SHOWN])}{more}", hint)


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    found = inspect.signature(module.forward).parameters
    return {n: p for n, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _required(module: nn.Module, name: str) -> bool:
    return _parameters(module)[name].default is inspect.Parameter.empty


def _forms(parameter: inspect.Parameter) -> tuple[str, ...]:
    """What a parameter for positions may be, the likeliest first."""
    hint = str(parameter.annotation)
    if isinstance(parameter.default, int) or hint == "int" or parameter.annotation is int:
        return ("int",)
    tensor = ("line",) if parameter.name in ("input_pos", "cache_position") else ("rows", "line")
    if "Tensor" in hint:
        return tensor
    return (*tensor, "int")


def _layers(module: nn.Module) -> int:
    """The number of layers: the longest list of modules."""
    return max((len(m) for m in module.modules() if isinstance(m, nn.ModuleList)), default=0)


def _all_none(values: list[Any]) -> bool:
    return all(value is None for value in values)


def _takes(method: Any, n: int) -> bool:
    """Whether a method can be called with n positional arguments."""
    try:
        inspect.signature(method).bind(*[None] * n)
    except TypeError:
        return False
    return True


def _make(factory: Any, batch: int, capacity: int, module: nn.Module) -> Any:
    """Call a factory with what the names of its parameters ask for."""
    weight = next(module.parameters())
    known = {"dtype": weight.dtype, "device": weight.device}
    known |= dict.fromkeys(SIZES["batch"], batch) | dict.fromkeys(SIZES["room"], capacity)
    names = inspect.signature(factory).parameters
    return factory(**{name: known[name] for name in names if name in known})

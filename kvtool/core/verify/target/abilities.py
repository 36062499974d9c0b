"""The abilities of an adapted module besides decoding: the methods that crop, select and reset, and
their arguments. Each is tried, and compared with a pass over the tokens that should be left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvtool.core.verify.target.adapter import OPS, ModuleDecoder, State
from kvtool.core.verify.target.answers import AGREES, last_gap
from kvtool.core.verify.target.changes import Change, changes
from kvtool.errors import pass_on_shortage

KEPT, HELD = 5, 7  # so that no length is a count


def changes_of(decoder: ModuleDecoder, ids: Tensor, sizes: Sequence[int]) -> dict[str, Change]:
    """How a module's cache is changed, by operation; sizes: steps that it is known to take."""
    found: dict[str, Change] = {}
    state = _fed(decoder, ids, sizes)
    for op in OPS:
        module, placed = decoder.running(state), bool(decoder.plan.position)
        candidates = [
            again
            for change in changes(module, state.cache, op, placed)
            for again in _again(change, decoder)
        ]
        if chosen := _chosen(decoder, candidates, ids, sizes):
            found[op] = chosen
    return found


def _again(change: Change, decoder: ModuleDecoder) -> list[Change]:
    """The changes of caches in the module, which a reset may have to set up again."""
    if change.op != "reset" or change.holder != "own" or not decoder.plan.initial:
        return [change]
    set_up = replace(change, again=True)
    return [change, set_up] if change.method else [set_up]


def _chosen(
    decoder: ModuleDecoder, candidates: list[Change], ids: Tensor, sizes: Sequence[int]
) -> Change | None:
    """The first change that is right; else the likeliest that runs; else the likeliest, which
    raises when it is used. A change by position alone must be right."""
    running = None
    for change in candidates:
        gap = _gap(decoder, change, ids, sizes)
        if gap <= AGREES:
            return change
        if running is None and change.method and not math.isinf(gap):
            running = change
    restart = next((c for c in candidates if c.op == "reset" and not c.method), None)
    return running or next((c for c in candidates if c.method), restart)


def _gap(decoder: ModuleDecoder, change: Change, ids: Tensor, sizes: Sequence[int]) -> float:
    """The gap of the logits after a change from those of a pass; inf if it raises."""
    other = replace(decoder, changes={change.op: change})
    try:
        if change.op == "select":
            return _selected(other, ids, sizes)
        state = _fed(other, ids, sizes)
        if change.op == "crop":
            state, history = other.crop(state, KEPT), ids[:, :KEPT]
        else:
            state, history = other.reset(state), ids[:, :0]
        fed = (ids[:, :1] + 3) % 4
        found, _ = other.step(fed, state)
        return last_gap(found[-1:], other.full(torch.cat([history, fed], dim=1))[-1:])
    except (Exception, SystemExit) as error:
        pass_on_shortage(error)
        return math.inf


def _selected(decoder: ModuleDecoder, ids: Tensor, sizes: Sequence[int]) -> float:
    rows = torch.cat([ids, (ids + 1) % 4])
    state = _fed(decoder, rows, sizes)
    order = torch.tensor([1, 0], device=ids.device)
    state = decoder.select(state, order)
    fed = rows[order, HELD : HELD + 1]
    found, _ = decoder.step(fed, state)
    expected = decoder.full(torch.cat([rows[order, :HELD], fed], dim=1))
    return max(last_gap(found[row], expected[row]) for row in range(2))


def _fed(decoder: ModuleDecoder, ids: Tensor, sizes: Sequence[int]) -> State:
    """The state after HELD tokens, in steps that the module takes."""
    state, end = decoder.start(ids.shape[0], 4 * ids.shape[1]), 0
    for n in (*sizes, *[1] * HELD):
        n = min(n, HELD - end)
        if n:
            _, state = decoder.step(ids[:, end : end + n], state)
        end += n
    return state

"""Names for wrong maps of what tokens see: each rule says which keys its bug shows.

A rule is named only if it gives the map that was found, cell by cell: at each step either just
that, or just what is right; so a bug in steps of one size alone is named with that size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvtool.core.verify.diagnosis.locate import ranges
from kvtool.core.verify.target.influence import Query, Sight
from kvtool.core.verify.target.views import View, views, width

AFTER = " (after the first step)"
MAX_BUGS = 3  # bugs that may all be named: of more, too little was seen to tell
Rule = Callable[[View], Tensor]  # -> (Q,K) bool: what is seen under it


def past_lost(v: View) -> Tensor:
    return v.right & (v.key >= v.past)


def top_left(v: View) -> Tensor:
    """Keys are counted from the oldest that the cache holds."""
    oldest = (v.past - v.window + 1).clamp(min=0) if v.window else torch.zeros_like(v.past)
    return (v.key >= oldest) & (v.key - oldest <= v.at - v.past) & (v.key >= v.padding)


def top_left_of_ring(v: View) -> Tensor:
    oldest = (v.end - v.window).clamp(min=0)
    shown = (v.key >= oldest) & (v.key - oldest <= v.at - v.past)
    return shown & (v.key < v.end) & (v.window > 0)


def no_causal(v: View) -> Tensor:
    return v.right | ((v.key >= v.past) & (v.key < v.end))


def no_causal_window(v: View) -> Tensor:
    """All tokens of a step see what its last token sees."""
    oldest = (v.end - v.window).clamp(min=0) if v.window else 0
    return (v.key < v.end) & (v.key >= oldest) & (v.key >= v.padding) & (v.window > 0)


def stored_first(v: View) -> Tensor:
    return v.right & (v.key >= v.end - v.window) & (v.window > 0)


def wrapped(v: View) -> Tensor:
    w = max(v.window, 1)
    return v.right & ((v.key % w <= v.at % w) | (v.key == v.at)) & (v.window > 0)


def padding_seen(v: View) -> Tensor:
    return v.right | (v.key < v.padding)


def last_padding_seen(v: View) -> Tensor:
    return v.right | (v.key == v.padding - 1)


def padding_of_another(v: View) -> Tensor:
    """The oldest key that a wrong query sees is the first behind the padding of another row."""
    wrong = (v.seen != v.right).any(1)
    oldest = int(v.key.expand_as(v.seen)[wrong][v.seen[wrong]].min()) if bool(wrong.any()) else 0
    if not bool(wrong.any()) or oldest not in v.paddings - {v.padding}:
        return v.right
    return v._replace(padding=oldest).within(v.window)


def first_lost(v: View) -> Tensor:
    return v.right & (v.key != v.padding)


def latest_lost(v: View) -> Tensor:
    return v.right & (v.key != v.past - 1)


def prompt_only(v: View) -> Tensor:
    return v.right & ((v.key < v.first) | (v.key >= v.past))


def prompt_lost(v: View) -> Tensor:
    return v.right & (v.key >= v.first)


def last_step_only(v: View) -> Tensor:
    return v.right & (v.key >= v.before)


def oldest_lost(v: View) -> Tensor:
    """One key fewer than there are, whether or not a window is full."""
    reach = v.window or 10**9
    oldest = (v.at - reach + 1).clamp(min=v.padding)
    return v.right & (v.key != oldest)


def step_hidden(v: View) -> Tensor:
    """The past is seen, and the other tokens of the step are not."""
    return v.right & ((v.key < v.past) | (v.key == v.at))


def slot_low(v: View) -> Tensor:
    held = (v.key < v.first - 1) | (v.key >= v.first)
    behind = (v.key >= v.first) & (v.key <= v.at + 1) & (v.key < v.end)
    return held & (v.right | behind) & (v.past > 0) | v.right & (v.past == 0)


RULES: dict[Rule, str] = {
    past_lost: "the past is not read: tokens of a step see that step alone",
    top_left: "the causal mask is aligned top-left: a step's token sees the first keys, not its "
    "past",
    top_left_of_ring: "a step longer than the window is stored before it is read, and its mask "
    "goes by slots: the keys that its first tokens need are gone",
    no_causal: "a step of several tokens has no causal mask once there is a past: they see each "
    "other",
    no_causal_window: "all tokens of a step see through the window of its last one",
    stored_first: "a step of several tokens is stored before it is read: it overwrites keys still "
    "needed",
    wrapped: "once the ring has wrapped, the slots after the newest are taken for empty",
    padding_seen: "the padding mask is dropped: tokens attend to left padding",
    last_padding_seen: "the padding mask is one column short: the last padding token is seen",
    padding_of_another: "a row is masked with the padding of another",
    first_lost: "the first token is lost",
    latest_lost: "the token before the step is lost",
    prompt_only: "the first step alone is stored: tokens after it are forgotten",
    prompt_lost: "the first step is not stored: tokens after it alone are seen",
    last_step_only: "the step before replaces the past in place of joining it",
    step_hidden: "the tokens of a step do not see each other",
    slot_low: "tokens after the first step are stored one slot too low: over its last one",
    oldest_lost: "the oldest key is not read",
}


ANOTHER_REQUEST = (
    "what the first step stored is not read, and maybe that of an earlier request in its place"
)


LASTING = (prompt_only, prompt_lost, slot_low)
IN_STEPS = " (in steps of "


def named(sight: Sight, step: int) -> tuple[str, ...]:
    """All bugs that give the measured map; none if nearly all do."""
    found = list(_elsewhere(sight))
    if found or not sight.differs:
        return tuple(found)
    rows = views(sight)
    if named := _by_ids(sight, rows):
        return (named,)
    if not sight.direct:  # through several layers a window reaches further than it is wide
        rows = [view._replace(window=0) for view in rows]
    fits = list(_windows(rows, sight.queries, step)) if sight.direct else []
    fits += list(_chunks(rows, sight.queries, step)) if sight.direct else []
    for rule, words in RULES.items():
        words = ANOTHER_REQUEST if sight.earlier and rule is prompt_lost else words
        when = _where_it_holds([(v, rule(v)) for v in rows], sight.queries, step)
        if when is not None and rule in LASTING and IN_STEPS in when:
            continue  # what is not stored does not come back
        if when is not None and not (fits and rule in (oldest_lost, padding_of_another)):
            fits.append((words, "" if when == AFTER and "past" in words else when))
    always = [words + when for words, when in fits if when in ("", AFTER)]
    names = always or [words + when for words, when in fits]
    return tuple(dict.fromkeys(names)) if len(names) <= MAX_BUGS else ()


def _where_it_holds(
    predicted: list[tuple[View, Tensor]], queries: tuple[Query, ...], step: int
) -> str | None:
    """The steps in which a rule gives exactly the map, in words; None if it does not explain
    all."""
    holds: list[Step] = []
    free: list[Step] = []
    for one in dict.fromkeys((q.step, q.past, q.end - q.past) for q in queries):
        of_step = torch.tensor([q.step == one[0] for q in queries])
        right, fits, tells = True, True, False
        for v, seen in predicted:
            # What the query itself is, it always knows.
            rule = (seen | (v.key == v.at)) & (v.at >= v.padding)
            found, expected = v.seen[of_step], v.right[of_step]
            right &= torch.equal(found, expected)
            fits &= torch.equal(found, rule[of_step])
            tells |= not torch.equal(rule[of_step], expected)
        if not right and not fits:
            return None
        if tells:
            (free if right else holds).append(one)
    if all(one[0] != step for one in holds):
        return None
    return _when(holds, free)


Step = tuple[int, int, int]  # its number, tokens before it, tokens of it


def _when(holds: list[Step], free: list[Step]) -> str | None:
    """What tells the steps in which a bug shows from those in which it could and does not; None if
    nothing does: then it is none of that kind."""
    if not free:
        return ""
    sizes, others = {n for *_, n in holds}, {n for *_, n in free}
    if all(past == 0 for _, past, _ in free) and all(past > 0 for _, past, _ in holds):
        return AFTER
    if sizes == {1} and 1 not in others:
        return " (in steps of one token alone)"
    if 1 not in sizes and others == {1}:
        one = f"{min(sizes)} tokens, and not of one"
        return f"{IN_STEPS}{one if len(sizes) == 1 else 'several tokens alone'})"
    if not sizes & others:
        return f" (in steps of {ranges(sorted(sizes))} tokens alone)"
    least, most = min(past for _, past, _ in holds), max(past for _, past, _ in free)
    if least > most:
        return f" (from token {least} on)"
    return None


def _windows(rows: list[View], queries: tuple[Query, ...], step: int) -> Iterator[tuple[str, str]]:
    """Windows of another width than the right one."""
    wrong = [(v.seen != v.right).any(1).nonzero()[:, 0] for v in rows]
    found = {width(v, v.seen, w) for v, w in zip(rows, wrong, strict=True) if len(w)}
    right = {v.window for v in rows}
    if len(right) == 1 and right != {0}:
        (window,) = right
        when = _where_it_holds([(v, v.within(0)) for v in rows], queries, step)
        if when is not None:
            most = max(
                int((v.at[w] - v.padding).max()) + 1
                for v, w in zip(rows, wrong, strict=True)
                if len(w)
            )
            if most == window + 1:
                yield f"the window is one token too wide: {most} tokens, not {window}", when
            yield f"the window of {window} tokens is dropped: up to {most} are seen", when
            return
    if len(found) != 1 or len(right) != 1 or found & {0, 1}:
        return
    (cached,), (window,) = found, right
    when = _where_it_holds([(v, v.within(cached)) for v in rows], queries, step)
    if when is None:
        return
    if not window:  # of that many tokens the pass shows all
        most = max(int((v.at - v.padding).max()) + 1 for v in rows)
        wide = f"through the cache, and {most} or more without it"
        yield f"the window is {cached} tokens wide {wide}", when
    elif abs(cached - window) == 1:
        how = "wide" if cached > window else "narrow"
        yield f"the window is one token too {how}: {cached} tokens, not {window}", when
    else:
        yield f"the window is {cached} tokens wide through the cache, and {window} without it", when


def chunk_of(view: View, seen: Tensor) -> int:
    """The size of chunks that all queries see within, 0 if they do not."""
    begins = set()
    for i in range(len(view.at)):
        keys = view.key[0][seen[i]]
        begins.add(int(keys.min()) if len(keys) else int(view.at[i]))
    size = math.gcd(*begins)
    return size if size > 1 and torch.equal(seen, in_chunks(view, size)) else 0


def in_chunks(view: View, size: int) -> Tensor:
    """The keys of a query's own chunk."""
    return view.causal & (view.key // size == view.at // size)


def _chunks(rows: list[View], queries: tuple[Query, ...], step: int) -> Iterator[tuple[str, str]]:
    """Chunks of another size than the right one, or none."""
    right = {chunk_of(v, v.right) for v in rows}
    if len(right) != 1 or right == {0} or any(v.padding for v in rows):
        return
    (size,) = right
    others = {chunk_of(v, v.seen) for v in rows} - {0}
    for other in others if len(others) == 1 else ():
        when = _where_it_holds([(v, in_chunks(v, other)) for v in rows], queries, step)
        if when is not None:
            yield f"a chunk has {other} tokens through the cache, and {size} without it", when
            return
    when = _where_it_holds([(v, v.causal) for v in rows], queries, step)
    if when is not None:
        yield f"chunks of {size} tokens are not kept apart: those before are seen", when


def _by_ids(sight: Sight, rows: list[View]) -> str:
    """The ids of the hidden keys, if the ids alone explain the map; else ""."""
    if sight.ids is None or len(rows) != 1 or any(bool((v.seen & ~v.right).any()) for v in rows):
        return ""
    (view,), ids = rows, sight.ids[0]
    known = view.key[0]
    missing = (view.right & ~view.seen)[:, :]
    lost = missing.any(0)
    behind = known < int(view.at[missing.any(1)].max())
    shown = (view.seen & (view.key < view.past)).any(0)  # behind its own step
    if bool((lost & shown).any()) or not bool((behind & ~lost).any()):
        return ""
    same = {int(i) for i in ids[known[lost]]}
    alike = torch.isin(ids[known], torch.tensor(sorted(same)).to(ids)) & behind
    if len(same) == 1 and int(alike.sum()) > 1 and torch.equal(alike, lost):
        return f"tokens with the id {same.pop()} are not seen after their step"
    again = torch.cat([ids[:1] != ids[:1], ids[1:] == ids[:-1]])[known] & behind
    if int(again.sum()) > 1 and torch.equal(again, lost):
        return "tokens that repeat the one before are not seen after their step"
    return ""


def _elsewhere(sight: Sight) -> Iterator[str]:
    """The visible tokens that are not in a row's history."""
    if sight.across:
        rows = sorted({row for row, _ in sight.across})
        others = sorted({other for _, other in sight.across})
        fed = "were" if len(others) > 1 else "was"
        words = f"rows read each other: what {_numbered('row', others)} {fed} fed"
        yield f"{words} changes {_numbered('row', rows)}"
    for fate in sight.stale:
        yield f"tokens {fate} are still read"


def described(sight: Sight, step: int) -> str:
    """What the first token with a wrong view at the wrong step sees, in words; "" if none is
    wrong."""
    rows = views(sight)
    for row, v in enumerate(rows):
        for i, query in enumerate(sight.queries):
            missing, extra = v.right[i] & ~v.seen[i], v.seen[i] & ~v.right[i]
            if query.step != step or not bool((missing | extra).any()):
                continue
            parts = [
                f"{verb} {_columns(v.key[0], cells)}"
                for verb, cells in (("does not see", missing), ("sees", extra))
                if bool(cells.any())
            ]
            of_row = f" of row {row}" if len(rows) > 1 else ""
            wrongly = ", wrongly" if bool(extra.any()) else ""
            return f"token {query.column}{of_row} {' and '.join(parts)}{wrongly}"
    return ""


def _columns(known: Tensor, cells: Tensor) -> str:
    """Tokens by their columns: "token 3", "tokens 3-5". Of many tokens some were tried: those
    between two that were are taken to be as these."""
    found = known[cells].tolist()
    for i in range(len(known) - 1):
        if bool(cells[i]) and bool(cells[i + 1]):
            found += range(int(known[i]) + 1, int(known[i + 1]))
    return _numbered("token", sorted(found))


def _numbered(what: str, numbers: list[int]) -> str:
    return f"{what}{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"

"""The steps that a check feeds: their sizes, the pasts before them, and their ends.

A bug may need one size of step alone, a past of some length, or a step that ends on a boundary of a
block, a window or a chunk. So each size is fed behind several pasts, and each boundary is met from
one before to one behind it. A schedule is the sizes of the steps of one history.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

Schedule = tuple[int, ...]

SMALL_STEPS = tuple(range(1, 10))  # tokens of a step, up to those of a long draft
LARGE_STEPS = (15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
BLOCKS = (16, 32, 64, 96, 128)  # tokens, of which tiles, pages and buffers are often made
FAR_TOKENS = (300, 512, 1000)  # tokens, at which the sparse long histories take some steps
FARTHER = (2000, 4000, 8000)
DEEP = 130  # tokens of a past that no block of BLOCKS exceeds
MAX_SIZES = 4  # windows and chunks of a decoder around which steps are put
MAX_SINGLE_STEPS = 160  # tokens that are fed one by one if a decoder takes single tokens alone
BRIEF, NORMAL, THOROUGH = 0, 1, 2


@dataclass(frozen=True)
class Bounds:
    """The bounds of a subject's schedules.

    reach: tokens of the longest history. largest: tokens of the largest step, 0 for any. single:
    whether steps behind the first have one token. sizes: of its windows and chunks, in tokens.
    """

    reach: int
    largest: int = 0
    single: bool = False
    sizes: tuple[int, ...] = ()
    level: int = NORMAL


def prompts(limits: Bounds) -> list[Schedule]:
    """First steps of every size, each with a step of one token and one of two behind it."""
    sizes = (1, 3, 16, 64, 129) if limits.level == BRIEF else (*SMALL_STEPS, *LARGE_STEPS)
    return _fitted(((n, 1, 2) for n in sizes), limits)


def steps(limits: Bounds) -> list[Schedule]:
    """Steps of every size, each behind a short past and behind longer ones."""
    deep = min(DEEP, limits.reach // 2)
    if limits.level == BRIEF:
        found = [
            *_packed(1, SMALL_STEPS, limits.reach),
            *_packed(deep, (3, 2, 1, 33), limits.reach),
        ]
        return _fitted(found, limits)
    shuffled = (3, 2, 5, 4, 7, 6, 9, 8, 1, *reversed(LARGE_STEPS))
    found = [
        *_packed(1, (1, *SMALL_STEPS), limits.reach),
        *((3, n, 1) for n in LARGE_STEPS),
        *_packed(min(40, deep), (*reversed(SMALL_STEPS), 15, 31, 63), limits.reach),
        *_packed(deep, shuffled, limits.reach),
    ]
    if limits.level == THOROUGH:
        pasts = [past for past in (2, 16, 64, 96, *FAR_TOKENS, *FARTHER) if past < limits.reach]
        found += [(past, n, 1, n) for past in pasts for n in (*SMALL_STEPS, *LARGE_STEPS)]
    return _fitted(found, limits)


def boundaries(limits: Bounds) -> list[Schedule]:
    """Steps that end on, one before and one behind a block's end; across it; and around sizes."""
    blocks = [n for n in BLOCKS if n + 4 <= limits.reach]
    if limits.level == THOROUGH:
        blocks = list(range(16, min(limits.reach, 1100) - 4, 16))
    found = [_to(*(n + off for n in blocks)) for off in (-1, 0, 1)]
    if limits.level != BRIEF:
        found.append(_to(*(end for n in blocks for end in range(n - 2, n + 3))))
        found.append(_to(*(end for n in blocks for end in (n - 2, n + 2))))
        found.append(_to(*(end for n in blocks for end in (n - 3, n, n + 1))))
    for size in around(limits):
        found += _around(size, limits.level)
    return _fitted(found, limits)


def around(limits: Bounds) -> tuple[int, ...]:
    """The sizes around which steps are put: the smallest of those that are well below reach."""
    fits = sorted({n for n in limits.sizes if 2 <= n <= limits.reach - 4})
    return tuple(fits[:MAX_SIZES])


def _around(n: int, level: int) -> list[Schedule]:
    """Steps around a window or a chunk of n tokens, and around twice as many."""
    singly = (*range(max(n - 2, 1), n + 4), *range(2 * n - 1, 2 * n + 3), 2 * n + 6)
    found: list[Schedule] = [
        _to(*singly),
        (3, n + 1, 1, n + 3, 1, 4),  # steps that are longer than what is held
    ]
    if level != BRIEF:
        found += [(n - 1, 2, 1), (n, 1, 3, n, 1), (n + 1, 1, n - 1 or 1, 1), (3, n - 1 or 1, 1)]
        found += [(2 * n, 1, 3), (2 * n + 1, 1, 5), (n + 5, 2, n + 2, 1)]
    return [tuple(step for step in schedule if step > 0) for schedule in found]


def long(limits: Bounds) -> list[Schedule]:
    """A few long histories: large steps, then some of one and of several tokens at each length."""
    farther = FARTHER if limits.level == THOROUGH else ()
    marks = [n for n in (*FAR_TOKENS, *farther) if n + 16 <= limits.reach - 8]
    ends: list[int] = []
    for n in marks:
        several = () if limits.level == BRIEF else (n + 10, n + 12)
        ends += [n - 2, n - 1, n, n + 1, n + 2, n + 5, *several]
    last = limits.reach
    tail = [last - 8, last - 7, last - 4, last - 2, last - 1, last]
    found = [_to(*ends, *(end for end in tail if end > max(ends, default=0)))]
    if limits.level == BRIEF:
        return _fitted(found, limits)
    found += [(n + 1, 1, 3) for n in (256, *marks) if n + 5 <= last]
    found.append((last - 1, 1))
    if marks:
        found += _packed(marks[0], SMALL_STEPS, last)
    return _fitted(found, limits)


def _to(*ends: int) -> Schedule:
    """The steps that end at lengths which rise."""
    line = sorted({end for end in ends if end > 0})
    return tuple(b - a for a, b in zip([0, *line], line, strict=False))


def _packed(prompt: int, sizes: Sequence[int], reach: int) -> list[Schedule]:
    """All sizes behind a prompt, in as few histories as hold them; those that do not fit left."""
    found: list[list[int]] = []
    for n in sizes:
        if prompt + n > reach:
            continue
        if not found or sum(found[-1]) + n > reach:
            found.append([prompt])
        found[-1].append(n)
    return [tuple(schedule) for schedule in found]


def _fitted(schedules: Iterable[Schedule], limits: Bounds) -> list[Schedule]:
    """The schedules within a subject's bounds, each once."""
    found: dict[Schedule, None] = {}
    for schedule in schedules:
        for part in _singly(schedule, limits) if limits.single else [_split(schedule, limits)]:
            if part := _within(part, limits.reach):
                found[part] = None
    # A schedule that is the beginning of another adds nothing.
    return [s for s in found if not any(s != o and o[: len(s)] == s for o in found)]


def _within(schedule: Schedule, reach: int) -> Schedule:
    """As many of its steps as there is room for."""
    end = n = 0
    while n < len(schedule) and end + schedule[n] <= reach:
        end += schedule[n]
        n += 1
    return schedule[:n]


def _split(schedule: Schedule, limits: Bounds) -> Schedule:
    """With steps of at most `largest` tokens."""
    if not limits.largest:
        return schedule
    found: list[int] = []
    for n in schedule:
        whole, rest = divmod(n, limits.largest)
        found += [limits.largest] * whole + [rest] * bool(rest)
    return tuple(found)


def _singly(schedule: Schedule, limits: Bounds) -> Iterator[Schedule]:
    """Histories with a prompt and steps of one token: a step of several begins a new one, whose
    prompt is as long."""
    current: list[int] = []
    for n in schedule:
        if current and n > 1:
            yield (*current, *[1] * (len(current) == 1))
            current = [sum(current) + n]
        else:
            current.append(n)
        if limits.largest and current[0] > limits.largest:
            more = min(sum(current), MAX_SINGLE_STEPS) - limits.largest
            yield (limits.largest, *[1] * max(more, 0))
            return
    yield (*current, *[1] * (len(current) == 1))

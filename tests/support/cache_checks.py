"""Promises of docs/extending.md about contents: all steps and operations give the logits of one
pass. Each is a function `check_...(make, case)`, so that broken caches can be judged too.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from helpers import (
    Case,
    Make,
    Subject,
    addresses,
    agree,
    break_off,
    refuses,
    require,
    tokens,
    write,
)
from kvtool.core.cache import EMPTY, Cache, CacheSpec, Step
from kvtool.core.cache.none import NoCache
from kvtool.core.kernels.masks import visible
from kvtool.errors import CacheOpUnsupported, UsageError


def cut(n: int, start: int, rng: random.Random) -> list[int]:
    """Random ends of a few dozen steps at most that take a sequence from `start` to `n`."""
    inside = range(start + 1, n)
    return [*sorted(rng.sample(inside, rng.randint(0, min(30, len(inside))))), n]


def needed(cache: Cache, length: int) -> Tensor:
    """Which of the positions from 0 on (B,length) the token after `length` others would see."""
    positions = torch.arange(length).expand(cache.batch, length)
    padding = 0 if cache.left_padding is None else cache.left_padding
    own = (torch.full((cache.batch,), length) - padding)[:, None]
    return visible(own, positions, cache.window, cache.sinks)[:, 0, 0] & (positions < own)


def holds_what_is_needed(cache: Cache, length: int) -> bool:
    """Whether the cache has everything that going on from `length` takes."""
    if cache.recompute or not length:
        return True
    held = cache.snapshot(0)[2]  # (B,S)
    there = (held[:, None] == torch.arange(length)[:, None]).any(-1)
    return not bool((needed(cache, length) & ~there).any())


def may_be_rounded(cache: Cache, length: int) -> bool:
    """Whether the token after `length` others would meet one exactly that has been quantized. A
    cache may have kept it exactly too."""
    if cache.quantization is None:
        return False
    n_quantized = cache.quantization.n_quantized
    return n_quantized(length) < min(length, n_quantized(cache.length))


def cropped(promise: str, cache: Cache, length: int) -> bool:
    """Crop where that can be honoured; where it cannot, it must be refused, with reasons (I13)."""
    before, held = cache.length, holds_what_is_needed(cache, length)
    may_refuse = not held or may_be_rounded(cache, length)
    try:
        cache.crop(length)
    except CacheOpUnsupported as error:
        require(may_refuse, f"{promise}: is refused: {error}")
        said = f"{cache.kind} cache cannot crop to {length}: it needs "
        require(str(error).startswith(said) and bool(error.hint), f"I13: {error}")
        require(cache.length == before, f"{promise}: is refused, but shortens the cache")
        return False
    require(held, f"{promise}: is not refused")
    return True


def check_any_split_equals_one_pass(make: Make, case: Case) -> None:
    rng = random.Random(1)
    few = [[12], list(range(1, 13)), *(cut(12, 0, rng) for _ in range(4))]
    # Over the ends of a cache's blocks of 64 columns: in a long step, at an end, in short steps.
    many = [[60, 140, 150], [64, 65, 128, 150], *(cut(150, 0, rng) for _ in range(2))]
    for n, splits in ((12, few), (150, many)):
        subject = Subject(case, n)
        for split in splits:
            cache = subject.cache(make)
            agree(f"I1, steps to {split}", subject, cache, subject.ids, subject.padding, split)


class Recorder(NoCache):
    """Remembers the keys and values that the model hands over."""

    def __init__(self, spec: CacheSpec, left_padding: Tensor | None = None) -> None:
        super().__init__(spec, left_padding)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        self.seen[layer] = k, v
        if step.quantization is not None:
            return step.quantization.both_copies(k, v, step.q_pos)
        return k, v

    def stored(self, layer: int, n: int, like: Cache) -> tuple[Tensor, Tensor]:
        """What a cache that holds the first n tokens should have of a layer."""
        k, v = self.seen[layer]
        if like.quantization is not None and like.quantization.in_place:
            return like.quantization.rounded(k, v, self._positions(0, n))
        if like.quantization is None or not (n_quantized := like.quantization.n_quantized(n)):
            return k, v
        old = k[:, :, :n_quantized], v[:, :, :n_quantized]
        rounded = like.quantization.rounded(*old, self._positions(0, n_quantized))
        pairs = zip(rounded, (k, v), strict=True)
        keys, values = (torch.cat([a, b[:, :, n_quantized:]], dim=2) for a, b in pairs)
        return keys, values


def check_columns_hold_what_their_positions_say(make: Make, case: Case) -> None:
    subject = Subject(case)
    cache = subject.filled(make, 9)
    break_off(subject, cache, subject.ids, subject.model.norm)
    truth = subject.cache(Recorder)
    window = Step.full(
        *subject.ids.shape,
        left_padding=subject.padding,
        window=cache.window,
        sinks=cache.sinks,
        quantization=cache.quantization,
    )
    with torch.no_grad():
        subject.model(subject.ids, window, truth)
    first = torch.zeros(case.batch, dtype=torch.long) - torch.tensor(case.padding or 0)
    for layer in range(2):
        k, v, pos = cache.snapshot(layer)
        there = pos != EMPTY
        number = (pos - first[:, None]).masked_fill(~there, 0)  # in order of arrival
        require(bool((number < 9).all() and (number >= 0).all()), f"I2: layer {layer} is at {pos}")
        count = torch.zeros(case.batch, 9, dtype=torch.long).scatter_add_(1, number, there.long())
        if cache.window:
            kept = bool((count <= 1).all()) and holds_what_is_needed(cache, 9)
        else:
            kept = bool((count == 1).all())
        require(kept, f"I2: layer {layer} is at {pos}")
        for found, whole in zip((k, v), truth.stored(layer, 9, cache), strict=True):
            gap = found - torch.take_along_dim(whole, number[:, None, :, None], dim=2)
            gap = float((gap * there[:, None, :, None]).abs().max())
            require(gap < 1e-12, f"I2: layer {layer} holds other keys or values, by {gap:.1e}")
        k.fill_(7.0)
        v.fill_(7.0)
    agree("I2: a snapshot is a copy", subject, cache, subject.ids, subject.padding, 1, 9)


def check_a_cache_without_columns_says_so(make: Make, case: Case) -> None:
    """I2 asks where keys are; a kind that recomputes has none to show (I13)."""
    cache = Subject(case).filled(make, 9)
    error = refuses("I13: snapshot", CacheOpUnsupported, cache.snapshot, 0)
    require("it stores none" in str(error), f"I13: snapshot: {error}")


def check_any_part_of_a_chunk_is_committed(make: Make, case: Case, start: int) -> None:
    """The first tokens of a step of 12 that begins at `start`, as after speculative decoding."""
    for part in (0, 1, 3, 11, 12):
        subject = Subject(case, 40)
        cache = subject.filled(make, start) if start else subject.cache(make)
        with torch.no_grad():
            step = cache.begin(12)
            subject.model(subject.ids[:, start : start + 12], step, cache)
        cache.commit(part)
        promise = f"{part} of 12 tokens after {start}"
        agree(promise, subject, cache, subject.ids, subject.padding, 3, start + part)


def check_unused_columns_do_not_leak(make: Make, case: Case) -> None:
    subject = Subject(case)
    for held in (0, 5, 11):
        for chunk in (1, 4):
            cache = subject.filled(make, held, 80) if held else subject.cache(make, 80)
            write(cache, 80 - held, 1e30, commit=False)  # to the last column, and dropped
            ids = subject.ids
            agree(f"I3, {held} tokens held", subject, cache, ids, subject.padding, chunk, held)
    for length in (11, 3):
        if cropped("I3, after crop", cache, length):
            write(cache, 80 - length, 1e30, commit=False)
            agree("I3, after crop", subject, cache, subject.ids, subject.padding, 2, length)


def check_a_broken_step_leaves_no_trace(make: Make, case: Case) -> None:
    subject = Subject(case)
    other = tokens(case.batch, 12, 2)
    for held in (0, 5):
        for module in (subject.model.layers[1], subject.model.norm):
            cache = subject.filled(make, held, 90) if held else subject.cache(make, 90)
            live = cache.nbytes().live
            break_off(subject, cache, torch.cat([subject.ids[:, :held], other], 1), module)
            break_off(subject, cache, tokens(case.batch, 90, 3), module)  # makes a cache grow
            found = cache.nbytes().live  # a window may have let go of what nobody needs any more
            kept = found == live or bool(cache.window and found < live)
            require(kept, "I4: a broken step counts as live")
            promise = f"I4, {held} tokens held"
            agree(promise, subject, cache, subject.ids, subject.padding, 3, held)


def check_crop_equals_never_having_gone_on(make: Make, case: Case) -> None:
    subject = Subject(case)
    for length in (0, 1, 6, 9):
        cache = subject.filled(make, 9)
        promise = f"I5, crop({length})"
        held = length if cropped(promise, cache, length) else 9
        ids = torch.cat([subject.ids[:, :held], tokens(case.batch, 12 - held, 2)], dim=1)
        agree(promise, subject, cache, ids, subject.padding, 2, held)
    for length in (13, -1):
        refuses(f"I5, crop({length}) of 12 tokens", UsageError, cache.crop, length)
    require(cache.length == 12, "I5, a refused crop shortens the cache")


def selections(batch: int) -> list[list[int]]:
    """Rows as they are, reversed, repeated, fewer, and more."""
    rows = list(range(batch))
    return [rows, rows[::-1], [batch - 1] * batch, [batch - 1], [*rows[::-1], 0, 0]]


def check_select_continues_from_each_rows_history(make: Make, case: Case) -> None:
    subject = Subject(case)
    for rows in map(torch.tensor, selections(case.batch)):
        ids, padding = subject.ids[:, :7], subject.padding
        cache = subject.filled(make, 7, 80)  # room for all rows where they share it
        promise = f"I6, select({rows.tolist()})"
        try:
            cache.select(rows)
        except CacheOpUnsupported:
            require(len(rows) > case.batch, f"{promise}: is refused")
        else:
            ids = ids[rows]
            padding = None if padding is None else padding[rows]
        for wrong in (len(ids), -1):  # of fewer rows, others may still lie behind
            refused = f"{promise}, then select({wrong})"
            refuses(refused, UsageError, cache.select, torch.tensor([wrong]))
        for length in (10, 14):  # and once more, from what it made of the first
            ids = torch.cat([ids, tokens(len(ids), length - ids.shape[1], length)], dim=1)
            held = cache.length
            agree(promise, subject, cache, ids, padding, 2, held)
            last = torch.arange(len(ids)).roll(1)
            cache.select(last)
            ids, padding = ids[last], None if padding is None else padding[last]


def check_reset_equals_a_new_cache(make: Make, case: Case) -> None:
    subject = Subject(case, 70)
    cache = subject.filled(make, 70)
    before = addresses(cache)
    for padding in (subject.padding, torch.full((case.batch,), 2), None):
        for n in (6, 12):  # a shorter sequence lies where a longer one was
            cache.crop(0)
            write(cache, 70, 1e30, commit=False)
            cache.reset(padding)
            ids = tokens(case.batch, n, n)
            agree(f"I7, padding {padding}", subject, cache, ids, padding, 3)
            # Who plays a recording of its steps goes on with it; nobody else looks there.
            stays = not cache.compilable or addresses(cache) == before
            require(stays, "I7: a reset cache is somewhere else")
    cache.select(torch.tensor([0]))
    cache.reset(subject.padding)
    agree("I7, after select", subject, cache, subject.ids[:, :12], subject.padding, 3)


def check_a_long_random_history(make: Make, case: Case) -> None:
    """All operations in any order, against plain lists of the tokens that each row has seen."""
    for seed in range(3):
        rng = random.Random(seed)
        subject = Subject(case)
        cache, padding, ids = subject.cache(make, 20), subject.padding, subject.ids[:, :0]
        for number in range(25):
            n = min(rng.randint(1, 4), 20 - ids.shape[1])
            more = torch.cat([ids, tokens(len(ids), n, number)], dim=1)
            operation = rng.choice(["feed"] * 4 + ["break", "crop", "select", "reset"])
            if operation == "feed" and n:
                promise = f"a random history, seed {seed}, operation {number}"
                agree(promise, subject, cache, more, padding, rng.randint(1, 2), ids.shape[1])
                ids = more
            elif operation == "break" and n:
                break_off(subject, cache, more, subject.model.layers[1])
            elif operation == "crop":
                length = rng.randint(0, ids.shape[1])
                if cropped(f"a random history, seed {seed}", cache, length):
                    ids = ids[:, :length]
            elif operation == "select":
                count = rng.randint(1, case.batch)
                rows = torch.tensor([rng.randrange(len(ids)) for _ in range(count)])
                cache.select(rows)
                ids, padding = ids[rows], None if padding is None else padding[rows]
            elif operation == "reset":
                padding = rng.choice([None, torch.randint(3, (case.batch,))])
                cache.reset(padding)
                ids = subject.ids[:, :0]

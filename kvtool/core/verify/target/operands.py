"""The operands of attention: the keys and values that a step reads, compared with those of the
pass.

Where a decoder multiplies queries with keys, and weights with values, both are at hand, whatever
stored them. The first that is wrong is compared with what it might have been taken for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.core.verify.arms import Case
from kvtool.core.verify.diagnosis.locate import TOLERANCE, ranges, scale
from kvtool.core.verify.scenario_run import Stopped
from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.operations import Done, Line, Operations
from kvtool.core.verify.target.session import TargetSession
from kvtool.core.verify.target.standing import NEAR, PRODUCTS, Standing, attended, turned
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.core.verify.target.trace import aligned, is_wrong

LATER = 3  # steps that are tried, if there are so many
WEIGHTS = (
    "queries and keys are right, and the attention weights are not: the scale, the bias or the cap "
    "of the scores"
)

OR_MASK = WEIGHTS.replace("the scale", "the mask, the scale")


class Product(NamedTuple):
    """One product of attention: its operands by name, of a step and of the pass (narrowed)."""

    names: tuple[str, ...]  # queries, keys, weights, values
    found: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    axes: tuple[int, ...]  # of the tokens
    answers: tuple[Tensor, Tensor]  # of the step, and of the pass as it is
    place: tuple[Line, int]  # the line, and which of its calls


class GivenSession(TargetSession):
    """The user's session, and the operations of its last step with their operands."""

    def __init__(self, subject: TargetSubject, start: Start, seen: list[Operations]) -> None:
        super().__init__(subject, start)
        self.seen = seen

    def feed(self, ids: Tensor) -> Tensor:
        with Operations(keep_given=True) as operations:
            logits = super().feed(ids)
        self.seen[:] = [operations]
        return logits


@torch.inference_mode()
def misread(subject: TargetSubject, case: Case, step: int) -> tuple[str, bool]:
    """The first wrong operand of attention at a step, in words, and whether its replacement was
    identified. "" if none is wrong, or none is visible."""
    for later in range(LATER):  # as many tokens as a head has channels cannot be told apart
        found = _misread_at(subject, case, step + later)
        if found is not None and (found[1] or not later):  # or it may only follow from the bug
            return found
    return "", False


def _misread_at(subject: TargetSubject, case: Case, step: int) -> tuple[str, bool] | None:
    """As `misread`, of one step; None if the step has no known products of attention."""
    seen: list[Operations] = []
    run = case.run(subject.with_session(lambda s, start: GivenSession(s, start, seen)), last=step)
    try:
        case.scenario.play(run)
        return None
    except Stopped as stopped:
        segment, answer = stopped.segment, stopped.answer
    with Operations(keep_given=True) as whole:
        subject.call_full(segment.history, segment.start)
    sizes = (answer.first, answer.logits.shape[1], segment.history.shape[1])
    if extra := _extra_slots(seen[0].done, whole.done, sizes[2]):
        slots = "a slot" if extra == 1 else f"{extra} slots"
        return f"attention reads {slots} more than there are tokens", True
    products = list(_products(seen[0].done, whole.done, sizes))
    if not products:
        return None
    stands = Standing(subject, segment.history, products[0].place)
    pads = segment.start.padding
    padding = 0 if pads is None else int(pads.max())
    for layer, product in enumerate(products):
        for i, name in enumerate(product.names):
            found, right = product.found[i], product.right[i]
            if name in ("keys", "values"):
                wrong = _wrong_tokens(found, right, product.axes[i], padding)
                if wrong:
                    return _in_words(products, layer, i, wrong, sizes, stands)
            elif padding == 0 and is_wrong(found, right):
                if name == "weights":
                    return WEIGHTS, True
                if name == "queries" and layer == 0:
                    return _queries_in_words(product, sizes, stands)
                return "", False
        if padding == 0 and len(product.names) == 3 and _answers_wrong(product, sizes):
            return WEIGHTS, True
    return "", False


def _extra_slots(step: list[Done], whole: list[Done], total: int) -> int:
    """How many more keys than tokens get weight in a step."""
    parts = [[d for d in done if d.line.asked in PRODUCTS] for done in (step, whole)]
    for one, other in zip(*parts, strict=False):
        if attended(other, total)[:1] != ("weights",) or one.given[0].dim() != other.given[0].dim():
            continue
        axis = max(i for i, size in enumerate(other.given[0].shape) if size == total)
        weighed = (one.given[0] != 0).movedim(axis, 0).flatten(1).any(1)
        if int(weighed.sum()) > total:
            return int(weighed.sum()) - total
    return 0


def _answers_wrong(product: Product, sizes: Sizes) -> bool:
    """Whether fused attention over right operands answers wrongly."""
    found, whole = product.answers
    expected = aligned(whole, found.shape, *sizes[:2])
    return expected is not None and is_wrong(found, expected)


def _queries_in_words(product: Product, sizes: Sizes, stands: Standing) -> tuple[str, bool]:
    """The positions of a step's queries, if these alone are wrong."""
    first, n, _ = sizes
    found = product.found[0].movedim(product.axes[0], 0)
    keys = _wrong_tokens(product.found[1], product.right[1], product.axes[1], 0)
    words = stands.words(0, found, list(range(first, first + n)), first)
    if not words or any(token < first for token in keys):
        return "", False
    tokens = f"token{'s' if n > 1 else ''} {ranges(range(first, first + n))}"
    what = "queries and keys" if keys else "queries"
    rest = "" if keys else ", and their keys do not"
    return f"the {what} of {tokens} {words}{rest}", True


Sizes = tuple[int, int, int]  # the step's first token, its tokens, and all tokens


def _products(step: list[Done], whole: list[Done], sizes: Sizes) -> Iterator[Product]:
    """The products of attention of a step beside those of the pass, in order."""
    parts = [[d for d in done if d.line.asked in PRODUCTS] for done in (step, whole)]
    if len(parts[0]) != len(parts[1]):
        return
    for one, other in zip(*parts, strict=True):
        product = _product(one, other, sizes)
        if product is not None:
            yield product


def _product(one: Done, other: Done, sizes: Sizes) -> Product | None:
    """A step's product with the pass's; None if it is none of attention, or has another shape."""
    first, n, total = sizes
    names = attended(other, total)
    if not names or len(one.given) < len(names):
        return None
    found, right, axes = list[Tensor](), list[Tensor](), list[int]()
    for name, ours, theirs in zip(names, one.given, other.given, strict=False):
        if ours.dim() != theirs.dim():
            return None
        for dim, (a, b) in enumerate(zip(ours.shape, theirs.shape, strict=True)):
            if a == b:
                continue
            if b == total and a == n and name in ("queries", "weights"):
                theirs = theirs.narrow(dim, first, n)
            elif b == total and a > b and name in ("keys", "values", "weights"):
                ours = ours.narrow(dim, 0, total)  # a buffer with room
            else:
                return None
        tokens = [dim for dim, size in enumerate(other.given[len(found)].shape) if size == total]
        found.append(ours)
        right.append(theirs)
        axes.append(tokens[-1])
    answers, place = (one.answer, other.answer), (other.line, other.time)
    return Product(names, tuple(found), tuple(right), tuple(axes), answers, place)


def _wrong_tokens(found: Tensor, right: Tensor, axis: int, padding: int) -> list[int]:
    """The tokens whose keys or values are wrong, left padding aside."""
    gap = (found - right).abs().where(found != right, 0.0).movedim(axis, 0).flatten(1).amax(1)
    wrong = (~(gap <= TOLERANCE * scale(right))).nonzero()[:, 0].tolist()
    return [token for token in wrong if token >= padding]


def _in_words(
    products: list[Product], layer: int, i: int, wrong: list[int], sizes: Sizes, stands: Standing
) -> tuple[str, bool]:
    product = products[layer]
    name, axis = product.names[i], product.axes[i]
    found, right = (t[i].movedim(axis, 0) for t in (product.found, product.right))
    tokens = f"token{'s' if len(wrong) > 1 else ''} {ranges(wrong)}"
    if len(wrong) > 1 and wrong == list(range(sizes[0])):
        tokens = "the past"
    which = f"the {name} that are read of {tokens}"
    others = _others(products, layer, name)
    instead = _instead(found, right, wrong, others)
    if instead:
        return f"{which} are {instead}", True
    if not layer and (words := stands.words(i, found[wrong], wrong, sizes[0])):
        return f"{which} {words}", True
    if turned(found[wrong], right[wrong]):
        return f"{which} are rotated otherwise: they stand at other positions", True
    return f"{which} are wrong", False


def _others(products: list[Product], layer: int, name: str) -> dict[str, Tensor]:
    """Candidates for what was read instead: other layers, and keys for values, tokens first."""
    found = {}
    own = sum(name in product.names for product in products[:layer])
    counts = {"keys": -1, "values": -1}  # layers so far
    for product in products:
        for other, right, axis in zip(product.names, product.right, product.axes, strict=True):
            if other not in counts:
                continue
            counts[other] += 1
            of_layer = "" if counts[other] == own else f" of layer {counts[other]}"
            if other != name or of_layer:
                what = "those" if other == name else f"the {other}"
                found[f"{what}{of_layer}"] = right.movedim(axis, 0)
    return found


def _instead(found: Tensor, right: Tensor, wrong: list[int], others: dict[str, Tensor]) -> str:
    """What is read in place of the stored `wrong` tokens, (T,...) both; "" if it cannot be
    identified."""
    ours, theirs = found[wrong], right[wrong]
    near = NEAR * scale(right)
    if bool((ours == 0).all()):
        return "zero"
    factor = float((ours * theirs).sum() / (theirs * theirs).sum())
    if _same(ours, factor * theirs, near):
        return "negated" if abs(factor + 1) < 1e-9 else f"multiplied by {factor:.4g}"
    for shift in (-1, 1, -2, 2):
        there = [token + shift for token in wrong]
        if min(there) >= 0 and max(there) < len(right) and _same(ours, right[there], near):
            count = "" if abs(shift) == 1 else f"{abs(shift)} "
            return f"those of the token {count}{'before' if shift < 0 else 'after'} each"
    for name, other in others.items():
        if other.shape == right.shape and _same(ours, other[wrong], near):
            return name
    for name, other in others.items():
        if other.shape == right.shape and turned(ours, other[wrong]):
            return f"{name}, rotated"
    for dim, what in ((1, "row"), (2, "head")):
        several = found.dim() > dim + 1 and found.shape[dim] > 1
        if several and (words := _taken(ours, theirs, dim, what, near)):
            return words
    factors = (ours * theirs).sum(-1, keepdim=True) / (theirs * theirs).sum(-1, keepdim=True)
    if ours.shape[-1] > 2 and _same(ours, factors * theirs, near):
        low, high = float(factors.min()), float(factors.max())
        return f"multiplied by factors from {low:.2g} to {high:.2g}: their scales are wrong"
    gaps = [(right - one).abs().flatten(1).amax(1) for one in ours]
    if all(float(gap.min()) <= near for gap in gaps) and len(right) > 2:
        places = [int(gap.argmin()) for gap in gaps]
        return f"those of token{'s' if len(places) > 1 else ''} {', '.join(map(str, places[:6]))}"
    return ""


def _taken(ours: Tensor, theirs: Tensor, dim: int, what: str, near: float) -> str:
    """The row or head that each is taken from, "" if it cannot be identified."""
    parts = []
    for i in range(ours.shape[dim]):
        one = ours.select(dim, i)
        same = [j for j in range(theirs.shape[dim]) if _same(one, theirs.select(dim, j), near)]
        if not same:
            return ""
        if i not in same:
            parts.append(f"{what} {i} reads those of {what} {same[0]}")
    return f"another's: {', '.join(parts[:4])}" if parts else ""


def _same(found: Tensor, expected: Tensor, near: float) -> bool:
    return bool(((found - expected).abs() <= near).all())

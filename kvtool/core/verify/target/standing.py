"""The positions of wrong keys and queries.

Before the first attention a token knows its id and its position, and nothing of other tokens. So a
pass over one id, again and again, has its keys and queries at each position; and where a wrong one
is among them, that is where it stands.
"""

from __future__ import annotations

from torch import Tensor

from kvtool.core.verify.diagnosis.locate import ranges, scale
from kvtool.core.verify.target.operations import Done, Line, Operations, by_place
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.errors import pass_on_shortage

PRODUCTS = ("matmul", "bmm", "einsum", "scaled_dot_product_attention")
NEAR = 1e-9  # of the largest value: both are float64, and were computed in other orders
ROTATED = 1e-6  # of the largest value: angles may be float32 numbers, and turned by twice
MIN_VECTORS = 4  # vectors that are compared by their lengths
TRIED = 6  # tokens that are looked for
AGAIN = 2  # times as far as a token stands it may be looked for


class Standing:
    """Looks for the keys and queries of a history's first row in passes over one id alone.

    place: where the decoder multiplies queries with keys for the first time.
    """

    def __init__(self, subject: TargetSubject, history: Tensor, place: tuple[Line, int]) -> None:
        self.subject, self.history, self.place = subject, history, place

    def words(self, operand: int, found: Tensor, tokens: list[int], first: int) -> str:
        """How the values (N,B,...) of N tokens stand, if each is that of another position; ""
        else. first: tokens before the step."""
        chosen = sorted({0, len(tokens) - 1, *range(min(TRIED, len(tokens)))})
        try:
            places = [self._place(operand, found[i], tokens[i]) for i in chosen]
        except Exception as error:  # the user's code may not like what it is given here
            pass_on_shortage(error)
            return ""
        known = [place for place in places if place is not None]
        if len(known) < len(places):
            return ""
        shown = [tokens[i] for i in chosen]
        if known == [-token for token in shown]:
            return "are rotated backwards: by minus their positions"
        if known == [2 * token for token in shown] and max(shown):
            return "are rotated twice: they stand at twice their positions"
        shifts = {place - token for place, token in zip(known, shown, strict=True)}
        if shifts == {-first} and first:
            return "stand as if the step began at position 0"
        at = f"stand at position{'s' if len(known) > 1 else ''} {ranges(sorted(set(known)))}"
        if len(shifts) > 1:
            return at
        (shift,) = shifts
        return f"{at}, {abs(shift)} too {'far' if shift > 0 else 'low'}"

    def _place(self, operand: int, found: Tensor, token: int) -> int | None:
        """The position at which (B,...) stands, negative if it is rotated backwards by it; None if
        it is none of them, or stands right."""
        limit = min(self.subject.context, self.subject.largest_pass or self.subject.context)
        n = min(limit, AGAIN * self.history.shape[1] + 1)
        with Operations(keep_given=True) as passed:
            self.subject.call_full(self.history[:, token : token + 1].expand(-1, n).contiguous())
        done = by_place(passed.done).get(self.place)
        if done is None or not attended(done, n):
            return None
        table = done.given[operand]
        (axis,) = [dim for dim, size in enumerate(table.shape) if size == n]
        table = table.movedim(axis, 0)
        if table.shape[1:] != found.shape:
            return None
        gaps = (table - found).abs().flatten(1).amax(1)
        if float(gaps.min()) <= ROTATED * scale(table):
            place = int(gaps.argmin())
            return None if place == token else place
        return -token if token < n and _is_backwards(found, table[token], table[0]) else None


def _is_backwards(found: Tensor, right: Tensor, start: Tensor) -> bool:
    """Whether `found` (...,D) is what a rotation by minus a position makes of `start`, and `right`
    that by the position; pairs of channels are neighbours, or halves of a head."""
    for dim in (-1, -2):
        if right.shape[-1] % 2:
            return False
        pairs = [t.unflatten(-1, (-1, 2) if dim == -1 else (2, -1)) for t in (right, start)]
        along = (pairs[0] * pairs[1]).sum(dim, keepdim=True)
        mirrored = 2 * along / (pairs[1] ** 2).sum(dim, keepdim=True) * pairs[1] - pairs[0]
        if bool(((mirrored.flatten(-2) - found).abs() <= ROTATED * scale(right)).all()):
            return True
    return False


def turned(found: Tensor, right: Tensor) -> bool:
    """Whether values (N,...,D) are others rotated: each pair of channels is as long as before.

    Pairs are neighbours, or halves of a head. Of few tokens that may be by chance.
    """
    if found.shape[-1] % 2 or found[..., 0].numel() < MIN_VECTORS:
        return False
    for dim, pair in ((-1, (-1, 2)), (-2, (2, -1))):
        sizes = [t.unflatten(-1, pair).norm(dim=dim) for t in (found, right)]
        if float((sizes[0] - sizes[1]).abs().max()) <= ROTATED * scale(right):
            return True
    return False


def attended(done: Done, total: int) -> tuple[str, ...]:
    """What the operands of a product over the whole history are, by their sizes."""
    counts = [sum(size == total for size in t.shape) for t in done.given]
    if done.line.asked == "scaled_dot_product_attention":
        return ("queries", "keys", "values") if counts[:3] == [1, 1, 1] else ()
    made = sum(size == total for size in done.answer.shape)
    if len(counts) != 2:
        return ()
    if counts == [1, 1] and made == 2:
        return ("queries", "keys")
    return ("weights", "values") if counts == [2, 1] and made == 1 else ()
